"""What a call reports of its samples while they run."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.messages import MessageParser, Turn
from twinkle_serve.data_format.response import SampleResponse
from twinkle_serve.data_format.samples import FloatArray, PartialSample, StopReason
from twinkle_serve.data_format.token_lists import TokenLists
from twinkle_serve.data_format.weights import Spans


@dataclass(frozen=True, slots=True, kw_only=True)
class CallBegun:
    """A call that was admitted, before any of its tokens."""

    prompt_indices: tuple[int, ...]
    """Index in the call of each prompt."""
    prompts: TokenLists
    """Token ids of each prompt."""
    num_samples: tuple[int, ...]
    """Of each prompt."""
    reproducible: tuple[bool, ...]
    """Whether a sample of each prompt has the same tokens when it is sampled again: it is seeded or greedy."""
    adapter: str
    """Label of the adapter version that samples the call, "" for the base model."""
    logprobs_mode: str
    """As in SampleResponse."""
    logprobs_are_masked: bool
    """As in SampleResponse."""
    parser: MessageParser
    """As in SampleResponse."""
    turns: tuple[Turn, ...]
    """As in SampleResponse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleUpdate:
    """New tokens of one sample, T of them, and the text that became final with them.

    The updates of a sample, joined, are its tokens, logprobs, weight versions and text.
    """

    prompt_index: int
    """Index of the prompt in the call."""
    sample: int
    """Index of the sample in its prompt."""
    offset: int
    """Number of tokens in earlier updates."""
    new: PartialSample
    """The new tokens; none if only the end is new."""
    text: str
    """New text: whole characters, without what may be the beginning of a stop string."""
    text_offset: int
    """Number of characters in earlier updates."""
    stop_reason: StopReason | None = None
    """Set in the sample's last update, and only there."""

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The new token ids, shape [T]."""
        return self.new.tokens

    @property
    def logprobs(self) -> FloatArray | None:
        """As in SampleColumns. Shape [T, 1 + k + n]; None if not requested."""
        return self.new.logprobs

    @property
    def logprob_tokens(self) -> NDArray[np.int32] | None:
        """As in SampleColumns. Shape [T, 1 + k + n]; None if k + n = 0."""
        return self.new.logprob_tokens

    @property
    def weight_versions(self) -> Spans:
        """Versions of the model's own weights that sampled the tokens; starts count from the first one here."""
        return self.new.weight_versions

    @classmethod
    def concat(cls, updates: Sequence[SampleUpdate]) -> SampleUpdate:
        """Joins consecutive updates of a sample. At least one."""
        if len(updates) == 1:
            return updates[0]
        return replace(
            updates[0],
            new=PartialSample.concat([update.new for update in updates]),
            text="".join(update.text for update in updates),
            stop_reason=updates[-1].stop_reason,
        )


UpdatesItem: TypeAlias = CallBegun | list[SampleUpdate] | SampleResponse
"""An item of `RouterAPI.run_updates`."""

UpdateText: TypeAlias = Literal["decoded", "whole"]
"""The text of updates: as the sampling parameters ask for it, or with special tokens, as a MessageParser takes it."""

UPDATE_TEXTS: tuple[UpdateText, ...] = ("decoded", "whole")


MAX_PARTS = 32
"""Updates of a sample that wait for their reader are joined when there are so many."""


class WaitingUpdates:
    """Updates that wait for their reader, in memory that is bounded by that of the samples."""

    def __init__(self) -> None:
        self._updates: dict[tuple[int, int], list[SampleUpdate]] = {}
        """By prompt and sample."""

    def __len__(self) -> int:
        return len(self._updates)

    def add(self, update: SampleUpdate) -> None:
        """Adds an update, which follows those of the same sample."""
        parts = self._updates.setdefault((update.prompt_index, update.sample), [])
        parts.append(update)
        if len(parts) > MAX_PARTS:
            parts[:] = [SampleUpdate.concat(parts)]

    def first(self, prompt_index: int, sample: int) -> SampleUpdate | None:
        """Returns the first update of a sample, if any waits."""
        parts = self._updates.get((prompt_index, sample))
        return parts[0] if parts else None

    def drop(self, prompt_index: int, sample: int) -> None:
        """Drops the updates of a sample."""
        self._updates.pop((prompt_index, sample), None)

    def take(self) -> list[SampleUpdate]:
        """Removes all updates. Returns one of each sample."""
        updates, self._updates = self._updates, {}
        return [SampleUpdate.concat(parts) for parts in updates.values()]


class DifferentSampleError(Exception):
    """A sample that was sampled again has other tokens than those that were handed out."""


@dataclass(slots=True)
class HandedOut:
    """The beginning of a sample that its reader has."""

    tokens: array[int] = field(default_factory=lambda: array("i"))
    characters: int = 0
    """Number of characters of its text."""
    ended: bool = False
    """Whether the reader has the whole sample."""

    def rest(self, update: SampleUpdate) -> SampleUpdate | None:
        """Records an update. Returns the part of it that the reader does not have; None if there is none.

        Raises:
            DifferentSampleError: its tokens are not those that the reader has at the same places.
        """
        known = len(self.tokens) - update.offset
        assert known >= 0, f"tokens {len(self.tokens)} to {update.offset} of a sample are missing"
        again = update.tokens[:known]
        had = self.tokens[update.offset : update.offset + len(again)]
        longer, ends = len(update.tokens) > known, update.stop_reason is not None
        if again.tolist() != had.tolist() or (self.ended and longer) or (ends and len(again) < known):
            raise DifferentSampleError
        text = update.text[max(0, self.characters - update.text_offset) :]
        if self.ended or not (longer or text or ends):
            return None
        self.ended = ends
        new = update.new.since(min(known, len(update.tokens)))
        rest = replace(update, offset=len(self.tokens), new=new, text=text, text_offset=self.characters)
        self.tokens.frombytes(np.ascontiguousarray(new.tokens, np.int32).tobytes())
        self.characters += len(text)
        return rest
