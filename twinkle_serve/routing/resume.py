"""Samples that continue on another engine from the tokens they had. Free of Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from twinkle_serve.data_format.groups import Attempt, EngineInfo, Group
from twinkle_serve.data_format.samples import PartialSample, SampleColumns
from twinkle_serve.engines.group_runner import PartialUpdate
from twinkle_serve.engines.protocol import max_new_tokens
from twinkle_serve.routing.groups import RoutedGroup


def can_resume(group: Group) -> bool:
    """Whether samples of a group can continue on another engine without changing their distribution.

    Not with a seed: a seeded generator cannot be resumed mid-stream. Not with parameters that depend on the sample's
    own tokens, of which those before the break would count as the prompt's: stop strings and bad words, which may span
    it, minimum length, presence and frequency penalties, structured outputs and the budget for thinking. Not with a
    sampling mask, which is not reported while a sample runs. Not with prompt logprobs or greedy samples: such a group
    is sampled as one.
    """
    params = group.params
    return group.seed is None and not (
        params.stop_strings
        or params.bad_words
        or params.min_tokens
        or params.presence_penalty
        or params.frequency_penalty
        or params.structured_outputs is not None
        or params.thinking_token_budget is not None
        or params.return_sampling_mask
        or params.greedy
        or params.prompt_logprobs is not None
    )


def rejoin(groups: Iterable[RoutedGroup]) -> list[RoutedGroup]:
    """Joins groups of consecutive samples of a prompt, to be sampled from their start.

    Suspects run one at a time on an engine, so there should be one per prompt, not one per sample.
    """
    joined: list[RoutedGroup] = []
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


MAX_PARTS = 32
"""Parts of a sample are joined when there are so many."""


@dataclass(slots=True)
class _Partial:
    attempt: Attempt
    resumable: bool
    """Whether its tokens are kept."""
    parts: list[PartialSample] = field(default_factory=list)
    length: int = 0
    """Number of its tokens."""

    def add(self, part: PartialSample) -> None:
        self.length += len(part)
        if self.resumable:
            self.parts.append(part)
            if len(self.parts) > MAX_PARTS:
                self.parts = [PartialSample.concat(self.parts)]


class PartialSamples:
    """The tokens that have arrived of running samples.

    Guarantees:
        - A partial sample is the beginning of one sample by one attempt; updates from an earlier attempt, or after a
          gap, are ignored.
    """

    def __init__(self) -> None:
        self._partials: dict[int, dict[int, _Partial]] = {}
        """By group id and sample index."""

    def __len__(self) -> int:
        return sum(map(len, self._partials.values()))

    def start(self, group: Group) -> None:
        """Starts to follow a group that is sent to an engine."""
        if not group.is_followed:
            return
        samples = self._partials.setdefault(group.id, {})
        for sample in group.samples:
            samples[sample] = partial = _Partial(group.attempt, group.resume)
            if group.partial is not None:
                partial.add(group.partial)

    def extend(self, updates: Iterable[PartialUpdate]) -> list[PartialUpdate]:
        """Adds new tokens of samples. Returns the updates that were not ignored."""
        added = []
        for update in updates:
            # Those of equal samples are of one.
            partial = self._partials.get(update.attempt[0], {}).get(update.sample)
            if partial is not None and partial.attempt == update.attempt and partial.length == update.offset:
                partial.add(update.partial)
                added.append(update)
        return added

    def finish(self, columns: SampleColumns) -> None:
        """Drops samples that have finished."""
        if not self._partials:
            return
        for group_id, sample in zip(columns.group.tolist(), columns.sample.tolist(), strict=True):
            if (samples := self._partials.get(group_id)) is not None:
                samples.pop(sample, None)
                if not samples:
                    del self._partials[group_id]

    def drop(self, group_ids: Sequence[int]) -> None:
        """Drops all samples of groups."""
        for group_id in group_ids:
            self._partials.pop(group_id, None)

    def resume(self, group: RoutedGroup, info: EngineInfo) -> list[RoutedGroup]:
        """Splits a group that an engine did not finish into groups to sample next: each partial sample by itself, other
        consecutive samples together."""
        if not group.resume:
            return [group]
        max_tokens, parts = max_new_tokens(info, group), list[RoutedGroup]()
        for sample in group.samples:
            partial = self._partial_of(group, sample, max_tokens)
            if partial is None and parts and parts[-1].partial is None:
                parts[-1] = replace(parts[-1], count=parts[-1].count + 1)
            else:
                parts.append(replace(group.part(sample, 1), partial=partial))
        return parts

    def _partial_of(self, group: Group, sample: int, max_tokens: int) -> PartialSample | None:
        """Returns a sample that has tokens and is not complete; None otherwise."""
        arrived = self._partials.get(group.id, {}).get(sample)
        if arrived is None or not 0 < arrived.length < max_tokens:
            return None
        partial = PartialSample.concat(arrived.parts)
        return None if int(partial.tokens[-1]) in group.params.stop_token_ids else partial
