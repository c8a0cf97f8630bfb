"""Updates of running samples, put together again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.sample_updates import CallBegun, SampleUpdate, UpdatesItem


@dataclass
class Joined:
    """All items of a call, each at its place."""

    begun: CallBegun | None = None
    samples: dict[tuple[int, int], list[SampleUpdate]] = field(default_factory=dict)
    """By prompt and sample."""
    responses: list[SampleResponse] = field(default_factory=list)

    @classmethod
    def of(cls, items: Iterable[UpdatesItem]) -> Joined:
        joined = cls()
        for item in items:
            joined.add(item)
        return joined

    def add(self, item: UpdatesItem) -> None:
        """Adds an item, and checks that it continues what came before."""
        if isinstance(item, CallBegun):
            assert self.begun is None and not self.samples and not self.responses, "it is the first item"
            self.begun = item
        elif isinstance(item, SampleResponse):
            assert self.begun is not None
            self.responses.append(item)
        else:
            assert item and len({(update.prompt_index, update.sample) for update in item}) == len(item)
            for update in item:
                self._add(update)

    def _add(self, update: SampleUpdate) -> None:
        before = self.samples.setdefault((update.prompt_index, update.sample), [])
        assert update.offset == sum(len(each.tokens) for each in before)
        assert update.text_offset == sum(len(each.text) for each in before)
        assert all(each.stop_reason is None for each in before), "nothing comes after the end"
        before.append(update)

    def check(self, *, whole: bool = False) -> None:
        """Checks that the updates are the samples.

        Args:
            whole: whether the text has special tokens.
        """
        assert self.begun is not None
        checked = set()
        for part in self.responses:
            for response in part:
                columns, index = response.columns, response.prompt_index
                at = self.begun.prompt_indices.index(index)
                assert self.begun.prompts[at] == response.prompt_token_ids
                assert self.begun.num_samples[at] == len(columns)
                for row, start in enumerate(columns.starts.tolist()):
                    sequence, key = response.sequences[row], (index, int(columns.sample[row]))
                    tokens = slice(start, start + int(columns.lengths[row]))
                    joined = SampleUpdate.concat(self.samples[key])
                    assert joined.tokens.tolist() == columns.tokens[tokens].tolist()
                    assert joined.stop_reason == sequence.stop_reason
                    texts = columns.whole_text if whole and columns.whole_text is not None else columns.decoded
                    assert joined.text == texts[row]
                    for name in ("logprobs", "logprob_tokens"):
                        ours, theirs = getattr(joined, name), getattr(columns, name)
                        assert (ours is None) == (theirs is None)
                        assert ours is None or (ours == theirs[tokens]).all()
                    assert joined.weight_versions == columns.weight_versions[row]
                    checked.add(key)
        assert checked == self.samples.keys(), "every sample with updates is in a response"
