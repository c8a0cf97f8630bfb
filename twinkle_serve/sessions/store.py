"""Keeps sessions within bounds, in memory and on disk. Free of Ray."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from twinkle_serve.config import SessionArgs
from twinkle_serve.errors import SessionError, SessionGoneError, SessionNotFoundError
from twinkle_serve.sessions.codec import pack_turn, unpack_turn
from twinkle_serve.sessions.disk import SessionDisk, record_size
from twinkle_serve.sessions.records import Found, Query, SessionInfo, SessionRecord, Turn
from twinkle_serve.sessions.tree import SessionTree

logger = logging.getLogger(__name__)

MAX_ID = 256
"""Maximum length of a session's id, characters."""
MAX_ENDED = 100_000
"""Number of ended sessions whose ids are remembered."""


@dataclass(slots=True)
class _Session:
    id: str
    created: float
    expires: float
    size: int = 0
    """Bytes on disk, or what these would be."""
    tree: SessionTree | None = None
    """None: on disk alone."""


class SessionStore:
    """The sessions of a sampler.

    Guarantees:
        - A turn that `append` has added is there for the next store on the same directory.
        - There are at most `max_sessions` sessions of `disk_bytes` together; those used least recently end for others.
        - An id does not begin again once its session has ended, as long as it is among the last MAX_ENDED of these.

    Does not guarantee:
        - Persistence beyond this process without a directory.
        - Anything if two stores use the same directory, or two threads the same store.
    """

    def __init__(
        self, args: SessionArgs, directory: Path | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        """
        Args:
            directory: a local directory. None keeps everything in this process's memory.
            clock: returns the time, seconds since 1970.

        Raises:
            ConfigError: the directory cannot be used.
        """
        self._args, self._clock = args, clock
        self._disk = None if directory is None else SessionDisk(directory)
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        """By id, the least recently used one first."""
        self._ended: OrderedDict[str, str] = OrderedDict()
        """Why sessions have ended, by id, oldest first."""
        self._size = 0
        """Bytes of all sessions on disk."""
        self._memory = 0
        """Bytes of the trees in memory."""
        if self._disk is not None:
            self._recover(self._disk)

    def __len__(self) -> int:
        return len(self._sessions)

    # -- turns -----------------------------------------------------------------------------------

    def find(self, session: str, query: Query, hold_s: float = 0.0) -> Found:
        """See `SessionsAPI.find_turn`."""
        entry = self._live(session)
        if entry is None:
            return Found()
        found = self._tree(entry).find(query)
        self._use(entry, hold_s)
        return found

    def append(self, session: str, turn: Turn) -> list[int]:
        """See `SessionsAPI.append_turn`."""
        entry = self._live(session)
        if entry is None:
            if turn.parent is not None:
                raise SessionGoneError(f"session {session!r} has ended since the turn began.")
            now = self._clock()
            entry = _Session(session, now, now + self._args.lease_s, tree=SessionTree())
        tree = self._tree(entry)
        if (nodes := tree.nodes_of(turn.id)) is not None:
            return nodes
        record = pack_turn(replace(tree.checked(turn), created=self._clock()))
        self._make_room(entry, record_size(record))
        self._write(entry, record)
        before = tree.memory_bytes
        nodes = tree.add(unpack_turn(record))
        self._memory += tree.memory_bytes - before
        self._use(entry)
        self._spill(entry)
        return nodes

    def _write(self, entry: _Session, record: bytes) -> None:
        """Writes a record before it is in the tree, and a new session before it is known."""
        before = entry.size
        if self._disk is None:
            entry.size += record_size(record)
        elif entry.id not in self._sessions:
            entry.size = self._disk.create(entry.id, entry.created, record)
        else:
            entry.size = self._disk.append(entry.id, record, entry.size)
        self._size += entry.size - before
        if entry.id not in self._sessions:
            self._sessions[entry.id] = entry

    # -- sessions --------------------------------------------------------------------------------

    def read(self, session: str) -> SessionRecord:
        """See `SessionsAPI.read_session`."""
        entry = self._live(session)
        if entry is None or not (turns := self._records(entry)):
            raise SessionNotFoundError(f"session {session!r} does not exist: its first turn makes it.")
        self._use(entry)
        return SessionRecord(info=_info(entry), turns=tuple(turns))

    def end(self, session: str) -> bool:
        """See `SessionsAPI.end_session`."""
        _check_id(session)
        self.expire()
        entry = self._sessions.get(session)
        if entry is not None:
            self._end(entry, "was deleted")
        return entry is not None

    def infos(self) -> list[SessionInfo]:
        """See `SessionsAPI.list_sessions`."""
        self.expire()
        return [_info(entry) for entry in self._sessions.values()]

    def purge(self) -> None:
        """See `SessionsAPI.purge_sessions`."""
        for session in list(self._sessions):
            self._forget(self._sessions[session])
        self._ended.clear()
        if self._disk is not None:
            self._disk.replace_ended([])

    def expire(self) -> float | None:
        """Ends sessions whose lease has expired. Returns in how many seconds the next one does; None without any."""
        now = self._clock()
        for entry in [entry for entry in self._sessions.values() if entry.expires <= now]:
            self._end(entry, f"expired after {self._args.lease_s:g} s without use (sessions.lease_s)")
        return min((entry.expires - now for entry in self._sessions.values()), default=None)

    def _live(self, session: str) -> _Session | None:
        """Returns a session; None if it does not exist yet.

        Raises:
            SessionGoneError: it has ended.
        """
        _check_id(session)
        entry = self._sessions.get(session)
        if entry is not None and entry.expires <= self._clock():
            self.expire()
        if (reason := self._ended.get(session)) is not None:
            raise SessionGoneError(f"session {session!r} {reason}. Begin another one, with another id.")
        return self._sessions.get(session)

    def _use(self, entry: _Session, hold_s: float = 0.0) -> None:
        """Renews the lease of a session, and makes it the most recently used one."""
        expires = self._clock() + max(self._args.lease_s, hold_s)
        entry.expires = max(entry.expires, expires)
        self._sessions.move_to_end(entry.id)
        if self._disk is not None:
            self._disk.touch(entry.id, entry.expires - self._args.lease_s)

    # -- bounds ----------------------------------------------------------------------------------

    def _make_room(self, entry: _Session, size: int) -> None:
        """Ends other sessions until one can have so many bytes more.

        Raises:
            SessionError: even alone, it would have too many.
        """
        limit = self._args.disk_bytes
        if entry.size + size > limit:
            raise SessionError(
                f"session {entry.id!r} would have {entry.size + size} bytes with this turn, and all sessions together "
                f"may have {limit}. Raise sessions.disk_bytes, or begin another session."
            )
        is_new = entry.id not in self._sessions
        while self._size + size > limit:
            self._end(self._least_recent(entry), f"was evicted: all sessions have {limit} bytes (sessions.disk_bytes)")
        while len(self._sessions) + is_new > self._args.max_sessions:
            limit = self._args.max_sessions
            self._end(self._least_recent(entry), f"was evicted: there are {limit} sessions (sessions.max_sessions)")

    def _spill(self, entry: _Session) -> None:
        """Drops trees from memory while there is too much, those of the least recently used sessions first."""
        limit = self._args.memory_bytes
        for other in list(self._sessions.values()):
            if self._memory <= limit or other is entry:
                return
            if self._disk is None:
                self._end(other, f"was evicted: all sessions have {limit} bytes of memory (sessions.memory_bytes)")
            elif other.tree is not None:
                self._memory -= other.tree.memory_bytes
                other.tree = None

    def _least_recent(self, entry: _Session) -> _Session:
        """Returns the least recently used session that is another one."""
        return next(other for other in self._sessions.values() if other is not entry)

    def _end(self, entry: _Session, reason: str) -> None:
        """Ends a session for good. It is in the list of ended ones before its file goes."""
        self._ended[entry.id] = reason
        if self._disk is not None:
            self._disk.add_ended(entry.id, reason)
        self._forget(entry)
        if len(self._ended) >= 2 * MAX_ENDED:
            self._shorten_ended()

    def _forget(self, entry: _Session) -> None:
        """Removes a session from memory and disk."""
        del self._sessions[entry.id]
        self._size -= entry.size
        self._memory -= 0 if entry.tree is None else entry.tree.memory_bytes
        entry.tree = None
        if self._disk is not None:
            self._disk.remove(entry.id)

    def _shorten_ended(self) -> None:
        while len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)
        if self._disk is not None:
            self._disk.replace_ended(list(self._ended.items()))

    # -- disk ------------------------------------------------------------------------------------

    def _tree(self, entry: _Session) -> SessionTree:
        """Returns the turns of a session, from disk if they are not in memory.

        Raises:
            StoreError: they cannot be read.
        """
        if entry.tree is None:
            assert self._disk is not None, "without a directory, sessions are in memory"
            entry.tree = SessionTree(map(unpack_turn, self._disk.read(entry.id)))
            self._memory += entry.tree.memory_bytes
            size = self._disk.size(entry.id)
            self._size += size - entry.size  # an incomplete record was removed
            entry.size = size
            self._spill(entry)
        return entry.tree

    def _records(self, entry: _Session) -> list[bytes]:
        """Returns the turns of a session as they are on disk."""
        if self._disk is None:
            return [pack_turn(turn) for turn in self._tree(entry).turns]
        return self._disk.read(entry.id)

    def _recover(self, disk: SessionDisk) -> None:
        self._ended.update(disk.ended())
        if len(self._ended) > MAX_ENDED:
            self._shorten_ended()
        for stored in disk.sessions():
            if stored.session in self._ended:
                disk.remove(stored.session)
                continue
            expires = stored.used + self._args.lease_s
            self._sessions[stored.session] = _Session(stored.session, stored.created, expires, stored.size)
            self._size += stored.size
        self.expire()
        if self._sessions:
            logger.info(f"{len(self._sessions)} sessions found")


def _check_id(session: object) -> None:
    if not isinstance(session, str) or not 0 < len(session) <= MAX_ID or not session.isprintable():
        raise SessionError(f"the id of a session must be 1 to {MAX_ID} printable characters, got {session!r:.300}.")


def _info(entry: _Session) -> SessionInfo:
    return SessionInfo(id=entry.id, created=entry.created, expires=entry.expires, size_bytes=entry.size)
