"""Admits requests: validates them, bounds the queue, enforces deadlines. Free of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

from cachetools import LRUCache

from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format import SamplingParams
from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.data_format.groups import EngineInfo
from twinkle_serve.data_format.inputs import as_list
from twinkle_serve.data_format.sample_request import SampleRequest, TemplateChoice
from twinkle_serve.data_format.structured_outputs import StructuredOutputs
from twinkle_serve.data_format.telemetry import CallInfo
from twinkle_serve.engines.client import EngineClient
from twinkle_serve.engines.param_checks import check_fits, check_params
from twinkle_serve.errors import DeadlineError, QueueFullError, RequestError, SamplingParamsError, TwinkleServeError
from twinkle_serve.routing.adapter_publishing import AdapterPublisher
from twinkle_serve.routing.calls import ActiveCall, CallRegistry, Rate
from twinkle_serve.routing.encoding_thread import EncodingThread
from twinkle_serve.routing.groups import RoutedGroup
from twinkle_serve.routing.membership import EngineMembership
from twinkle_serve.routing.request import PlannedPrompt, Request, ResponseHeader, plan_prompts
from twinkle_serve.routing.scheduler import GroupScheduler
from twinkle_serve.routing.seeds import SPACING
from twinkle_serve.routing.telemetry import Telemetry
from twinkle_serve.routing.templates import TemplateCache
from twinkle_serve.routing.tracks import Track
from twinkle_serve.template import Template
from twinkle_serve.template.prompts import Prompt, encode_inputs
from twinkle_serve.traces import Traces, valid_traceparent
from twinkle_serve.validation import seconds

MAX_CHECKED = 1000


class Admission:
    """Turns calls into requests, and ends requests.

    Guarantees:
        The queue of each track is bounded; a call beyond its limits is refused at once.
        A request ends at its deadline, when it is cancelled, when its caller is silent, or when it is complete; its
            unfinished groups are aborted then.
    """

    def __init__(
        self,
        args: ServiceArgs,
        templates: TemplateCache,
        encoding: EncodingThread,
        engines: EngineMembership,
        scheduler: GroupScheduler,
        publisher: AdapterPublisher,
        requests: dict[int, Request],
        rate: Rate,
        telemetry: Telemetry,
        on_complete: Callable[[Request], None],
        traces: Traces | None = None,
    ) -> None:
        """
        Args:
            requests: live requests by the ids of the groups that they wait for; filled by this.
            rate: tokens that engines return.
            telemetry: counts calls.
            on_complete: receives each complete request.
            traces: records calls.
        """
        self._args, self._templates, self._encoding, self._engines = args, templates, encoding, engines
        self._scheduler, self._publisher, self._requests = scheduler, publisher, requests
        self._rate, self._telemetry, self._on_complete = rate, telemetry, on_complete
        self._traces = traces
        # A random start, so that ids do not repeat those of the router that this one replaces.
        self._next_id = random.getrandbits(40) << 20
        self._calls = CallRegistry(self.fail, telemetry)
        self._checked: LRUCache[StructuredOutputs, None] = LRUCache(MAX_CHECKED)
        """Structured outputs that an engine has checked."""
        self.asleep = False
        """Whether requests are refused because the engines sleep."""

    @property
    def running(self) -> int:
        """Number of running requests and streams."""
        return len(self._calls)

    # -- calls -------------------------------------------------------------------------------------

    @asynccontextmanager
    async def admitted(self, call: SampleRequest) -> AsyncGenerator[Request, None]:
        """Yields a request whose groups are queued; aborts its unfinished groups at the end."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with self._admitted(call) as request:
                yield request
        except BaseException as error:
            self._telemetry.failed(call.adapter_name, error)
            raise
        self._telemetry.completed(call.adapter_name, loop.time() - began)

    def _traced(self, call: SampleRequest, stack: contextlib.ExitStack) -> SampleRequest:
        """Records a call until the stack closes. Returns it as part of its own span."""
        if call.traceparent != "" and call.traceparent != (valid := valid_traceparent(call.traceparent)):
            call = replace(call, traceparent=valid)
        if self._traces is None or not self._traces.chooses(call.traceparent):
            return call
        prompts = call.input_count
        span = stack.enter_context(self._traces.recorded("router.sample", call.traceparent, "SERVER", prompts=prompts))
        if isinstance(call.adapter_name, str) and call.adapter_name:
            span.set(adapter=call.adapter_name)
        return replace(call, traceparent=span.traceparent)

    @asynccontextmanager
    async def _admitted(self, call: SampleRequest) -> AsyncGenerator[Request, None]:
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            call = self._traced(call, stack)
            limit_s = self._limit_s(call)
            lease_s = None if call.lease_s is None else seconds("lease_s", call.lease_s)
            track = self._engines.choose_track(call.track, call.engine)
            self._require_room(track)
            deadline = loop.time() + limit_s
            active = stack.enter_context(self._holding(call, lease_s, track, deadline))
            # No timeout is held across the yield: it would cancel the caller's task in whatever it does then.
            try:
                async with asyncio.timeout_at(deadline):
                    request, groups = await self._prepared(call, track, stack)
            except TimeoutError:
                raise DeadlineError(self._late(limit_s, track, None)) from None
            self._require_admissible(active, track)
            self._calls.became_request(active, request)
            adapter = "" if request.adapter is None else request.adapter.name
            self._telemetry.admitted(adapter, len(request.ids), request.prompt_tokens)
            request.admitted_at = loop.time()
            self._requests.update(dict.fromkeys(request.ids, request))
            self._scheduler.enqueue(groups)
            if active.cancelled:  # while the call was being validated
                self.drop(request, request.ids_of(active.cancelled))
            expiry = loop.call_at(deadline, self._expire, request, limit_s)
            try:
                yield request
            finally:
                expiry.cancel()
                self._dismiss(request)
                if request.complete:
                    self._on_complete(request)

    def _holding(
        self, call: SampleRequest, lease_s: float | None, track: Track, deadline: float
    ) -> contextlib.AbstractContextManager[ActiveCall]:
        """Registers a call while it runs."""
        return self._calls.holding(
            call.input_count, call.request_id, lease_s, caller=call.caller, track=track.name, deadline=deadline
        )

    @asynccontextmanager
    async def admitted_stream(self, call: SampleRequest) -> AsyncGenerator[tuple[RoutedGroup, float, ActiveCall], None]:
        """Yields the only group of a stream, its deadline by the event loop's clock, and its registration."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with self._admitted_stream(call) as stream:
                yield stream
        except BaseException as error:
            self._telemetry.failed(call.adapter_name, error)
            raise
        self._telemetry.completed(call.adapter_name, loop.time() - began)

    @asynccontextmanager
    async def _admitted_stream(
        self, call: SampleRequest
    ) -> AsyncGenerator[tuple[RoutedGroup, float, ActiveCall], None]:
        with contextlib.ExitStack() as stack:
            call = self._traced(call, stack)
            limit_s = self._limit_s(call)
            lease_s = None if call.lease_s is None else seconds("lease_s", call.lease_s)
            track = self._engines.choose_track(call.track, call.engine)
            self._require_room(track)
            deadline = asyncio.get_running_loop().time() + limit_s
            active = stack.enter_context(self._holding(call, lease_s, track, deadline))
            try:
                async with asyncio.timeout_at(deadline):
                    request, groups = await self._prepared(call, track, stack)
                samples = request.samples_wanted // max(1, len(groups))
                if len(groups) != 1 or samples != 1:
                    raise RequestError(
                        f"sample_stream takes one prompt and one sample, got {len(groups)} and {samples}. "
                        "Use sample_iter for more."
                    )
                self.require_awake()
                adapter = "" if request.adapter is None else request.adapter.name
                self._telemetry.admitted(adapter, 1, request.prompt_tokens)
                yield _streamed(groups[0], call.skip_special_tokens), deadline, active
            except TimeoutError:
                raise DeadlineError(
                    f"timeout_s={limit_s:g} passed in a stream; {self._engines.describe_up(track)}. Raise it or ask "
                    "for less."
                ) from None

    def infos(self) -> list[CallInfo]:
        """See `RouterAPI.calls`."""
        return self._calls.infos()

    def cancel(self, request_id: str, inputs: Sequence[int] | None) -> int:
        """See `RouterAPI.cancel`."""
        if (call := self._calls.get(request_id)) is None:
            return 0
        if (request := call.request) is None:
            return call.cancel(inputs)
        return self.drop(request, request.ids if inputs is None else request.ids_of(inputs))

    def renew(self, request_ids: Sequence[str], lease_s: float) -> None:
        """See `RouterAPI.renew`."""
        self._calls.renew(request_ids, lease_s)

    def require_awake(self) -> None:
        """Raises RequestError while the engines sleep."""
        if self.asleep:
            raise RequestError("the sampler is asleep. Call wake_up() first.")

    def _limit_s(self, call: SampleRequest) -> float:
        return self._args.request_timeout_s if call.timeout_s is None else seconds("timeout_s", call.timeout_s)

    # -- validation --------------------------------------------------------------------------------

    async def _prepared(
        self, call: SampleRequest, track: Track, stack: contextlib.ExitStack
    ) -> tuple[Request, list[RoutedGroup]]:
        """Validates a call and encodes its prompts. Its adapter version is held until the stack closes."""
        short = call.is_short
        params = await self._encoding.run(short, call.params_of_inputs, self._args.sampling_params)
        if (most := max((each.num_samples for each in params), default=1)) > SPACING:
            raise SamplingParamsError(f"num_samples must be at most {SPACING}, got {most}.")
        self.require_awake()
        name, path = call.adapter()
        if name:
            self._publisher.require(name)  # refused before waiting for engines
        template = await self.template(call.template, short=short)
        # A conversation that is only scored does not open a turn for the assistant.
        opens_turn = not params or params[0].max_tokens != 0
        prompts = await self._encoding.run(
            short, encode_inputs, call.inputs, template, opens_turn, call.continue_final_message
        )
        info = await self._engines.wait_for_info()
        await self._encoding.run(short, _check_all, info, prompts, params, template)
        call.check_limits(len(prompts))
        await self._check_structured(params)
        planned = await self._encoding.run(short, plan_prompts, prompts, params)
        if call.cancelled is None or (call.min_groups is not None and len(call.done) >= call.min_groups):
            planned = []
        elif excluded := {*call.done, *call.cancelled}:
            planned = [each for each in planned if each.prompt.index not in excluded]
        adapter = await self._publisher.resolve(name, path)
        stack.enter_context(self._publisher.holding(adapter))
        header = _header(info, template, params)
        # Building 10,000 groups takes long enough to delay other calls.
        first_id = self._take_ids(len(planned))
        return await self._encoding.run(short, _build, first_id, planned, header, adapter, track, call)

    async def _check_structured(self, params: Sequence[SamplingParams]) -> None:
        """Has an engine check the structured outputs of a call. Raises SamplingParamsError."""
        for structured in dict.fromkeys(each.structured_outputs for each in params):
            if isinstance(structured, StructuredOutputs) and structured not in self._checked:
                await self._engines.call_any(partial(_check_structured_on, structured))
                self._checked[structured] = None

    async def template(self, choice: TemplateChoice, *, short: bool = False) -> Template:
        """Returns the template of a call, built on first use. Raises TemplateError."""
        if choice is not None and not self._templates.has(choice):
            # A download must not occupy the one encoding thread.
            await asyncio.to_thread(self._templates.fetch, choice)
            short = False
        return await self._encoding.run(short, self._templates.get, choice)

    def _take_ids(self, count: int) -> int:
        """Reserves consecutive group ids. Returns the first."""
        self._next_id += count
        return self._next_id - count

    # -- requests ----------------------------------------------------------------------------------

    def _require_admissible(self, active: ActiveCall, track: Track) -> None:
        """Raises if the queue is full, the engines sleep, or the call ended while it was being validated."""
        self.require_awake()
        self._require_room(track, active)
        if active.error is not None:
            raise active.error

    def _require_room(self, track: Track, active: ActiveCall | None = None) -> None:
        """Refuses a call that would make the queue of its track too long; the first call is taken, however large.

        Args:
            active: the call itself, if it is counted already.

        Raises:
            QueueFullError
        """
        args, name = self._args, track.name
        waiting, tokens = self._scheduler.waiting_in(name), self._scheduler.waiting_tokens_in(name)
        counted, limit = active is not None, args.max_queued_requests
        calls, outside_queue = self._calls.count(name) - counted, self._calls.outside_queue(name) - counted
        full = waiting and (calls >= limit or tokens >= args.max_queued_tokens)
        if not full and outside_queue < limit:
            return
        rate = self._rate.per_s()
        retry_after_s = min(60.0, max(1.0, tokens / rate / 4 if rate else 1.0))
        raise QueueFullError(
            f"{waiting} prompts of {calls} calls wait, {tokens:.0f} tokens by guess; the service takes "
            f"max_queued_requests={args.max_queued_requests} and max_queued_tokens={args.max_queued_tokens}. "
            f"Send the call again in {retry_after_s:.0f} s.",
            retry_after_s,
        )

    def _expire(self, request: Request, limit_s: float) -> None:
        """Ends a request at its deadline."""
        if not request.settled:
            track = self._engines.tracks.named(request.track)
            self.fail(request, DeadlineError(self._late(limit_s, track, request)))

    def fail(self, request: Request, error: TwinkleServeError) -> None:
        """Ends a request with an error: samples that have arrived can still be read, nothing more is sampled."""
        request.fail(error)
        self._withdraw(request, request.ids)

    def drop(self, request: Request, group_ids: Sequence[int]) -> int:
        """Stops sampling groups of a request that are not complete. Returns how many there were."""
        dropped = request.drop(group_ids)
        self._withdraw(request, dropped)
        return len(dropped)

    def _withdraw(self, request: Request, group_ids: Sequence[int]) -> None:
        for group_id in group_ids:
            self._requests.pop(group_id, None)
        self._scheduler.withdraw(request.caller, group_ids)

    def _dismiss(self, request: Request) -> None:
        if request.settled:
            for group_id in request.ids:
                self._requests.pop(group_id, None)
        else:
            self._withdraw(request, request.ids)

    def _late(self, limit_s: float, track: Track, request: Request | None) -> str:
        if request is None:
            state = "its prompts were being prepared" if self._engines.ready else "no engine was ready"
        else:
            done = request.samples_wanted - request.samples_missing
            state = f"{done} of {request.samples_wanted} samples were done"
        return (
            f"timeout_s={limit_s:g} passed when {state}; {self._engines.describe_up(track)}. Raise timeout_s, or send "
            "less in a call."
        )


def _check_structured_on(structured: StructuredOutputs, client: EngineClient) -> Awaitable[None]:
    return client.check_structured(structured)


def _streamed(group: RoutedGroup, skip_special_tokens: bool) -> RoutedGroup:
    if not skip_special_tokens:
        return group
    return replace(group, params=replace(group.params, skip_special_tokens=True))


def _check_all(
    info: EngineInfo, prompts: Sequence[Prompt], params: Sequence[SamplingParams], template: Template
) -> None:
    """See `check_fits` and `check_params`."""
    for each in {id(each): each for each in params}.values():
        check_params(info, each, template.tokenizer)
    for prompt in prompts:
        check_fits(info, prompt.ids, params[prompt.index], f"inputs[{prompt.index}]")


def _header(info: EngineInfo, template: Template, params: Sequence[SamplingParams]) -> ResponseHeader:
    mode = (params[0].logprobs_mode if params else None) or info.logprobs_mode
    if params and params[0].max_tokens == 0:
        mode = "raw_logprobs"  # as those of prompts always are
    masks_apply = mode == "processed_logprobs" or info.masks_raw_logprobs
    return ResponseHeader(
        logprobs_mode=mode,
        logprobs_are_masked=masks_apply and any(each.structured_outputs is not None for each in params),
        parser=template.message_parser(),
    )


def _build(
    first_id: int,
    planned: Sequence[PlannedPrompt],
    header: ResponseHeader,
    adapter: AdapterVersion | None,
    track: Track,
    call: SampleRequest,
) -> tuple[Request, list[RoutedGroup]]:
    request = Request(
        first_id,
        planned,
        header,
        adapter,
        inputs=as_list(call.inputs) if call.return_inputs else None,
        caller=call.caller,
        sample_timeout_s=call.sample_timeout_s,
        min_groups=None if call.min_groups is None else max(0, call.min_groups - len(call.done)),
        track=track.name,
        engine=call.engine,
        update_text=call.update_text if call.updates else None,
        skip_special_tokens=call.updates and call.skip_special_tokens,
        traceparent=call.traceparent,
    )
    return request, request.groups()
