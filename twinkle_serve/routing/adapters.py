"""What each adapter's name means at a router, and who still uses a version. No Ray, no awaiting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from twinkle_serve.adapters import CONFIG, WEIGHTS
from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.errors import AdapterError, unknown_name


class Adapters:
    """The adapters of a service, as its router knows them; the store has their files.

    Guarantees: a version that a request was admitted with is held until that request is over.
    Guarantees: of each name, the `kept` newest versions are held.
    """

    def __init__(self, published: Mapping[str, Sequence[AdapterVersion]], kept: int = 1) -> None:
        """
        Args:
            published: versions by name, the newest last.
            kept: how many versions of a name can be asked for.
        """
        self._kept = kept
        self._versions = {name: list(versions) for name, versions in published.items()}
        """Those that a name means or has meant and that can be asked for, the newest last."""
        self._held = {version.label: version for versions in published.values() for version in versions}
        """All that there are, by label."""
        self._uses: Counter[str] = Counter()

    def publish(self, version: AdapterVersion) -> list[AdapterVersion]:
        """Makes it the version that its name means. Returns those that may be dropped now."""
        self._held[version.label] = version
        versions = self._versions.setdefault(version.name, [])
        versions.append(version)
        self._versions[version.name] = versions[-self._kept :]
        return self._forget(versions[: -self._kept])

    def remove(self, name: str) -> list[AdapterVersion]:
        """Takes a name away; running requests keep their version. Returns those that may be dropped now.

        Raises:
            AdapterError: no such adapter.
        """
        self.require(name)
        return self._forget(self._versions.pop(name))

    def resolve(self, name: str) -> AdapterVersion:
        """The version that a name, or `name@version`, means.

        Raises:
            AdapterError: no such adapter.
        """
        # Names first: a path may look like the label of another one.
        if name not in self._versions and name in self._held:
            return self._held[name]
        self.require(name)
        return self._versions[name][-1]

    def require(self, name: str) -> None:
        """Raises AdapterError if the name means nothing."""
        if name not in self._versions:
            known = unknown_name("adapter", name, self._versions)
            raise AdapterError(f"{known}. Add it with add_adapter_to_model, or leave it out for the base model.")

    def acquire(self, version: AdapterVersion) -> None:
        """A request uses a version from now on."""
        self._uses[version.label] += 1

    def release(self, version: AdapterVersion) -> list[AdapterVersion]:
        """A request that used it is over. Returns the versions that may be dropped now."""
        self._uses[version.label] -= 1
        return self._forget([version])

    def staleness(self, version: AdapterVersion) -> int:
        """Versions that its name has come to mean since."""
        newest = self._versions.get(version.name)
        return newest[-1].version - version.version if newest else 0

    def _forget(self, versions: Iterable[AdapterVersion]) -> list[AdapterVersion]:
        """Gives up those that nothing uses and nobody can ask for."""
        gone = []
        for version in versions:
            unused = not self._uses[version.label] and version not in self._versions.get(version.name, ())
            if unused and self._held.pop(version.label, None) is not None:
                del self._uses[version.label]
                gone.append(version)
        return gone

    @property
    def newest(self) -> dict[str, AdapterVersion]:
        """By name."""
        return {name: versions[-1] for name, versions in self._versions.items()}

    @property
    def held(self) -> Iterable[AdapterVersion]:
        """All versions, those that are in use and nobody means any more among them."""
        return self._held.values()


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
