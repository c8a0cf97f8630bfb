"""Adapter names, versions and their uses at a router. No Ray, no awaiting."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from twinkle_serve.adapters import CONFIG, WEIGHTS, read_adapter
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.errors import AdapterError, unknown_name

FINE_STEP_NS = 50_000_000
COARSE_STEP_NS = 2_000_000_000
"""Largest steps of times on file systems that count fractions of a second, and on those that do not."""

READ_ATTEMPTS = 5


class Adapters:
    """The router's registry of adapter versions; their files are in the store.

    Guarantees:
        - A version is held until the last request that was admitted with it has ended.
        - The `max_versions` newest versions of each name are held.
    """

    def __init__(self, published: Mapping[str, Sequence[AdapterVersion]], max_versions: int = 1) -> None:
        """
        Args:
            published: versions by name, the newest last.
            max_versions: versions of a name that requests can choose from.
        """
        self._max_versions = max_versions
        self._versions = {name: list(versions) for name, versions in published.items()}
        """Versions of each name that requests can choose from, the newest last."""
        self._held = {version.label: version for versions in published.values() for version in versions}
        """All versions by label, including old ones that requests still use."""
        self._uses: Counter[str] = Counter()

    def publish(self, version: AdapterVersion) -> list[AdapterVersion]:
        """Makes a version the newest of its name. Returns versions to drop."""
        self._held[version.label] = version
        versions = self._versions.setdefault(version.name, [])
        versions.append(version)
        self._versions[version.name] = versions[-self._max_versions :]
        return self._drop_unused(versions[: -self._max_versions])

    def remove(self, name: str) -> list[AdapterVersion]:
        """Removes a name; running requests keep their version. Returns versions to drop.

        Raises:
            AdapterError: unknown adapter.
        """
        self.require(name)
        return self._drop_unused(self._versions.pop(name))

    def resolve(self, name: str) -> AdapterVersion:
        """Returns the newest version of a name, or the version of a label, `name@version`.

        Raises:
            AdapterError: unknown adapter.
        """
        # Names first: a path may look like the label of another adapter.
        if name not in self._versions and name in self._held:
            return self._held[name]
        self.require(name)
        return self._versions[name][-1]

    def require(self, name: str) -> None:
        """Raises AdapterError if the name is unknown."""
        if not isinstance(name, str):
            raise AdapterError(f"adapter_name must be a string, got {name!r}.")
        if name not in self._versions:
            known = unknown_name("adapter", name, self._versions)
            raise AdapterError(f"{known}. Add it with add_adapter_to_model, or leave it out for the base model.")

    def acquire(self, version: AdapterVersion) -> None:
        """Counts a request that uses the version."""
        self._uses[version.label] += 1

    def release(self, version: AdapterVersion) -> list[AdapterVersion]:
        """Ends the use of a version by a request. Returns versions to drop."""
        self._uses[version.label] -= 1
        return self._drop_unused([version])

    def staleness(self, version: AdapterVersion) -> int:
        """Number of versions of its name published since."""
        newest = self._versions.get(version.name)
        return newest[-1].version - version.version if newest else 0

    def _drop_unused(self, versions: Iterable[AdapterVersion]) -> list[AdapterVersion]:
        """Removes and returns versions that no request uses or can choose."""
        dropped = []
        for version in versions:
            unused = not self._uses[version.label] and version not in self._versions.get(version.name, ())
            if unused and self._held.pop(version.label, None) is not None:
                del self._uses[version.label]
                dropped.append(version)
        return dropped

    @property
    def newest(self) -> dict[str, AdapterVersion]:
        """Newest version of each name."""
        return {name: versions[-1] for name, versions in self._versions.items()}

    @property
    def labels(self) -> dict[str, list[str]]:
        """Labels of the versions of each name that requests can choose from, the newest last."""
        return {name: [version.label for version in versions] for name, versions in self._versions.items()}

    @property
    def held(self) -> Iterable[AdapterVersion]:
        """All versions, including removed ones still in use."""
        return self._held.values()


@dataclass(frozen=True, slots=True)
class Directory:
    """The adapter files of a directory at some moment."""

    states: tuple[tuple[str | int, ...], ...]
    """Directory without links, device, inode, size, and times of modification and change; empty if one is missing."""
    checksum: str = ""
    """Of their content, once it was read."""
    settled: bool = False
    """Whether a file that changes after this moment has other times: file systems count them in steps."""

    @classmethod
    def at(cls, path: str) -> Directory:
        """Returns the files in a directory, without their content."""
        now_ns, settled = time.time_ns(), True
        states: list[tuple[str | int, ...]] = []
        try:
            directory = Path(path).resolve()
            for name in (CONFIG, WEIGHTS):
                stat = (directory / name).stat()
                times = stat.st_mtime_ns, stat.st_ctime_ns
                states.append((str(directory), stat.st_dev, stat.st_ino, stat.st_size, *times))
                step_ns = FINE_STEP_NS if stat.st_ctime_ns % 10**9 else COARSE_STEP_NS
                settled = settled and now_ns - stat.st_ctime_ns > step_ns
        except (OSError, ValueError, RuntimeError):  # also a name that no file can have, and a loop of links
            return cls(())
        return cls(tuple(states), settled=settled)

    def holds(self, now: Directory) -> bool:
        """Whether the files are the same now, so that their content need not be read again."""
        return self.settled and bool(now.states) and now.states == self.states


def absolute(path: str) -> str:
    """Returns the name of an adapter that is known by its path."""
    return str(Path(path).expanduser().absolute())


def read_directory(path: str) -> tuple[AdapterFiles, Directory]:
    """Reads an adapter from a directory, in one state.

    Raises:
        AdapterError: no adapter there, or files that change all the time.
    """
    for _ in range(READ_ATTEMPTS):
        before = Directory.at(path)
        files = read_adapter(path)
        if Directory.at(path).states == before.states:
            return files, replace(before, checksum=files.checksum())
    raise AdapterError(f"adapter {path!r}: its files change while they are read. Write them elsewhere, then rename.")
