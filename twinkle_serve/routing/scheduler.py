"""Groups on a router's engines: which waits, which engine has it, and what becomes of it when that ends. No Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import replace

from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.data_format.groups import Group, GroupKey, TextDelta
from twinkle_serve.data_format.samples import SampleColumns
from twinkle_serve.engines.base import Finished
from twinkle_serve.errors import (
    EngineCrashedError,
    EngineDeadError,
    EngineError,
    TwinkleServeError,
)
from twinkle_serve.routing.dispatch import Dispatcher
from twinkle_serve.routing.membership import PROBE_TIMEOUT_S, ActiveEngine, EngineMembership
from twinkle_serve.routing.poison import MAX_CRASHES, classify, named, poison_error, suspicion_s
from twinkle_serve.routing.policies import PolicyName
from twinkle_serve.routing.resume import PartialSamples, can_resume

logger = logging.getLogger("ray.serve")

MAX_ATTEMPTS = 50
"""Of a group, whatever ended them."""


class GroupScheduler:
    """Has engines sample groups, whatever becomes of the engines.

    Guarantees: every group that is enqueued is handed back as samples or as a failure, unless it is withdrawn.
    Guarantees: what an engine that ends or hangs had not handed back is sampled elsewhere, with its seeds, from its
        start or, with `resume`, from what had arrived of it; no sample is delivered twice.
    Guarantees: a group that ends engine after engine fails, and those beside it do not.
    Guarantees: an engine has a group's adapter version before it is sent the group.
    Does not guarantee: the order in which groups finish.
    """

    def __init__(
        self,
        membership: EngineMembership,
        *,
        wanted: Callable[[int], bool],
        deliver: Callable[[SampleColumns], None],
        fail: Callable[[int, TwinkleServeError], None],
        policy: PolicyName = "balanced",
        resume: bool = False,
    ) -> None:
        """
        Args:
            membership: is started, with this as its work.
            wanted: whether anybody waits for a group, by its id.
            deliver: takes samples, of any number of groups.
            fail: takes what a group failed by, by its id.
            policy: which engine a group goes to.
            resume: whether samples that are broken off go on from where they were, where that can be; see `can_resume`.
        """
        self._engines = membership
        self._wanted, self._deliver_columns, self._fail = wanted, deliver, fail
        self._dispatcher = Dispatcher(policy)
        """It knows the same engines as the membership has in use."""
        self._resume = resume
        self._drafts = PartialSamples()
        self._pump_due = False
        membership.start(self)

    # -- engines, as `EngineListener` ------------------------------------------------------------

    def engine_begins(self, name: str, use: ActiveEngine) -> None:
        self._dispatcher.add_engine(name, use.info.max_num_seqs)
        self._engines.spawn_for(use, self._collect(name, use))
        self._pump_soon()

    def engine_closes(self, name: str) -> None:
        self._dispatcher.close_engine(name)

    def engine_opens(self, name: str) -> None:
        self._dispatcher.open_engine(name)
        self._pump_soon()

    def engine_ends(self, name: str, use: ActiveEngine, error: BaseException | None) -> None:
        suspect = self._dispatcher.suspect_of(name)
        rest = self._dispatcher.remove_engine(name)
        if error is not None:
            logger.warning(
                f"{name} is lost with {len(rest)} groups, to be sampled elsewhere: {type(error).__name__}: {error}"
            )
            now = asyncio.get_running_loop().time()
            rest = [replace(group, ran_s=now - use.placed_at.get(group.id, now)) for group in rest]
            rest = self._blame(name, suspect, rest, isinstance(error, EngineCrashedError))
        self._sample_again(rest)
        self._fail_without_hope(name)
        self._pump_soon()

    def sequences_of(self, name: str) -> int:
        return self._dispatcher.sequences(name)

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
        if not self._engines.engines_return and not self._engines.active:
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

    @property
    def sequences(self) -> int:
        """Sequences that engines have been sent and have not finished."""
        return sum(self._dispatcher.sequences(name) for name in self._engines.active)

    def withdraw(self, caller: str, group_ids: Sequence[int]) -> None:
        """Drops groups of a caller: from the queue, and from the engines that have them."""
        self._drafts.drop(group_ids)
        for name, groups in self._dispatcher.withdraw(caller, group_ids).items():
            self._engines.spawn(self._abort(name, self._engines.active[name], groups))
        self._pump_soon()  # they may have stood in the way of others

    async def _abort(self, name: str, use: ActiveEngine, groups: list[Group]) -> None:
        """Has an engine drop groups, and releases the load that they were, if it is still the same use of it."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._engines.links[name].abort(use.session, [group.attempt for group in groups])
        except Exception as error:  # a lost engine has nothing to abort
            logger.info(f"{name} did not take an abort of {len(groups)} groups: {type(error).__name__}")
        if self._engines.active.get(name) is use:
            self._dispatcher.finish(name, [group.key for group in groups])
            self._pump_soon()

    async def stream(self, group: Group) -> AsyncGenerator[TextDelta, None]:
        """Text of a group of one sample as it comes, past the queue. Closing it aborts the sample.

        Raises:
            EngineDeadError: its engine died when there was some text already, or a second one did.
        """
        started = False
        while True:
            await self._engines.some_engine()
            name = self._dispatcher.place(group)
            use = self._engines.active[name]
            try:
                if group.adapter is not None:
                    await self._engines.load_on(name, use, group.adapter)
                async with contextlib.aclosing(self._engines.links[name].stream(use.session, group)) as deltas:
                    while (delta := await self._engines.unless_lost(name, use, anext(deltas, None))) is not None:
                        started = True
                        yield delta
                        if delta.finish_reason is not None:
                            return
                raise EngineError(f"{name} ended a stream before its sample had ended. Send the call again.")
            except EngineDeadError as error:
                self._engines.lose(name, use, error)
                group = replace(
                    group,
                    attempts=group.attempts + 1,
                    lost=(*group.lost, name),
                    crashes=group.crashes + isinstance(error, EngineCrashedError),
                )
                if started or len(group.lost) >= MAX_CRASHES:
                    raise EngineDeadError(
                        f"{' and '.join(group.lost)} died in the middle of a stream. Send the call again."
                    ) from None
            finally:
                if self._engines.active.get(name) is use:
                    self._dispatcher.finish(name, [group.key])
                    self._pump_soon()

    def _pump_soon(self) -> None:
        """Sends what can be sent at the next turn of the loop: calls that arrive together share a chunk."""
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        if self._engines.closed:
            return
        now = asyncio.get_running_loop().time()
        for name, groups in self._dispatcher.assign().items():
            use = self._engines.active[name]
            use.placed_at.update(dict.fromkeys((group.id for group in groups), now))
            self._watch_suspect(name, use, groups)
            by_adapter: dict[AdapterVersion | None, list[Group]] = defaultdict(list)
            for group in groups:
                self._drafts.begin(group)
                # What an engine has yet to load keeps nobody else waiting, and fails alone.
                by_adapter[None if use.has(group.adapter) else group.adapter].append(group)
            for missing, part in by_adapter.items():
                self._engines.spawn_for(use, self._send(name, use, part, missing))
            if len(use.placed_at) > 2 * self._dispatcher.sequences(name) + 64:
                held = {group.id for group in self._dispatcher.groups(name)}
                use.placed_at = {group_id: at for group_id, at in use.placed_at.items() if group_id in held}
        self._engines.find_idle()

    async def _send(self, name: str, use: ActiveEngine, groups: list[Group], missing: AdapterVersion | None) -> None:
        """Sends an engine a chunk, after it has loaded the adapter that it lacks for it. Groups that it does not take
        fail, or are placed elsewhere if it is gone."""
        keys = [group.key for group in groups]
        try:
            if missing is not None:
                if not any(self._wanted(group.id) for group in groups):  # and with them nobody may hold the version
                    self._dispatcher.finish(name, keys)
                    self._pump_soon()
                    return
                await self._engines.load_on(name, use, missing)
            await self._engines.unless_lost(
                name, use, self._engines.links[name].submit(use.session, groups, self._dispatcher.waiting > 0)
            )
        except EngineDeadError as error:
            self._engines.lose(name, use, error)
        except Exception as error:
            if self._engines.active.get(name) is not use:
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

    async def _collect(self, name: str, use: ActiveEngine) -> None:
        """Takes what an engine hands back. What still comes once it is out of that use is dropped, for its groups are
        elsewhere then."""
        while True:
            await use.has_sent.wait()
            use.has_sent.clear()
            sent, use.sent = use.sent, set()
            try:
                async with contextlib.aclosing(self._engines.links[name].results(use.session)) as results:
                    async for finished in results:
                        if self._engines.active.get(name) is not use:
                            return
                        self._deliver(name, finished)
            except Exception as error:
                if not isinstance(error, EngineDeadError):  # a bug, here or there: what it struck is not known
                    logger.exception(f"what {name} has sampled could not be taken")
                self._engines.lose(name, use, error)
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
            if group.attempts > MAX_ATTEMPTS:
                self._fail(group.id, EngineError(f"{named(group)} was begun {group.attempts} times, and never ended."))
            else:
                assert self._engines.info is not None
                again.extend(self._drafts.resumed(group, self._engines.info))
        self._dispatcher.enqueue(again, first=True)

    # -- what ends engines -----------------------------------------------------------------------

    def _blame(self, name: str, suspect: GroupKey | None, lost: list[Group], crashed: bool) -> list[Group]:
        """Of what an engine had when it ended, what is to be sampled again at once. Suspects take their turn."""
        verdict = classify(name, suspect, lost, crashed=crashed)
        for group in verdict.poisoned:
            self._fail(group.id, poison_error(group))
        if verdict.poisoned and crashed:
            self._dispatcher.clear_waiting()
        for group in verdict.suspects:
            if self._wanted(group.id):
                self._dispatcher.suspect(replace(group, attempts=group.attempts + 1))
        return verdict.innocent

    def _watch_suspect(self, name: str, use: ActiveEngine, groups: list[Group]) -> None:
        """Clears a suspect that was sent to an engine when it has outlived what it may have done before."""
        key = self._dispatcher.suspect_of(name)
        for group in groups:
            if group.key == key:
                self._engines.spawn(self._clear_suspect(name, use, group))

    async def _clear_suspect(self, name: str, use: ActiveEngine, group: Group) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(suspicion_s(group)):
                await use.lost.wait()
        if self._engines.active.get(name) is use:
            self._dispatcher.clear(name, group.key)
            self._pump_soon()
