"""The engines of a router: which there are, which are in use, and what they have loaded. Free of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import logging
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.data_format.groups import EngineInfo, GroupKey, Session
from twinkle_serve.data_format.weights import WeightsVersion
from twinkle_serve.errors import (
    DeadlineError,
    EngineDeadError,
    RequestError,
    StoreError,
    TwinkleServeError,
    UnsupportedError,
    unknown_name,
)
from twinkle_serve.routing.adapters import Adapters
from twinkle_serve.routing.engine_client import EngineClient

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

PROBE_PERIOD_S = 2.0
PROBE_TIMEOUT_S = 15.0
"""An engine that does not answer for so long is lost. Serve itself keeps a call to a dead one until it is replaced."""

LEAVE_S = 5.0
"""How long an engine that is taken out of the service may finish what it has. Below graceful_shutdown_timeout_s of
deployments/engine.py, which ends its process."""

MAX_FAILED_LOADS = 3
"""Times in a row that an engine may fail to load the current weights; then its process is replaced."""

EngineState: TypeAlias = Literal["starting", "catching up", "ready", "draining", "drained", "dead"]
"""starting: it has not answered yet. catching up: it answers, and is loading the current weights. ready: it is used.
draining: it finishes what it samples, for a pause or because it gets no more. drained: it is kept out of use. dead: it
was used, and does not answer any more."""


@dataclass(eq=False, slots=True)
class ActiveEngine:
    """An engine from when it was found ready until it is lost. It holds the current weights, or is paused."""

    info: EngineInfo
    session: Session
    progressed_at: float
    """When it was last seen to have sampled something, or to have nothing to sample."""
    progress: int = -1
    placed_at: dict[int, float] = field(default_factory=dict)
    """When it was sent the groups that it has, by their ids."""
    adapters: dict[int, asyncio.Task[Any]] = field(default_factory=dict)
    """Versions that it has loaded, or is loading, by id."""
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at its end."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is held back and has finished what it had."""
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    """That send it groups, and the one that takes what it hands back. They end with the use."""
    sent: set[GroupKey] = field(default_factory=set)
    """Groups that it has taken since its results were last asked for."""
    has_sent: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there are any."""

    def forget_failed(self, version_id: int, loading: asyncio.Task[Any]) -> None:
        """A load of a version is over; one that failed is none."""
        if (loading.cancelled() or loading.exception()) and self.adapters.get(version_id) is loading:
            del self.adapters[version_id]

    def has(self, version: AdapterVersion | None) -> bool:
        return version is None or self.has_loaded(version.id)

    def has_loaded(self, version_id: int) -> bool:
        loading = self.adapters.get(version_id)
        return loading is not None and loading.done() and not loading.cancelled() and loading.exception() is None


class EngineListener(Protocol):
    """What the engines are used for. It is told when one comes into use, and when it goes."""

    def engine_begins(self, name: str, use: ActiveEngine) -> None:
        """It may be given work."""

    def engine_closes(self, name: str) -> None:
        """It is to be given nothing more, and goes on with what it has. Again, or one that is not in use: nothing."""

    def engine_opens(self, name: str) -> None:
        """Undoes `engine_closes`."""

    def engine_ends(self, name: str, use: ActiveEngine, error: BaseException | None) -> None:
        """It is in use no more. What it had not finished is to go elsewhere.

        Args:
            error: by which it was lost; None: it lives.
        """

    def sequences_of(self, name: str) -> int:
        """Sequences that an engine in use has been sent and has not finished."""


class EngineMembership:
    """Keeps engines in use for as long as they answer.

    Guarantees: an engine in use holds the current version of the model's own weights, or is paused.
    Guarantees: one that ends, hangs or cannot load what is current is out of use, and used again once it can be; its
        process is replaced where that helps.
    """

    def __init__(
        self,
        links: Mapping[str, EngineClient],
        adapters: Adapters,
        base: WeightsVersion,
        *,
        current: Callable[[], Awaitable[WeightsVersion]],
        load_timeout_s: float,
        stall_timeout_s: float = 120.0,
        engines_return: bool = True,
    ) -> None:
        """Must be called on the event loop that it is to live on.

        Args:
            adapters: whose versions new engines load.
            base: version of the model's own weights that is current.
            current: asks the store for it, where there is doubt.
            load_timeout_s: deadline for an engine to load the current weights.
            stall_timeout_s: an engine that has something to sample and samples nothing for so long is lost.
            engines_return: whether somebody replaces an engine that dies.
        """
        self.links = dict(links)
        self._adapters = adapters
        self.weights_version = base
        """The current version of the model's own weights."""
        self._current = current
        self.load_timeout_s = load_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self.engines_return = engines_return
        self._work: EngineListener
        self.active: dict[str, ActiveEngine] = {}
        """Engines in use."""
        self.states: dict[str, EngineState] = dict.fromkeys(links, "starting")
        self.info: EngineInfo | None = None
        """Of the first engine that answered; they are alike."""
        self._has_info = asyncio.Event()
        self._used = asyncio.Condition()
        """Notified when an engine comes into use."""
        self.changing = asyncio.Lock()
        """Held while weights change, a pause begins or ends, or an engine is brought into use."""
        self.holds: set[object] = set()
        """What keeps the engines paused."""
        self._failed_loads: Counter[str] = Counter()
        """In a row, by engine."""
        self._cordoned: set[str] = set()
        """Engines that get no groups, on somebody's word."""
        self._leaving: dict[str, asyncio.Task[Any]] = {}
        """Engines that are not of the service any more, and finish what they have."""
        self._id = uuid.uuid4().hex
        """By which engines know this router."""
        self._numbers = itertools.count()
        """Of its sessions."""
        self.closed = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._followers: dict[str, asyncio.Task[Any]] = {}

    def start(self, work: EngineListener) -> None:
        """Brings engines into use, for this work."""
        self._work = work
        self._followers = {name: self.spawn(self._follow_engine(name)) for name in self.links}

    def close(self) -> None:
        """Stops following engines."""
        self.closed = True
        for task in self._tasks:
            task.cancel()

    async def wait_for_info(self) -> EngineInfo:
        """What the engines are like; waits for the first one.

        Raises:
            EngineDeadError: they died, and do not return.
        """
        await self._has_info.wait()
        self._require_hope()
        assert self.info is not None
        return self.info

    def _require_hope(self) -> None:
        if not self.engines_return and not self.active:
            raise EngineDeadError("the engine died. Make a new sampler.")

    async def some_engine(self) -> None:
        """Waits until an engine is in use and not held back.

        Raises:
            EngineDeadError: they died, and do not return.
        """
        await self._has_info.wait()
        self._require_hope()
        async with self._used:
            await self._used.wait_for(lambda: self.ready)

    @property
    def size(self) -> int:
        """Engines of the service, in use or not."""
        return len(self.links) - len(self._leaving)

    @property
    def ready(self) -> int:
        """Engines that are given groups."""
        return len(self.active.keys() - self._cordoned)

    @property
    def paused(self) -> bool:
        """Whether engines stand still, for weights or for whoever asked."""
        return bool(self.holds)

    def status(self) -> dict[str, Any]:
        """Of each engine, as plain values."""
        engines: dict[str, Any] = {}
        for name, state in self.states.items():
            if name in self._cordoned:
                state = "draining" if name in self.active else "drained"
            engines[name] = {"state": state, "sequences": 0}
            if (use := self.active.get(name)) is not None:
                held = {version.id: version.label for version in self._adapters.held}
                engines[name] |= {
                    "sequences": self._work.sequences_of(name),
                    "weights": self.weights_version.label,
                    "adapters": sorted(held[id] for id in use.adapters if id in held and use.has_loaded(id)),
                    "engine": use.info.kind,
                    "device": use.info.device,
                    "cpus": list(use.info.cpus),
                    "max_model_len": use.info.max_model_len,
                    "logprobs_mode": use.info.logprobs_mode,
                }
        return engines

    async def unless_lost(self, name: str, use: ActiveEngine, call: Awaitable[T]) -> T:
        """Waits for a call to an engine, but not after the engine was given up: a hung one answers never.

        In an empty context, as `spawn` says: Serve would cancel the call with the request, and what comes of that looks
        like the engine's death.
        """

        async def answered() -> T:
            return await call

        answer = asyncio.get_running_loop().create_task(answered(), context=contextvars.Context())
        lost = asyncio.ensure_future(use.lost.wait())
        try:
            await asyncio.wait({answer, lost}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            raise EngineDeadError(f"{name} stopped answering.")
        finally:
            lost.cancel()
            if not answer.done():
                answer.cancel()
                await asyncio.wait({answer}, timeout=1.0)

    def spawn_for(self, use: ActiveEngine, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Runs a coroutine for as long as a use of an engine lasts."""
        task = self.spawn(coroutine)
        use.tasks.add(task)
        task.add_done_callback(use.tasks.discard)

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Runs a coroutine that is of no request.

        In an empty context: a task that inherited a request's would pass for its child at Serve, and be cancelled with
        it.
        """
        task = asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
        # The loop holds tasks weakly; the set keeps them from being collected halfway.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- calls to engines ------------------------------------------------------------------------

    async def control(self, name: str, use: ActiveEngine, method: str, *args: Any) -> Any:
        """A control call to an engine in use.

        Raises:
            EngineDeadError: it is gone, or was lost meanwhile.
        """
        return await self.unless_lost(name, use, self.links[name].control(method, *args))

    async def call_any(self, method: str, *args: Any) -> Any:
        """A control call to any one engine: the next one, where one dies of it; waits until there is one."""
        while True:
            await self.some_engine()
            name, use = next(iter(self.active.items()))
            try:
                return await self.control(name, use, method, *args)
            except EngineDeadError as error:
                self.lose(name, use, error)

    async def call_all(self, method: str, *args: Any) -> None:
        """A control call to every engine in use."""
        await self._has_info.wait()
        # One that leaves may be out of reach already.
        names = self.active.keys() - self._leaving.keys()
        await asyncio.gather(*(self.links[name].control(method, *args) for name in names))

    async def _quietly(self, name: str, method: str, *args: Any) -> None:
        """A control call whose failure changes nothing: the engine is gone, or keeps something for longer."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self.links[name].control(method, *args)
        except Exception as error:
            logger.info(f"{name} did not take {method}: {type(error).__name__}: {error}")

    # -- adapters --------------------------------------------------------------------------------

    async def load(self, version: AdapterVersion) -> None:
        """Has every engine in use load a version. One that dies loads it when it is back and a group needs it.

        Guarantees: at least one engine has loaded it, and so checked it; if it raises or is cancelled, none keeps it.

        Raises:
            AdapterError: an engine refuses it.
        """
        try:
            loaded = 0
            while not loaded:
                await self.some_engine()
                loading = [self.load_on(name, use, version) for name, use in self.active.items()]
                results = await asyncio.gather(*loading, return_exceptions=True)
                for error in results:
                    if isinstance(error, BaseException) and not isinstance(error, EngineDeadError):
                        raise error
                loaded = sum(error is None for error in results)
        except BaseException:
            self.drop([version])
            raise

    async def load_on(self, name: str, use: ActiveEngine, version: AdapterVersion) -> None:
        """Has an engine load a version, once, whoever asks; whoever stops waiting does not stop it."""
        loading = use.adapters.get(version.id)
        if loading is None:
            loading = use.adapters[version.id] = self.spawn(self.links[name].control("load_adapter", version))
            # Whether or not anybody waits for it still: the next one who needs the version tries again.
            loading.add_done_callback(lambda task: use.forget_failed(version.id, task))
        await self.unless_lost(name, use, asyncio.shield(loading))

    def drop(self, versions: Iterable[AdapterVersion]) -> None:
        """Has every engine give up versions that no group uses any more."""
        for version in versions:
            for name, use in self.active.items():
                self.spawn(self._drop(name, use.adapters.pop(version.id, None), version))

    async def _drop(self, name: str, loading: asyncio.Task[Any] | None, version: AdapterVersion) -> None:
        if loading is not None:
            await asyncio.wait({loading})  # a drop that came first would leave it there for good
        await self._quietly(name, "drop_adapter", version)

    async def _prefetch(self, name: str, use: ActiveEngine, version: AdapterVersion) -> None:
        try:
            await self.load_on(name, use, version)
        except TwinkleServeError as error:  # requests for it get the error themselves
            logger.warning(f"{name} did not load {version.label}: {error}")

    # -- into use, and out of it -----------------------------------------------------------------

    async def _follow_engine(self, name: str) -> None:
        """Keeps an engine in use for as long as it answers; sees restarts, and deaths while it has no work."""
        while True:
            base, changing = self.weights_version, self.changing.locked()
            try:
                info = await self._describe(name)
            except Exception as error:  # whatever it is, an engine that does not answer is not used
                self.lose(name, self.active.get(name), error)
                if self.states[name] != "starting":
                    self.states[name] = "dead"
            else:
                use = self.active.get(name)
                if use is not None and use.info.incarnation != info.incarnation:
                    self.lose(name, use, EngineDeadError("it was restarted"))
                elif (
                    info.weights_version != base
                    and base == self.weights_version
                    and not (changing or self.changing.locked())
                ):
                    self.lose(name, use, EngineDeadError("it has other weights than the current ones"))
                if name not in self.active:
                    await self._catch_up(name, info)
                elif use is not None:
                    await self._require_progress(name, use, info)
            await asyncio.sleep(PROBE_PERIOD_S)

    async def _describe(self, name: str) -> EngineInfo:
        """Raises EngineDeadError where it does not answer."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                return await self.links[name].describe(self._id)
        except TimeoutError:
            raise EngineDeadError(f"{name} did not answer for {PROBE_TIMEOUT_S:g} s.") from None

    async def _require_progress(self, name: str, use: ActiveEngine, info: EngineInfo) -> None:
        """Gives up an engine that answers and has something to sample, but samples nothing; its process is replaced."""
        now = asyncio.get_running_loop().time()
        stands_still = self.paused and self.states[name] != "draining"
        if info.progress != use.progress or stands_still or not info.running:
            use.progress, use.progressed_at = info.progress, now
        elif now - use.progressed_at > self._stall_timeout_s:
            hung = f"it had {info.running} groups and sampled nothing for "
            hung += f"stall_timeout_s={self._stall_timeout_s:g}"
            self.lose(name, use, EngineDeadError(hung))
            await self._quietly(name, "retire", info.incarnation, hung)

    async def _catch_up(self, name: str, info: EngineInfo) -> None:
        """Brings an engine into use: without what another router left there, with the current weights, and paused where
        the others are. An engine that cannot, several times in a row, has its process replaced."""
        if name in self._cordoned:
            return
        self.states[name] = "catching up"
        base = self.weights_version
        try:
            async with asyncio.timeout(self.load_timeout_s):
                await self.links[name].control("keep_adapters", [version.id for version in self._adapters.held])
                await self._load_current(name, info)
            # The engine is not to blame for how long others take, who have deadlines of their own.
            async with self.changing, asyncio.timeout(self.load_timeout_s):
                # They may have gone on to a newer version meanwhile, and the engine may be another one.
                info = await self._describe(name)
                await self._load_current(name, info)
                await self.links[name].control(*(("pause", "keep") if self.holds else ("resume",)))
                await self._begin_use(name, info)
        except Exception as error:
            logger.warning(f"{name} did not get ready with {base.label!r}: {type(error).__name__}: {error}")
            if isinstance(error, StoreError):
                await self._ask_what_is_current()
            if self.weights_version != base:
                return  # it was overtaken
            self._failed_loads[name] += 1
            if self._failed_loads[name] >= MAX_FAILED_LOADS or isinstance(error, TimeoutError):
                self._failed_loads[name] = 0
                await self._quietly(name, "retire", info.incarnation, f"it does not load {base.label!r}: {error}")
        else:
            self._failed_loads[name] = 0

    async def _load_current(self, name: str, info: EngineInfo) -> None:
        """Has an engine that is not in use load the current weights, if it has others."""
        if info.weights_version != self.weights_version:
            await self.links[name].control("pause", "keep")
            await self.links[name].control("load_weights", self.weights_version)

    async def _ask_what_is_current(self) -> None:
        """The store may have taken a commit whose answer never came."""
        async with self.changing:
            with contextlib.suppress(StoreError):
                self.weights_version = await self._current()

    async def _begin_use(self, name: str, info: EngineInfo) -> None:
        if name in self._cordoned:  # since it began to catch up
            return
        session = Session(incarnation=info.incarnation, router=self._id, epoch=next(self._numbers))
        self.active[name] = use = ActiveEngine(info, session, progressed_at=asyncio.get_running_loop().time())
        self.states[name] = "ready"
        self.info = self.info or info
        self._has_info.set()
        self._work.engine_begins(name, use)
        async with self._used:
            self._used.notify_all()
        for version in self._adapters.newest.values():  # ahead of the first request that needs it
            self.spawn(self._prefetch(name, use, version))

    def lose(self, name: str, use: ActiveEngine | None, error: BaseException) -> None:
        """Ends a use of an engine: its groups go elsewhere. It is used again once it answers."""
        if use is None or self.active.get(name) is not use:
            return
        del self.active[name]
        self.states[name] = "dead"
        use.lost.set()
        for task in use.tasks - {asyncio.current_task()}:  # it may be slow and not dead: this aborts them there
            task.cancel()
        self._work.engine_ends(name, use, error)

    def _end_use(self, name: str, use: ActiveEngine) -> None:
        """Takes a living engine out of use. What it has not finished is sampled elsewhere, and has lost no engine."""
        del self.active[name]
        self.states[name] = "catching up"  # as it will have to, if it is used again
        use.lost.set()
        for task in use.tasks:  # which aborts them there
            task.cancel()
        self._work.engine_ends(name, use, None)

    # -- engines that come and go ----------------------------------------------------------------

    def set_links(self, links: Mapping[str, EngineClient]) -> None:
        """Says which engines there are. New ones are used as soon as they can be; links of known ones are ignored.

        Guarantees: one that is not named gets no new groups, may finish for LEAVE_S what it has, and what it has not
            finished by then is sampled elsewhere, with its seed, and not counted as lost with an engine.
        Does not guarantee: that a text stream survives that, once it has begun.
        """
        for name, link in links.items():
            if (leaving := self._leaving.get(name)) is not None:  # another process will answer to its name
                leaving.cancel()
                self._forget(name)
            if name not in self.links:
                self.links[name] = link
                self.states[name] = "starting"
                self._followers[name] = self.spawn(self._follow_engine(name))
        for name in self.links.keys() - links.keys() - self._leaving.keys():
            # It is out of reach, but for the calls that run: an engine that does not answer would count as lost.
            self._followers.pop(name).cancel()
            self._cordon(name)
            self._leaving[name] = self.spawn(self._leave(name))

    async def _leave(self, name: str) -> None:
        await self._empty(name, LEAVE_S)
        self._forget(name)
        async with self._used:
            self._used.notify_all()  # who waits for its restart

    def _forget(self, name: str) -> None:
        if (use := self.active.get(name)) is not None:
            self._end_use(name, use)
        del self._leaving[name], self.links[name], self.states[name]
        self._failed_loads.pop(name, None)
        self._cordoned.discard(name)

    async def drain(self, name: str, timeout_s: float) -> None:
        """Gives an engine no new groups, and returns when it has none any more; it stays out of use until `undrain`.

        Guarantees: what it has not finished after `timeout_s` is sampled elsewhere, as by `set_links`.
        Guarantees: cancelling the call, the engine is drained all the same.

        Raises:
            RequestError: no such engine.
            UnsupportedError: the only engine is in this process.
        """
        self._require_engine(name)
        self._cordon(name)
        await asyncio.shield(self.spawn(self._empty(name, timeout_s)))

    async def undrain(self, name: str) -> None:
        """Ends `drain`: the engine is used as soon as it has caught up. Again: nothing.

        Raises:
            RequestError: no such engine.
            UnsupportedError: the only engine is in this process.
        """
        self._require_engine(name)
        self._cordoned.discard(name)
        self._work.engine_opens(name)
        async with self._used:
            self._used.notify_all()

    async def restart(self, name: str, drain_timeout_s: float, timeout_s: float) -> None:
        """Drains an engine, has its process replaced, and returns when that is in use.

        Raises:
            RequestError: no such engine, or it was taken out of the service meanwhile.
            UnsupportedError: the only engine is in this process.
            DeadlineError: it was not in use again within `timeout_s`. It will be as soon as it can.
        """
        self._require_engine(name)
        try:
            async with asyncio.timeout(timeout_s):
                use = self.active.get(name)
                try:
                    await self.drain(name, drain_timeout_s)
                    with contextlib.suppress(EngineDeadError):  # it is being replaced already
                        incarnation = (
                            use.info.incarnation if use is not None else (await self._describe(name)).incarnation
                        )
                        await self.links[name].control("retire", incarnation, "restart_engine was called")
                finally:
                    await self.undrain(name)
                async with self._used:
                    await self._used.wait_for(lambda: name in self.active or name not in self.links)
        except TimeoutError:
            raise DeadlineError(
                f"{name} was not in use again within {timeout_s:g} s; it is used as soon as it can be. "
                "Raise timeout_s, or see `serve status`."
            ) from None
        self._require_engine(name)

    def _require_engine(self, name: str) -> None:
        if not self.engines_return:
            raise UnsupportedError(
                "the only engine is in this process, and goes with the sampler. Make another sampler, or serve one."
            )
        if name not in self.links or name in self._leaving:
            raise RequestError(unknown_name("engine", name, self.links.keys() - self._leaving.keys()) + ".")

    def _cordon(self, name: str) -> None:
        self._cordoned.add(name)
        self._work.engine_closes(name)

    async def _empty(self, name: str, timeout_s: float) -> None:
        """Ends the use of an engine that is held back, when it has finished what it had, or after so long."""
        if (use := self.active.get(name)) is None:
            return
        use.idle.clear()
        self.find_idle()
        with contextlib.suppress(TimeoutError, EngineDeadError):  # if it dies, its groups are elsewhere already
            async with asyncio.timeout(timeout_s):
                await self.unless_lost(name, use, use.idle.wait())
        if self.active.get(name) is use and name in self._cordoned:
            self._end_use(name, use)

    def find_idle(self) -> None:
        """Tells those that wait for engines to finish what they had of those that have."""
        for name in self._cordoned & self.active.keys():
            if not self._work.sequences_of(name):
                self.active[name].idle.set()
