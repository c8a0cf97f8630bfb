"""Tracks: groups of engines, each with current weights of its own. Free of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence, Set

from twinkle_serve.data_format.weights import CHECKPOINT_VERSION, WeightsVersion
from twinkle_serve.errors import RequestError, unknown_name


class Track:
    """Engines that sample with the same weights, and what stops them."""

    def __init__(self, name: str, weights: WeightsVersion) -> None:
        """
        Args:
            weights: the current version.
        """
        self.name = name
        self._weights = weights
        self._positions = {weights.label: 0}
        """Versions that have been current since this was made, by label, in order."""
        self.changing = asyncio.Lock()
        """Held while its weights change, a pause begins or ends, or an engine of it comes into use."""
        self.holds: set[object] = set()
        """Keys of the pauses in force."""

    @property
    def weights(self) -> WeightsVersion:
        """The current version."""
        return self._weights

    @weights.setter
    def weights(self, version: WeightsVersion) -> None:
        if version != self._weights:
            self._positions[version.label] = self._positions[self._weights.label] + 1
            self._weights = version

    def staleness(self, labels: Set[str]) -> int:
        """Returns how many versions have become current since the oldest of these; unknown ones are left out."""
        if len(labels) == 1 and self._weights.label in labels:  # of most calls
            return 0
        current = self._positions[self._weights.label]
        return current - min((self._positions.get(label, current) for label in labels), default=current)


class Tracks:
    """The tracks of a service, and the one that each engine belongs to."""

    def __init__(self, names: Sequence[str], engines: Mapping[str, str], weights: Mapping[str, WeightsVersion]) -> None:
        """
        Args:
            names: of all tracks; the first one is that of calls that name none.
            engines: the track of each engine, by name.
            weights: the current version of each track; a missing one has the model's checkpoint.
        """
        self.by_name = {name: Track(name, weights.get(name, CHECKPOINT_VERSION)) for name in names}
        self.names_of_engines = dict(engines)

    def __iter__(self) -> Iterator[Track]:
        return iter(self.by_name.values())

    def of(self, engine: str) -> Track:
        """Returns the track of an engine."""
        return self.by_name[self.names_of_engines[engine]]

    def named(self, name: str) -> Track:
        """Returns a track; for "" the first one. Raises RequestError for a name that none has."""
        if name == "":
            return next(iter(self))
        if not isinstance(name, str) or name not in self.by_name:
            raise RequestError(unknown_name("track", str(name), self.by_name) + ".")
        return self.by_name[name]

    def describe(self) -> str:
        """Returns the labels of the current weights, for people."""
        first, *others = self
        if not others:
            return first.weights.label
        return ", ".join(f"{track.name} {track.weights.label}" for track in self)
