"""Groups as the router keeps them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from twinkle_serve.data_format.groups import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedGroup(Group):
    """A group with the router's bookkeeping, which engines are not sent."""

    caller: str = ""
    """Callers take turns."""
    input: int = 0
    """Index of its input in the call."""
    lost: tuple[str, ...] = ()
    """Engines that ended while it was on them, and that it may have ended."""
    crashes: int = 0
    """Number of those that crashed, by an error or signal of their own, rather than being killed from outside."""
    ran_s: float = 0.0
    """Time that it had run on the last of them."""

    def for_engine(self) -> Group:
        """Returns the group without the bookkeeping."""
        return Group(**{name: getattr(self, name) for name in _SENT})


_SENT = tuple(field.name for field in fields(Group))
