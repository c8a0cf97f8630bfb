"""The updates of a call that its caller has, while the call may be sent to another router."""

from __future__ import annotations

from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.sample_updates import (
    CallBegun,
    DifferentSampleError,
    HandedOut,
    SampleUpdate,
    UpdatesItem,
)
from twinkle_serve.errors import ServiceError


class ReceivedUpdates:
    """Items of one call with updates, over all its attempts.

    Guarantees:
        The items that `new` returns are those of one call: nothing is repeated, nothing is left out.
    """

    def __init__(self) -> None:
        self._begun: CallBegun | None = None
        self._reproducible: dict[int, bool] = {}
        """By prompt."""
        self._samples: dict[int, dict[int, HandedOut]] = {}
        """The beginnings of samples, by prompt and sample, of prompts that are not complete."""

    @property
    def may_repeat(self) -> bool:
        """Whether another attempt gives the same samples as those whose updates have arrived."""
        return all(self._reproducible[prompt] for prompt in self._samples)

    def new(self, item: UpdatesItem) -> UpdatesItem | None:
        """Returns what the caller does not have of an item; None if there is nothing.

        Raises:
            ServiceError: the item does not continue what has arrived.
        """
        if isinstance(item, CallBegun):
            return self._begin(item)
        if isinstance(item, SampleResponse):
            for prompt in item.prompt_indices:
                self._samples.pop(prompt, None)
            return item
        return [rest for update in item if (rest := self._rest(update)) is not None] or None

    def _begin(self, begun: CallBegun) -> CallBegun | None:
        if self._begun is None:
            self._begun = begun
            self._reproducible = dict(zip(begun.prompt_indices, begun.reproducible, strict=True))
            return begun
        if begun.adapter != self._begun.adapter:
            raise ServiceError(
                f"the router was replaced in the middle of the call, and the call's adapter is {begun.adapter!r} by "
                f"now, after updates of {self._begun.adapter!r}. Send the call again."
            )
        return None

    def _rest(self, update: SampleUpdate) -> SampleUpdate | None:
        received = self._samples.setdefault(update.prompt_index, {}).setdefault(update.sample, HandedOut())
        try:
            return received.rest(update)
        except DifferentSampleError:
            raise ServiceError(
                f"the router was replaced in the middle of the call, and sample {update.sample} of "
                f"inputs[{update.prompt_index}] has other tokens when it is sampled again, after "
                f"{len(received.tokens)} of them had arrived. Send the call again."
            ) from None
