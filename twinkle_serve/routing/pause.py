"""Pauses engines at once: all for a caller's pause, those of a track to load new weights. Free of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, TypeVar

from twinkle_serve import timing
from twinkle_serve.data_format.weights import PAUSE_MODES, PauseMode, WeightsVersion
from twinkle_serve.engines.client import EngineClient
from twinkle_serve.errors import (
    DeadlineError,
    EngineDeadError,
    EngineError,
    LeaseExpiredError,
    TwinkleServeError,
)
from twinkle_serve.lease import Lease
from twinkle_serve.routing.active_engine import ActiveEngine
from twinkle_serve.routing.membership import EngineMembership
from twinkle_serve.routing.tracks import Track
from twinkle_serve.routing.transfers import CallEach
from twinkle_serve.validation import one_of, seconds

logger = logging.getLogger(__name__)

T = TypeVar("T")

Load: TypeAlias = Callable[[WeightsVersion, Sequence[ActiveEngine], CallEach], Awaitable[dict[str, str]]]
"""Has paused engines take a version. Returns the checksums of those that have it, by engine."""


async def load_from_store(
    version: WeightsVersion, engines: Sequence[ActiveEngine], broadcast: CallEach
) -> dict[str, str]:
    """Has each engine load a version from the store."""
    return await broadcast("load_weights", lambda client: client.load_weights(version))


@dataclass(frozen=True, slots=True)
class WeightChange:
    """A version that the engines of a track are to have."""

    version: WeightsVersion
    mode: PauseMode
    """Fate of running samples."""
    commit: Callable[[], Awaitable[None]]
    """Records the version as current; called once the engines have it."""
    load: Load = load_from_store
    """Brings the version into the engines."""


class PauseCoordinator:
    """Pauses the engines in use, and changes their weights.

    Guarantees:
        Engines resume when no pause is in force any more.
        Either all engines of a track that are in use load a weights version, or none keeps it. Those of other tracks
            are not touched.
    """

    def __init__(self, engines: EngineMembership) -> None:
        self._engines = engines

    async def hold(self, key: object, mode: PauseMode) -> None:
        """Pauses every engine until `release` of the same key. A failed call leaves them unpaused.

        Raises:
            EngineDeadError: all engines died, and none returns.
        """
        async with self._all_changing():
            for track in self._engines.tracks:
                track.holds.add(key)
            try:
                await self._pause(mode, self._engines.active.values())
            except BaseException:
                await self._release_all(key)
                raise

    async def release(self, key: object) -> None:
        """Ends a pause; the engines resume when no other pause is in force. Idempotent."""
        async with self._all_changing():
            await self._release_all(key)

    @contextlib.asynccontextmanager
    async def _all_changing(self) -> AsyncGenerator[None, None]:
        async with contextlib.AsyncExitStack() as stack:
            for track in self._engines.tracks:
                await stack.enter_async_context(track.changing)
            yield

    async def update(self, track: Track, change: WeightChange, timeout_s: float) -> dict[str, float]:
        """Loads a weights version on every engine of a track while their sampling is paused.

        Guarantees:
            If it raises, the engines have the previous version, and this call leaves none of them paused.
            Engines that die on the way do not fail it, as long as one is left; they return with the current version.

        Returns:
            Duration of its phases: wait, pause, load, commit. Seconds.

        Raises:
            WeightsError: an engine refuses the weights.
            EngineError: an engine failed, or engines ended with different weights.
            EngineDeadError: all engines of the track died.
            DeadlineError: it took longer than `timeout_s`, including the wait for another pause or update.
        """
        clock = asyncio.get_running_loop().time
        began = clock()
        deadline = began + timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                await self._engines.some_engine(track)
                await track.changing.acquire()
        except TimeoutError:
            raise DeadlineError(
                f"no engine could be paused within {timeout_s:g} s for {change.version.label!r}: "
                f"{self._engines.describe_up(track)}, or another pause begins or ends. {track.weights.label!r} is "
                "current."
            ) from None
        try:
            times = await self._update(track, change, timeout_s, deadline)
        finally:
            track.changing.release()
        names = ("wait", "pause", "load", "commit")
        return {name: end - start for name, start, end in zip(names, (began, *times), times, strict=False)}

    async def change(self, what: str, call: Callable[[EngineClient], Awaitable[None]]) -> None:
        """Makes a control call to every engine in use, for `sleep` and `wake_up`, while no weights or pauses change.

        An engine that wakes up holds no version until it has loaded one, and must not be taken for a broken one.

        Args:
            what: name of the call, for errors.

        Raises:
            TwinkleServeError: an engine refused; the message has its name.
            DeadlineError: it took longer than a load of weights may.
        """
        limit_s = self._engines.load_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._engines.wait_for_info()
                async with self._all_changing():
                    await self._broadcast(what, call, self._engines.active.values())
        except TimeoutError:
            raise DeadlineError(f"the engines did not {what} within startup_timeout_s={limit_s:g}.") from None

    async def _release_all(self, key: object) -> None:
        await asyncio.gather(*(self._release(track, key) for track in self._engines.tracks))

    async def _release(self, track: Track, key: object) -> None:
        track.holds.discard(key)
        # Under another pause engines may have run meanwhile: draining for it, or after an expired lease.
        if track.holds:
            await self._broadcast_or_evict(track, timing.PROBE_TIMEOUT_S, lambda client: client.pause("keep"))
        else:
            await self._broadcast_or_evict(track, timing.PROBE_TIMEOUT_S, lambda client: client.resume())
        for engine in self._engines.active_of(track):
            self._engines.states[engine.name] = "ready"

    async def _pause(self, mode: PauseMode, engines: Iterable[ActiveEngine]) -> None:
        engines = list(engines)
        if mode == "wait":
            self._engines.states |= {engine.name: "draining" for engine in engines}
        await self._broadcast("pause", lambda client: client.pause(mode), engines)

    async def _update(self, track: Track, change: WeightChange, timeout_s: float, deadline: float) -> list[float]:
        """Returns when it had the engines, when they were paused, when they had the weights, and when it was over."""
        engines, version, key, loading = self._engines, change.version, object(), False
        clock = asyncio.get_running_loop().time
        times = [clock()]
        track.holds.add(key)
        try:
            async with asyncio.timeout_at(deadline):
                await self._pause(change.mode, engines.active_of(track))
                times.append(clock())
                loading = True
                checksums = await change.load(version, engines.active_of(track), partial(self._broadcast_to, track))
                times.append(clock())
            if not checksums:
                raise EngineDeadError(f"every engine died while it loaded {version.label!r}.")
            if len(set(checksums.values())) > 1:
                each = ", ".join(f"{name} {checksum}" for name, checksum in checksums.items())
                raise EngineError(f"engines have different weights after they loaded {version.label!r}: {each}.")
            await change.commit()
            track.weights = version
            times.append(clock())
        except BaseException as error:
            current = track.weights
            if loading:
                # An engine that is not replaced has as long as one that starts: without it, the sampler is at its end.
                back_s = timeout_s if engines.engines_return else max(timeout_s, engines.load_timeout_s)
                await self._broadcast_or_evict(track, back_s, lambda client: client.load_weights(current))
            where = f"{current.label!r} is current"
            if isinstance(error, TimeoutError):
                step = "loaded" if loading else "paused"
                raise DeadlineError(
                    f"the engines were not {step} within {timeout_s:g} s for {version.label!r}; {where}."
                ) from None
            if isinstance(error, TwinkleServeError):
                raise type(error)(f"{error} {where}.") from None
            raise
        finally:
            await self._release(track, key)
        return times

    async def _broadcast_or_evict(
        self, track: Track, timeout_s: float, call: Callable[[EngineClient], Awaitable[object]]
    ) -> None:
        """Makes a control call to the engines of a track. One that fails it is not used until it has caught up."""

        async def call_one(engine: ActiveEngine) -> None:
            try:
                async with asyncio.timeout(timeout_s):
                    await engine.unless_lost(call(engine.client))
            except Exception as error:
                self._engines.lose(engine, error)

        await asyncio.gather(*map(call_one, self._engines.active_of(track)))

    async def _broadcast_to(
        self, track: Track, what: str, call: Callable[[EngineClient], Awaitable[T]]
    ) -> dict[str, T]:
        """`_broadcast` to the engines of a track that are left."""
        return await self._broadcast(what, call, self._engines.active_of(track))

    async def _broadcast(
        self, what: str, call: Callable[[EngineClient], Awaitable[T]], engines: Iterable[ActiveEngine]
    ) -> dict[str, T]:
        """Makes a control call to engines in use. Returns the answers by engine once all have answered or died.

        Raises:
            TwinkleServeError: an engine refused; the message has its name.
        """
        active = list(engines)
        results = await asyncio.gather(
            *(engine.unless_lost(call(engine.client)) for engine in active), return_exceptions=True
        )
        answers: dict[str, T] = {}
        failure: BaseException | None = None
        for engine, result in zip(active, results, strict=True):
            if isinstance(result, EngineDeadError):
                self._engines.lose(engine, result)
            elif isinstance(result, TwinkleServeError):
                failure = type(result)(f"{engine.name}: {result}")
            elif isinstance(result, BaseException):
                failure = EngineError(f"{engine.name} failed at {what}: {result!r}")
            else:
                answers[engine.name] = result
        if failure is not None:
            raise failure
        return answers


class CallerPauses:
    """Pauses that callers ask for. Each lasts while its caller renews it.

    Guarantees:
        A caller that is gone leaves no engine paused for longer than its lease.
    Does not guarantee:
        That samples held by one pause stay where they are when a later one says `wait` or `abort`.
    """

    def __init__(self, engines: EngineMembership, coordinator: PauseCoordinator) -> None:
        self._engines, self._coordinator = engines, coordinator
        self._ids = itertools.count(1)
        self._leases: dict[int, Lease] = {}

    async def pause(self, mode: PauseMode, lease_s: float) -> int:
        """Pauses every engine. Returns the id of the pause.

        Raises:
            RequestError: unknown mode or invalid lease.
        """
        one_of("mode", mode, PAUSE_MODES)
        seconds("lease_s", lease_s, maximum=timing.MAX_PAUSE_LEASE_S)
        pause = next(self._ids)
        await self._coordinator.hold(("pause", pause), mode)
        self._leases[pause] = Lease(lambda: self._expire(pause))
        self._leases[pause].renew(lease_s)
        return pause

    async def renew(self, pause: int, lease_s: float) -> None:
        """Extends the lease of a pause.

        Raises:
            LeaseExpiredError: the pause has ended.
        """
        self._lease_of(pause).renew(lease_s)

    async def resume(self, pause: int) -> None:
        """Ends a pause.

        Raises:
            LeaseExpiredError: it had ended before, and sampling went on meanwhile.
        """
        self._lease_of(pause).end()
        del self._leases[pause]
        # A caller who stops waiting has ended the pause all the same.
        await asyncio.shield(self._engines.spawn(self._coordinator.release(("pause", pause))))

    def _lease_of(self, pause: int) -> Lease:
        if pause not in self._leases:
            raise LeaseExpiredError("the pause is over: it was not renewed in time, or the router was restarted.")
        return self._leases[pause]

    def _expire(self, pause: int) -> None:
        logger.warning(f"pause {pause} was not renewed: the engines resume")
        del self._leases[pause]
        self._engines.spawn(self._coordinator.release(("pause", pause)))
