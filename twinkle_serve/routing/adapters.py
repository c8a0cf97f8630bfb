"""Adapter names, versions and their uses at a router. No Ray, no awaiting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from twinkle_serve.adapters import CONFIG, WEIGHTS
from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.errors import AdapterError, unknown_name


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
    def held(self) -> Iterable[AdapterVersion]:
        """All versions, including removed ones still in use."""
        return self._held.values()


def fingerprint(path: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Returns the absolute path and (size, modification time) of each adapter file there.

    The second is empty if a file is missing.
    """
    directory = Path(path).expanduser().absolute()
    try:
        stats = [(directory / name).stat() for name in (CONFIG, WEIGHTS)]
    except OSError:
        return str(directory), ()
    return str(directory), tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
