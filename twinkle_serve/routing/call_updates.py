"""New tokens of a call's running samples, on their way from engines to the call's reader. Free of Ray."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from twinkle_serve.data_format.sample_updates import (
    DifferentSampleError,
    HandedOut,
    SampleUpdate,
    UpdateText,
    WaitingUpdates,
)
from twinkle_serve.data_format.samples import STOP_REASONS, PartialSample, SampleColumns
from twinkle_serve.engines.group_runner import PartialUpdate
from twinkle_serve.errors import EngineDeadError


@dataclass(frozen=True, slots=True)
class FollowedPrompt:
    """A prompt whose samples are reported while they run."""

    index: int
    """In the call."""
    reproducible: bool
    """Whether its samples have the same tokens when they are sampled again."""


class CallUpdates:
    """Updates of the samples of one call that wait for its reader.

    Guarantees:
        The updates of a sample, joined, are the sample, also if it was sampled again or continued elsewhere.
        The last one of each sample has its stop reason.
        Updates of a sample that wait are joined, so a slow reader takes no more memory than the samples.
    """

    def __init__(self, text: UpdateText, prompts: Mapping[int, FollowedPrompt]) -> None:
        """
        Args:
            prompts: by group id.
        """
        self._text = text
        self._prompts = prompts
        self._handed_out: dict[int, dict[int, HandedOut]] = defaultdict(dict)
        """By group id and sample, of samples that run."""
        self._waiting = WaitingUpdates()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, update: PartialUpdate) -> None:
        """Adds new tokens of a running sample, or of several that are equal.

        Raises:
            EngineDeadError: a sample was sampled again, and differs.
        """
        group_id = update.attempt[0]
        for sample in range(update.sample, update.sample + update.count):
            self._add(
                group_id,
                SampleUpdate(
                    prompt_index=self._prompts[group_id].index,
                    sample=sample,
                    offset=update.offset,
                    new=update.partial,
                    text=update.text,
                    text_offset=update.text_offset,
                ),
            )

    def finish(self, columns: SampleColumns) -> None:
        """Adds the rest of finished samples.

        Raises:
            EngineDeadError: as `add`.
        """
        texts = columns.whole_text if self._text == "whole" and columns.whole_text is not None else columns.decoded
        starts, groups, samples = columns.starts.tolist(), columns.group.tolist(), columns.sample.tolist()
        for row, (group_id, sample, start) in enumerate(zip(groups, samples, starts, strict=True)):
            tokens = slice(start, start + int(columns.lengths[row]))
            update = SampleUpdate(
                prompt_index=self._prompts[group_id].index,
                sample=sample,
                offset=0,
                new=PartialSample(
                    tokens=columns.tokens[tokens],
                    logprobs=None if columns.logprobs is None else columns.logprobs[tokens],
                    logprob_tokens=None if columns.logprob_tokens is None else columns.logprob_tokens[tokens],
                    weight_versions=columns.weight_versions[row],
                ),
                text=texts[row],
                text_offset=0,
                stop_reason=STOP_REASONS[int(columns.stop_reason[row])],
            )
            self._add(group_id, update)
            del self._handed_out[group_id][sample]

    def _add(self, group_id: int, update: SampleUpdate) -> None:
        handed_out = self._handed_out[group_id].setdefault(update.sample, HandedOut())
        try:
            rest = handed_out.rest(update)
        except DifferentSampleError:
            raise EngineDeadError(
                f"{_name(update.prompt_index, update.sample)} lost its engine after {len(handed_out.tokens)} of its "
                "tokens were handed out, and has other tokens when it is sampled again. Send the call again."
            ) from None
        if rest is not None:
            self._waiting.add(rest)

    def restart(self, group_id: int, samples: Iterable[int]) -> None:
        """Prepares for samples that are sampled again from their start.

        Raises:
            EngineDeadError: one of them cannot be the same again, and its reader has the beginning.
        """
        prompt = self._prompts[group_id]
        if prompt.reproducible:
            return
        for sample in samples:
            handed_out = self._handed_out[group_id].get(sample)
            if handed_out is None:
                continue
            first = self._waiting.first(prompt.index, sample)
            if first is None or first.offset:
                raise EngineDeadError(
                    f"{_name(prompt.index, sample)} lost its engine after {len(handed_out.tokens)} of its tokens were "
                    "handed out, and it has no seed to be sampled again with. Send the call again; with a seed, or "
                    "with failover: resume in the config, such samples go on."
                )
            self._waiting.drop(prompt.index, sample)
            del self._handed_out[group_id][sample]

    def drop(self, group_ids: Iterable[int]) -> None:
        """Drops the updates of groups."""
        for group_id in group_ids:
            for sample in self._handed_out.pop(group_id, ()):
                self._waiting.drop(self._prompts[group_id].index, sample)

    def take(self) -> list[SampleUpdate]:
        """Removes all updates that wait, one of each sample."""
        return self._waiting.take()


def _name(prompt_index: int, sample: int) -> str:
    return f"sample {sample} of inputs[{prompt_index}]"
