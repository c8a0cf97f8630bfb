"""The engines of a router: which are in use, what each has, and what waits for them. Free of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import logging
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypeVar

from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.data_format.groups import EngineInfo, Group, GroupKey, Session, TextDelta
from twinkle_serve.data_format.samples import SampleColumns
from twinkle_serve.data_format.weights import BaseVersion, PauseMode
from twinkle_serve.engines.base import Finished
from twinkle_serve.errors import (
    DeadlineError,
    EngineCrashedError,
    EngineDeadError,
    EngineError,
    RequestError,
    StoreError,
    TwinkleServeError,
    UnsupportedError,
    unknown_name,
)
from twinkle_serve.routing.adapters import Adapters
from twinkle_serve.routing.blame import MOST_CRASHES, judge, named, poison, suspicion_s
from twinkle_serve.routing.dispatch import Dispatcher
from twinkle_serve.routing.link import EngineLink
from twinkle_serve.routing.policies import PolicyName
from twinkle_serve.routing.resume import Drafts, can_resume

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

MOST_ATTEMPTS = 50
"""Of a group, whatever ended them."""

PROBE_PERIOD_S = 2.0
PROBE_TIMEOUT_S = 15.0
"""An engine that does not answer for so long is lost. Serve itself keeps a call to a dead one until it is replaced."""


LEAVE_S = 5.0
"""How long an engine that is taken out of the service may finish what it has. Below graceful_shutdown_timeout_s of
deployments/engine.py, which ends its process."""

MOST_FAILED_LOADS = 3
"""Times in a row that an engine may fail to load the current weights; then its process is replaced."""

EngineState: TypeAlias = Literal["starting", "catching up", "ready", "draining", "drained", "dead"]
"""starting: it has not answered yet. catching up: it answers, and is loading the current weights. ready: it is used.
draining: it finishes what it samples, for a pause or because it gets no more. drained: it is kept out of use. dead: it
was used, and does not answer any more."""


@dataclass(eq=False, slots=True)
class _Use:
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
        if (loading.cancelled() or loading.exception()) and self.adapters.get(version_id) is loading:
            del self.adapters[version_id]

    def has(self, version: AdapterVersion | None) -> bool:
        return version is None or self.has_loaded(version.id)

    def has_loaded(self, version_id: int) -> bool:
        loading = self.adapters.get(version_id)
        return loading is not None and loading.done() and not loading.cancelled() and loading.exception() is None


class EnginePool:
    """Has engines sample groups, whatever becomes of the engines.

    Guarantees: every group that is enqueued is handed back as samples or as a failure, unless it is withdrawn.
    Guarantees: what an engine that ends or hangs had not handed back is sampled elsewhere, with its seeds, from its
        start or, with `resume`, from what had arrived of it; no sample is delivered twice.
    Guarantees: a group that ends engine after engine fails, and those beside it do not.
    Guarantees: an engine has a group's adapter version before it is sent the group.
    Guarantees: an engine that samples holds the current version of the model's own weights.
    Does not guarantee: the order in which groups finish.
    """

    def __init__(
        self,
        links: Mapping[str, EngineLink],
        adapters: Adapters,
        base: BaseVersion,
        *,
        current: Callable[[], Awaitable[BaseVersion]],
        wanted: Callable[[int], bool],
        deliver: Callable[[SampleColumns], None],
        fail: Callable[[int, TwinkleServeError], None],
        load_timeout_s: float,
        stall_timeout_s: float = 120.0,
        policy: PolicyName = "balanced",
        resume: bool = False,
        engines_return: bool = True,
    ) -> None:
        """Must be called on the event loop that it is to live on.

        Args:
            adapters: whose versions new engines load.
            base: version of the model's own weights that is current.
            current: asks the store for it, where there is doubt.
            wanted: whether anybody waits for a group, by its id.
            deliver: takes samples, of any number of groups.
            fail: takes what a group failed by, by its id.
            load_timeout_s: deadline for an engine to load the current weights.
            stall_timeout_s: an engine that has something to sample and samples nothing for so long is lost.
            policy: which engine a group goes to.
            resume: whether samples that are broken off go on from where they were, where that can be; see `can_resume`.
            engines_return: whether somebody replaces an engine that dies; else groups are not kept for it.
        """
        self._links = dict(links)
        self._adapters = adapters
        self.base = base
        """The current version of the model's own weights."""
        self._states: dict[str, EngineState] = dict.fromkeys(links, "starting")
        self._failed_loads: Counter[str] = Counter()
        """In a row, by engine."""
        self._changing = asyncio.Lock()
        """Held while weights change, a pause begins or ends, or an engine is brought into use."""
        self._holds: set[object] = set()
        """What keeps the engines paused."""
        self._current = current
        self._wanted, self._deliver_columns, self._fail = wanted, deliver, fail
        self.info: EngineInfo | None = None
        """Of the first engine that answered; they are alike."""
        self._load_timeout_s = load_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._id = uuid.uuid4().hex
        """By which engines know this router."""
        self._numbers = itertools.count()
        """Of its sessions."""
        self._has_info = asyncio.Event()
        self._dispatcher = Dispatcher(policy)
        self._resume = resume
        self._drafts = Drafts()
        self._uses: dict[str, _Use] = {}
        """Engines in use, the same as the dispatcher's."""
        self._used = asyncio.Condition()
        """Notified when an engine comes into use."""
        self._engines_return = engines_return
        self._held_back: set[str] = set()
        """Engines that get no groups, on somebody's word."""
        self._leaving: dict[str, asyncio.Task[Any]] = {}
        """Engines that are not of the service any more, and finish what they have."""
        self._pump_due = False
        self._closed = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._followers = {name: self.spawn(self._follow_engine(name)) for name in self._links}

    def close(self) -> None:
        """Stops following engines."""
        self._closed = True
        for task in self._tasks:
            task.cancel()

    async def known(self) -> EngineInfo:
        """What the engines are like; waits for the first one.

        Raises:
            EngineDeadError: they died, and do not return.
        """
        await self._has_info.wait()
        self._require_hope()
        assert self.info is not None
        return self.info

    def _require_hope(self) -> None:
        if not self._engines_return and not self._uses:
            raise EngineDeadError("the engine died. Make a new sampler.")

    @property
    def size(self) -> int:
        """Engines of the service, in use or not."""
        return len(self._links) - len(self._leaving)

    @property
    def ready(self) -> int:
        """Engines that are given groups."""
        return len(self._uses.keys() - self._held_back)

    @property
    def paused(self) -> bool:
        """Whether engines stand still, for weights or for whoever asked."""
        return bool(self._holds)

    @property
    def sequences(self) -> int:
        """Sequences that engines have been sent and have not finished."""
        return sum(self._dispatcher.sequences(name) for name in self._uses)

    def status(self) -> dict[str, Any]:
        """Engines and queue, as plain values."""
        engines: dict[str, Any] = {}
        for name, state in self._states.items():
            if name in self._held_back:
                state = "draining" if name in self._uses else "drained"
            engines[name] = {"state": state, "sequences": 0}
            if (use := self._uses.get(name)) is not None:
                held = {version.id: version.label for version in self._adapters.held}
                engines[name] |= {
                    "sequences": self._dispatcher.sequences(name),
                    "weights": self.base.label,
                    "adapters": sorted(held[id] for id in use.adapters if id in held and use.has_loaded(id)),
                    "engine": use.info.kind,
                    "device": use.info.device,
                    "cpus": list(use.info.cpus),
                    "max_model_len": use.info.max_model_len,
                    "logprobs_mode": use.info.logprobs_mode,
                }
        return {"engines": engines, "groups_waiting": self._dispatcher.waiting, "paused": self.paused}

    # -- groups ----------------------------------------------------------------------------------

    def enqueue(self, groups: Iterable[Group]) -> None:
        """Has groups sampled, as soon as an engine can."""
        if self._resume:
            groups = [replace(group, resume=can_resume(group.params)) for group in groups]
        self._dispatcher.enqueue(groups)
        self._fail_without_hope("the engine")
        self._pump_soon()

    def _fail_without_hope(self, name: str) -> None:
        """Fails what waits, where there is no engine and none returns."""
        if not self._engines_return and not self._uses:
            for group_id in {group.id for group in self._dispatcher.withdraw_waiting()}:
                self._fail(group_id, EngineDeadError(f"{name} died. Make a new sampler."))

    @property
    def waiting(self) -> int:
        """Groups that no engine has."""
        return self._dispatcher.waiting

    @property
    def waiting_tokens(self) -> float:
        """Tokens that these will take, about."""
        return self._dispatcher.waiting_tokens

    def withdraw(self, caller: str, group_ids: Sequence[int]) -> None:
        """Drops groups of a caller: from the queue, and from the engines that have them."""
        self._drafts.drop(group_ids)
        for name, groups in self._dispatcher.withdraw(caller, group_ids).items():
            self.spawn(self._abort(name, self._uses[name], groups))
        self._pump_soon()  # they may have stood in the way of others

    async def stream(self, group: Group) -> AsyncGenerator[TextDelta, None]:
        """Text of a group of one sample as it comes, past the queue. Closing it aborts the sample.

        Raises:
            EngineDeadError: its engine died when there was some text already, or a second one did.
        """
        started = False
        while True:
            await self._some_engine()
            name = self._dispatcher.place(group)
            use = self._uses[name]
            try:
                if group.adapter is not None:
                    await self._load(name, use, group.adapter)
                async with contextlib.aclosing(self._links[name].stream(use.session, group)) as deltas:
                    while (delta := await self._unless_lost(name, use, anext(deltas, None))) is not None:
                        started = True
                        yield delta
                        if delta.finish_reason is not None:
                            return
                raise EngineError(f"{name} ended a stream before its sample had ended. Send the call again.")
            except EngineDeadError as error:
                self._lose(name, use, error)
                group = replace(
                    group,
                    attempts=group.attempts + 1,
                    lost=(*group.lost, name),
                    crashes=group.crashes + isinstance(error, EngineCrashedError),
                )
                if started or len(group.lost) >= MOST_CRASHES:
                    raise EngineDeadError(
                        f"{' and '.join(group.lost)} died in the middle of a stream. Send the call again."
                    ) from None
            finally:
                if self._uses.get(name) is use:
                    self._dispatcher.finish(name, [group.key])
                    self._pump_soon()

    def _pump_soon(self) -> None:
        """Sends what can be sent at the next turn of the loop: calls that arrive together share a chunk."""
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        if self._closed:
            return
        now = asyncio.get_running_loop().time()
        for name, groups in self._dispatcher.assign().items():
            use = self._uses[name]
            use.placed_at.update(dict.fromkeys((group.id for group in groups), now))
            self._watch_suspect(name, use, groups)
            by_adapter: dict[AdapterVersion | None, list[Group]] = defaultdict(list)
            for group in groups:
                self._drafts.begin(group)
                # What an engine has yet to load keeps nobody else waiting, and fails alone.
                by_adapter[None if use.has(group.adapter) else group.adapter].append(group)
            for missing, part in by_adapter.items():
                self._spawn_for(use, self._send(name, use, part, missing))
            if len(use.placed_at) > 2 * self._dispatcher.sequences(name) + 64:
                held = {group.id for group in self._dispatcher.groups(name)}
                use.placed_at = {group_id: at for group_id, at in use.placed_at.items() if group_id in held}
        self._find_idle()

    def _spawn_for(self, use: _Use, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Runs a coroutine for as long as a use of an engine lasts."""
        task = self.spawn(coroutine)
        use.tasks.add(task)
        task.add_done_callback(use.tasks.discard)

    async def _send(self, name: str, use: _Use, groups: list[Group], missing: AdapterVersion | None) -> None:
        """Sends an engine a chunk, after it has loaded the adapter that it lacks for it. Groups that it does not take
        fail, or are placed elsewhere if it is gone."""
        keys = [group.key for group in groups]
        try:
            if missing is not None:
                if not any(self._wanted(group.id) for group in groups):  # and with them nobody may hold the version
                    self._dispatcher.finish(name, keys)
                    self._pump_soon()
                    return
                await self._load(name, use, missing)
            await self._unless_lost(
                name, use, self._links[name].submit(use.session, groups, self._dispatcher.waiting > 0)
            )
        except EngineDeadError as error:
            self._lose(name, use, error)
        except Exception as error:
            if self._uses.get(name) is not use:
                return
            if not isinstance(error, TwinkleServeError):
                # A bug, here or there: these groups fail, the engine stays.
                logger.exception(f"{name} did not take {len(groups)} groups")
                error = EngineError(f"{name} did not take {len(groups)} groups: {error!r}")
            for group_id in {group.id for group in self._dispatcher.finish(name, keys)}:
                self._fail(group_id, error)
            self._pump_soon()
        else:
            use.sent.update(keys)
            use.has_sent.set()

    async def _collect(self, name: str, use: _Use) -> None:
        """Takes what an engine hands back. What still comes once it is out of that use is dropped, for its groups are
        elsewhere then."""
        while True:
            await use.has_sent.wait()
            use.has_sent.clear()
            sent, use.sent = use.sent, set()
            try:
                async with contextlib.aclosing(self._links[name].results(use.session)) as results:
                    async for finished in results:
                        if self._uses.get(name) is not use:
                            return
                        self._deliver(name, finished)
            except Exception as error:
                if not isinstance(error, EngineDeadError):  # a bug, here or there: what it struck is not known
                    logger.exception(f"what {name} has sampled could not be taken")
                self._lose(name, use, error)
                return
            # It has nothing any more. What it was sent before and has not handed back would wait for ever.
            self._sample_again(self._dispatcher.finish(name, sent))
            self._pump_soon()

    def _deliver(self, name: str, finished: Finished) -> None:
        self._drafts.gain(finished.gains)
        failed = self._dispatcher.finish(name, finished.failures)
        for group_id in {group.id: None for group in failed}:
            self._fail(group_id, next(error for key, error in finished.failures.items() if key[0] == group_id))
        if failed:
            self._pump_soon()
        if (columns := finished.columns) is None:
            return
        self._dispatcher.ended(name, zip(columns.group.tolist(), columns.sample.tolist(), strict=True))
        self._dispatcher.learn(columns.lengths)
        self._drafts.end(columns)
        self._deliver_columns(columns)
        self._pump_soon()

    def _sample_again(self, groups: list[Group]) -> None:
        """Puts what an engine did not finish back into the queue, in front; what can go on from where it was does."""
        again = []
        for group in groups:
            if not self._wanted(group.id):
                continue
            group = replace(group, attempts=group.attempts + 1)
            if group.attempts > MOST_ATTEMPTS:
                self._fail(group.id, EngineError(f"{named(group)} was begun {group.attempts} times, and never ended."))
            else:
                assert self.info is not None
                again.extend(self._drafts.resumed(group, self.info))
        self._dispatcher.enqueue(again, first=True)

    # -- what ends engines -----------------------------------------------------------------------

    def _blame(self, name: str, suspect: GroupKey | None, lost: list[Group], crashed: bool) -> list[Group]:
        """Of what an engine had when it ended, what is to be sampled again at once. Suspects take their turn."""
        verdict = judge(name, suspect, lost, crashed=crashed)
        for group in verdict.guilty:
            self._fail(group.id, poison(group))
        if verdict.guilty and crashed:
            self._dispatcher.clear_waiting()
        for group in verdict.suspects:
            if self._wanted(group.id):
                self._dispatcher.suspect(replace(group, attempts=group.attempts + 1))
        return verdict.innocent

    def _watch_suspect(self, name: str, use: _Use, groups: list[Group]) -> None:
        """Clears a suspect that was sent to an engine when it has outlived what it may have done before."""
        key = self._dispatcher.suspect_of(name)
        for group in groups:
            if group.key == key:
                self.spawn(self._clear_suspect(name, use, group))

    async def _clear_suspect(self, name: str, use: _Use, group: Group) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(suspicion_s(group)):
                await use.lost.wait()
        if self._uses.get(name) is use:
            self._dispatcher.clear(name, group.key)
            self._pump_soon()

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
                await self._some_engine()
                loading = [self._load(name, use, version) for name, use in self._uses.items()]
                results = await asyncio.gather(*loading, return_exceptions=True)
                for error in results:
                    if isinstance(error, BaseException) and not isinstance(error, EngineDeadError):
                        raise error
                loaded = sum(error is None for error in results)
        except BaseException:
            self.drop([version])
            raise

    async def _some_engine(self) -> None:
        """Waits until an engine is in use and not held back.

        Raises:
            EngineDeadError: they died, and do not return.
        """
        await self._has_info.wait()
        self._require_hope()
        async with self._used:
            await self._used.wait_for(lambda: self.ready)

    def drop(self, versions: Iterable[AdapterVersion]) -> None:
        """Has every engine give up versions that no group uses any more."""
        for version in versions:
            for name, use in self._uses.items():
                self.spawn(self._drop(name, use.adapters.pop(version.id, None), version))

    async def _drop(self, name: str, loading: asyncio.Task[Any] | None, version: AdapterVersion) -> None:
        if loading is not None:
            await asyncio.wait({loading})  # a drop that came first would leave it there for good
        await self._quietly(name, "drop_adapter", version)

    async def _load(self, name: str, use: _Use, version: AdapterVersion) -> None:
        """Has an engine load a version, once, whoever asks; whoever stops waiting does not stop it."""
        loading = use.adapters.get(version.id)
        if loading is None:
            loading = use.adapters[version.id] = self.spawn(self._links[name].control("load_adapter", version))
            # Whether or not anybody waits for it still: the next one who needs the version tries again.
            loading.add_done_callback(lambda task: use.forget_failed(version.id, task))
        await self._unless_lost(name, use, asyncio.shield(loading))

    async def _unless_lost(self, name: str, use: _Use, call: Awaitable[T]) -> T:
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

    # -- weights ---------------------------------------------------------------------------------

    async def hold(self, key: object, mode: PauseMode) -> None:
        """Pauses every engine, until `release` of the same key. A failure leaves it unpaused.

        Raises:
            EngineDeadError: they died, and do not return.
        """
        async with self._changing:
            self._holds.add(key)
            try:
                await self._pause(mode)
            except BaseException:
                await self._let_go(key)
                raise

    async def release(self, key: object) -> None:
        """Ends a pause; the engines go on when no other one holds them. Again: nothing."""
        async with self._changing:
            await self._let_go(key)

    async def _let_go(self, key: object) -> None:
        self._holds.discard(key)
        # What another one holds may have run meanwhile: to drain it, or in a pause that was given up.
        await self._tell_each_or_lose_it(PROBE_TIMEOUT_S, *(("pause", "keep") if self._holds else ("resume",)))
        for name in self._uses:
            self._states[name] = "ready"

    async def _pause(self, mode: PauseMode) -> None:
        if mode == "wait":
            self._states |= dict.fromkeys(self._uses, "draining")
        await self._tell_each("pause", mode)

    async def update(
        self, version: BaseVersion, mode: PauseMode, commit: Callable[[], Awaitable[None]], timeout_s: float
    ) -> None:
        """Has every engine load a version of the model's own weights, while nothing is sampled.

        Guarantees: if it raises, the engines have the version before, and nobody stays paused by it.
        Guarantees: engines that die on the way do not fail it, as long as one is left; they come back with what is
            current.

        Args:
            mode: what becomes of running samples.
            commit: records that the version is current; called when the engines have it.

        Raises:
            WeightsError: an engine does not take it.
            EngineError: an engine failed on it, or engines ended with different weights.
            EngineDeadError: all died.
            DeadlineError: it took longer than `timeout_s`, waiting for another pause or update included.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                await self._some_engine()
                await self._changing.acquire()
        except TimeoutError:
            raise DeadlineError(
                f"no engine could be paused within {timeout_s:g} s for {version.label!r}: none is up, or another pause "
                f"begins or ends. {self.base.label!r} is current."
            ) from None
        try:
            await self._update(version, mode, commit, timeout_s, deadline)
        finally:
            self._changing.release()

    async def _update(
        self,
        version: BaseVersion,
        mode: PauseMode,
        commit: Callable[[], Awaitable[None]],
        timeout_s: float,
        deadline: float,
    ) -> None:
        key, loading = object(), False
        self._holds.add(key)
        try:
            async with asyncio.timeout_at(deadline):
                await self._pause(mode)
                loading = True
                checksums = await self._tell_each("load_weights", version)
            if not checksums:
                raise EngineDeadError(f"every engine died while it loaded {version.label!r}.")
            if len(set(checksums.values())) > 1:
                found = ", ".join(f"{name} {checksum}" for name, checksum in checksums.items())
                raise EngineError(f"engines have different weights after they loaded {version.label!r}: {found}.")
            await commit()
            self.base = version
        except BaseException as error:
            if loading:
                await self._tell_each_or_lose_it(timeout_s, "load_weights", self.base)
            where = f"{self.base.label!r} is current"
            if isinstance(error, TimeoutError):
                step = "loaded" if loading else "paused"
                raise DeadlineError(
                    f"the engines were not {step} within {timeout_s:g} s for {version.label!r}; {where}."
                ) from None
            if isinstance(error, TwinkleServeError):
                raise type(error)(f"{error} {where}.") from None
            raise
        finally:
            await self._let_go(key)

    async def _tell_each_or_lose_it(self, timeout_s: float, method: str, *args: Any) -> None:
        """A control call to every engine in use. One that does not take it is not used until it has caught up."""

        async def tell(name: str, use: _Use) -> None:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._unless_lost(name, use, self._links[name].control(method, *args))
            except Exception as error:
                self._lose(name, use, error)

        await asyncio.gather(*(tell(name, use) for name, use in list(self._uses.items())))

    async def _tell_each(self, method: str, *args: Any) -> dict[str, Any]:
        """A control call to every engine in use; returns when all have answered, with the answers of the living.

        Raises:
            TwinkleServeError: an engine refused, with its name.
        """
        uses = dict(self._uses)
        calls = (self._unless_lost(name, use, self._links[name].control(method, *args)) for name, use in uses.items())
        answers: dict[str, Any] = {}
        failure: BaseException | None = None
        for (name, use), answer in zip(uses.items(), await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(answer, EngineDeadError):
                self._lose(name, use, answer)
            elif isinstance(answer, TwinkleServeError):
                failure = type(answer)(f"{name}: {answer}")
            elif isinstance(answer, BaseException):
                failure = EngineError(f"{name} failed at {method}: {answer!r}")
            else:
                answers[name] = answer
        if failure is not None:
            raise failure
        return answers

    # -- control ---------------------------------------------------------------------------------

    async def ask(self, method: str, *args: Any) -> Any:
        """A control call to any one engine: the next one, where one dies of it; waits until there is one."""
        while True:
            await self._some_engine()
            name, use = next(iter(self._uses.items()))
            try:
                return await self._unless_lost(name, use, self._links[name].control(method, *args))
            except EngineDeadError as error:
                self._lose(name, use, error)

    async def tell_all(self, method: str, *args: Any) -> None:
        """A control call to every engine in use."""
        await self._has_info.wait()
        # One that leaves may be out of reach already.
        names = self._uses.keys() - self._leaving.keys()
        await asyncio.gather(*(self._links[name].control(method, *args) for name in names))

    async def _quietly(self, name: str, method: str, *args: Any) -> None:
        """A control call whose failure changes nothing: the engine is gone, or keeps something for longer."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._links[name].control(method, *args)
        except Exception as error:
            logger.info(f"{name} did not take {method}: {type(error).__name__}: {error}")

    # -- engines ---------------------------------------------------------------------------------

    async def _follow_engine(self, name: str) -> None:
        """Keeps an engine in use for as long as it answers; sees restarts, and deaths while it has no work."""
        while True:
            base, changing = self.base, self._changing.locked()
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    info = await self._links[name].describe(self._id)
            except Exception as error:  # whatever it is, an engine that does not answer is not used
                self._lose(name, self._uses.get(name), error)
                if self._states[name] != "starting":
                    self._states[name] = "dead"
            else:
                use = self._uses.get(name)
                if use is not None and use.info.life != info.life:
                    self._lose(name, use, EngineDeadError("it was restarted"))
                elif info.base != base and base == self.base and not (changing or self._changing.locked()):
                    self._lose(name, use, EngineDeadError("it has other weights than the current ones"))
                if name not in self._uses:
                    await self._catch_up(name, info)
                elif use is not None:
                    await self._require_progress(name, use, info)
            await asyncio.sleep(PROBE_PERIOD_S)

    async def _require_progress(self, name: str, use: _Use, info: EngineInfo) -> None:
        """Gives up an engine that answers and has something to sample, but samples nothing; its process is replaced."""
        now = asyncio.get_running_loop().time()
        stands_still = self.paused and self._states[name] != "draining"
        if info.progress != use.progress or stands_still or not info.running:
            use.progress, use.progressed_at = info.progress, now
        elif now - use.progressed_at > self._stall_timeout_s:
            hung = f"it had {info.running} groups and sampled nothing for "
            hung += f"stall_timeout_s={self._stall_timeout_s:g}"
            self._lose(name, use, EngineDeadError(hung))
            await self._quietly(name, "retire", hung)

    async def _catch_up(self, name: str, info: EngineInfo) -> None:
        """Brings an engine into use: without what another router left there, with the current weights, and paused where
        the others are. An engine that cannot, several times in a row, has its process replaced."""
        if name in self._held_back:
            return
        self._states[name] = "catching up"
        base = self.base
        try:
            async with asyncio.timeout(self._load_timeout_s):
                await self._links[name].control("keep_adapters", [version.id for version in self._adapters.held])
                await self._load_current(name, info)
                async with self._changing:
                    # Others may have gone on to a newer version meanwhile, and the engine may be another one.
                    info = await self._links[name].describe(self._id)
                    await self._load_current(name, info)
                    await self._links[name].control(*(("pause", "keep") if self._holds else ("resume",)))
                    await self._begin_use(name, info)
        except Exception as error:
            logger.warning(f"{name} did not get ready with {base.label!r}: {type(error).__name__}: {error}")
            if isinstance(error, StoreError):
                await self._ask_what_is_current()
            if self.base != base:
                return  # it was overtaken
            self._failed_loads[name] += 1
            if self._failed_loads[name] >= MOST_FAILED_LOADS or isinstance(error, TimeoutError):
                self._failed_loads[name] = 0
                await self._quietly(name, "retire", f"it does not load {base.label!r}: {error}")
        else:
            self._failed_loads[name] = 0

    async def _load_current(self, name: str, info: EngineInfo) -> None:
        """Has an engine that is not in use load the current weights, if it has others."""
        if info.base != self.base:
            await self._links[name].control("pause", "keep")
            await self._links[name].control("load_weights", self.base)

    async def _ask_what_is_current(self) -> None:
        """The store may have taken a commit whose answer never came."""
        async with self._changing:
            with contextlib.suppress(StoreError):
                self.base = await self._current()

    async def _begin_use(self, name: str, info: EngineInfo) -> None:
        if name in self._held_back:  # since it began to catch up
            return
        session = Session(life=info.life, router=self._id, number=next(self._numbers))
        self._uses[name] = use = _Use(info, session, progressed_at=asyncio.get_running_loop().time())
        self._states[name] = "ready"
        self.info = self.info or info
        self._has_info.set()
        self._dispatcher.add_engine(name, info.max_num_seqs)
        self._spawn_for(use, self._collect(name, use))
        self._pump_soon()
        async with self._used:
            self._used.notify_all()
        for version in self._adapters.newest.values():  # ahead of the first request that needs it
            self.spawn(self._prefetch(name, use, version))

    async def _prefetch(self, name: str, use: _Use, version: AdapterVersion) -> None:
        try:
            await self._load(name, use, version)
        except TwinkleServeError as error:  # requests for it get the error themselves
            logger.warning(f"{name} did not load {version.label}: {error}")

    def _lose(self, name: str, use: _Use | None, error: BaseException) -> None:
        """Ends a use of an engine: its groups go elsewhere. It is used again once it answers."""
        if use is None or self._uses.get(name) is not use:
            return
        del self._uses[name]
        self._states[name] = "dead"
        use.lost.set()
        suspect = self._dispatcher.suspect_of(name)
        lost = self._dispatcher.remove_engine(name)
        logger.warning(
            f"{name} is lost with {len(lost)} groups, to be sampled elsewhere: {type(error).__name__}: {error}"
        )
        for task in use.tasks - {asyncio.current_task()}:  # it may be slow and not dead: this aborts them there
            task.cancel()
        now = asyncio.get_running_loop().time()
        lost = [replace(group, ran_s=now - use.placed_at.get(group.id, now)) for group in lost]
        self._sample_again(self._blame(name, suspect, lost, isinstance(error, EngineCrashedError)))
        self._fail_without_hope(name)
        self._pump_soon()

    async def _abort(self, name: str, use: _Use, groups: list[Group]) -> None:
        """Has an engine drop groups, and releases the load that they were, if it is still the same use of it."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._links[name].abort(use.session, [group.attempt for group in groups])
        except Exception as error:  # a lost engine has nothing to abort
            logger.info(f"{name} did not take an abort of {len(groups)} groups: {type(error).__name__}")
        if self._uses.get(name) is use:
            self._dispatcher.finish(name, [group.key for group in groups])
            self._pump_soon()

    # -- engines that come and go ----------------------------------------------------------------

    def set_links(self, links: Mapping[str, EngineLink]) -> None:
        """Says which engines there are. New ones are used as soon as they can be; links of known ones are ignored.

        Guarantees: one that is not named gets no new groups, may finish for LEAVE_S what it has, and what it has not
            finished by then is sampled elsewhere, with its seed, and not counted as lost with an engine.
        Does not guarantee: that a text stream survives that, once it has begun.
        """
        for name, link in links.items():
            if (leaving := self._leaving.get(name)) is not None:  # another process will answer to its name
                leaving.cancel()
                self._forget(name)
            if name not in self._links:
                self._links[name] = link
                self._states[name] = "starting"
                self._followers[name] = self.spawn(self._follow_engine(name))
        for name in self._links.keys() - links.keys() - self._leaving.keys():
            # It is out of reach, but for the calls that run: an engine that does not answer would count as lost.
            self._followers.pop(name).cancel()
            self._hold_back(name)
            self._leaving[name] = self.spawn(self._leave(name))

    async def _leave(self, name: str) -> None:
        await self._empty(name, LEAVE_S)
        self._forget(name)
        async with self._used:
            self._used.notify_all()  # who waits for its restart

    def _forget(self, name: str) -> None:
        if (use := self._uses.get(name)) is not None:
            self._end_use(name, use)
        del self._leaving[name], self._links[name], self._states[name]
        self._failed_loads.pop(name, None)
        self._held_back.discard(name)

    async def drain(self, name: str, timeout_s: float) -> None:
        """Gives an engine no new groups, and returns when it has none any more; it stays out of use until `undrain`.

        Guarantees: what it has not finished after `timeout_s` is sampled elsewhere, as by `set_links`.
        Guarantees: cancelling the call, the engine is drained all the same.

        Raises:
            RequestError: no such engine.
            UnsupportedError: the only engine is in this process.
        """
        self._require_engine(name)
        self._hold_back(name)
        await asyncio.shield(self.spawn(self._empty(name, timeout_s)))

    async def undrain(self, name: str) -> None:
        """Ends `drain`: the engine is used as soon as it has caught up. Again: nothing.

        Raises:
            RequestError: no such engine.
            UnsupportedError: the only engine is in this process.
        """
        self._require_engine(name)
        self._held_back.discard(name)
        self._dispatcher.open_engine(name)
        self._pump_soon()
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
                try:
                    await self.drain(name, drain_timeout_s)
                    with contextlib.suppress(EngineDeadError):  # it is being replaced already
                        await self._links[name].control("retire", "restart_engine was called")
                finally:
                    await self.undrain(name)
                async with self._used:
                    await self._used.wait_for(lambda: name in self._uses or name not in self._links)
        except TimeoutError:
            raise DeadlineError(
                f"{name} was not in use again within {timeout_s:g} s; it is used as soon as it can be. "
                "Raise timeout_s, or see `serve status`."
            ) from None
        self._require_engine(name)

    def _require_engine(self, name: str) -> None:
        if not self._engines_return:
            raise UnsupportedError(
                "the only engine is in this process, and goes with the sampler. Make another sampler, or serve one."
            )
        if name not in self._links or name in self._leaving:
            raise RequestError(unknown_name("engine", name, self._links.keys() - self._leaving.keys()) + ".")

    def _hold_back(self, name: str) -> None:
        self._held_back.add(name)
        self._dispatcher.close_engine(name)

    async def _empty(self, name: str, timeout_s: float) -> None:
        """Ends the use of an engine that is held back, when it has finished what it had, or after so long."""
        if (use := self._uses.get(name)) is None:
            return
        use.idle.clear()
        self._find_idle()
        with contextlib.suppress(TimeoutError, EngineDeadError):  # if it dies, its groups are elsewhere already
            async with asyncio.timeout(timeout_s):
                await self._unless_lost(name, use, use.idle.wait())
        if self._uses.get(name) is use and name in self._held_back:
            self._end_use(name, use)

    def _find_idle(self) -> None:
        for name in self._held_back & self._uses.keys():
            if not self._dispatcher.sequences(name):
                self._uses[name].idle.set()

    def _end_use(self, name: str, use: _Use) -> None:
        """Takes a living engine out of use. What it has not finished is sampled elsewhere, and has lost no engine."""
        del self._uses[name]
        self._states[name] = "catching up"  # as it will have to, if it is used again
        use.lost.set()
        moved = self._dispatcher.remove_engine(name)
        for task in use.tasks:  # which aborts them there
            task.cancel()
        self._sample_again(moved)
        self._pump_soon()

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
