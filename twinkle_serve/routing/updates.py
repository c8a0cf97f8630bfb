"""New weights of the model's own, one update at a time, and pauses that end with whoever asked for them. No Ray."""

from __future__ import annotations

import asyncio
import itertools
import logging
from dataclasses import dataclass
from typing import Any

from twinkle_serve.data_format.weights import PAUSE_MODES, PauseMode, WeightsVersion
from twinkle_serve.errors import EngineError, RequestError, StoreError, UnsupportedError, WeightsError
from twinkle_serve.routing.membership import EngineMembership
from twinkle_serve.routing.pause import PauseCoordinator
from twinkle_serve.weights import StoreClient

logger = logging.getLogger("ray.serve")

UPLOAD_LEASE_S = 60.0
"""An update is given up when no bucket of it has come for so long: its trainer is gone."""

MAX_LEASE_S = 3600.0


@dataclass(slots=True, eq=False)
class _Update:
    """One that has begun."""

    label: str
    heard_at: float
    upload: int | None = None
    """What its buckets are sent under, once the store has said so."""
    expiry: asyncio.TimerHandle | None = None
    """When it is given up; None while it is not the trainer that is waited for."""
    publishing: bool = False


class WeightUpdates:
    """Takes new versions of the model's own weights from trainers, and has the engines load them.

    Guarantees: nobody samples from a version before every byte of it is in the store and every engine in use has it.
    Guarantees: an update that fails, or whose trainer dies, leaves the version before current, and nothing behind.
    """

    def __init__(
        self, store: StoreClient, membership: EngineMembership, pause_coordinator: PauseCoordinator, labels: list[str]
    ) -> None:
        """
        Args:
            labels: of all versions so far, by their number.
        """
        self._store, self._engines, self._pause_coordinator = store, membership, pause_coordinator
        self._numbers = {label: number for number, label in enumerate(labels)}
        self._update: _Update | None = None

    async def begin(self, label: str) -> int:
        """Begins an update. Returns what its buckets are sent under.

        Raises:
            WeightsError: the version exists, or another update is under way.
            UnsupportedError: the model's files do not say what weights it has.
        """
        if not isinstance(label, str) or not label:
            raise WeightsError(f"version must be a non-empty string, got {label!r}.")
        now = asyncio.get_running_loop().time()
        if (other := self._update) is not None:
            raise WeightsError(
                f"an update to {other.label!r} is under way, heard of {now - other.heard_at:.1f} s ago. Wait for it; "
                f"one whose trainer is gone is given up after {UPLOAD_LEASE_S:g} s."
            )
        update = self._update = _Update(label, now)
        try:
            shapes, tied = await self._engines.call_any("weight_shapes")
            if not shapes:
                raise UnsupportedError("the model has no safetensors files, which say what weights it has.")
            update.upload = int(await self._store.base("begin", label, shapes, tied))
        except BaseException:
            self._end(update)
            raise
        self._wait_for_trainer(update)
        return update.upload

    async def append(self, upload: int, index: int, bucket: Any) -> None:
        """Takes the next bucket.

        Raises:
            WeightsError: it is damaged, or holds names or shapes that the model has not. The update is over.
            StoreError: the update was given up, or the store cannot be written. The update is over.
        """
        update = self._require(upload)
        self._stop_waiting(update)
        try:
            await self._store.base("append", upload, index, bucket)
        except BaseException:
            self._give_up(update)
            raise
        self._wait_for_trainer(update)

    async def publish(self, upload: int, mode: PauseMode, timeout_s: float) -> str:
        """Makes the version current, on all engines or on none. Returns its label.

        Once it has begun, it goes on though nobody waits for it any more.

        Raises:
            WeightsError: weights are missing, or an engine does not take them.
            EngineError: an engine failed on it.
            DeadlineError: it took longer than `timeout_s`.
                After each, the version before is current and nobody is paused.
        """
        require_mode(mode)
        update = self._require(upload)
        self._stop_waiting(update)
        update.publishing = True
        await asyncio.shield(self._engines.spawn(self._publish(update, mode, timeout_s)))
        return update.label

    async def _publish(self, update: _Update, mode: PauseMode, timeout_s: float) -> None:
        try:
            version: WeightsVersion = await self._store.base("seal", update.upload)

            async def commit() -> None:
                try:
                    await self._store.base("commit", version)
                except StoreError:  # it may have been taken all the same
                    if await self._store.base("current") != version:
                        raise
                self._numbers[version.label] = version.number

            await self._pause_coordinator.update(version, mode, commit, timeout_s)
        except BaseException:
            self._give_up(update)
            raise
        self._end(update)

    async def abandon(self, upload: int) -> None:
        """Gives an update up that is not being published. Again: nothing."""
        update = self._update
        if update is not None and update.upload == upload and not update.publishing:
            self._give_up(update)

    def _give_up(self, update: _Update) -> None:
        self._end(update)
        self._engines.spawn(self._discard(update))

    async def _discard(self, update: _Update) -> None:
        try:
            await self._store.base("discard", update.upload)
        except StoreError as error:  # the next update replaces it
            logger.warning(f"the store keeps a part of {update.label!r}: {error}")

    def _require(self, upload: int) -> _Update:
        if self._update is None or self._update.upload != upload:
            raise StoreError("the update of weights was given up: its trainer was silent, or the router was restarted.")
        return self._update

    def _wait_for_trainer(self, update: _Update) -> None:
        """The trainer has the next word, and UPLOAD_LEASE_S for it."""
        if self._update is not update:
            return
        self._stop_waiting(update)
        loop = asyncio.get_running_loop()
        update.heard_at = loop.time()
        update.expiry = loop.call_later(UPLOAD_LEASE_S, self._expire, update)

    def _stop_waiting(self, update: _Update) -> None:
        if update.expiry is not None:
            update.expiry.cancel()
            update.expiry = None

    def _expire(self, update: _Update) -> None:
        logger.warning(f"the update to {update.label!r} is given up: no bucket came for {UPLOAD_LEASE_S:g} s")
        self._give_up(update)

    def _end(self, update: _Update) -> None:
        self._stop_waiting(update)
        if self._update is update:
            self._update = None

    def staleness(self, labels: set[str]) -> int:
        """Versions that have become current since the oldest of these."""
        current = self._engines.weights_version.number
        return current - min((self._numbers.get(label, current) for label in labels), default=current)


class Pauses:
    """Pauses that callers ask for: each lasts while its caller renews it.

    Guarantees: a caller that is gone leaves nobody paused for longer than its lease.
    Does not guarantee: that samples which one pause holds stay where they are when a later one says `wait` or `abort`.
    """

    def __init__(self, membership: EngineMembership, pause_coordinator: PauseCoordinator) -> None:
        self._engines, self._pause_coordinator = membership, pause_coordinator
        self._ids = itertools.count(1)
        self._ends: dict[int, asyncio.TimerHandle] = {}

    async def pause(self, mode: PauseMode, lease_s: float) -> int:
        """Pauses every engine; returns the lease's number.

        Raises:
            RequestError: no such mode, or a lease that is none.
        """
        require_mode(mode)
        if isinstance(lease_s, bool) or not isinstance(lease_s, (int, float)) or not 0 < lease_s <= MAX_LEASE_S:
            raise RequestError(
                f"lease_s must be a number of seconds above 0, at most {MAX_LEASE_S:g}, got {lease_s!r}."
            )
        lease = next(self._ids)
        await self._pause_coordinator.hold(self._key(lease), mode)
        self._schedule(lease, lease_s)
        return lease

    async def renew(self, lease: int, lease_s: float) -> None:
        """The caller lives.

        Raises:
            EngineError: the pause is over.
        """
        self._require(lease)
        self._schedule(lease, lease_s)

    async def resume(self, lease: int) -> None:
        """Ends a pause.

        Raises:
            EngineError: it was over before: what ran meanwhile was not paused.
        """
        self._require(lease)
        self._ends.pop(lease).cancel()
        # A caller who stops waiting has ended the pause all the same.
        await asyncio.shield(self._engines.spawn(self._pause_coordinator.release(self._key(lease))))

    def _key(self, lease: int) -> tuple[str, int]:
        return ("pause", lease)

    def _require(self, lease: int) -> None:
        if lease not in self._ends:
            raise EngineError("the pause is over: it was not renewed in time, or the router was restarted.")

    def _schedule(self, lease: int, lease_s: float) -> None:
        if (end := self._ends.get(lease)) is not None:
            end.cancel()
        self._ends[lease] = asyncio.get_running_loop().call_later(lease_s, self._expire, lease)

    def _expire(self, lease: int) -> None:
        logger.warning(f"pause {lease} was not renewed: the engines go on")
        del self._ends[lease]
        self._engines.spawn(self._pause_coordinator.release(self._key(lease)))


def require_mode(mode: object) -> None:
    """Raises RequestError for what is no PauseMode."""
    if mode not in PAUSE_MODES:
        raise RequestError(f"mode must be one of {', '.join(PAUSE_MODES)}, got {mode!r}.")
