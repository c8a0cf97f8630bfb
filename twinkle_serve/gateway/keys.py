"""Keys of HTTP callers."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from twinkle_serve.errors import ConfigError, RequestError

Scope: TypeAlias = Literal["sample", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

VARIABLE = "TWINKLE_SERVE_KEYS"
MIN_KEY_LENGTH = 16
"""Shorter keys can be guessed."""

_ENTRY = re.compile(r"([A-Za-z0-9._-]{1,64}):([a-z]+):([!-~]+)")
"""Keys are of ASCII: headers have no encoding that clients agree on."""


class UnauthorizedError(RequestError):
    """The request has no key, or an unknown one."""


class ForbiddenError(RequestError):
    """The key's scope does not cover the request."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of a key."""

    name: str
    """Callers of different names take turns in the queue; "" where no keys are set."""
    scope: Scope


ANYBODY = Caller("", "admin")
"""Where no keys are set, everybody on this machine may do everything."""


class Keys:
    """The keys that the gateway accepts. Holds digests, not the keys themselves."""

    def __init__(self, callers: Mapping[str, Caller]) -> None:
        """
        Args:
            callers: by key.
        """
        self._callers = [(_digest(key), caller) for key, caller in callers.items()]

    def __bool__(self) -> bool:
        return bool(self._callers)

    @classmethod
    def read(cls, file: str | None, environment: Mapping[str, str] = os.environ) -> Keys:
        """Reads the keys from a file, or else from TWINKLE_SERVE_KEYS.

        Raises:
            ConfigError: the file cannot be read, or an entry is not `name:scope:key`.
        """
        if file is None:
            return cls(_parsed(environment.get(VARIABLE, "").split(","), VARIABLE))
        try:
            lines = Path(file).expanduser().read_text().splitlines()
        except (OSError, ValueError, RuntimeError) as error:  # not UTF-8; `~name` without such a user
            raise ConfigError(f"keys_file={file} cannot be read: {error}.") from error
        keys = cls(_parsed(lines, f"keys_file={file}"))
        if not keys:
            raise ConfigError(f"keys_file={file} has no key. Write name:scope:key, one a line, or leave it out.")
        return keys

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Returns the holder of the key in `Authorization: Bearer`, or else in `X-API-Key`. Takes the same time for
        every key.

        Args:
            headers: by lower-case name.

        Raises:
            UnauthorizedError: no key, or an unknown one.
        """
        if not self._callers:
            return ANYBODY
        bearer, _, token = headers.get("authorization", "").partition(" ")
        key = (token.strip() if bearer.lower() == "bearer" else "") or headers.get("x-api-key", "").strip()
        if not key:
            raise UnauthorizedError("no key. Send it as Authorization: Bearer KEY, or as X-API-Key.")
        given, found = _digest(key), None
        for digest, caller in self._callers:
            if hmac.compare_digest(digest, given):
                found = caller
        if found is None:
            raise UnauthorizedError("unknown key. Ask the operator of this service for one.")
        return found


def require_scope(caller: Caller, scope: Scope) -> None:
    """Raises ForbiddenError if a caller may not make requests of a scope."""
    if scope == "admin" and caller.scope != "admin":
        raise ForbiddenError(f"the key {caller.name!r} has scope sample, and this request needs admin.")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _parsed(entries: list[str], where: str) -> dict[str, Caller]:
    callers: dict[str, Caller] = {}
    for i, entry in enumerate(entries):
        entry = entry.strip()
        if not entry or entry.startswith("#"):
            continue
        match = _ENTRY.fullmatch(entry)
        if match is None or match[2] not in SCOPES:  # without the entry: it holds a key
            raise ConfigError(
                f"{where}, entry {i + 1}: must be name:scope:key, with a scope of {' or '.join(SCOPES)} and a key of "
                "ASCII without spaces."
            )
        if len(match[3]) < MIN_KEY_LENGTH:
            raise ConfigError(
                f"{where}, entry {i + 1}: the key of {match[1]!r} has {len(match[3])} characters, and needs at least "
                f"{MIN_KEY_LENGTH}."
            )
        if match[3] in callers:
            raise ConfigError(f"{where}, entry {i + 1}: the key of {match[1]!r} is there twice.")
        callers[match[3]] = Caller(match[1], "admin" if match[2] == "admin" else "sample")
    return callers
