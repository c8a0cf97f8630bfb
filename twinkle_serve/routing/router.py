"""Admits requests, sends groups to engines, gathers samples. Free of Ray: it sees engines through `EngineClient`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinkle_serve.adapters import read_adapter
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format import SampleResponse, SamplingParams
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.groups import EngineInfo, Group
from twinkle_serve.data_format.inputs import PackedInputs, as_list
from twinkle_serve.data_format.samples import SampleColumns, StopReason
from twinkle_serve.data_format.sampling_params import UNSET, Unset
from twinkle_serve.data_format.weights import PauseMode
from twinkle_serve.engines.base import check_fits
from twinkle_serve.errors import (
    AdapterError,
    DeadlineError,
    EngineError,
    QueueFullError,
    RequestError,
    SamplingParamsError,
    StoreError,
    TwinkleServeError,
)
from twinkle_serve.routing.adapters import Adapters, fingerprint
from twinkle_serve.routing.calls import ActiveCall, CallRegistry, Rate, seconds
from twinkle_serve.routing.engine_client import EngineClient
from twinkle_serve.routing.membership import EngineMembership
from twinkle_serve.routing.pause import PauseCoordinator
from twinkle_serve.routing.request import Request, ResponseHeader
from twinkle_serve.routing.scheduler import GroupScheduler
from twinkle_serve.routing.seeds import SPACING, prompt_seed
from twinkle_serve.routing.templates import TemplateCache, TemplateChoice
from twinkle_serve.routing.updates import Pauses, WeightUpdates, require_mode
from twinkle_serve.template import Template
from twinkle_serve.template.prompts import Prompt, encode_inputs
from twinkle_serve.weights import StoreClient

logger = logging.getLogger("ray.serve")

MAX_PATHS = 16
"""Adapters that are known by their path alone; the one that was used least recently is forgotten."""


class Router:
    """Sends prompts to engines and gathers what they sampled.

    Guarantees: every accepted prompt yields exactly `num_samples` sequences, or the call raises.
    Guarantees: cancelling the call or a group of it, its deadline, or its caller's silence aborts its sequences in the
        engines.
    Guarantees: an engine's death loses no sample; see `GroupScheduler`.
    Guarantees: what waits is bounded; a call beyond that is refused at once.
    Guarantees: a request is sampled by the adapter version that its name meant when it was admitted.
    Guarantees: every sample names the versions of the model's own weights that sampled it, and their tokens.
    Guarantees: what a name means, it means again to the router that replaces this one; the store has it.
    Does not guarantee: the order in which prompts finish.
    Does not guarantee: that a request survives this process. `ServiceBackend` sends it again, under the same id.
    """

    def __init__(
        self,
        args: ServiceArgs,
        model: Path,
        links: Mapping[str, EngineClient],
        store: StoreClient,
        *,
        engines_return: bool = True,
        observe_staleness: Callable[[str, int], None] = lambda name, versions: None,
    ) -> None:
        """Must be called on the event loop that it is to live on, and `start` before anything else.

        Args:
            model: directory of the model; its weights need not be there.
            store: has adapters and weights; the engines fetch them there.
            engines_return: whether somebody replaces an engine that dies; else requests are not kept for it.
            observe_staleness: told of each finished request its adapter's name, "" for none, and how many versions
                newer than the one that sampled it there are by then: of the adapter, or of the model's own weights.

        Raises:
            ModelNotFoundError: it has no tokenizer.
        """
        self._args = args
        self._observe_staleness = observe_staleness
        self._links, self._engines_return = links, engines_return
        self._store = store
        self._templates = TemplateCache(model, args)
        self._adapters: Adapters
        self._engines: EngineMembership
        self._pool: GroupScheduler
        self._pause_coordinator: PauseCoordinator
        self._updates: WeightUpdates
        self._pauses: Pauses
        self._paths: OrderedDict[str, tuple[tuple[int, int], ...]] = OrderedDict()
        """Adapters by path, the last used last: what their files looked like when they were read."""
        self._adding = asyncio.Lock()
        """Adapters are added one after the other, so that versions of a name are published in their order."""
        # At random, so that it meets no group of a router that this one replaces.
        self._next_id = random.getrandbits(40) << 20
        # One thread: tokenizers are not safe in several, and the event loop must not wait for them.
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._requests: dict[int, Request] = {}
        """Live requests, by the ids of the groups that they wait for."""
        self._live = CallRegistry(self._give_up_request)
        self._rate = Rate()
        """Tokens that engines hand back."""
        self._streams: set[int] = set()
        """Group ids of the streams that run; they are in no queue."""
        self._asleep = False

    async def start(self) -> None:
        """Takes over what the store has, and adds the adapters of the config that it lacks.

        Raises:
            AdapterError: an adapter of the config cannot be read.
            StoreError: the store cannot be reached or written.
        """
        kept = self._args.adapter_versions
        published = await self._store.published()
        self._adapters = Adapters({name: versions[-kept:] for name, versions in published.items()}, kept)
        await self._store.drop([version for versions in published.values() for version in versions[:-kept]])
        for name, path in self._args.adapters.items():
            files = await asyncio.to_thread(read_adapter, path)
            if name in published and published[name][-1].checksum == files.checksum():
                continue
            version = await self._store.put(name, files)
            await self._store.publish(version)
            await self._store.drop(self._adapters.publish(version))
        base, labels = await self._store.base("recover")
        self._engines = EngineMembership(
            self._links,
            self._adapters,
            base,
            current=lambda: self._store.base("current"),
            load_timeout_s=self._args.startup_timeout_s,
            stall_timeout_s=self._args.stall_timeout_s,
            engines_return=self._engines_return,
        )
        self._pool = GroupScheduler(
            self._engines,
            wanted=self._requests.__contains__,
            deliver=self._deliver,
            fail=self._fail,
            policy=self._args.policy,
            resume=self._args.failover == "resume",
        )
        self._pause_coordinator = PauseCoordinator(self._engines)
        self._updates = WeightUpdates(self._store, self._engines, self._pause_coordinator, labels)
        self._pauses = Pauses(self._engines, self._pause_coordinator)

    def close(self) -> None:
        """Stops following engines; running calls are cancelled by whoever made them."""
        self._engines.close()
        self._encoding.shutdown(wait=False, cancel_futures=True)

    # -- sampling --------------------------------------------------------------------------------

    async def sample(self, *args: Any, **options: Any) -> SampleResponse:
        """Samples each input; the arguments are the fields of `Call`."""
        async with self._admitted(Call(*args, **options)) as request:
            return await request.response()

    async def sample_iter(self, *args: Any, **options: Any) -> AsyncGenerator[SampleResponse, None]:
        """As `sample`, but yields responses over prompts as they finish: each prompt once, in any order."""
        async with self._admitted(Call(*args, **options)) as request:
            async for response in request.prompts_as_they_finish():
                yield response

    async def sample_stream(self, *args: Any, **options: Any) -> AsyncGenerator[tuple[str, StopReason | None], None]:
        """One sample of one prompt as (text, finish_reason), as it comes; finish_reason is None until the last.

        Closing the iterator aborts the sample. An engine that dies before the first text is replaced by another;
        afterwards its death is an EngineDeadError.
        """
        call = Call(*args, **options)
        limit_s = self._limit_s(call)
        self._require_room()
        deadline = asyncio.get_running_loop().time() + limit_s
        try:
            async with asyncio.timeout_at(deadline):
                validated = await self._validate(call)
            with self._holding(validated.adapter):
                group = self._streamed(validated)
                self._streams.add(group.id)
                try:
                    async with contextlib.aclosing(self._pool.stream(group)) as deltas:
                        while True:
                            # Around each step alone: a timeout must not be held across a yield.
                            async with asyncio.timeout_at(deadline):
                                delta = await anext(deltas, None)
                            if delta is None:
                                return
                            yield delta.text, delta.finish_reason
                finally:
                    self._streams.discard(group.id)
        except TimeoutError:
            raise DeadlineError(f"timeout_s={limit_s:g} passed in a stream. Raise it or ask for less.") from None

    def _streamed(self, validated: _ValidatedCall) -> Group:
        """The only group of a stream."""
        prompts, params = validated.prompts, validated.params
        if len(prompts) != 1 or params.num_samples != 1:
            raise RequestError(
                f"sample_stream takes one prompt and one sample, got {len(prompts)} and {params.num_samples}. "
                "Use sample_iter for more."
            )
        self._require_awake()
        return Group(
            id=self._take_ids(1),
            prompt_ids=prompts[0].ids,
            params=params,
            seed=None if params.seed is None else prompt_seed(params.seed, prompts[0].index),
            adapter=validated.adapter,
        )

    # -- adapters --------------------------------------------------------------------------------

    async def add_adapter(self, name: str, source: AdapterFiles | str) -> str:
        """Loads an adapter on every engine, then has its name mean it. Returns `name@version`.

        Guarantees: all engines in use or none; until it returns, and if it raises, the name means what it meant.

        Args:
            source: a directory on this node, or the files themselves.

        Raises:
            AdapterError: it cannot be read, is not of this model, is too large, or LoRA is off.
        """
        try:
            async with asyncio.timeout(self._args.startup_timeout_s), self._adding:
                return await self._add(name, source)
        except TimeoutError:
            raise DeadlineError(
                f"adapter {name!r} was not loaded within startup_timeout_s={self._args.startup_timeout_s:g}; "
                f"{self._engines.ready} of {self._engines.size} engines are up. Its name means what it meant."
            ) from None

    async def _add(self, name: str, source: AdapterFiles | str, *, is_path: bool = False) -> str:
        await self._engines.wait_for_info()
        files = source if isinstance(source, AdapterFiles) else await asyncio.to_thread(read_adapter, source)
        version = await self._store.put(name, files, is_path=is_path)
        try:
            await self._engines.load(version)
            await self._store.publish(version)
        except BaseException:
            self._give_up([version])
            raise
        self._give_up(self._adapters.publish(version))
        return version.label

    def _give_up(self, versions: Sequence[AdapterVersion]) -> None:
        """Has engines and store drop versions that no name means and no request uses."""
        if versions:
            self._engines.drop(versions)
            self._engines.spawn(self._forgotten(versions))

    async def _forgotten(self, versions: Sequence[AdapterVersion]) -> None:
        try:
            await self._store.drop(versions)
        except StoreError as error:  # the next router drops them
            logger.warning(f"the store keeps {', '.join(version.label for version in versions)}: {error}")

    async def remove_adapter(self, name: str) -> None:
        """Takes an adapter's name away. Requests that were admitted with it finish on it.

        Raises:
            AdapterError: no such adapter.
            StoreError: the store cannot be reached or written; the name still means what it meant.
        """
        self._adapters.require(name)
        await self._store.withdraw(name)
        self._give_up(self._adapters.remove(name))
        self._paths.pop(name, None)

    async def _adapter_at(self, path: str) -> AdapterVersion:
        """The adapter in a directory; read again only where its files have changed."""
        path, now = await asyncio.to_thread(fingerprint, path)
        if self._paths.get(path) != now or not now:
            async with self._adding:
                if self._paths.get(path) != now or not now:  # nobody else has just read it
                    await self._add(path, path, is_path=True)
                    self._paths[path] = now
        self._paths.move_to_end(path)
        version = self._adapters.resolve(path)
        while len(self._paths) > MAX_PATHS:
            await self.remove_adapter(next(iter(self._paths)))
        return version

    @contextlib.contextmanager
    def _holding(self, adapter: AdapterVersion | None) -> Any:
        """Keeps a version while a request uses it."""
        if adapter is None:
            yield
            return
        self._adapters.acquire(adapter)
        try:
            yield
        finally:
            self._give_up(self._adapters.release(adapter))

    # -- weights ---------------------------------------------------------------------------------

    async def begin_weights(self, label: str, mode: PauseMode) -> int:
        """See `WeightUpdates.begin`; a wrong mode is said before anything is sent."""
        require_mode(mode)
        self._require_awake()
        return await self._updates.begin(label)

    async def append_weights(self, upload: int, index: int, bucket: Any) -> None:
        """See `WeightUpdates.append`."""
        await self._updates.append(upload, index, bucket)

    async def publish_weights(self, upload: int, mode: PauseMode, timeout_s: float) -> str:
        """See `WeightUpdates.publish`."""
        self._require_awake()
        return await self._updates.publish(upload, mode, timeout_s)

    async def abandon_weights(self, upload: int) -> None:
        """See `WeightUpdates.abandon`."""
        await self._updates.abandon(upload)

    async def pause(self, mode: PauseMode, lease_s: float) -> int:
        """See `Pauses.pause`."""
        self._require_awake()
        return await self._pauses.pause(mode, lease_s)

    async def renew_pause(self, lease: int, lease_s: float) -> None:
        """See `Pauses.renew`."""
        await self._pauses.renew(lease, lease_s)

    async def resume(self, lease: int) -> None:
        """See `Pauses.resume`."""
        await self._pauses.resume(lease)

    # -- control ---------------------------------------------------------------------------------

    async def state_keys(self) -> list[str]:
        """Names of the model's weights, as its checkpoint has them."""
        shapes, _ = await self._engines.call_any("weight_shapes")
        return sorted(shapes)

    async def check_template(self, template: TemplateChoice) -> None:
        """Builds a template, so that what is wrong with it is said before it is used.

        Raises:
            TemplateError
        """
        await self._template(template)

    async def reset_prefix_cache(self) -> None:
        """On every engine."""
        await self._engines.call_all("reset_prefix_cache")

    async def sleep(self, level: int = 1) -> None:
        """Frees the engines' device memory until `wake_up`; calls are refused meanwhile.

        Raises:
            RequestError: requests are running.
            UnsupportedError: the engines cannot.
        """
        if level not in (1, 2):
            raise RequestError(f"level must be 1 or 2, got {level!r}.")
        if running := self._running + self._pool.sequences:
            raise RequestError(f"{running} requests are running: sleep would lose them. Wait for them, or cancel them.")
        if self._engines.paused:
            raise RequestError("the engines are paused, or are loading weights. Wait for the end of that.")
        self._asleep = True
        try:
            await self._pause_coordinator.change("sleep", level)
        except BaseException:
            self._asleep = False
            with contextlib.suppress(TwinkleServeError):  # those that could not sleep are awake
                await self._pause_coordinator.change("wake_up", None)
            raise

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Ends `sleep`; with `tags`, of "weights" and "kv_cache", wakes these alone."""
        if tags is not None and set(tags) - {"weights", "kv_cache"}:
            raise RequestError(f"tags may hold weights and kv_cache, got {list(tags)!r}.")
        await self._pause_coordinator.change("wake_up", tags)
        if tags is None or "kv_cache" in tags:
            self._asleep = False

    @property
    def _running(self) -> int:
        """Requests and streams."""
        return len(self._live) + len(self._streams)

    def set_links(self, links: Mapping[str, EngineClient]) -> None:
        """See `EngineMembership.set_links`."""
        self._engines.set_links(links)

    async def drain_engine(self, name: str, timeout_s: float) -> None:
        """See `EngineMembership.drain`."""
        await self._engines.drain(name, seconds("timeout_s", timeout_s))

    async def undrain_engine(self, name: str) -> None:
        """See `EngineMembership.undrain`."""
        await self._engines.undrain(name)

    async def restart_engine(self, name: str, drain_timeout_s: float, timeout_s: float) -> None:
        """See `EngineMembership.restart`."""
        await self._engines.restart(name, seconds("drain_timeout_s", drain_timeout_s), seconds("timeout_s", timeout_s))

    async def purge(self) -> None:
        """Before the service is deleted: without a state_dir of its own, nobody is to find its weights again."""
        if self._args.state_dir is None:
            published = await self._store.published()
            await self._store.drop([version for versions in published.values() for version in versions])
            await self._store.base("purge")

    async def status(self) -> dict[str, Any]:
        """Engines, adapters and queues, as plain values."""
        return {
            "model_id": self._args.model_id,
            "request_timeout_s": self._args.request_timeout_s,
            "engines": self._engines.status(),
            "groups_waiting": self._pool.waiting,
            "paused": self._engines.paused,
            "asleep": self._asleep,
            "weights": self._engines.weights_version.label,
            "adapters": {name: version.label for name, version in self._adapters.newest.items()},
            "requests": self._running,
        }

    # -- admission -------------------------------------------------------------------------------

    def _limit_s(self, call: Call) -> float:
        return self._args.request_timeout_s if call.timeout_s is None else seconds("timeout_s", call.timeout_s)

    @asynccontextmanager
    async def _admitted(self, call: Call) -> AsyncGenerator[Request, None]:
        """A request whose groups are on their way; whatever is left of it at the end is aborted."""
        limit_s = self._limit_s(call)
        lease_s = None if call.lease_s is None else seconds("lease_s", call.lease_s)
        self._require_room()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit_s
        with contextlib.ExitStack() as stack:
            live = stack.enter_context(self._live.holding(call.count, call.request_id, lease_s))
            # No timeout is held across the yield: it would cancel whatever the caller's task is doing there.
            try:
                async with asyncio.timeout_at(deadline):
                    validated = await self._validate(call)
                    stack.enter_context(self._holding(validated.adapter))
                    # 10,000 groups take long enough to make to keep others waiting.
                    first_id = self._take_ids(len(validated.prompts))
                    request, groups = await self._encode_in_thread(self._request_of, first_id, validated, call)
            except TimeoutError:
                raise DeadlineError(self._late(limit_s, None)) from None
            self._admit(live, request, groups)
            expiry = loop.call_at(deadline, self._expire, request, limit_s)
            try:
                yield request
            finally:
                expiry.cancel()
                self._dismiss(request)
                if request.complete:
                    self._observe(validated.adapter, request.weight_versions)

    def _observe(self, adapter: AdapterVersion | None, weight_versions: set[str]) -> None:
        """Reports how stale a finished request is: its adapter where it has one, else the model's own weights."""
        if adapter is None:
            self._observe_staleness("", self._updates.staleness(weight_versions))
        elif adapter.name not in self._paths:
            self._observe_staleness(adapter.name, self._adapters.staleness(adapter))

    def _expire(self, request: Request, limit_s: float) -> None:
        """Ends a request at its deadline: what has arrived can still be read, then comes the error."""
        if not request.settled:
            self._give_up_request(request, DeadlineError(self._late(limit_s, request)))

    def _give_up_request(self, request: Request, error: TwinkleServeError) -> None:
        """Ends a request with an error: what has arrived can still be read, nothing more is sampled."""
        request.fail(error)
        self._withdraw(request, request.ids)

    def _withdraw(self, request: Request, group_ids: Sequence[int]) -> None:
        """Has groups of a request sampled no more."""
        for group_id in group_ids:
            self._requests.pop(group_id, None)
        self._pool.withdraw(request.caller, group_ids)

    async def cancel(self, request_id: str, inputs: Sequence[int] | None = None) -> int:
        """Drops prompts of a call, by their indices, or all that are not complete. Returns how many were not.

        The call goes on without them. One that is over, or unknown, has none.
        """
        if (live := self._live.get(request_id)) is None:
            return 0
        if (request := live.request) is None:
            return live.cancel(inputs)
        return self._drop(request, request.ids if inputs is None else request.ids_of(inputs))

    def _drop(self, request: Request, group_ids: Sequence[int]) -> int:
        dropped = request.drop(group_ids)
        self._withdraw(request, dropped)
        return len(dropped)

    async def renew(self, request_ids: Sequence[str], lease_s: float) -> None:
        """The caller of these calls is there, and will say so again within `lease_s`."""
        self._live.renew(request_ids, lease_s)

    async def _validate(self, call: Call) -> _ValidatedCall:
        """What a call asks for, checked against what the engines can do."""
        params = SamplingParams.of(call.sampling_params, call.num_samples, call.logprobs)
        if params.num_samples > SPACING:
            raise SamplingParamsError(f"num_samples must be at most {SPACING}, got {params.num_samples}.")
        self._require_awake()
        name, path = call.adapter()
        if name:
            self._adapters.resolve(name)  # what is unknown is said before engines are waited for
        template = await self._template(call.template)
        # What is only scored is a conversation as it stands, not one that waits for an answer.
        prompts: list[Prompt] = await self._encode_in_thread(
            encode_inputs, call.inputs, template, params.max_tokens != 0
        )
        info = await self._engines.wait_for_info()
        await self._encode_in_thread(_check_all, info, prompts, params)
        call.check(len(prompts))
        if call.cancelled is None or (call.min_groups is not None and len(call.done) >= call.min_groups):
            prompts = []
        elif not_wanted := {*call.done, *call.cancelled}:
            prompts = [prompt for prompt in prompts if prompt.index not in not_wanted]
        adapter = await self._adapter_at(path) if path else self._adapters.resolve(name) if name else None
        header = ResponseHeader(logprobs_mode=info.logprobs_mode, parser=template.message_parser())
        return _ValidatedCall(prompts, params, adapter, header)

    async def _template(self, choice: TemplateChoice) -> Template:
        if choice is not None and not self._templates.has(choice):
            # A download must not keep the one encoding thread.
            await asyncio.to_thread(self._templates.fetch, choice)
        template: Template = await self._encode_in_thread(self._templates.get, choice)
        return template

    async def _encode_in_thread(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._encoding, function, *args)

    def _require_awake(self) -> None:
        if self._asleep:
            raise RequestError("the sampler is asleep. Call wake_up() first.")

    def _take_ids(self, count: int) -> int:
        """The first of so many ids of groups, one after the other."""
        self._next_id += count
        return self._next_id - count

    def _request_of(self, first_id: int, validated: _ValidatedCall, call: Call) -> tuple[Request, list[Group]]:
        request = Request(
            first_id,
            validated.prompts,
            validated.params,
            validated.header,
            validated.adapter,
            inputs=as_list(call.inputs) if call.return_inputs else None,
            caller=call.caller,
            sample_timeout_s=call.sample_timeout_s,
            min_groups=None if call.min_groups is None else max(0, call.min_groups - len(call.done)),
        )
        return request, request.groups()

    def _admit(self, live: ActiveCall, request: Request, groups: list[Group]) -> None:
        """Has a request sampled, but for what was cancelled while the call was being validated."""
        self._require_awake()
        self._require_room(live)
        if live.error is not None:
            raise live.error
        live.request = request
        self._requests.update(dict.fromkeys(request.ids, request))
        self._pool.enqueue(groups)
        if live.cancelled:
            self._drop(request, request.ids_of(live.cancelled))

    def _require_room(self, live: ActiveCall | None = None) -> None:
        """Refuses what would make the queue too long; a call that comes first is taken, however large.

        Args:
            live: the call itself, where it is counted already.

        Raises:
            QueueFullError
        """
        args, waiting, tokens = self._args, self._pool.waiting, self._pool.waiting_tokens
        counted, most = live is not None, args.max_queued_requests
        calls, outside = self._running - counted, self._live.arriving - counted + len(self._streams)
        full = waiting and (calls >= most or tokens >= args.max_queued_tokens)
        if not full and outside < most:  # of the queue
            return
        rate = self._rate.per_s()
        retry_after_s = min(60.0, max(1.0, tokens / rate / 4 if rate else 1.0))
        raise QueueFullError(
            f"{waiting} prompts of {calls} calls wait, {tokens:.0f} tokens by guess; the service takes "
            f"max_queued_requests={args.max_queued_requests} and max_queued_tokens={args.max_queued_tokens}. "
            f"Send the call again in {retry_after_s:.0f} s.",
            retry_after_s,
        )

    def _dismiss(self, request: Request) -> None:
        if request.settled:
            for group_id in request.ids:
                self._requests.pop(group_id, None)
        else:
            self._withdraw(request, request.ids)

    def _late(self, limit_s: float, request: Request | None) -> str:
        if request is None:
            state = "no engine was ready"
        else:
            done = request.samples_wanted - request.samples_missing
            state = f"{done} of {request.samples_wanted} samples were done"
        return (
            f"timeout_s={limit_s:g} passed when {state}; {self._engines.ready} of {self._engines.size} engines are up. "
            "Raise timeout_s, or send less in a call."
        )

    # -- what engines hand back ------------------------------------------------------------------

    def _deliver(self, columns: SampleColumns) -> None:
        self._rate.add(len(columns.tokens))
        present = set(columns.group.tolist())
        by_request: dict[Request, set[int]] = {}
        for group_id in present & self._requests.keys():
            by_request.setdefault(self._requests[group_id], set()).add(group_id)
        for request, ids in by_request.items():
            try:
                not_needed = request.add(columns if ids == present else columns.without(present - ids))
                if not_needed:
                    self._drop(request, not_needed)
            except Exception as error:  # a bug of ours; the others' samples must still reach them
                logger.exception("samples could not be handed to their request")
                request.fail(EngineError(f"a bug in the router: {error!r}"))

    def _fail(self, group_id: int, error: TwinkleServeError) -> None:
        if (request := self._requests.get(group_id)) is not None:
            self._give_up_request(request, error)


@dataclass(frozen=True, slots=True)
class Call:
    """What a caller asks for; see `Sampler.sample` for the fields."""

    inputs: Any
    sampling_params: SamplingParams | Mapping[str, Any] | None = None
    adapter_name: str = ""
    adapter_path: str | None = None
    num_samples: int | None = None
    logprobs: int | Unset | None = UNSET
    use_base_model: bool = False
    template: TemplateChoice = None
    timeout_s: float | None = None
    sample_timeout_s: float | None = None
    min_groups: int | None = None
    request_id: str = ""
    """By which its caller cancels it; a call with that of one that runs takes its place."""
    caller: str = ""
    """Callers take turns."""
    lease_s: float | None = None
    """It is given up when `renew` has not been called for so long; None: never."""
    done: Sequence[int] = ()
    """Indices of the inputs that its caller has already, from another router."""
    cancelled: Sequence[int] | None = ()
    """Indices of the inputs that it has cancelled there; None: all that are not done."""
    return_inputs: bool = True
    """Whether the response is to have them; a caller that keeps them spares the router that."""

    @property
    def count(self) -> int:
        """Of its inputs; 0 where that cannot be told, for they are none."""
        if isinstance(self.inputs, PackedInputs):
            return len(self.inputs)
        return len(as_list(self.inputs) or ())

    def check(self, prompts: int) -> None:
        """Refuses limits that cannot be.

        Raises:
            RequestError
        """
        if self.sample_timeout_s is not None:
            seconds("sample_timeout_s", self.sample_timeout_s)
        groups = self.min_groups
        if groups is not None and (
            isinstance(groups, bool) or not isinstance(groups, int) or not 1 <= groups <= prompts
        ):
            raise RequestError(f"min_groups must be a number from 1 to the call's {prompts} prompts, got {groups!r}.")

    def adapter(self) -> tuple[str, str]:
        """(name, path) of the adapter, of which at most one is not empty.

        Raises:
            AdapterError: more than one of adapter_name, adapter_path and use_base_model is given.
        """
        given = {
            "adapter_name": self.adapter_name,
            "adapter_path": self.adapter_path,
            "use_base_model": self.use_base_model,
        }
        given = {key: value for key, value in given.items() if value}
        if len(given) > 1:
            both = " and ".join(f"{key}={value!r}" for key, value in given.items())
            raise AdapterError(f"{both} contradict each other. Give one of them.")
        for key, value in (("adapter_name", self.adapter_name), ("adapter_path", self.adapter_path or "")):
            if not isinstance(value, str):
                raise AdapterError(f"{key} must be a string, got {value!r}.")
        return self.adapter_name, self.adapter_path or ""


@dataclass(frozen=True, slots=True)
class _ValidatedCall:
    """A call, checked."""

    prompts: list[Prompt]
    params: SamplingParams
    adapter: AdapterVersion | None
    header: ResponseHeader


def _check_all(info: EngineInfo, prompts: Sequence[Prompt], params: SamplingParams) -> None:
    """See `check_fits`."""
    for prompt in prompts:
        check_fits(info, prompt.ids, params, f"inputs[{prompt.index}]")
