"""Updates of the model's own weights, one at a time. Free of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from twinkle_serve import timing
from twinkle_serve.data_format import metrics
from twinkle_serve.data_format.weights import (
    PAUSE_MODES,
    BucketArgument,
    PauseMode,
    TransferCall,
    TransferOffer,
    TransferPlan,
    WeightsVersion,
)
from twinkle_serve.errors import DeadlineError, StoreError, TwinkleServeError, UnsupportedError, WeightsError, one_line
from twinkle_serve.lease import Lease
from twinkle_serve.routing.membership import EngineMembership
from twinkle_serve.routing.pause import Load, PauseCoordinator, WeightChange, load_from_store
from twinkle_serve.routing.telemetry import Telemetry
from twinkle_serve.routing.tracks import Track
from twinkle_serve.routing.transfers import Transfer, require_transfer, targets
from twinkle_serve.validation import flag, one_of
from twinkle_serve.weights import StoreClient

logger = logging.getLogger(__name__)

NO_UPLOAD = -1
GIVEN_UP = "the update of weights was given up: its trainer was silent, or the router was restarted."


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
    transfer: Transfer | None = None
    """What its trainer sends to the engines itself."""
    durable: bool = True
    began: float = 0.0
    """By the event loop's clock."""
    size: int = 0
    """Of its weights, bytes; 0 for those that the store has."""


class WeightUpdates:
    """Takes new versions of the model's own weights from trainers, and loads them on the engines of a track.

    Guarantees:
        A version samples nothing before the store has every byte of it and every engine of its track that is in use has
            loaded it.
        An update that fails, or whose trainer dies, leaves the previous version current, and no data behind.
        A version that cannot be written to the disk is replaced by the previous one, on every engine.
    """

    def __init__(
        self,
        store: StoreClient,
        membership: EngineMembership,
        pause_coordinator: PauseCoordinator,
        kept: list[str],
        *,
        telemetry: Telemetry | None = None,
    ) -> None:
        """
        Args:
            kept: labels of the versions that the store has, the oldest first.
            telemetry: records updates.
        """
        self._telemetry = telemetry or Telemetry()
        self._store, self._engines, self._pause_coordinator = store, membership, pause_coordinator
        self.kept = kept
        """Labels of the versions that `use` takes, the oldest first."""
        self._update: _Update | None = None
        self._connected: dict[str, tuple[int, TransferPlan]] = {}
        """Of each track, the last update whose trainer the engines were connected to, and its plan."""
        self._persisting: asyncio.Task[None] | None = None
        """Writes the last version to the disk."""

    async def begin(self, label: str, track: Track, durable: bool = True, direct: bool = False) -> int:
        """Starts an update of a track. Returns the id of the upload.

        Args:
            durable: `publish` returns when the store has written the version, which it does while buckets come. False:
                when the engines have it; the store writes it then.
            direct: the engines do not load the version from the store: the trainer sends it to them too, by `transfer`.

        Raises:
            WeightsError: the version exists, or another update is under way.
            UnsupportedError: the model's files do not list its weights.
        """
        flag("durable", durable)
        update = self._start(label, track)
        update.durable = durable
        try:
            await self._last_is_written()
            model = await self._engines.call_any(lambda client: client.model_spec())
            if not model.weights:
                raise UnsupportedError("the model has no safetensors files, which list its weights.")
            update.size = sum(spec.nbytes for spec in model.weights.values())
            update.upload = await self._store.begin_weights(label, model, write_late=not durable)
            update.transfer = Transfer(update.upload) if direct else None
        except BaseException:
            self._end(update)
            raise
        self._restart_timeout(update)
        return update.upload

    async def _last_is_written(self) -> None:
        """Waits until the last version is on the disk or given up: one at a time fills memory, or makes engines go
        back."""
        if self._persisting is not None:
            await asyncio.wait([self._persisting])

    def _start(self, label: str, track: Track) -> _Update:
        """Keeps others from beginning an update. Raises WeightsError if one has begun."""
        if not isinstance(label, str) or not label:
            raise WeightsError(f"version must be a non-empty string, got {label!r}.")
        now = asyncio.get_running_loop().time()
        if (other := self._update) is not None:
            raise WeightsError(
                f"an update to {other.label!r} is under way, heard of {now - other.heard_at:.1f} s ago. Wait for it; "
                f"one whose trainer is gone is given up after {timing.UPLOAD_LEASE_S:g} s."
            )
        self._update = _Update(label, track, now, Lease(self._expire), began=now)
        return self._update

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

    async def offer(self, track: Track, kind: str) -> TransferOffer:
        """Returns the engines of a track, for a trainer that is to send weights to them itself.

        Args:
            kind: backend of vLLM's weight transfer.

        Raises:
            UnsupportedError: an engine does not take weights by it.
        """
        await self._engines.some_engine(track)
        engines = self._engines.active_of(track)
        require_transfer(engines, kind)
        present, (upload, plan) = targets(engines), self._connected.get(track.name, (0, None))
        return TransferOffer(present, upload if plan is not None and plan.targets == present else 0)

    async def publish(self, upload: int, mode: PauseMode, timeout_s: float, plan: TransferPlan | None = None) -> str:
        """Makes the version current, on all engines or on none. Returns its label.

        Runs to its end even if the call is cancelled, unless its trainer has to send to the engines itself.

        Args:
            plan: what the trainer sends to the engines itself, for an update that began as `direct`.

        Raises:
            WeightsError: weights are missing, an engine refuses them, or has others than the store.
            EngineError: an engine failed.
            StoreError: the version cannot be written.
            DeadlineError: it took longer than `timeout_s`.
                After each, the previous version is current and no engine is paused.
        """
        one_of("mode", mode, PAUSE_MODES)
        update = self._require(upload)
        if update.publishing:
            raise WeightsError(f"{update.label!r} is being published already. Wait for that.")
        if (plan is None) != (update.transfer is None):
            began, given = ("did not begin", "a plan") if update.transfer is None else ("began", "no plan")
            raise WeightsError(f"{update.label!r} {began} as direct, and {given} is given. Begin it anew.")
        update.lease.end()
        update.publishing = True
        if update.transfer is not None:
            update.transfer.plan = plan
        publishing = self._engines.spawn(self._publish(update, mode, timeout_s))
        publishing.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            await asyncio.shield(publishing)
        except asyncio.CancelledError:
            await self.abandon(upload, "the trainer's call was cancelled.")
            raise
        return update.label

    async def transfer(self, upload: int, call: TransferCall, info: Any = None) -> None:
        """Makes a trainer's call to all engines, which are paused for it: waits until they are, and have answered.

        Raises:
            StoreError: the update was given up.
            WeightsError: it did not begin as `direct`.
            TwinkleServeError: an engine refused. `publish` raises it too.
        """
        if (transfer := self._require(upload).transfer) is None:
            raise WeightsError("the engines load this update from the store: it did not begin as direct.")
        await transfer.call(call, info)

    async def _publish(self, update: _Update, mode: PauseMode, timeout_s: float) -> None:
        clock = asyncio.get_running_loop().time
        uploaded = clock()
        try:
            with self._reported(update), self._unless_given_up(update):
                version = await self._store.seal_weights(update.upload)
                phases = {"upload": uploaded - update.began, "seal": clock() - uploaded}
                load = load_from_store if update.transfer is None else update.transfer.load
                phases |= await self._switch(update.track, version, mode, timeout_s, load)
            self._note_connection(update)
            self._persisting = self._engines.spawn(self._persist(update, version, phases, timeout_s))
            self._persisting.add_done_callback(lambda task: task.cancelled() or task.exception())
            if update.durable:
                await self._persisting
        except BaseException as error:
            if update.transfer is not None:
                update.transfer.end(error)
                self._connected.pop(update.track.name, None)
            self._give_up(update)
            raise
        self._end(update)

    @contextlib.contextmanager
    def _unless_given_up(self, update: _Update) -> Iterator[None]:
        """Cancels the running task if the trainer of a transfer gives up before the engines wait for it."""
        transfer = update.transfer
        if transfer is None:
            yield
            return
        task = transfer.waiting = asyncio.current_task()
        assert task is not None
        try:
            if transfer.error is not None:
                raise asyncio.CancelledError
            yield
        except asyncio.CancelledError:
            if transfer.error is None:
                raise
            task.uncancel()
            raise WeightsError(f"{transfer.error} {update.track.weights.label!r} is current.") from None

    def _note_connection(self, update: _Update) -> None:
        """Remembers the trainer that the engines of a track are connected to."""
        transfer, name = update.transfer, update.track.name
        if transfer is None:
            return
        assert transfer.plan is not None
        if not transfer.complete:  # one that comes back has missed something
            self._connected.pop(name, None)
        elif transfer.connects:
            self._connected[name] = update.upload, transfer.plan

    async def use(self, label: str, track: Track, mode: PauseMode, timeout_s: float) -> str:
        """Makes a version current that the store has kept, on all engines of a track or on none. Returns its label.

        Runs to its end even if the call is cancelled.

        Raises:
            WeightsError: the version is not kept, or an update is under way.
                Others as `publish`.
        """
        one_of("mode", mode, PAUSE_MODES)
        update = self._start(label, track)
        update.publishing = True
        await asyncio.shield(self._engines.spawn(self._use(update, mode, timeout_s)))
        return label

    async def _use(self, update: _Update, mode: PauseMode, timeout_s: float) -> None:
        try:
            await self._last_is_written()
            with self._reported(update):
                version = await self._store.find_weights(update.label)
                phases = await self._switch(update.track, version, mode, timeout_s)
            await self._persist(update, version, phases, timeout_s)
        finally:
            self._end(update)

    async def _switch(
        self, track: Track, version: WeightsVersion, mode: PauseMode, timeout_s: float, load: Load = load_from_store
    ) -> dict[str, float]:
        """Makes a version current on all engines of a track and in the memory of the store. Returns the seconds of each
        phase."""
        clock = asyncio.get_running_loop().time
        began = clock()

        async def commit() -> None:
            try:
                await self._store.commit_weights(version, track.name)
            except StoreError:  # the commit may have happened, and its answer may be lost
                if await self._store.current_weights(track.name) != version:
                    raise

        if load is load_from_store:
            await self._engines.prepare(track, version, timeout_s)
        prepared = clock()
        return {
            "prepare": prepared - began,
            **await self._pause_coordinator.update(track, WeightChange(version, mode, commit, load), timeout_s),
        }

    async def _persist(
        self, update: _Update, version: WeightsVersion, phases: Mapping[str, float], timeout_s: float
    ) -> None:
        """Waits until a version is on the disk; if it cannot be, the engines take the previous one again.

        Raises:
            StoreError: it cannot be written.
            DeadlineError: it was not within `timeout_s`.
        """
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    self.kept = await self._store.persist_weights(version)
            except TimeoutError:
                raise DeadlineError(f"the store did not write {version.label!r} within {timeout_s:g} s") from None
        except (StoreError, DeadlineError) as error:
            current = await self._return(update.track, version, timeout_s)
            if current != version:
                text = f"{str(error).rstrip('.')}; {current.label!r} is current again."
                logger.error(text)
                with self._reported(update):
                    raise type(error)(text) from None
        self._report(update, {**phases, "persist": clock() - began})

    async def _return(self, track: Track, version: WeightsVersion, timeout_s: float) -> WeightsVersion:
        """Makes the engines load what the store has in place of a version that it could not write. Returns that."""
        await self._store.revert_weights(version)
        current = await self._store.current_weights(track.name)
        if current != version:

            async def committed() -> None:
                """The store has it."""

            try:
                await self._pause_coordinator.update(track, WeightChange(current, "keep", committed), timeout_s)
            except TwinkleServeError as error:
                logger.warning(f"engines leave the service until they have {current.label!r}: {error}")
                track.weights = current
        return current

    @contextlib.contextmanager
    def _reported(self, update: _Update) -> Iterator[None]:
        """Records an update that fails."""
        try:
            yield
        except BaseException as error:
            self._telemetry.count(metrics.UPDATES, 1, "failed")
            self._telemetry.event("weights", f"the update to {update.label} failed: {one_line(error)}")
            raise

    def _report(self, update: _Update, phases: Mapping[str, float]) -> None:
        """Records a published version, and how long each phase took, seconds."""
        for phase, seconds in phases.items():
            self._telemetry.count(metrics.UPDATE_SECONDS, seconds, phase)
        self._telemetry.count(metrics.UPDATES, 1, "published")
        self._telemetry.count(metrics.UPDATE_BYTES, update.size)
        steps = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in phases.items())
        sent = f"{update.size / 1e6:,.0f} MB, " if update.size else ""
        track = f" on track {update.track.name}" if len(self._engines.tracks.by_name) > 1 else ""
        text = f"{update.label} is current{track}: {sent}{steps}"
        self._telemetry.event("weights", text)

    async def abandon(self, upload: int, reason: str = "the trainer gave the update up.") -> None:
        """Gives an update up, unless the engines load it from the store, or have it. Idempotent.

        Args:
            reason: a sentence, for the error of a `publish` that waits for the trainer.
        """
        update = self._update
        if update is None or update.upload != upload:
            return
        if not update.publishing:
            self._give_up(update)
        elif update.transfer is not None:
            update.transfer.give_up(reason)

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
            raise StoreError(GIVEN_UP)
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
        if update.transfer is not None:
            update.transfer.end(StoreError(GIVEN_UP))
        if self._update is update:
            self._update = None
