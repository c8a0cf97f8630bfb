"""Which adapter versions there are, which one a name means, and who still uses one. No Ray, no awaiting."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from twinkle_serve.adapters import CONFIG, WEIGHTS
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.errors import AdapterError, unknown_name


@dataclass(slots=True)
class _Held:
    version: AdapterVersion
    files: AdapterFiles


@dataclass(slots=True)
class Adapters:
    """The adapters of a service.

    Guarantees: a name means a version that is whole, the newest; a version that a request was admitted with is held
    until that request is over.
    """

    _held: dict[str, _Held] = field(default_factory=dict)
    """Versions with their files, by label."""
    _newest: dict[str, str] = field(default_factory=dict)
    """Label of the version that a name means."""
    _loads: Counter[str] = field(default_factory=Counter)
    _uses: Counter[str] = field(default_factory=Counter)
    # At random: engines may still hold versions of a router that this one replaces.
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(random.randrange(1, 2**30)))

    def new_version(self, name: str, rank: int, *, is_path: bool = False) -> AdapterVersion:
        """A version that no name means yet. An adapter without a name has its path for one.

        Raises:
            AdapterError: the name cannot be one.
        """
        if not isinstance(name, str) or not name or ("@" in name and not is_path):
            raise AdapterError(f"adapter_name must be a non-empty string without '@', got {name!r}.")
        self._loads[name] += 1
        return AdapterVersion(name=name, version=self._loads[name], id=next(self._ids), rank=rank)

    def publish(self, version: AdapterVersion, files: AdapterFiles) -> list[AdapterVersion]:
        """Makes it the version that its name means. Returns those that may be dropped now."""
        self._held[version.label] = _Held(version, files)
        before = self._newest.get(version.name)
        self._newest[version.name] = version.label
        return [] if before is None else self._forget(before)

    def remove(self, name: str) -> list[AdapterVersion]:
        """Takes a name away; running requests keep their version. Returns those that may be dropped now.

        Raises:
            AdapterError: no such adapter.
        """
        return self._forget(self._newest.pop(self._known(name)))

    def resolve(self, name: str) -> AdapterVersion:
        """The version that a name, or `name@version`, means.

        Raises:
            AdapterError: no such adapter.
        """
        # Names first: a path may look like the label of another one.
        if name not in self._newest and name in self._held:
            return self._held[name].version
        return self._held[self._newest[self._known(name)]].version

    def _known(self, name: str) -> str:
        if name not in self._newest:
            known = unknown_name("adapter", name, self._newest)
            raise AdapterError(f"{known}. Add it with add_adapter_to_model, or leave it out for the base model.")
        return name

    def files(self, version: AdapterVersion) -> AdapterFiles:
        return self._held[version.label].files

    def acquire(self, version: AdapterVersion) -> None:
        """A request uses a version from now on."""
        self._uses[version.label] += 1

    def release(self, version: AdapterVersion) -> list[AdapterVersion]:
        """A request that used it is over. Returns the versions that may be dropped now."""
        self._uses[version.label] -= 1
        return self._forget(version.label)

    def _forget(self, label: str) -> list[AdapterVersion]:
        """Gives up a version that nothing uses and no name means."""
        held = self._held.get(label)
        if held is None or self._uses[label] > 0 or self._newest.get(held.version.name) == label:
            return []
        del self._uses[label], self._held[label]
        return [held.version]

    @property
    def newest(self) -> dict[str, AdapterVersion]:
        """By name."""
        return {name: self._held[label].version for name, label in self._newest.items()}

    @property
    def held(self) -> Iterable[AdapterVersion]:
        """All versions, those that are in use and nobody means any more among them."""
        return [held.version for held in self._held.values()]


def fingerprint(path: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The whole path, and what changes when an adapter's files there are written anew: size and time of each.

    Nothing where there are none.
    """
    directory = Path(path).expanduser().absolute()
    try:
        stats = [(directory / name).stat() for name in (CONFIG, WEIGHTS)]
    except OSError:
        return str(directory), ()
    return str(directory), tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
