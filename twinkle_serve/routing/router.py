"""Wires a router: admission, scheduling, adapters, weights, pauses. Free of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from twinkle_serve.adapters import read_adapter
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.adapters import AdapterFiles
from twinkle_serve.data_format.futures import Completions, FutureResult, Submission
from twinkle_serve.data_format.metrics import MetricsSink
from twinkle_serve.data_format.sample_request import (
    EncodeOptions,
    HandleOptions,
    Inputs,
    SampleRequest,
    SamplingParamsLike,
    TemplateChoice,
)
from twinkle_serve.data_format.sample_updates import UpdatesItem
from twinkle_serve.data_format.samples import SampleColumns, StopReason
from twinkle_serve.data_format.status import SamplerStatus
from twinkle_serve.data_format.telemetry import CallInfo, TelemetryReport
from twinkle_serve.data_format.token_lists import TokenLists
from twinkle_serve.data_format.weights import (
    PAUSE_MODES,
    BucketArgument,
    PauseMode,
    TransferCall,
    TransferOffer,
    TransferPlan,
)
from twinkle_serve.engines.client import EngineClient
from twinkle_serve.engines.group_runner import PartialUpdate
from twinkle_serve.errors import EngineDeadError, RequestError, ServiceError, TwinkleServeError, UnsupportedError
from twinkle_serve.routing.adapter_loading import AdapterLoader
from twinkle_serve.routing.adapter_publishing import AdapterPublisher
from twinkle_serve.routing.adapters import Adapters
from twinkle_serve.routing.admission import Admission
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.routing.calls import Rate
from twinkle_serve.routing.encoding_thread import EncodingThread
from twinkle_serve.routing.futures import Futures
from twinkle_serve.routing.groups import RoutedGroup
from twinkle_serve.routing.lifecycle import EngineLifecycle
from twinkle_serve.routing.membership import EngineMembership
from twinkle_serve.routing.pause import CallerPauses, PauseCoordinator
from twinkle_serve.routing.request import Request
from twinkle_serve.routing.scheduler import GroupScheduler
from twinkle_serve.routing.telemetry import PERIOD_S, RouterState, Telemetry
from twinkle_serve.routing.templates import TemplateCache
from twinkle_serve.routing.tokenization import Tokenization
from twinkle_serve.routing.tracks import Tracks
from twinkle_serve.routing.updates import WeightUpdates
from twinkle_serve.sessions import SessionInfo, SessionRecord, SessionsAPI
from twinkle_serve.traces import Traces
from twinkle_serve.validation import one_of, positive, seconds
from twinkle_serve.weights import StoreClient

logger = logging.getLogger(__name__)


class Router(RouterAPI):
    """Sends prompts to engines and gathers their samples.

    Guarantees:
        Every accepted prompt yields exactly `num_samples` sequences, unless it is cancelled, or the call raises.
        Cancelling a call or one of its prompts, its deadline, or its caller's silence aborts its sequences in the
            engines.
        An engine's death loses no sample; see `GroupScheduler`.
        The queue is bounded; a call beyond its limits is refused at once.
        A request is sampled by engines of its track alone, with the adapter version that its name meant when it was
            admitted.
        Every sample names the versions of the model's own weights that sampled its tokens.
        The router that replaces this one resolves names as this one did: the store keeps them.
    Does not guarantee:
        The order in which prompts finish.
        That a request survives this process. `sampler.client.ServiceClient` sends it again, under the same id.
    """

    def __init__(
        self,
        args: ServiceArgs,
        model: Path,
        engines: Mapping[str, EngineClient],
        store: StoreClient,
        *,
        sessions: SessionsAPI | None = None,
        engines_return: bool = True,
        sink: MetricsSink | None = None,
        traces: Traces | None = None,
    ) -> None:
        """Creates a router; `start` must be called before anything else, on the event loop that it runs on.

        Args:
            model: directory of the model; its weights may be missing.
            engines: by name, in the order of their numbers.
            store: source of adapters and weights, the same that the engines use.
            sessions: the conversations of a gateway's clients; None where there is no gateway.
            engines_return: whether an engine that dies is replaced; if not, its requests fail.
            sink: takes the metrics of `data_format.metrics`.
            traces: records calls; closed with this.

        Raises:
            ModelNotFoundError: the model has no tokenizer.
        """
        self._args, self._clients, self._engines_return = args, engines, engines_return
        self._telemetry, self._traces = Telemetry(sink), traces
        self._store, self._sessions = store, sessions
        self._templates = TemplateCache(model, args)
        self._encoding = EncodingThread()
        self._requests: dict[int, Request] = {}
        """Live requests by the ids of the groups that they wait for."""
        self._rate = Rate()
        """Tokens that engines return."""
        self._adapters: Adapters
        self._engines: EngineMembership
        self._lifecycle: EngineLifecycle
        self._scheduler: GroupScheduler
        self._publisher: AdapterPublisher
        self._admission: Admission
        self._futures: Futures
        self._tokenization: Tokenization
        self._pause_coordinator: PauseCoordinator
        self._pauses: CallerPauses
        self._updates: WeightUpdates

    async def start(self) -> None:
        """Recovers the state of an earlier router from the store, and adds the adapters of the config.

        Raises:
            AdapterError: an adapter of the config cannot be read.
            StoreError: the store cannot be reached or written.
        """
        args = self._args
        self._adapters = await self._recover_adapters()
        weights = await self._store.recover_weights()
        self._engines = EngineMembership(
            self._clients,
            self._adapters,
            Tracks(args.track_names, args.tracks_of(list(self._clients)), weights.current),
            current_weights=self._store.current_weights,
            load_timeout_s=args.startup_timeout_s,
            stall_timeout_s=args.stall_timeout_s,
            engines_return=self._engines_return,
            telemetry=self._telemetry,
        )
        loader = AdapterLoader(self._engines, self._adapters)
        self._scheduler = GroupScheduler(
            self._engines,
            loader,
            wanted=self._requests.__contains__,
            deliver=self._deliver,
            fail=self._fail,
            deliver_updates=self._deliver_updates,
            restart=self._restart,
            on_sent=self._count_sent,
            telemetry=self._telemetry,
            policy=args.policy,
            resume=args.failover == "resume",
        )
        self._lifecycle = EngineLifecycle(self._engines)
        self._publisher = AdapterPublisher(
            self._adapters, self._store, self._engines, loader, timeout_s=args.startup_timeout_s
        )
        self._admission = Admission(
            args,
            self._templates,
            self._encoding,
            self._engines,
            self._scheduler,
            self._publisher,
            self._requests,
            self._rate,
            self._telemetry,
            on_complete=self._report_staleness,
            traces=self._traces,
        )
        self._futures = Futures(args.futures, self._run_admitted)
        self._tokenization = Tokenization(self._encoding, self._admission.template)
        self._pause_coordinator = PauseCoordinator(self._engines)
        self._pauses = CallerPauses(self._engines, self._pause_coordinator)
        self._updates = WeightUpdates(
            self._store, self._engines, self._pause_coordinator, weights.kept, telemetry=self._telemetry
        )
        self._engines.spawn(self._keep_telemetry())

    async def _recover_adapters(self) -> Adapters:
        kept = self._args.adapter_versions
        published = await self._store.published()
        adapters = Adapters({name: versions[-kept:] for name, versions in published.items()}, kept)
        await self._store.drop([version for versions in published.values() for version in versions[:-kept]])
        for name, path in self._args.adapters.items():
            files = await asyncio.to_thread(read_adapter, path)
            if name in published and published[name][-1].checksum == files.checksum():
                continue
            version = await self._store.put(name, files, track=self._args.track_names[0])
            await self._store.publish(version)
            await self._store.drop(adapters.publish(version))
        return adapters

    def close(self) -> None:
        """Stops all background work; running calls are cancelled by their callers."""
        self._futures.close()
        self._engines.close()
        if self._traces is not None:
            self._traces.close()
        self._encoding.close()

    # -- sampling --------------------------------------------------------------------------------

    async def sample(
        self,
        inputs: Inputs,
        sampling_params: SamplingParamsLike | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        **options: Unpack[HandleOptions],
    ) -> SampleResponse:
        """Samples each input, for callers by handle: `handle.sample.remote(trajectories, params, num_samples=4)`.

        Args:
            options: the other fields of `SampleRequest`.
        """
        return await self.run(SampleRequest.of(inputs, sampling_params, adapter_name, adapter_path, options))

    async def sample_iter(
        self,
        inputs: Inputs,
        sampling_params: SamplingParamsLike | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        **options: Unpack[HandleOptions],
    ) -> AsyncGenerator[SampleResponse, None]:
        """As `sample`, but yields responses over prompts as they finish: each prompt once, in any order."""
        request = SampleRequest.of(inputs, sampling_params, adapter_name, adapter_path, options)
        async with contextlib.aclosing(self.run_iter(request)) as responses:
            async for response in responses:
                yield response

    async def sample_updates(
        self,
        inputs: Inputs,
        sampling_params: SamplingParamsLike | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        **options: Unpack[HandleOptions],
    ) -> AsyncGenerator[UpdatesItem, None]:
        """As `sample_iter`, but also yields new tokens while samples run; see `RouterAPI.run_updates`."""
        request = SampleRequest.of(inputs, sampling_params, adapter_name, adapter_path, options)
        async with contextlib.aclosing(self.run_updates(request)) as items:
            async for item in items:
                yield item

    async def sample_stream(
        self,
        inputs: Inputs,
        sampling_params: SamplingParamsLike | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        **options: Unpack[HandleOptions],
    ) -> AsyncGenerator[tuple[str, StopReason | None], None]:
        """Samples one prompt once and yields (text, finish_reason) as the text arrives."""
        request = SampleRequest.of(inputs, sampling_params, adapter_name, adapter_path, options)
        async with contextlib.aclosing(self.run_stream(request)) as deltas:
            async for delta in deltas:
                yield delta

    async def run(self, request: SampleRequest) -> SampleResponse:
        return await self._run_admitted(request, lambda: None)

    async def _run_admitted(self, request: SampleRequest, on_admission: Callable[[], None]) -> SampleResponse:
        async with self._admission.admitted(request) as admitted:
            on_admission()
            return await admitted.response()

    async def run_iter(self, request: SampleRequest) -> AsyncGenerator[SampleResponse, None]:
        async with self._admission.admitted(request) as admitted:
            async for response in admitted.prompts_as_they_finish():
                yield response

    async def run_updates(self, request: SampleRequest) -> AsyncGenerator[UpdatesItem, None]:
        async with self._admission.admitted(replace(request, updates=True)) as admitted:
            yield admitted.begun()
            async with contextlib.aclosing(admitted.updates_and_prompts()) as items:
                async for item in items:
                    yield item

    async def run_stream(self, request: SampleRequest) -> AsyncGenerator[tuple[str, StopReason | None], None]:
        async with (
            self._admission.admitted_stream(request) as (group, deadline, active),
            contextlib.aclosing(self._scheduler.stream(group)) as deltas,
        ):
            while True:
                # Around each step alone: a timeout must not be held across a yield.
                async with active.step(deadline):
                    delta = await anext(deltas, None)
                if delta is None:
                    return
                yield delta.text, delta.finish_reason

    async def cancel(self, request_id: str, inputs: Sequence[int] | None = None) -> int:
        return self._admission.cancel(request_id, inputs)

    async def renew(self, request_ids: Sequence[str], lease_s: float) -> None:
        self._admission.renew(request_ids, lease_s)

    async def check_template(self, template: TemplateChoice) -> None:
        await self._admission.template(template)

    # -- calls without a waiting caller ------------------------------------------------------------

    async def submit(self, submission: Submission) -> int:
        return await self._futures.submit(submission)

    async def incarnation(self) -> int:
        return self._futures.incarnation

    async def collect(self, ids: Sequence[str], wait_s: float) -> list[FutureResult]:
        return await self._futures.collect(ids, wait_s)

    async def completions(self, group: str, after: int, wait_s: float) -> Completions:
        return await self._futures.completions(group, after, wait_s)

    async def report_lost(self, incarnation: int, group: str, ids: Sequence[str]) -> None:
        self._futures.report_lost(incarnation, group, ids)

    async def forget(self, ids: Sequence[str]) -> None:
        self._futures.forget(ids)

    async def renew_futures(self, session: str) -> bool:
        return self._futures.renew_futures(session)

    async def end_futures(self, session: str) -> None:
        self._futures.end_futures(session)

    # -- tokens ----------------------------------------------------------------------------------

    async def encode(self, inputs: Inputs, **options: Unpack[EncodeOptions]) -> TokenLists:
        return await self._tokenization.encode(inputs, **options)

    async def count_tokens(self, inputs: Inputs, **options: Unpack[EncodeOptions]) -> list[int]:
        return (await self._tokenization.encode(inputs, **options)).lengths

    async def decode(
        self, token_ids: object, *, template: TemplateChoice = None, skip_special_tokens: bool = False
    ) -> str | list[str]:
        return await self._tokenization.decode(token_ids, template, skip_special_tokens)

    # -- adapters --------------------------------------------------------------------------------

    async def add_adapter(self, name: str, source: AdapterFiles | str) -> str:
        label = await self._publisher.add(name, source)
        self._telemetry.event("adapter", f"{label} is loaded")
        return label

    async def remove_adapter(self, name: str) -> None:
        await self._publisher.remove(name)
        self._telemetry.event("adapter", f"{name} is removed")

    # -- weights ---------------------------------------------------------------------------------

    async def begin_weights(
        self, label: str, mode: PauseMode, durable: bool = True, track: str = "", direct: bool = False
    ) -> int:
        one_of("mode", mode, PAUSE_MODES)  # before anything is sent
        self._admission.require_awake()
        return await self._updates.begin(label, self._engines.tracks.named(track), durable, direct)

    async def append_weights(self, upload: int, index: int, bucket: BucketArgument) -> None:
        await self._updates.append(upload, index, bucket)

    async def offer_weights(self, kind: str, track: str = "") -> TransferOffer:
        return await self._updates.offer(self._engines.tracks.named(track), kind)

    async def publish_weights(
        self, upload: int, mode: PauseMode, timeout_s: float, plan: TransferPlan | None = None
    ) -> str:
        self._admission.require_awake()
        return await self._updates.publish(upload, mode, timeout_s, plan)

    async def transfer_weights(self, upload: int, call: TransferCall, info: Any = None) -> None:
        await self._updates.transfer(upload, call, info)

    async def use_weights(self, label: str, mode: PauseMode, timeout_s: float, track: str = "") -> str:
        self._admission.require_awake()
        named = self._engines.tracks.named(track)
        return await self._updates.use(label, named, mode, positive("timeout_s", timeout_s))

    async def weights_buckets(self, label: str) -> list[str]:
        return list((await self._store.find_weights(label)).buckets)

    async def abandon_weights(self, upload: int, reason: str = "the trainer gave the update up.") -> None:
        await self._updates.abandon(upload, reason)

    async def pause(self, mode: PauseMode, lease_s: float) -> int:
        self._admission.require_awake()
        return await self._pauses.pause(mode, lease_s)

    async def renew_pause(self, pause: int, lease_s: float) -> None:
        await self._pauses.renew(pause, lease_s)

    async def resume(self, pause: int) -> None:
        await self._pauses.resume(pause)

    async def state_keys(self) -> list[str]:
        model = await self._engines.call_any(lambda client: client.model_spec())
        return sorted(model.weights)

    # -- sessions --------------------------------------------------------------------------------

    async def read_sessions(self, sessions: Sequence[str]) -> list[SessionRecord]:
        return await asyncio.gather(*map(self._known_sessions.read_session, sessions))

    async def list_sessions(self) -> list[SessionInfo]:
        return await self._known_sessions.list_sessions()

    async def end_sessions(self, sessions: Sequence[str]) -> list[bool]:
        return await asyncio.gather(*map(self._known_sessions.end_session, sessions))

    @property
    def _known_sessions(self) -> SessionsAPI:
        if self._sessions is None:
            raise UnsupportedError(
                "sessions are conversations through a gateway, and this sampler's engine is in the process of its "
                "caller. Deploy it as a service."
            )
        return self._sessions

    # -- control ---------------------------------------------------------------------------------

    async def reset_prefix_cache(self) -> None:
        await self._engines.call_all(lambda client: client.reset_prefix_cache())

    async def sleep(self, level: int = 1) -> None:
        if isinstance(level, bool) or level not in (1, 2):
            raise RequestError(f"level must be 1 or 2, got {level!r}.")
        if running := self._admission.running + self._scheduler.sequences:
            raise RequestError(f"{running} requests are running: sleep would lose them. Wait for them, or cancel them.")
        if self._engines.paused:
            raise RequestError("the engines are paused, or are loading weights. Wait for the end of that.")
        self._admission.asleep = True
        try:
            await self._pause_coordinator.change("sleep", lambda client: client.sleep(level))
        except BaseException:
            self._admission.asleep = False
            with contextlib.suppress(TwinkleServeError):  # those that could not sleep are awake
                await self._pause_coordinator.change("wake_up", lambda client: client.wake_up(None))
            raise

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        if tags is not None and (
            not isinstance(tags, (list, tuple)) or any(tag not in ("weights", "kv_cache") for tag in tags)
        ):
            raise RequestError(f"tags must be a list of weights and kv_cache, got {tags!r}.")
        await self._pause_coordinator.change("wake_up", lambda client: client.wake_up(tags))
        if tags is None or "kv_cache" in tags:
            self._admission.asleep = False

    def set_engines(self, engines: Mapping[str, EngineClient], tracks: Mapping[str, str] | None = None) -> None:
        """See `EngineLifecycle.set_engines`. Without `tracks`, all engines belong to the first one."""
        first = self._args.track_names[0]
        self._lifecycle.set_engines(engines, dict.fromkeys(engines, first) if tracks is None else tracks)

    async def drain_engine(self, name: str, timeout_s: float) -> None:
        await self._lifecycle.drain(name, seconds("timeout_s", timeout_s))
        self._telemetry.event("engine drained", "it gets no more prompts", name)

    async def undrain_engine(self, name: str) -> None:
        await self._lifecycle.undrain(name)

    async def restart_engine(self, name: str, drain_timeout_s: float, timeout_s: float) -> None:
        await self._lifecycle.restart(
            name, seconds("drain_timeout_s", drain_timeout_s), seconds("timeout_s", timeout_s)
        )

    async def purge(self) -> None:
        if self._args.state_dir is None:
            published = await self._store.published()
            await self._store.drop([version for versions in published.values() for version in versions])
            await self._store.purge_weights()
            if self._sessions is not None:
                await self._sessions.purge_sessions()

    async def telemetry(self, since: float = 0.0) -> TelemetryReport:
        return self._telemetry.report(since)

    async def calls(self) -> list[CallInfo]:
        return self._admission.infos()

    async def _keep_telemetry(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                self._telemetry.tick(self._state())
            except Exception:
                logger.exception("a bug in the router's telemetry")

    def _state(self) -> RouterState:
        return RouterState(
            running_calls=self._admission.running,
            waiting=self._scheduler.waiting,
            waiting_tokens=self._scheduler.waiting_tokens,
            tracks=self._engines.tracks,
            engines=self._engines.status(),
            loads={name: engine.load for name, engine in self._engines.active.items()},
        )

    async def status(self) -> SamplerStatus:
        return {
            "model_id": self._args.model_id,
            "template": self._args.template.model_dump(),
            "request_timeout_s": self._args.request_timeout_s,
            "engines": self._engines.status(),
            "groups_waiting": self._scheduler.waiting,
            "paused": self._engines.paused,
            "asleep": self._admission.asleep,
            "weights": self._engines.tracks.named("").weights.label,
            "tracks": {track.name: track.weights.label for track in self._engines.tracks},
            "weights_versions": self._updates.kept,
            "adapters": {name: version.label for name, version in self._adapters.newest.items()},
            "adapter_versions": self._adapters.labels,
            "requests": self._admission.running,
        }

    # -- results of engines ----------------------------------------------------------------------

    def _deliver(self, columns: SampleColumns) -> None:
        """Hands samples of any number of groups to their requests."""
        self._rate.add(len(columns.tokens))
        rows_of: dict[Request, list[int]] = {}
        for row, group_id in enumerate(columns.group.tolist()):
            if (request := self._requests.get(group_id)) is not None:
                rows_of.setdefault(request, []).append(row)
        for request, rows in rows_of.items():
            if request.is_read:  # a short sample ends before its first update
                self._count_first_token(request)
            try:
                not_needed = request.add(columns if len(rows) == len(columns) else columns.take(rows))
                if not_needed:
                    self._admission.drop(request, not_needed)
            except EngineDeadError as error:
                self._admission.fail(request, error)
            except Exception as error:  # a bug of ours; other requests must still get their samples
                logger.exception("samples could not be handed to their request")
                request.fail(ServiceError(f"a bug in the router: {error!r}"))

    def _count_first_token(self, request: Request) -> None:
        if not request.has_tokens:
            request.has_tokens = True
            self._telemetry.first_token(asyncio.get_running_loop().time() - request.admitted_at)

    def _count_sent(self, groups: Sequence[RoutedGroup], now: float) -> None:
        """Counts the first parts of prompts that are sent to an engine for the first time."""
        find = self._requests.get
        first = [
            (group, now - request.admitted_at)
            for group in groups
            if not (group.first_sample or group.attempts) and (request := find(group.id)) is not None
        ]
        self._telemetry.sent(seconds for _, seconds in first)
        if self._traces is not None:
            for group, seconds in first:
                if group.traceparent:
                    self._traces.record("router.queue", group.traceparent, seconds, prompt=group.input)

    def _deliver_updates(self, updates: Sequence[PartialUpdate]) -> None:
        """Hands new tokens of running samples to their requests."""
        for update in updates:
            if (request := self._requests.get(update.attempt[0])) is not None:
                self._count_first_token(request)
                try:
                    request.add_update(update)
                except EngineDeadError as error:
                    self._admission.fail(request, error)

    def _restart(self, group: RoutedGroup) -> None:
        """Tells a request that samples of it start anew, or fails it."""
        if (request := self._requests.get(group.id)) is not None:
            try:
                request.restart(group)
            except EngineDeadError as error:
                self._admission.fail(request, error)

    def _fail(self, group_id: int, error: TwinkleServeError) -> None:
        if (request := self._requests.get(group_id)) is not None:
            self._admission.fail(request, error)

    def _report_staleness(self, request: Request) -> None:
        """Reports how stale a finished request is, by its adapter if it has one, else by the weights of its track."""
        adapter = request.adapter
        if adapter is None:
            track = self._engines.tracks.named(request.track)
            self._telemetry.stale("", track.staleness(request.weight_versions))
        elif (versions := self._publisher.staleness(adapter)) is not None:
            self._telemetry.stale(adapter.name, versions)
