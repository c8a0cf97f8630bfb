"""Groups as the router keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from twinkle_serve.data_format.groups import Group
from twinkle_serve.data_format.weights import MAIN_TRACK


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedGroup(Group):
    """A group with the router's bookkeeping, which engines are not sent."""

    caller: str = ""
    """Callers take turns."""
    priority: int = 0
    """Groups of a lower number leave the queue earlier."""
    input: int = 0
    """Index of its input in the call."""
    track: str = MAIN_TRACK
    """The track whose engines may sample it."""
    engine: str = ""
    """The only engine that may sample it; "": any."""
    lost: tuple[str, ...] = ()
    """Engines that ended while it was on them, and that it may have ended."""
    crashes: int = 0
    """Number of those that crashed, by an error or signal of their own, rather than being killed from outside."""
    ran_s: float = 0.0
    """Time that it had run on the last of them."""

    def for_engine(self) -> Group:
        """Returns the group without the bookkeeping."""
        return Group(
            id=self.id,
            prompt_ids=self.prompt_ids,
            params=self.params,
            first_sample=self.first_sample,
            count=self.count,
            seed=self.seed,
            adapter=self.adapter,
            sample_timeout_s=self.sample_timeout_s,
            resume=self.resume,
            partial=self.partial,
            updates=self.updates,
            attempts=self.attempts,
            urgent=self.urgent,
            alone=self.alone,
            traceparent=self.traceparent,
        )
