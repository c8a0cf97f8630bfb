"""Tracks which engines of a router are usable. Free of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from twinkle_serve import timing
from twinkle_serve.data_format.groups import EngineInfo, Session
from twinkle_serve.data_format.status import EngineStatus
from twinkle_serve.data_format.weights import WeightsVersion
from twinkle_serve.engines.client import EngineClient
from twinkle_serve.errors import EngineDeadError, RequestError, StoreError, unknown_name
from twinkle_serve.routing.active_engine import ActiveEngine, EngineListener, EngineState
from twinkle_serve.routing.adapters import Adapters
from twinkle_serve.routing.telemetry import Telemetry
from twinkle_serve.routing.tracks import Track, Tracks
from twinkle_serve.tasks import BackgroundTasks, Call

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_FAILED_LOADS = 3
"""An engine's process is replaced after this many failures in a row to load the current weights."""


class EngineMembership:
    """Keeps engines in use for as long as they answer.

    Guarantees:
        An engine in use holds the current weights of its track, or is paused.
        An engine that ends, hangs or cannot load the current weights is taken out of use, and used again once it can
            be. Its process is replaced where that helps.
    """

    def __init__(
        self,
        clients: Mapping[str, EngineClient],
        adapters: Adapters,
        tracks: Tracks,
        *,
        current_weights: Callable[[str], Awaitable[WeightsVersion]],
        load_timeout_s: float,
        stall_timeout_s: float = 120.0,
        engines_return: bool = True,
        telemetry: Telemetry | None = None,
    ) -> None:
        """Binds to the running event loop.

        Args:
            clients: engines by name.
            adapters: versions that an engine may keep when it comes into use.
            tracks: of these engines, with their current weights.
            current_weights: asks the store for the current weights of a track, in case of doubt.
            load_timeout_s: deadline for an engine to load the current weights.
            stall_timeout_s: an engine that has groups and produces no token for so long is lost.
            engines_return: whether an engine that dies is replaced.
            telemetry: records engines that come into use.
        """
        self._telemetry = telemetry or Telemetry()
        self.clients = dict(clients)
        self._adapters = adapters
        self.tracks = tracks
        self._current_weights = current_weights
        self.load_timeout_s = load_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self.engines_return = engines_return
        self.listener: EngineListener
        self.active: dict[str, ActiveEngine] = {}
        """Engines in use, by name."""
        self.states: dict[str, EngineState] = dict.fromkeys(clients, "starting")
        self.info: EngineInfo | None = None
        """State of the first engine that answered; they are alike."""
        self._has_info = asyncio.Event()
        self.changed = asyncio.Condition()
        """Notified when an engine comes into use, is opened, or leaves the service."""
        self._loss: BaseException | None = None
        """Why the use of an engine ended last."""
        self.failed_loads: Counter[str] = Counter()
        """Failures in a row to load the current weights, by engine."""
        self.cordoned: set[str] = set()
        """Engines that get no new groups."""
        self.leaving: dict[str, asyncio.Task[None]] = {}
        """Engines that were taken out of the service and finish their groups."""
        self._router_id = uuid.uuid4().hex
        self._epochs = itertools.count()
        self.closed = False
        self._tasks = BackgroundTasks()
        self.followers: dict[str, asyncio.Task[None]] = {}

    def start(self, listener: EngineListener) -> None:
        """Brings engines into use for a listener."""
        self.listener = listener
        for name in self.clients:
            self.follow(name)

    def follow(self, name: str) -> None:
        """Starts probing an engine."""
        self.followers[name] = self.spawn(self._follow_engine(name))

    def close(self) -> None:
        """Stops probing, and every other background task."""
        self.closed = True
        self._tasks.cancel()

    def spawn(self, coroutine: Call[T]) -> asyncio.Task[T]:
        """Runs a coroutine in the background until the router closes."""
        return self._tasks.spawn(coroutine)

    def spawn_for(self, engine: ActiveEngine, coroutine: Call[None]) -> None:
        """Runs a coroutine for as long as an engine is in use."""
        task = self.spawn(coroutine)
        engine.tasks.add(task)
        task.add_done_callback(engine.tasks.discard)

    # -- queries ---------------------------------------------------------------------------------

    async def wait_for_info(self) -> EngineInfo:
        """Returns the limits of the engines; waits for the first one.

        Raises:
            EngineDeadError: all engines died, and none returns.
        """
        await self._has_info.wait()
        self._require_hope()
        assert self.info is not None
        return self.info

    def _require_hope(self) -> None:
        if not self.engines_return and not self.active:
            raise self.death("the engine")

    def death(self, name: str) -> EngineDeadError:
        """Returns the error for calls when the last engine is gone for good: with its own cause, if it has one."""
        if not isinstance(self._loss, EngineDeadError):
            return EngineDeadError(f"{name} died. Make a new sampler.")
        return type(self._loss)(f"{str(self._loss).rstrip('.')}. Make a new sampler.")

    async def some_engine(self, track: Track | None = None) -> None:
        """Waits until an engine is in use and not cordoned.

        Args:
            track: the engine is one of it.

        Raises:
            EngineDeadError: all engines died, and none returns.
        """
        await self._has_info.wait()
        self._require_hope()
        async with self.changed:
            await self.changed.wait_for(lambda: self.ready if track is None else self.ready_of(track))

    def choose_track(self, name: str, engine: str) -> Track:
        """Returns the track of a call.

        Args:
            name: of the track, or "".
            engine: the only one that may sample the call, or "".

        Raises:
            RequestError: unknown names, or an engine of another track.
        """
        track = self.tracks.named(name)
        if engine == "":
            return track
        self.require_name(engine)
        own = self.tracks.of(engine)
        if name not in ("", own.name):
            raise RequestError(
                f"{engine} belongs to track {own.name!r}, and the call names track {name!r}. Leave one out."
            )
        return own

    def require_name(self, name: str) -> None:
        """Raises RequestError for a name that no engine of the service has."""
        known = self.clients.keys() - self.leaving.keys()
        if not isinstance(name, str) or name not in known:
            raise RequestError(unknown_name("engine", str(name), known) + ".")

    def is_active(self, engine: ActiveEngine) -> bool:
        """Whether this use of an engine has not ended."""
        return self.active.get(engine.name) is engine

    def active_of(self, track: Track) -> list[ActiveEngine]:
        """Returns the engines of a track that are in use."""
        return [engine for name, engine in self.active.items() if self.tracks.of(name) is track]

    @property
    def size(self) -> int:
        """Number of engines of the service, in use or not."""
        return len(self.clients) - len(self.leaving)

    @property
    def ready(self) -> int:
        """Number of engines that get new groups."""
        return len(self.active.keys() - self.cordoned)

    def ready_of(self, track: Track) -> int:
        """Number of engines of a track that get new groups."""
        return sum(engine.name not in self.cordoned for engine in self.active_of(track))

    def describe_up(self, track: Track) -> str:
        """Returns how many engines of a track are up, as text; without its name if it is the only one."""
        if len(self.tracks.by_name) == 1:
            return f"{self.ready} of {self.size} engines are up"
        size = sum(self.tracks.of(name) is track for name in self.clients.keys() - self.leaving.keys())
        return f"{self.ready_of(track)} of {size} engines of track {track.name!r} are up"

    @property
    def paused(self) -> bool:
        """Whether a pause or an update of weights stops engines."""
        return any(track.holds for track in self.tracks)

    def status(self) -> dict[str, EngineStatus]:
        """Returns the state of each engine as plain values, by name."""
        engines: dict[str, EngineStatus] = {}
        for name, state in self.states.items():
            if name in self.cordoned:
                state = "draining" if name in self.active else "drained"
            track = self.tracks.of(name)
            engines[name] = status = EngineStatus(state=state, track=track.name, sequences=0)
            if failure := self._telemetry.last_failure(name):
                status["last_failure"] = failure
            if (engine := self.active.get(name)) is not None:
                held = {version.id: version.label for version in self._adapters.held}
                status["sequences"] = self.listener.sequences_of(name)
                status["weights"] = track.weights.label
                status["adapters"] = sorted(held[id] for id in engine.adapters if id in held and engine.has_loaded(id))
                status["engine"] = engine.info.kind
                status["device"] = engine.info.device
                status["cpus"] = list(engine.info.cpus)
                status["max_model_len"] = engine.info.max_model_len
                status["logprobs_mode"] = engine.info.logprobs_mode
                status["max_num_seqs"] = engine.info.max_num_seqs
                status["batch_fill"] = (engine.load.running + engine.load.waiting) / engine.info.max_num_seqs
                status["prefix_hits"] = engine.load.prefix_hits
                status["preemptions"] = engine.load.preemptions
                status["tokens_per_s"] = self._telemetry.rate(name)
                if engine.load.kv_cache is not None:
                    status["kv_cache"] = engine.load.kv_cache
        return engines

    # -- calls to engines ------------------------------------------------------------------------

    async def call_any(self, call: Callable[[EngineClient], Awaitable[T]]) -> T:
        """Makes a control call to any one engine, and to the next where one dies; waits until there is one."""
        while True:
            await self.some_engine()
            engine = next(iter(self.active.values()))
            try:
                return await engine.unless_lost(call(engine.client))
            except EngineDeadError as error:
                self.lose(engine, error)

    async def call_all(self, call: Callable[[EngineClient], Awaitable[None]]) -> None:
        """Makes a control call to every engine in use."""
        await self._has_info.wait()
        names = self.active.keys() - self.leaving.keys()  # an engine that leaves may be out of reach already
        await asyncio.gather(*(call(self.clients[name]) for name in names))

    async def prepare(self, track: Track, version: WeightsVersion, limit_s: float) -> None:
        """Has the engines of a track fetch the beginning of a version. One that fails shows it when it loads."""
        calls = [
            self.try_call(
                engine.name, "prepare a load", engine.unless_lost(engine.client.prepare_weights(version)), limit_s
            )
            for engine in self.active_of(track)
            if engine.name not in self.leaving
        ]
        await asyncio.gather(*calls)

    async def try_call(
        self, name: str, what: str, call: Awaitable[None], limit_s: float = timing.PROBE_TIMEOUT_S
    ) -> None:
        """Awaits a control call whose failure changes nothing: the engine is gone, or keeps something for longer."""
        try:
            async with asyncio.timeout(limit_s):
                await call
        except Exception as error:
            logger.info(f"{name} did not {what}: {type(error).__name__}: {error}")

    async def describe(self, name: str) -> EngineInfo:
        """Asks an engine for its state. Raises EngineDeadError where it does not answer in time."""
        try:
            async with asyncio.timeout(timing.PROBE_TIMEOUT_S):
                return await self.clients[name].describe(self._router_id)
        except TimeoutError:
            raise EngineDeadError(f"{name} did not answer for {timing.PROBE_TIMEOUT_S:g} s.") from None

    # -- into use, and out of it -----------------------------------------------------------------

    async def _follow_engine(self, name: str) -> None:
        """Probes an engine for as long as it belongs to the service; notices restarts, stalls and idle deaths."""
        track = self.tracks.of(name)
        while True:
            weights_version, changing = track.weights, track.changing.locked()
            try:
                info = await self.describe(name)
            except Exception as error:  # whatever the reason, an engine that does not answer is not used
                if (engine := self.active.get(name)) is not None:
                    self.lose(engine, error)
                if self.states[name] != "starting":
                    self.states[name] = "dead"
            else:
                engine = self.active.get(name)
                if engine is not None and engine.info.incarnation != info.incarnation:
                    self.lose(engine, EngineDeadError("it was restarted"))
                elif (
                    engine is not None
                    and info.weights_version != weights_version
                    and weights_version == track.weights
                    and not (changing or track.changing.locked())
                ):
                    self.lose(engine, EngineDeadError("it has other weights than the current ones"))
                if name not in self.active:
                    await self._catch_up(name, track, info)
                elif engine is not None:
                    engine.load = info.load
                    await self._require_progress(engine, info)
            await asyncio.sleep(timing.PROBE_PERIOD_S)

    async def _require_progress(self, engine: ActiveEngine, info: EngineInfo) -> None:
        """Gives up an engine that answers and has groups but produces no tokens; its process is replaced."""
        now = asyncio.get_running_loop().time()
        stopped = self.tracks.of(engine.name).holds and self.states[engine.name] != "draining"
        if info.progress != engine.progress or stopped or not info.running:
            engine.progress, engine.progressed_at = info.progress, now
        elif now - engine.progressed_at > self._stall_timeout_s:
            reason = f"it had {info.running} groups and sampled nothing for "
            reason += f"stall_timeout_s={self._stall_timeout_s:g}"
            self.lose(engine, EngineDeadError(reason))
            await self.retire(engine.name, info.incarnation, reason)

    async def retire(self, name: str, incarnation: str, reason: str) -> None:
        """Has an engine's process replaced."""
        await self.try_call(name, "retire", self.clients[name].retire(incarnation, reason))

    async def _catch_up(self, name: str, track: Track, info: EngineInfo) -> None:
        """Brings an engine into use: without adapters of an earlier router, with the current weights, and paused if its
        track is. Replaces the process of an engine that fails several times in a row."""
        if name in self.cordoned:
            return
        self.states[name] = "catching up"
        client, weights_version = self.clients[name], track.weights
        try:
            async with asyncio.timeout(self.load_timeout_s):
                await client.keep_adapters([version.id for version in self._adapters.held])
                await self._load_current(client, track, info)
            # Waiting for `changing` does not count: others hold it, with deadlines of their own.
            async with track.changing, asyncio.timeout(self.load_timeout_s):
                # Meanwhile the weights may have changed again, and the process may have been replaced.
                info = await self.describe(name)
                await self._load_current(client, track, info)
                await (client.pause("keep") if track.holds else client.resume())
                await self._begin_use(name, client, info)
        except Exception as error:
            logger.warning(f"{name} did not get ready with {weights_version.label!r}: {type(error).__name__}: {error}")
            if isinstance(error, StoreError):
                await self._refresh_weights(track)
            if track.weights != weights_version:
                return
            self.failed_loads[name] += 1
            if self.failed_loads[name] >= MAX_FAILED_LOADS or isinstance(error, TimeoutError):
                self.failed_loads[name] = 0
                await self.retire(name, info.incarnation, f"it does not load {weights_version.label!r}: {error}")
        else:
            self.failed_loads[name] = 0

    async def _load_current(self, client: EngineClient, track: Track, info: EngineInfo) -> None:
        """Makes an engine that is not in use load the current weights of its track, if it has others."""
        if info.weights_version != track.weights:
            await client.pause("keep")
            await client.load_weights(track.weights)

    async def _refresh_weights(self, track: Track) -> None:
        """Asks the store: it may have taken a commit whose answer was lost."""
        async with track.changing:
            with contextlib.suppress(StoreError):
                track.weights = await self._current_weights(track.name)

    async def _begin_use(self, name: str, client: EngineClient, info: EngineInfo) -> None:
        if name in self.cordoned:  # since it began to catch up
            return
        session = Session(incarnation=info.incarnation, router=self._router_id, epoch=next(self._epochs))
        now = asyncio.get_running_loop().time()
        self.active[name] = engine = ActiveEngine(name, client, info, session, progressed_at=now)
        self.states[name] = "ready"
        self.info = self.info or info
        self._has_info.set()
        weights = self.tracks.of(name).weights.label
        self._telemetry.event("engine ready", f"with weights {weights}", name)
        logger.info(f"{name} is ready with weights {weights!r}")
        self.listener.engine_begins(engine)
        await self.notify()

    async def notify(self) -> None:
        """Wakes everything that waits for engines to change."""
        async with self.changed:
            self.changed.notify_all()

    def lose(self, engine: ActiveEngine, error: BaseException) -> None:
        """Ends the use of an engine by a failure; its groups go elsewhere. It is used again once it answers."""
        self._end_use(engine, "dead", error)

    def release(self, engine: ActiveEngine) -> None:
        """Ends the use of a living engine. Its groups go elsewhere and do not count as lost with an engine."""
        self._end_use(engine, "catching up", None)  # as it will have to, if it is used again

    def _end_use(self, engine: ActiveEngine, state: EngineState, error: BaseException | None) -> None:
        if not self.is_active(engine):
            return
        del self.active[engine.name]
        self.states[engine.name] = state
        self._loss = error
        engine.lost.set()
        for task in engine.tasks - {asyncio.current_task()}:  # a slow engine aborts the groups then
            task.cancel()
        self.listener.engine_ends(engine, error)

    def mark_idle(self) -> None:
        """Marks the cordoned engines that have finished their groups."""
        for name in self.cordoned & self.active.keys():
            if not self.listener.sequences_of(name):
                self.active[name].idle.set()
