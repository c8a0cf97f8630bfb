"""Updates of the model's own weights, one at a time. Free of Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from twinkle_serve import timing
from twinkle_serve.data_format import metrics
from twinkle_serve.data_format.weights import PAUSE_MODES, BucketArgument, PauseMode
from twinkle_serve.errors import StoreError, UnsupportedError, WeightsError, one_line
from twinkle_serve.lease import Lease
from twinkle_serve.routing.membership import EngineMembership
from twinkle_serve.routing.pause import PauseCoordinator
from twinkle_serve.routing.telemetry import Telemetry
from twinkle_serve.routing.tracks import Track
from twinkle_serve.validation import one_of
from twinkle_serve.weights import StoreClient

logger = logging.getLogger(__name__)

NO_UPLOAD = -1


@dataclass(slots=True, eq=False)
class _Update:
    """An update under way."""

    label: str
    track: Track
    heard_at: float
    """When its trainer was last heard of, in seconds of the event loop's clock."""
    lease: Lease
    """The trainer's. Runs while the router waits for the trainer."""
    upload: int = NO_UPLOAD
    """Id of the upload, once the store has assigned it."""
    publishing: bool = False
    began: float = 0.0
    """By the event loop's clock."""
    size: int = 0
    """Of its weights, bytes."""


class WeightUpdates:
    """Takes new versions of the model's own weights from trainers, and loads them on the engines of a track.

    Guarantees:
        A version samples nothing before the store has every byte of it and every engine of its track that is in use has
            loaded it.
        An update that fails, or whose trainer dies, leaves the previous version current, and no data behind.
    """

    def __init__(
        self,
        store: StoreClient,
        membership: EngineMembership,
        pause_coordinator: PauseCoordinator,
        *,
        telemetry: Telemetry | None = None,
    ) -> None:
        """
        Args:
            telemetry: records updates.
        """
        self._telemetry = telemetry or Telemetry()
        self._store, self._engines, self._pause_coordinator = store, membership, pause_coordinator
        self._update: _Update | None = None

    async def begin(self, label: str, track: Track) -> int:
        """Starts an update of a track. Returns the id of the upload.

        Raises:
            WeightsError: the version exists, or another update is under way.
            UnsupportedError: the model's files do not list its weights.
        """
        if not isinstance(label, str) or not label:
            raise WeightsError(f"version must be a non-empty string, got {label!r}.")
        now = asyncio.get_running_loop().time()
        if (other := self._update) is not None:
            raise WeightsError(
                f"an update to {other.label!r} is under way, heard of {now - other.heard_at:.1f} s ago. Wait for it; "
                f"one whose trainer is gone is given up after {timing.UPLOAD_LEASE_S:g} s."
            )
        update = self._update = _Update(label, track, now, Lease(self._expire), began=now)
        try:
            model = await self._engines.call_any(lambda client: client.model_spec())
            if not model.weights:
                raise UnsupportedError("the model has no safetensors files, which list its weights.")
            update.size = sum(spec.nbytes for spec in model.weights.values())
            update.upload = await self._store.begin_weights(label, model)
        except BaseException:
            self._end(update)
            raise
        self._restart_timeout(update)
        return update.upload

    async def append(self, upload: int, index: int, bucket: BucketArgument) -> None:
        """Stores the next bucket.

        Raises:
            WeightsError: it is damaged, or holds names or shapes that the model lacks. The update is over.
            StoreError: the update was given up, or the store cannot be written. The update is over.
        """
        update = self._require(upload)
        update.lease.end()
        try:
            await self._store.append_weights(upload, index, bucket)
        except BaseException:
            self._give_up(update)
            raise
        self._restart_timeout(update)

    async def publish(self, upload: int, mode: PauseMode, timeout_s: float) -> str:
        """Makes the version current, on all engines or on none. Returns its label.

        Runs to its end even if the call is cancelled.

        Raises:
            WeightsError: weights are missing, or an engine refuses them.
            EngineError: an engine failed.
            DeadlineError: it took longer than `timeout_s`.
                After each, the previous version is current and no engine is paused.
        """
        one_of("mode", mode, PAUSE_MODES)
        update = self._require(upload)
        update.lease.end()
        update.publishing = True
        await asyncio.shield(self._engines.spawn(self._publish(update, mode, timeout_s)))
        return update.label

    async def _publish(self, update: _Update, mode: PauseMode, timeout_s: float) -> None:
        clock, track = asyncio.get_running_loop().time, update.track
        uploaded = clock()
        try:
            version = await self._store.seal_weights(update.upload)
            sealed = clock()

            async def commit() -> None:
                try:
                    await self._store.commit_weights(version, track.name)
                except StoreError:  # the commit may have happened, and its answer may be lost
                    if await self._store.current_weights(track.name) != version:
                        raise

            await self._engines.prepare(track, version, timeout_s)
            prepared = clock()
            phases = await self._pause_coordinator.update(track, version, mode, commit, timeout_s)
        except BaseException as error:
            self._telemetry.count(metrics.UPDATES, 1, "failed")
            self._telemetry.event("weights", f"the update to {update.label} failed: {one_line(error)}")
            self._give_up(update)
            raise
        self._end(update)
        before = {"upload": uploaded - update.began, "seal": sealed - uploaded, "prepare": prepared - sealed}
        self._report(update, {**before, **phases})

    def _report(self, update: _Update, phases: Mapping[str, float]) -> None:
        """Records a published version, and how long each phase took, seconds."""
        for phase, seconds in phases.items():
            self._telemetry.count(metrics.UPDATE_SECONDS, seconds, phase)
        self._telemetry.count(metrics.UPDATES, 1, "published")
        self._telemetry.count(metrics.UPDATE_BYTES, update.size)
        steps = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in phases.items())
        text = f"{update.label} is current: {update.size / 1e6:,.0f} MB, {steps}"
        self._telemetry.event("weights", text)

    async def abandon(self, upload: int) -> None:
        """Gives an update up, unless it is being published. Idempotent."""
        update = self._update
        if update is not None and update.upload == upload and not update.publishing:
            self._give_up(update)

    def _give_up(self, update: _Update) -> None:
        self._end(update)
        self._engines.spawn(self._discard(update))

    async def _discard(self, update: _Update) -> None:
        try:
            await self._store.discard_weights(update.upload)
        except StoreError as error:  # the next update replaces it
            logger.warning(f"the store keeps a part of {update.label!r}: {error}")

    def _require(self, upload: int) -> _Update:
        if self._update is None or self._update.upload != upload:
            raise StoreError("the update of weights was given up: its trainer was silent, or the router was restarted.")
        return self._update

    def _restart_timeout(self, update: _Update) -> None:
        """Restarts the upload timeout."""
        if self._update is update:
            update.heard_at = asyncio.get_running_loop().time()
            update.lease.renew(timing.UPLOAD_LEASE_S)

    def _expire(self) -> None:
        assert self._update is not None
        label = self._update.label
        self._telemetry.count(metrics.EXPIRED_LEASES, 1, "trainer")
        logger.warning(f"the update to {label!r} is given up: no bucket came for {timing.UPLOAD_LEASE_S:g} s")
        self._give_up(self._update)

    def _end(self, update: _Update) -> None:
        update.lease.end()
        if self._update is update:
            self._update = None
