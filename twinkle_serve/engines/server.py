"""Serves one engine to its router: chunks, streams, adapter versions, weights, pauses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from twinkle_serve import timing
from twinkle_serve.adapter_description import AdapterDescription, describe_adapter
from twinkle_serve.checkpoint import hash_weights, named_tensors, read_model_spec
from twinkle_serve.data_format.adapters import AdapterArgument, AdapterFiles, AdapterVersion, files_of
from twinkle_serve.data_format.groups import Attempt, Chunk, EngineInfo, Group, Session, TextDelta
from twinkle_serve.data_format.samples import PartialSample, SampleColumns
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.data_format.structured_outputs import StructuredOutputs
from twinkle_serve.data_format.weights import (
    CHECKPOINT_VERSION,
    MAIN_TRACK,
    Bucket,
    ModelSpec,
    PauseMode,
    TransferStep,
    WeightsVersion,
)
from twinkle_serve.engines.adapter_checks import AdapterChecks, BaseDigests, base_keys
from twinkle_serve.engines.client import EngineClient
from twinkle_serve.engines.group_runner import Finished, GroupRunner
from twinkle_serve.engines.model_checks import require_range, require_readable
from twinkle_serve.engines.protocol import Engine
from twinkle_serve.engines.resumed import as_resume_prompt, join_resumed
from twinkle_serve.engines.router_lease import RouterLease
from twinkle_serve.engines.spans import SampleSpans
from twinkle_serve.engines.stages import OnStage, ignore_stage
from twinkle_serve.engines.text import TextStream
from twinkle_serve.engines.weights import EngineWeights
from twinkle_serve.errors import (
    AdapterError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    StoreError,
    WeightsError,
)
from twinkle_serve.lease import Lease
from twinkle_serve.packing import buckets
from twinkle_serve.tasks import BackgroundTasks
from twinkle_serve.traces import Traces
from twinkle_serve.weights import StoreClient

logger = logging.getLogger(__name__)

WARM_UP = Group(id=-1, prompt_ids=np.zeros(1, np.int32), params=DecodingParams(max_tokens=2))


class EngineServer(EngineClient):
    """Serves one engine to its router. `EngineClient` documents the methods."""

    def __init__(
        self,
        engine: Engine,
        model: Path,
        store: StoreClient,
        traces: Traces | None = None,
        *,
        track: str = MAIN_TRACK,
    ) -> None:
        """
        Args:
            model: directory of the engine's model.
            store: source of adapters and weights.
            traces: records samples; closed with this.
            track: the one whose current weights the engine begins with.
        """
        self._spans = None if traces is None else SampleSpans(traces, engine)
        self._engine = engine
        self._store = store
        self._track = track
        self._model = model
        self._adapter_checks = AdapterChecks(model)
        self._checking = asyncio.Lock()
        self._updated = BaseDigests(CHECKPOINT_VERSION)
        """Hashes of the last updated weights that an adapter was compared with."""
        self._model_spec: ModelSpec | None = None
        """Read from the model's files when it is first needed."""
        self._adapters: dict[int, AdapterVersion] = {}
        """Loaded versions, by id."""
        self._uses: Counter[int] = Counter()
        """Number of running groups and streams by adapter id."""
        self._unused = asyncio.Condition()
        """Notified when the last user of a version has ended."""
        self._weights = EngineWeights(engine, self._buckets)
        self._weights_dropped = False
        """Whether the engine sleeps without weights."""
        self._paused = False
        self._pause_lease = Lease(self._end_pause_soon)
        """Ends a pause when no router calls `describe` any more."""
        self._retired = ""
        """Why the process is to be replaced; "" if it is not."""
        self._tasks = BackgroundTasks()
        self._running = 0
        """Number of groups in the engine."""
        self._routers: dict[str, RouterLease] = {}
        """Live routers by id."""
        self._info: EngineInfo

    async def start(self, name: str, timeout_s: float, on_stage: OnStage = ignore_stage) -> None:
        """Loads the model with the current weights, and samples once: an engine that cannot sample must not be ready.

        Raises:
            EngineArgsError, ModelNotFoundError, EngineStartError
        """
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.to_thread(require_readable, name, self._model)
                await self._engine.start(on_stage)
                await asyncio.to_thread(require_range, name, self._model, self._engine.info.dtype)
                await self._load_current()
                on_stage("warming")
                await self._engine.sample_group(WARM_UP)  # takes vLLM seconds on CPU
        except TimeoutError:
            raise EngineStartError(
                f"{name}: {self._model} did not load within startup_timeout_s={timeout_s:g}. Raise it."
            ) from None
        self._info = replace(self._engine.info, incarnation=uuid.uuid4().hex)

    async def _load_current(self) -> None:
        """Loads the current weights version of its track, and again if it changes meanwhile."""
        while (current := await self._store.current_weights(self._track)) != self._weights.version:
            await self._engine.pause("keep")
            try:
                await self.load_weights(current)
            except StoreError:
                if await self._store.current_weights(self._track) == current:
                    raise
            else:
                await self._engine.resume()

    async def describe(self, router: str) -> EngineInfo:
        await self.check_health()
        if self._paused:
            self._pause_lease.renew(timing.ENGINE_PAUSE_LEASE_S)
        if router in self._routers:
            self._routers[router].renew()
        return replace(
            self._info,
            weights_version=self._weights.version,
            progress=self._engine.progress(),
            running=self._running,
            load=await self._engine.load(),
        )

    async def check_health(self) -> None:
        """Raises EngineDeadError if the process must be replaced. Serve calls this periodically."""
        if self._retired:
            raise EngineDeadError(f"{self._info.name} is being replaced: {self._retired}")
        await self._engine.check_health()

    # -- sampling --------------------------------------------------------------------------------

    async def _sample_group(self, group: Group) -> SampleColumns:
        if self._spans is None or not group.traceparent:
            return await self._sample(group)
        return await self._spans.sample(group, self._sample)

    async def _sample(self, group: Group) -> SampleColumns:
        async with self._using(group.adapter):
            self._running += 1
            try:
                if group.partial is None:
                    return await self._engine.sample_group(group)
                rest = await self._engine.sample_group(as_resume_prompt(group, group.partial))
            finally:
                self._running -= 1
            return join_resumed(group.partial, rest, group.params, self._engine.decode)

    def _partial_output(self, group: Group, offset: int, sample: int) -> PartialSample | None:
        before = 0 if group.partial is None else len(group.partial)
        return self._engine.partial_output(group, offset - before, sample)

    def _text_of(self, group: Group) -> TextStream:
        """Creates the text of a sample of a group that is reported while it runs."""
        params = group.params
        if group.updates == "whole":
            params = replace(params, skip_special_tokens=False)
        return TextStream(self._engine.decode, params, [] if group.partial is None else group.partial.tokens.tolist())

    async def submit(self, session: Session, groups: Sequence[Group], more: bool = False) -> None:
        self._lease_of(session).runner.submit(groups, more=more)

    def take(self, chunk: Chunk) -> None:
        """Starts sampling a chunk that came by message."""
        try:
            lease = self._lease_of(chunk.session)
        except EngineDeadError as over:  # `results` raises it
            logger.info(f"a chunk came after its session: {over}")
            return
        lease.runner.submit(chunk.groups, more=chunk.more)

    def chunk_was_lost(self, session: Session) -> None:
        """Makes `results` of a session raise: its router places all of its groups anew."""
        with contextlib.suppress(EngineDeadError):  # it is over
            self._lease_of(session).runner.fail(EngineDeadError(f"{self._info.name}: a chunk was lost on its way."))

    async def results(self, session: Session) -> AsyncGenerator[Finished, None]:
        async with contextlib.aclosing(self._lease_of(session).runner.results()) as items:
            async for finished in items:
                yield finished

    async def stream(self, session: Session, group: Group) -> AsyncGenerator[TextDelta, None]:
        lease = self._lease_of(session)
        text = TextStream(self._engine.decode, group.params)
        abandoned = asyncio.Event()
        async with contextlib.AsyncExitStack() as stack:
            lease.streams.add(abandoned)
            stack.callback(lease.streams.discard, abandoned)
            span = None
            if self._spans is not None and group.traceparent:
                span = stack.enter_context(self._spans.stream(group))
                group = replace(group, traceparent=span.traceparent)
            await stack.enter_async_context(self._using(group.adapter))
            tokens = await stack.enter_async_context(contextlib.aclosing(self._engine.stream_tokens(group)))
            count = 0
            async for delta in tokens:
                count += len(delta.tokens)
                if span is not None:
                    span.add(len(delta.tokens))
                if abandoned.is_set():
                    raise EngineError(
                        f"{self._info.name}: the router gave this stream up, or was silent for "
                        f"{timing.ROUTER_LEASE_S:g} s. Send the call again."
                    )
                last = delta.stop_reason is not None
                new = text.push(delta.tokens, last=last, by_stop_string=delta.by_stop_string)
                if new or last:
                    yield TextDelta(text=new, finish_reason=delta.stop_reason, tokens=count)
                    count = 0

    async def check_structured(self, structured: StructuredOutputs) -> None:
        await self._engine.check_structured(structured)

    async def abort(self, session: Session, attempts: Iterable[Attempt]) -> None:
        self._lease_of(session).runner.abort(attempts)

    def _lease_of(self, session: Session) -> RouterLease:
        """Returns the lease of the session's router, renewed.

        Raises:
            EngineDeadError: the session is over.
        """
        # Serve keeps calls that it could not hand to a process that died; the router has placed their groups anew.
        if session.incarnation != self._info.incarnation:
            raise EngineDeadError(f"{self._info.name} was restarted.")
        lease = self._routers.get(session.router)
        if lease is None or lease.session.epoch < session.epoch:
            if lease is not None:
                lease.close()
            runner = GroupRunner(self._sample_group, self._partial_output, self._info.max_num_seqs, self._text_of)
            lease = self._routers[session.router] = RouterLease(session, runner, self._abandon)
        if lease.session.epoch > session.epoch:
            raise EngineDeadError(f"{self._info.name} has a later session of the same router.")
        lease.renew()
        return lease

    def _abandon(self, router: str) -> None:
        """Aborts the groups of a router that is gone."""
        lease = self._routers.pop(router)
        if running := lease.runner.running + len(lease.streams):
            logger.warning(f"router {router} is silent: its {running} groups are aborted")
        lease.close()

    @contextlib.asynccontextmanager
    async def _using(self, adapter: AdapterVersion | None) -> AsyncGenerator[None, None]:
        """Keeps an adapter version loaded while a group or stream uses it."""
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

    async def load_adapter(self, version: AdapterVersion, files: AdapterArgument | None = None) -> None:
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
        loaded = await self._files_of(version, files)
        description = await asyncio.to_thread(describe_adapter, loaded)
        spec = await self.model_spec()
        async with self._checking:
            updated = await self._updated_base(version, description, spec)
            dtype = self._engine.info.adapter_dtype
            await asyncio.to_thread(self._adapter_checks.check, description, spec, dtype, updated)
        await self._engine.load_adapter(version, loaded)
        self._adapters[version.id] = version

    async def _files_of(self, version: AdapterVersion, files: AdapterArgument | None) -> AdapterFiles:
        if files is not None:
            with contextlib.suppress(Exception):  # of Ray: the process that shared them is gone
                return await files_of(files)
        return await self._store.files(version)

    async def _updated_base(
        self, version: AdapterVersion, adapter: AdapterDescription, spec: ModelSpec
    ) -> BaseDigests | None:
        """Returns the hashes of the weights with which the adapter's base tensors are compared; None: the checkpoint's.

        Without hashes if these weights are no longer current: an adapter is compared with them when it is added.
        """
        if not version.weights:
            return None
        current = await self._store.current_weights(self._track)
        if current.number != version.weights:
            return BaseDigests(current, outdated=True)
        if self._updated.version != current:
            self._updated = BaseDigests(current)
        known, wanted = self._updated.digests, base_keys(adapter, spec)
        try:
            async with contextlib.aclosing(self._buckets(current)) as parts:
                while not known.keys() >= wanted and (part := await anext(parts, None)) is not None:
                    known |= await asyncio.to_thread(hash_weights, part, wanted - known.keys())
        except StoreError:
            if (await self._store.current_weights(self._track)).number == version.weights:
                raise
            return BaseDigests(current, outdated=True)
        return self._updated

    async def drop_adapter(self, version: AdapterVersion) -> None:
        if self._adapters.pop(version.id, None) is not None:
            self._tasks.spawn(self._drop_when_unused(version))

    async def _drop_when_unused(self, version: AdapterVersion) -> None:
        async with self._unused:
            await self._unused.wait_for(lambda: not self._uses[version.id])
        await self._engine.drop_adapter(version)

    async def keep_adapters(self, ids: Sequence[int]) -> None:
        for version in [self._adapters[other] for other in self._adapters.keys() - set(ids)]:
            await self.drop_adapter(version)

    # -- weights ---------------------------------------------------------------------------------

    async def model_spec(self) -> ModelSpec:
        if self._model_spec is None:
            spec = await asyncio.to_thread(read_model_spec, self._model)
            self._model_spec = replace(spec, dtype=self._engine.info.dtype)
        return self._model_spec

    async def pause(self, mode: PauseMode) -> None:
        self._paused = True
        self._pause_lease.renew(timing.ENGINE_PAUSE_LEASE_S)
        await self._engine.pause(mode)

    def _end_pause_soon(self) -> None:
        self._tasks.spawn(self._end_forgotten_pause())

    async def _end_forgotten_pause(self) -> None:
        """Resumes the engine, unless it holds no weights, or a router was heard of while a load went on."""
        async with self._weights.changing:
            if self._paused and not self._pause_lease.running and self._weights.version is not None:
                logger.warning(f"{self._info.name} was paused and no router asks for it: it resumes")
                await self.resume()

    async def resume(self) -> None:
        self._paused = False
        await self._weights.drop_staged()
        self._pause_lease.end()
        await self._engine.resume()

    async def prepare_weights(self, version: WeightsVersion) -> None:
        await self._weights.prepare(version)

    async def load_weights(self, version: WeightsVersion) -> str:
        checksum = await self._weights.load(version)
        self._stay_paused()
        return checksum

    async def transfer_weights(self, step: TransferStep) -> None:
        # Serve keeps calls that it could not hand over, and may lose their cancellation.
        if not self._paused:
            raise WeightsError("the engine is not paused: the update is over.")
        if self._info.incarnation not in {target.incarnation for target in step.targets}:
            raise EngineDeadError(f"{self._info.name} was restarted.")
        await self._weights.transfer(step)
        self._stay_paused()

    async def finish_transfer(self, upload: int, version: WeightsVersion, digests: Mapping[str, str]) -> str:
        checksum = await self._weights.finish_transfer(upload, version, digests)
        self._stay_paused()
        return checksum

    def _stay_paused(self) -> None:
        """Extends a pause: a router was heard of."""
        if self._paused:
            self._pause_lease.renew(timing.ENGINE_PAUSE_LEASE_S)

    async def _buckets(self, version: WeightsVersion) -> AsyncGenerator[Bucket, None]:
        if version == CHECKPOINT_VERSION:
            tied = (await self.model_spec()).tied
            weights = ((name, tensor) for name, tensor in named_tensors(self._model) if name not in tied)
            own = buckets(weights, allow_nonfinite=True)
            while (bucket := await asyncio.to_thread(next, own, None)) is not None:
                yield bucket
        else:
            for index in range(len(version.buckets)):
                yield await self._store.bucket(version, index)

    async def retire(self, incarnation: str, reason: str) -> None:
        if incarnation == self._info.incarnation:
            self._retired = reason

    async def reset_prefix_cache(self) -> None:
        await self._engine.reset_prefix_cache()

    async def sleep(self, level: int) -> None:
        await self._engine.sleep(level)
        # `weights_version` stays: a router would make an engine without weights load them.
        self._weights_dropped = level == 2

    async def wake_up(self, tags: Sequence[str] | None) -> None:
        await self._engine.wake_up(tags)
        if self._weights_dropped and (tags is None or "weights" in tags):
            await self.load_weights(await self._store.current_weights(self._track))
            self._weights_dropped = False

    async def stop(self) -> None:
        """Aborts everything and frees the engine."""
        self._pause_lease.end()
        for lease in self._routers.values():
            lease.close()
        if self._spans is not None:
            self._spans.close()
        self._tasks.cancel()
        await self._engine.stop()
