"""Schedules groups on engines, and reschedules those of an engine that ends. Free of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import replace

from twinkle_serve import timing
from twinkle_serve.config import PolicyName
from twinkle_serve.data_format import metrics
from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.data_format.groups import GroupKey, TextDelta
from twinkle_serve.data_format.samples import SampleColumns
from twinkle_serve.engines.group_runner import Finished, PartialUpdate
from twinkle_serve.errors import EngineCrashedError, EngineDeadError, EngineError, TwinkleServeError, one_line
from twinkle_serve.routing.active_engine import ActiveEngine
from twinkle_serve.routing.adapter_loading import AdapterLoader
from twinkle_serve.routing.dispatch import Dispatcher
from twinkle_serve.routing.groups import RoutedGroup
from twinkle_serve.routing.membership import EngineMembership
from twinkle_serve.routing.poison import MAX_CRASHES, classify, describe_prompt, poison_error, suspicion_s
from twinkle_serve.routing.policies import POLICIES
from twinkle_serve.routing.resume import PartialSamples, can_resume
from twinkle_serve.routing.telemetry import Telemetry

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 50
"""Attempts at a group, whatever ended them."""


class GroupScheduler:
    """Samples groups on engines that may come, go, hang and die.

    Guarantees:
        Every enqueued group is delivered as samples or as a failure, unless it is withdrawn.
        Samples that an engine had not returned when it ended are sampled elsewhere, with the same seeds, from their
            start or, with `resume`, from the tokens that had arrived. No sample is delivered twice.
        A group is sampled by engines of its track alone.
        A group that ends engine after engine fails, and the groups beside it do not.
        An engine has a group's adapter version before it is sent the group.
    Does not guarantee:
        The order in which groups finish.
    """

    def __init__(
        self,
        engines: EngineMembership,
        loader: AdapterLoader,
        *,
        wanted: Callable[[int], bool],
        deliver: Callable[[SampleColumns], None],
        fail: Callable[[int, TwinkleServeError], None],
        deliver_updates: Callable[[Sequence[PartialUpdate]], None] = lambda updates: None,
        restart: Callable[[RoutedGroup], None] = lambda group: None,
        on_sent: Callable[[Sequence[RoutedGroup], float], None] = lambda groups, now: None,
        telemetry: Telemetry | None = None,
        policy: PolicyName = "balanced",
        resume: bool = False,
    ) -> None:
        """
        Args:
            engines: started by this, with this as its listener.
            wanted: whether a request waits for a group id.
            deliver: receives samples of any number of groups.
            fail: receives the id and the error of a failed group.
            deliver_updates: receives new tokens of running samples, of groups that are followed.
            restart: called with a group whose samples start anew.
            on_sent: called with groups that are sent to an engine, and the time of the event loop's clock.
            telemetry: counts samples, losses and retries.
            policy: chooses the engine of a group.
            resume: whether interrupted samples continue from the tokens that had arrived; see `can_resume`. Those of
                groups with updates always do.
        """
        self._engines, self._loader = engines, loader
        self._wanted, self._deliver_columns, self._fail = wanted, deliver, fail
        self._deliver_updates, self._restart = deliver_updates, restart
        self._on_sent, self._telemetry = on_sent, telemetry or Telemetry()
        self._dispatchers = {track.name: Dispatcher(POLICIES[policy]()) for track in engines.tracks}
        """One for each track, by name. It knows the engines in use."""
        self._resume = resume
        self._partials = PartialSamples()
        self._pump_due = False
        engines.start(self)

    # -- engines, as `EngineListener` ------------------------------------------------------------

    def engine_begins(self, engine: ActiveEngine) -> None:
        self._dispatcher_of(engine.name).add_engine(engine.name, engine.info.max_num_seqs)
        self._engines.spawn_for(engine, self._collect(engine))
        self._loader.prefetch(engine)
        self._pump_soon()

    def engine_closes(self, name: str) -> None:
        self._dispatcher_of(name).close_engine(name)

    def engine_opens(self, name: str) -> None:
        self._dispatcher_of(name).open_engine(name)
        self._pump_soon()

    def engine_ends(self, engine: ActiveEngine, error: BaseException | None) -> None:
        dispatcher = self._dispatcher_of(engine.name)
        suspect = dispatcher.suspect_of(engine.name)
        rest = dispatcher.remove_engine(engine.name)
        if error is not None:
            self._telemetry.engine_lost(engine.name, error, len(rest))
            logger.warning(
                f"{engine.name} is lost with {len(rest)} groups, to be sampled elsewhere: "
                f"{type(error).__name__}: {error}"
            )
            now = asyncio.get_running_loop().time()
            rest = [replace(group, ran_s=now - engine.placed_at.get(group.id, now)) for group in rest]
            rest = self._classify(engine.name, suspect, rest, isinstance(error, EngineCrashedError))
        self._requeue(rest)
        self._fail_without_hope(engine.name)
        self._pump_soon()

    def sequences_of(self, name: str) -> int:
        return self._dispatcher_of(name).sequences(name)

    def _dispatcher_of(self, name: str) -> Dispatcher:
        """Returns the dispatcher that knows an engine."""
        return self._dispatchers[self._engines.tracks.of(name).name]

    # -- groups ----------------------------------------------------------------------------------

    def enqueue(self, groups: Iterable[RoutedGroup]) -> None:
        """Queues groups; each starts as soon as an engine of its track has room."""
        groups = [
            # Tokens that were handed out cannot be taken back.
            replace(group, resume=can_resume(group)) if self._resume or group.updates is not None else group
            for group in groups
        ]
        self._queue(groups)
        self._fail_without_hope("the engine")
        self._pump_soon()

    def _queue(self, groups: Iterable[RoutedGroup], *, first: bool = False) -> None:
        by_track: dict[str, list[RoutedGroup]] = defaultdict(list)
        for group in groups:
            by_track[group.track].append(group)
        for track, part in by_track.items():
            self._dispatchers[track].enqueue(part, first=first)

    def _fail_without_hope(self, name: str) -> None:
        """Fails all waiting groups where there is no engine and none returns."""
        if not self._engines.engines_return and not self._engines.active:
            waiting = [group for each in self._dispatchers.values() for group in each.withdraw_waiting()]
            for group_id in {group.id for group in waiting}:
                self._fail(group_id, self._engines.death(name))

    @property
    def waiting(self) -> int:
        """Number of groups that no engine has."""
        return sum(map(self.waiting_in, self._dispatchers))

    @property
    def waiting_tokens(self) -> float:
        """Estimated tokens of the waiting groups."""
        return sum(map(self.waiting_tokens_in, self._dispatchers))

    def waiting_in(self, track: str) -> int:
        """Number of groups of a track that no engine has."""
        return self._dispatchers[track].waiting

    def waiting_tokens_in(self, track: str) -> float:
        """Estimated tokens of these."""
        return self._dispatchers[track].waiting_tokens

    @property
    def sequences(self) -> int:
        """Number of unfinished sequences on all engines."""
        return sum(map(self.sequences_of, self._engines.active))

    def withdraw(self, caller: str, group_ids: Sequence[int]) -> None:
        """Drops groups of a caller from the queue and from the engines that have them."""
        self._partials.drop(group_ids)
        for dispatcher in self._dispatchers.values():
            for name, groups in dispatcher.withdraw(caller, group_ids).items():
                self._engines.spawn(self._abort(self._engines.active[name], groups))
        self._pump_soon()  # other groups may fit now

    async def _abort(self, engine: ActiveEngine, groups: list[RoutedGroup]) -> None:
        """Aborts groups on an engine and releases their load, unless this use of the engine has ended."""
        try:
            async with asyncio.timeout(timing.PROBE_TIMEOUT_S):
                await engine.client.abort(engine.session, [group.attempt for group in groups])
        except Exception as error:  # a lost engine has nothing to abort
            logger.info(f"{engine.name} did not take an abort of {len(groups)} groups: {type(error).__name__}")
        if self._engines.is_active(engine):
            self._dispatcher_of(engine.name).finish(engine.name, [group.key for group in groups])
            self._pump_soon()

    async def stream(self, group: RoutedGroup) -> AsyncGenerator[TextDelta, None]:
        """Samples a group of one sample past the queue and yields its text. Closing the iterator aborts the sample.

        Raises:
            EngineDeadError: its engine died after the first text, or a second engine died.
        """
        started = False
        clock = asyncio.get_running_loop().time
        began, adapter = clock(), "" if group.adapter is None else group.adapter.label
        while True:
            await self._engines.some_engine(self._engines.tracks.named(group.track))
            engine = self._engines.active[self._dispatchers[group.track].place(group)]
            try:
                if group.adapter is not None:
                    await self._loader.load_on(engine, group.adapter)
                async with contextlib.aclosing(engine.client.stream(engine.session, group.for_engine())) as deltas:
                    while (delta := await engine.unless_lost(anext(deltas, None))) is not None:
                        if not started:
                            self._telemetry.first_token(clock() - began)
                        started = True
                        self._telemetry.streamed(engine.name, adapter, delta.tokens, delta.finish_reason)
                        yield delta
                        if delta.finish_reason is not None:
                            return
                raise EngineError(f"{engine.name} ended a stream before its sample had ended. Send the call again.")
            except EngineDeadError as error:
                self._engines.lose(engine, error)
                group = replace(
                    group,
                    attempts=group.attempts + 1,
                    lost=(*group.lost, engine.name),
                    crashes=group.crashes + isinstance(error, EngineCrashedError),
                )
                if started or len(group.lost) >= MAX_CRASHES:
                    raise EngineDeadError(
                        f"{' and '.join(group.lost)} died in the middle of a stream. Send the call again."
                    ) from None
            finally:
                if self._engines.is_active(engine):
                    self._dispatchers[group.track].finish(engine.name, [group.key])
                    self._pump_soon()

    def _pump_soon(self) -> None:
        """Schedules `_pump` for the next turn of the event loop, so that calls that arrive together share a chunk."""
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Sends waiting groups to the engines that have room."""
        self._pump_due = False
        if self._engines.closed:
            return
        for dispatcher in self._dispatchers.values():
            self._send_assigned(dispatcher)
        self._engines.mark_idle()

    def _send_assigned(self, dispatcher: Dispatcher) -> None:
        now = asyncio.get_running_loop().time()
        for name, groups in dispatcher.assign().items():
            engine = self._engines.active[name]
            engine.placed_at.update(dict.fromkeys((group.id for group in groups), now))
            self._watch_suspect(engine, groups)
            by_adapter: dict[AdapterVersion | None, list[RoutedGroup]] = defaultdict(list)
            self._on_sent(groups, now)
            for group in groups:
                self._partials.start(group)
                # Groups whose adapter is not loaded yet delay no others, and fail alone.
                by_adapter[None if engine.has_adapter(group.adapter) else group.adapter].append(group)
            for missing, part in by_adapter.items():
                self._engines.spawn_for(engine, self._send(engine, part, missing))
            if len(engine.placed_at) > 2 * dispatcher.sequences(name) + 64:
                held = {group.id for group in dispatcher.groups(name)}
                engine.placed_at = {group_id: at for group_id, at in engine.placed_at.items() if group_id in held}

    async def _send(self, engine: ActiveEngine, groups: list[RoutedGroup], missing: AdapterVersion | None) -> None:
        """Sends a chunk to an engine, after it has loaded the missing adapter. Groups that the engine refuses fail;
        those of an engine that is gone are placed elsewhere."""
        keys, sent = [group.key for group in groups], [group.for_engine() for group in groups]
        dispatcher = self._dispatcher_of(engine.name)
        try:
            if missing is not None:
                if not any(self._wanted(group.id) for group in groups):  # no request may hold the version any more
                    dispatcher.finish(engine.name, keys)
                    self._pump_soon()
                    return
                await self._loader.load_on(engine, missing)
            await engine.unless_lost(engine.client.submit(engine.session, sent, dispatcher.waiting > 0))
        except EngineDeadError as error:
            self._engines.lose(engine, error)
        except Exception as error:
            if not self._engines.is_active(engine):
                return
            if not isinstance(error, TwinkleServeError):
                # A bug, here or there: these groups fail, the engine stays.
                logger.exception(f"{engine.name} did not take {len(groups)} groups")
                error = EngineError(f"{engine.name} did not take {len(groups)} groups: {error!r}")
            for group_id in {group.id for group in dispatcher.finish(engine.name, keys)}:
                self._fail(group_id, error)
            self._pump_soon()
        else:
            engine.sent.update(keys)
            engine.has_sent.set()

    async def _collect(self, engine: ActiveEngine) -> None:
        """Receives an engine's results while it is in use. Later ones are dropped: its groups are elsewhere then."""
        dispatcher = self._dispatcher_of(engine.name)
        while True:
            await engine.has_sent.wait()
            engine.has_sent.clear()
            sent, engine.sent = engine.sent, set()
            try:
                async with contextlib.aclosing(engine.client.results(engine.session)) as results:
                    async for finished in results:
                        if not self._engines.is_active(engine):
                            return
                        self._deliver(engine.name, finished)
            except Exception as error:
                if not isinstance(error, EngineDeadError):  # a bug, here or there: which groups it hit is unknown
                    logger.exception(f"the results of {engine.name} could not be taken")
                self._engines.lose(engine, error)
                return
            # The engine is idle: requeue whatever it took and did not return.
            self._requeue(dispatcher.finish(engine.name, sent))
            self._pump_soon()

    def _deliver(self, name: str, finished: Finished) -> None:
        if finished.partial_updates:
            self._deliver_updates(self._partials.extend(finished.partial_updates))
        dispatcher = self._dispatcher_of(name)
        failed = dispatcher.finish(name, finished.failures)
        for group_id in {group.id: None for group in failed}:
            self._fail(group_id, next(error for key, error in finished.failures.items() if key[0] == group_id))
        if failed:
            self._pump_soon()
        if (columns := finished.columns) is None:
            return
        dispatcher.finish_samples(name, zip(columns.group.tolist(), columns.sample.tolist(), strict=True))
        dispatcher.learn(columns.lengths)
        self._count(name, columns)
        self._partials.finish(columns)
        self._deliver_columns(columns)
        self._pump_soon()

    def _count(self, name: str, columns: SampleColumns) -> None:
        engine = self._engines.active.get(name)
        placed = None if engine is None else engine.placed_at.get(int(columns.group[0]))
        passed = None if placed is None else asyncio.get_running_loop().time() - placed
        self._telemetry.arrived(name, columns, passed)

    def _requeue(self, groups: list[RoutedGroup]) -> None:
        """Puts groups that an engine did not finish at the front of the queue, resuming their samples if possible."""
        again = []
        for group in groups:
            if not self._wanted(group.id):
                continue
            group = replace(group, attempts=group.attempts + 1)
            if group.attempts > MAX_ATTEMPTS:
                self._fail(
                    group.id,
                    EngineError(f"{describe_prompt(group)} was begun {group.attempts} times, and never ended."),
                )
            else:
                assert self._engines.info is not None
                parts = self._partials.resume(group, self._engines.info)
                for part in parts:
                    if part.partial is None:
                        self._restart(part)
                    else:
                        self._telemetry.count(metrics.RESUMED_TOKENS, len(part.partial))
                again.extend(parts)
        # A restart may have ended their request.
        self._queue([group for group in again if self._wanted(group.id)], first=True)

    # -- suspects ----------------------------------------------------------------------------------

    def _classify(
        self, name: str, suspect: GroupKey | None, lost: list[RoutedGroup], crashed: bool
    ) -> list[RoutedGroup]:
        """Fails the poisoned groups of an engine that ended, queues its suspects, and returns the innocent ones."""
        verdict = classify(name, suspect, lost, crashed=crashed)
        for group in verdict.poisoned:
            self._telemetry.count(metrics.POISONED_PROMPTS)
            self._telemetry.event("poison", one_line(poison_error(group)), name)
            self._fail(group.id, poison_error(group))
        if verdict.poisoned and crashed:
            self._dispatcher_of(name).clear_waiting()
        for group in verdict.suspects:
            if self._wanted(group.id):
                self._restart(group)
            if self._wanted(group.id):
                self._dispatchers[group.track].suspect(replace(group, attempts=group.attempts + 1))
        return verdict.innocent

    def _watch_suspect(self, engine: ActiveEngine, groups: list[RoutedGroup]) -> None:
        """Clears a suspect that was sent to an engine once it has run for longer than before its last engine ended."""
        key = self._dispatcher_of(engine.name).suspect_of(engine.name)
        for group in groups:
            if group.key == key:
                self._engines.spawn(self._clear_suspect(engine, group))

    async def _clear_suspect(self, engine: ActiveEngine, group: RoutedGroup) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(suspicion_s(group)):
                await engine.lost.wait()
        if self._engines.is_active(engine):
            self._dispatchers[group.track].clear(engine.name, group.key)
            self._pump_soon()
