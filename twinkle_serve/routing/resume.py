"""Samples that are broken off and go on from where they were. Free of Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from twinkle_serve.data_format.groups import Attempt, EngineInfo, Group
from twinkle_serve.data_format.samples import PartialSample, SampleColumns
from twinkle_serve.data_format.sampling_params import SamplingParams
from twinkle_serve.engines.group_runner import PartialUpdate
from twinkle_serve.engines.protocol import max_new_tokens


def can_resume(params: SamplingParams) -> bool:
    """Whether samples may go on on another engine, and be what they would have been.

    Not with a seed: a random stream cannot be entered in its middle. Not with stop strings: one may lie across the
    break. Not where the prompt is scored, or the samples are greedy: such a group is sampled as one.
    """
    return params.seed is None and not (params.stop_strings or params.greedy or params.prompt_logprobs is not None)


def rejoined(groups: Iterable[Group]) -> list[Group]:
    """Groups with neighbours among the samples of a prompt as one, to be sampled from their start.

    Suspects run one by one on an engine: as many as there are prompts, not samples.
    """
    joined: list[Group] = []
    for group in sorted(groups, key=lambda group: group.key):
        last = joined[-1] if joined else None
        if last is None or last.id != group.id or last.samples.stop != group.first_sample:
            joined.append(replace(group, partial=None))
            continue
        joined[-1] = replace(
            last,
            count=last.count + group.count,
            attempts=max(last.attempts, group.attempts),
            lost=max(last.lost, group.lost, key=len),
            crashes=max(last.crashes, group.crashes),
            ran_s=max(last.ran_s, group.ran_s),
        )
    return joined


@dataclass(slots=True)
class _Partial:
    attempt: Attempt
    parts: list[PartialSample] = field(default_factory=list)
    length: int = 0
    """Tokens of all parts."""

    def add(self, part: PartialSample) -> None:
        self.parts.append(part)
        self.length += len(part)


class PartialSamples:
    """What has arrived of samples that run.

    Guarantees: a draft is the beginning of one sample as one attempt samples it; what comes of an earlier attempt, or
        after a gap, is passed over.
    """

    def __init__(self) -> None:
        self._drafts: dict[int, dict[int, _Partial]] = {}
        """By group and index of the sample."""

    def __len__(self) -> int:
        return sum(map(len, self._drafts.values()))

    def begin(self, group: Group) -> None:
        """A group is sent to an engine."""
        if not group.resume:
            return
        samples = self._drafts.setdefault(group.id, {})
        for sample in group.samples:
            samples[sample] = draft = _Partial(group.attempt)
            if group.partial is not None:
                draft.add(group.partial)

    def gain(self, gains: Iterable[PartialUpdate]) -> None:
        """Samples have got more tokens."""
        for gain in gains:
            draft = self._drafts.get(gain.attempt[0], {}).get(gain.sample)
            if draft is not None and draft.attempt == gain.attempt and draft.length == gain.offset:
                draft.add(gain.partial)

    def end(self, columns: SampleColumns) -> None:
        """Samples are there."""
        if not self._drafts:
            return
        for group_id, sample in zip(columns.group.tolist(), columns.sample.tolist(), strict=True):
            if (samples := self._drafts.get(group_id)) is not None:
                samples.pop(sample, None)
                if not samples:
                    del self._drafts[group_id]

    def drop(self, group_ids: Sequence[int]) -> None:
        """Nobody waits for groups any more."""
        for group_id in group_ids:
            self._drafts.pop(group_id, None)

    def resumed(self, group: Group, info: EngineInfo) -> list[Group]:
        """A group that was broken off, as groups that go on: each sample that has begun by itself, the others together
        with their neighbours."""
        if not group.resume:
            return [group]
        most, parts = max_new_tokens(info, group), list[Group]()
        for sample in group.samples:
            partial = self._partial_of(group, sample, most)
            if partial is None and parts and parts[-1].partial is None:
                parts[-1] = replace(parts[-1], count=parts[-1].count + 1)
            else:
                parts.append(replace(group.part(sample, 1), partial=partial))
        return parts

    def _partial_of(self, group: Group, sample: int, most: int) -> PartialSample | None:
        """Of a sample that has tokens, and will have more."""
        draft = self._drafts.get(group.id, {}).get(sample)
        if draft is None or not 0 < draft.length < most:
            return None
        partial = PartialSample.concat(draft.parts)
        return None if int(partial.tokens[-1]) in group.params.stop_token_ids else partial
