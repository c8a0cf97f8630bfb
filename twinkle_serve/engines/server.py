"""One engine and what goes with it, whatever its kind: chunks, streams, adapter versions, warm-up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from twinkle_serve.adapters import check_shapes, describe_adapter
from twinkle_serve.checkpoint import Bucket, buckets, named_tensors, weight_shapes
from twinkle_serve.data_format import SamplingParams
from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.data_format.groups import Attempt, EngineInfo, Group, Session, TextDelta
from twinkle_serve.data_format.samples import PartialSample, SampleColumns
from twinkle_serve.data_format.weights import CHECKPOINT_VERSION, PauseMode, WeightsVersion
from twinkle_serve.engines.base import Engine, Finished, GroupRunner
from twinkle_serve.engines.text import TextStream
from twinkle_serve.errors import AdapterError, EngineDeadError, EngineError, EngineStartError, StoreError
from twinkle_serve.weights import StoreClient

logger = logging.getLogger("ray.serve")

WARM_UP = Group(id=-1, prompt_ids=np.zeros(1, np.int32), params=SamplingParams(max_tokens=2))

CONTROLS = frozenset(
    {
        "load_adapter",
        "drop_adapter",
        "keep_adapters",
        "load_weights",
        "weight_shapes",
        "pause",
        "resume",
        "retire",
        "reset_prefix_cache",
        "sleep",
        "wake_up",
    }
)
"""Methods of EngineServer that a router calls through `control`."""

PAUSE_LEASE_S = 30.0
"""A pause ends by itself when no router has asked for so long whether the engine is there: they ask every 2 s."""


CLAIM_S = 15.0
"""What a router has sent is aborted when it has not asked for so long whether the engine is there."""


LATE_S = 1.0
"""A timer that fires so late says that this process stood still."""


class RouterLease:
    """A router's to what it has sent: it ends by itself when the router is silent."""

    def __init__(self, session: Session, runner: GroupRunner, abandon: Callable[[str], None]) -> None:
        """
        Args:
            runner: of what is sent in this session.
            abandon: called with the router's id when it has been silent for too long.
        """
        self._abandon = abandon
        self.session, self.runner = session, runner
        self.streams: set[asyncio.Event] = set()
        """Of its text streams; set when they are to end."""
        self._end: asyncio.TimerHandle | None = None
        self.renew()

    def renew(self) -> None:
        self.release()
        loop = asyncio.get_running_loop()
        self._end = loop.call_later(CLAIM_S, self._lapse, loop.time() + CLAIM_S)

    def release(self) -> None:
        if self._end is not None:
            self._end.cancel()

    def _lapse(self, due: float) -> None:
        if asyncio.get_running_loop().time() - due > LATE_S:
            self.renew()  # it was this process that was busy: the router may have asked
        else:
            self._abandon(self.session.router)

    def close(self) -> None:
        """Aborts everything."""
        self.release()
        self.runner.close()
        for stream in self.streams:
            stream.set()


class EngineServer:
    """What a router talks to, in this process or through a deployment. See `EngineClient` for what is guaranteed."""

    def __init__(self, engine: Engine, model: Path, store: StoreClient) -> None:
        """
        Args:
            model: directory of the engine's model.
            store: has the adapters, and the weights that are current.
        """
        self._engine = engine
        self._store = store
        self._model = model
        self._adapters: dict[int, AdapterVersion] = {}
        """Loaded versions, by id."""
        self._uses: Counter[int] = Counter()
        """Groups and streams that run, by id of their version."""
        self._unused = asyncio.Condition()
        """Notified when a version has lost its last use."""
        self._weights_version: WeightsVersion | None = CHECKPOINT_VERSION
        """The weights that it holds; None while it holds none whole."""
        self._weights_dropped = False
        """Whether it sleeps without them."""
        self._loading = asyncio.Lock()
        self._pause_end: asyncio.TimerHandle | None = None
        """When a pause that nobody asks about ends."""
        self._retired = ""
        """Why it is not to be used any more."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = 0
        """Groups in the engine."""
        self._claims: dict[str, RouterLease] = {}
        """By router, of those that are there."""
        self._info: EngineInfo

    async def start(self, name: str, timeout_s: float) -> None:
        """Loads the model, with the weights that are current, and samples once: an engine that cannot sample must not
        be ready.

        Raises:
            EngineArgsError, ModelNotFoundError, EngineStartError
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._engine.start()
                await self._load_current()
                await self._engine.sample_group(WARM_UP)  # takes vLLM seconds on CPU
        except TimeoutError:
            raise EngineStartError(
                f"{name}: {self._model} did not load within startup_timeout_s={timeout_s:g}. Raise it."
            ) from None
        self._info = replace(self._engine.info, incarnation=uuid.uuid4().hex)

    async def _load_current(self) -> None:
        """Loads what the store says is current, and again where another version becomes current meanwhile."""
        while (current := await self._store.base("current")) != self._weights_version:
            await self._engine.pause("keep")
            try:
                await self.load_weights(current)
            except StoreError:
                if await self._store.base("current") == current:
                    raise
            else:
                await self._engine.resume()

    async def describe(self, router: str) -> EngineInfo:
        await self.check_health()
        if self._pause_end is not None:
            self._lease()
        if router in self._claims:
            self._claims[router].renew()
        return replace(
            self._info, weights_version=self._weights_version, progress=self._engine.progress(), running=self._running
        )

    async def check_health(self) -> None:
        if self._retired:
            raise EngineDeadError(f"{self._info.name} is being replaced: {self._retired}")
        await self._engine.check_health()

    # -- sampling --------------------------------------------------------------------------------

    async def _sample_group(self, group: Group) -> SampleColumns:
        async with self._using(group.adapter):
            self._running += 1
            try:
                if group.partial is None:
                    return await self._engine.sample_group(group)
                rest = await self._engine.sample_group(_as_resume_prompt(group, group.partial))
            finally:
                self._running -= 1
            return _join_resumed(group.partial, rest, self._engine.decode)

    def _partial_output(self, group: Group, offset: int) -> PartialSample | None:
        return self._engine.partial_output(group, offset if group.partial is None else offset - len(group.partial))

    async def submit(self, session: Session, groups: Sequence[Group], more: bool = False) -> None:
        self._claim(session).runner.submit(groups, more=more)

    async def results(self, session: Session) -> AsyncGenerator[Finished, None]:
        async with contextlib.aclosing(self._claim(session).runner.results()) as items:
            async for finished in items:
                yield finished

    async def stream(self, session: Session, group: Group) -> AsyncGenerator[TextDelta, None]:
        claim = self._claim(session)
        text = TextStream(self._engine.decode, group.params.stop_strings)
        abandoned = asyncio.Event()
        async with contextlib.AsyncExitStack() as stack:
            claim.streams.add(abandoned)
            stack.callback(claim.streams.discard, abandoned)
            await stack.enter_async_context(self._using(group.adapter))
            tokens = await stack.enter_async_context(contextlib.aclosing(self._engine.stream_tokens(group)))
            async for delta in tokens:
                if abandoned.is_set():
                    raise EngineError(
                        f"{self._info.name}: the router has given this stream up, or was silent for {CLAIM_S:g} s."
                    )
                last = delta.stop_reason is not None
                new = text.push(delta.tokens, last=last, by_stop_string=delta.by_stop_string)
                if new or last:
                    yield TextDelta(text=new, finish_reason=delta.stop_reason)

    async def abort(self, session: Session, attempts: Iterable[Attempt]) -> None:
        self._claim(session).runner.abort(attempts)

    def _claim(self, session: Session) -> RouterLease:
        """Of the session's router to what it sends; renewed.

        Raises:
            EngineDeadError: the session is over.
        """
        # Serve keeps what it could not hand to a process that died; the router has placed it anew long since.
        if session.incarnation != self._info.incarnation:
            raise EngineDeadError(f"{self._info.name} was restarted.")
        claim = self._claims.get(session.router)
        if claim is None or claim.session.epoch < session.epoch:
            if claim is not None:
                claim.close()
            runner = GroupRunner(self._sample_group, self._partial_output, self._info.max_num_seqs)
            claim = self._claims[session.router] = RouterLease(session, runner, self._abandon)
        if claim.session.epoch > session.epoch:
            raise EngineDeadError(f"{self._info.name} has a later session of the same router.")
        claim.renew()
        return claim

    def _abandon(self, router: str) -> None:
        """Aborts what a router has sent."""
        claim = self._claims.pop(router)
        if running := claim.runner.running + len(claim.streams):
            logger.warning(f"router {router} is silent: what it has sent is aborted, {running} groups")
        claim.close()

    @contextlib.asynccontextmanager
    async def _using(self, adapter: AdapterVersion | None) -> AsyncGenerator[None, None]:
        """Keeps a version from being dropped."""
        if adapter is None:
            yield
            return
        if adapter.id not in self._adapters:
            raise AdapterError(f"{self._info.name} has no adapter {adapter.label}. Add it again.")
        self._uses[adapter.id] += 1
        try:
            yield
        finally:
            self._uses[adapter.id] -= 1
            if not self._uses[adapter.id]:
                del self._uses[adapter.id]
                async with self._unused:
                    self._unused.notify_all()

    # -- control ---------------------------------------------------------------------------------

    async def control(self, method: str, *args: Any) -> Any:
        assert method in CONTROLS, method
        return await getattr(self, method)(*args)

    async def load_adapter(self, version: AdapterVersion) -> None:
        """Fetches an adapter version, checks it against the model, loads it; one that is loaded is left as it is."""
        if version.id in self._adapters:
            return
        if not self._info.max_lora_rank:
            raise AdapterError(
                f"adapter {version.name!r}: LoRA is switched off. Start the service with engine_args.enable_lora: true."
            )
        if version.rank > self._info.max_lora_rank:
            raise AdapterError(
                f"adapter {version.name!r} has rank {version.rank}, the engine takes {self._info.max_lora_rank}. "
                "Raise engine_args.max_lora_rank."
            )
        files = await self._store.files(version)
        description = await asyncio.to_thread(describe_adapter, files)
        check_shapes(description, await asyncio.to_thread(weight_shapes, self._model))
        await self._engine.load_adapter(version, files)
        self._adapters[version.id] = version

    async def drop_adapter(self, version: AdapterVersion) -> None:
        """Gives a version up: at once for new groups, in the engine when the last that uses it has ended."""
        if self._adapters.pop(version.id, None) is not None:
            self._spawn(self._drop_when_unused(version))

    async def _drop_when_unused(self, version: AdapterVersion) -> None:
        async with self._unused:
            await self._unused.wait_for(lambda: not self._uses[version.id])
        await self._engine.drop_adapter(version)

    async def keep_adapters(self, ids: Iterable[int]) -> None:
        """Drops all versions but these: what a router that is gone has loaded."""
        for version in [self._adapters[known] for known in self._adapters.keys() - set(ids)]:
            await self.drop_adapter(version)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- weights ---------------------------------------------------------------------------------

    async def weight_shapes(self) -> tuple[dict[str, tuple[int, ...]], set[str]]:
        """Shape of each weight of the model by name, and names that are others of them."""
        shapes = await asyncio.to_thread(weight_shapes, self._model)
        # An output layer that is the embedding by another name: given or not, it changes nothing.
        return shapes, {"lm_head.weight"} - shapes.keys()

    async def pause(self, mode: PauseMode) -> None:
        """Has nothing sampled until `resume`, or until no router has asked after the engine for PAUSE_LEASE_S."""
        self._lease()
        await self._engine.pause(mode)

    def _lease(self) -> None:
        if self._pause_end is not None:
            self._pause_end.cancel()
        loop = asyncio.get_running_loop()
        self._pause_end = loop.call_later(PAUSE_LEASE_S, lambda: self._spawn(self._go_on(self._pause_end)))

    async def _go_on(self, lease: asyncio.TimerHandle | None) -> None:
        """Ends a pause that nobody has asked about, unless the engine holds no whole version."""
        async with self._loading:
            if self._pause_end is lease and self._weights_version is not None:
                logger.warning(f"{self._info.name} was paused, and no router has asked for it: it goes on")
                await self.resume()

    async def resume(self) -> None:
        """Ends a pause."""
        if self._pause_end is not None:
            self._pause_end.cancel()
            self._pause_end = None
        await self._engine.resume()

    async def load_weights(self, version: WeightsVersion) -> str:
        """Fetches a version of the model's own weights and loads it, bucket by bucket; it must be paused.

        Returns a checksum of what the engine has then. If it raises, the engine holds no version until the next load.
        """
        async with self._loading:
            self._weights_version = None
            async with contextlib.aclosing(_one_ahead(self._buckets(version))) as parts:
                checksum = await self._engine.load_weights(version.label, parts)
            self._weights_version = version
            if self._pause_end is not None:
                self._lease()
        return checksum

    async def _buckets(self, version: WeightsVersion) -> AsyncGenerator[Bucket, None]:
        if version == CHECKPOINT_VERSION:
            own = buckets(named_tensors(self._model), allow_nonfinite=True)
            while (bucket := await asyncio.to_thread(next, own, None)) is not None:
                yield bucket
        else:
            for index in range(len(version.buckets)):
                yield await self._store.bucket(version, index)

    async def retire(self, incarnation: str, reason: str) -> None:
        """Has the engine fail its health checks, so that its process is replaced; not the one that has replaced it."""
        if incarnation == self._info.incarnation:
            self._retired = reason

    async def reset_prefix_cache(self) -> None:
        await self._engine.reset_prefix_cache()

    async def sleep(self, level: int) -> None:
        await self._engine.sleep(level)
        # It still is known by what it held: a router would have one that holds nothing load it.
        self._weights_dropped = level == 2

    async def wake_up(self, tags: Sequence[str] | None) -> None:
        await self._engine.wake_up(tags)
        if self._weights_dropped and (tags is None or "weights" in tags):
            await self.load_weights(await self._store.base("current"))
            self._weights_dropped = False

    async def stop(self) -> None:
        if self._pause_end is not None:
            self._pause_end.cancel()
        for claim in self._claims.values():
            claim.close()
        for task in self._tasks:
            task.cancel()
        await self._engine.stop()


def _as_resume_prompt(group: Group, partial: PartialSample) -> Group:
    """A group of one sample that has begun, as one that samples the rest: what there is belongs to its prompt."""
    params, most = group.params, group.params.max_tokens
    if most is not None:
        assert len(partial) < most, (len(partial), most)
        params = replace(params, max_tokens=most - len(partial))
    return replace(group, prompt_ids=np.concatenate([group.prompt_ids, partial.tokens]), params=params, partial=None)


def _join_resumed(partial: PartialSample, rest: SampleColumns, decode: Callable[[Sequence[int]], str]) -> SampleColumns:
    """One sample out of its beginning and its rest."""
    gained = PartialSample(
        tokens=rest.tokens,
        logprobs=rest.logprobs,
        logprob_tokens=rest.logprob_tokens,
        weight_versions=rest.weight_versions[0],
    )
    whole = PartialSample.concat([partial, gained])
    return replace(
        rest,
        lengths=np.array([len(whole)], np.int32),
        tokens=whole.tokens,
        logprobs=whole.logprobs,
        logprob_tokens=whole.logprob_tokens,
        decoded=[decode(whole.tokens.tolist())],
        weight_versions=[whole.weight_versions],
    )


async def _one_ahead(items: AsyncGenerator[Bucket, None]) -> AsyncGenerator[Bucket, None]:
    """The same items; the next one is fetched while the last one is in use."""
    async with contextlib.aclosing(items):
        following = asyncio.ensure_future(anext(items, None))
        try:
            while (item := await following) is not None:
                following = asyncio.ensure_future(anext(items, None))
                yield item
        finally:
            following.cancel()
            await asyncio.wait({following})
