"""The error of a call that passes its deadline has the response to the prompts that were complete."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import cloudpickle
import pytest
import ray
from ray.exceptions import RayTaskError

from tests.support.eventually import wait_until
from tests.support.local_sampler import TIMEOUT_S, make
from tests.support.responses import columns, response
from tests.support.router_handle import RouterHandle
from twinkle_serve import SampleResponse, conventions
from twinkle_serve.data_format.groups import Group
from twinkle_serve.data_format.inputs import as_list
from twinkle_serve.data_format.response_list import ResponseList
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.data_format.samples import SampleColumns
from twinkle_serve.engines.fake import FakeEngine
from twinkle_serve.errors import DeadlineError, QueueFullError
from twinkle_serve.remote.errors import raised_error
from twinkle_serve.routing.request import Request
from twinkle_serve.sampler import RunningSampler
from twinkle_serve.sampler.client import ServiceClient

HANGS = 70
"""First token of a prompt that is never complete."""
INPUTS = [{"input_ids": [token, 20], "user_data": {"id": i}} for i, token in enumerate((30, HANGS, 31, 32, HANGS, 33))]
COMPLETE = (0, 2, 3, 5)
PARAMS = {"max_tokens": 4, "seed": 3, "num_samples": 2}
TEXT = "timeout_s=600 passed"


class Calls:
    """A sampler in this process whose deadlines come when they are told to."""

    def __init__(self) -> None:
        self.sampler, self.client = make()

    @property
    def requests(self) -> list[Request]:
        return list(set(self.client._router._requests.values()))

    def late(self, call: Callable[[], object], missing: int = 4) -> DeadlineError:
        """Runs a call and ends it by its deadline once it lacks no more than these samples. Returns the error."""
        with ThreadPoolExecutor(1) as pool:
            called = pool.submit(call)
            wait_until(lambda: [r.samples_missing for r in self.requests] == [missing], "the others are complete")
            self.client.loop.soon(self._expire)
            with pytest.raises(DeadlineError, match=r"^timeout_s=600 passed when") as raised:
                called.result(TIMEOUT_S)
        assert len(self.sampler.sample(INPUTS[0], PARAMS).sequences) == 2, "the next call works"
        return raised.value

    def _expire(self) -> None:
        (request,) = self.requests
        self.client._router._admission._expire(request, 600.0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    sample_group = FakeEngine.sample_group

    async def sample_or_hang(engine: FakeEngine, group: Group) -> SampleColumns:
        if group.prompt_ids[0] == HANGS:
            await asyncio.Event().wait()
        return await sample_group(engine, group)

    monkeypatch.setattr(FakeEngine, "sample_group", sample_or_hang)
    made = Calls()
    yield made
    made.sampler.shutdown()


def assert_as_min_groups(finished: SampleResponse | None, expected: SampleResponse) -> None:
    """The same samples of the same prompts, in the same order, with their inputs."""
    assert finished is not None and finished == expected
    assert finished.prompt_indices == expected.prompt_indices == COMPLETE
    assert finished.inputs == expected.inputs == [INPUTS[i] for i in COMPLETE]
    assert [s.prompt_index for s in finished.sequences] == [i for i in COMPLETE for _ in range(2)]
    assert finished[1].sequences[1].new_input_feature["user_data"] == {"id": 2}


@pytest.mark.parametrize("how", ["sample", "sample_async", "by handle"])
def test_deadline_error_has_what_min_groups_would_have_returned(calls: Calls, how: str) -> None:
    """Complete prompts in order, with their indices and inputs, and none of the others."""
    expected = calls.sampler.sample(INPUTS, PARAMS, min_groups=4)
    sampler, router = calls.sampler, calls.client._router
    ways: dict[str, Callable[[], object]] = {
        "sample": lambda: sampler.sample(INPUTS, PARAMS),
        "sample_async": lambda: asyncio.run(sampler.sample_async(INPUTS, PARAMS)),
        "by handle": lambda: calls.client.loop.call(router.sample(INPUTS, PARAMS)),
    }
    error = calls.late(ways[how])
    assert_as_min_groups(error.response, expected)
    assert str(error) == error.args[0] and "SampleResponse" not in repr(error)
    assert "when 8 of 12 samples were done; 1 of 1 engines are up" in str(error)


def test_deadline_error_has_fewer_prompts_than_min_groups_asked_for(calls: Calls) -> None:
    """The call waited for more than were complete."""
    expected = calls.sampler.sample(INPUTS, PARAMS, min_groups=4)
    error = calls.late(lambda: calls.sampler.sample(INPUTS, PARAMS, min_groups=5))
    assert_as_min_groups(error.response, expected)


def test_deadline_error_of_many_samples_is_made_beside_the_event_loop(calls: Calls) -> None:
    """More than are sorted on it; the order is the same."""
    params = {**PARAMS, "num_samples": 40}
    error = calls.late(lambda: calls.sampler.sample(INPUTS, params), missing=80)
    assert error.response is not None and error.response.prompt_indices == COMPLETE
    assert [s.prompt_index for s in error.response.sequences] == [i for i in COMPLETE for _ in range(40)]


@pytest.mark.parametrize(
    ("fields", "indices"),
    [
        ({"done": [2, 5]}, (0, 3)),
        ({"cancelled": [0, 4]}, (2, 3, 5)),
        ({"done": [3], "min_groups": 6}, (0, 2, 5)),
        ({"return_inputs": False}, COMPLETE),
    ],
)
def test_deadline_error_leaves_out_prompts_that_the_call_does(
    calls: Calls, fields: dict[str, Any], indices: tuple[int, ...]
) -> None:
    """Those that another router has answered, and cancelled ones."""
    request = SampleRequest(inputs=INPUTS, sampling_params=PARAMS, **fields)
    missing = 2 if 4 in fields.get("cancelled", ()) else 4
    error = calls.late(lambda: calls.client.loop.call(calls.client.run(request)), missing)
    assert error.response is not None and error.response.prompt_indices == indices
    assert error.response.inputs == ([] if "return_inputs" in fields else [INPUTS[i] for i in indices])


def test_prompt_that_was_cancelled_while_the_call_ran_is_left_out(calls: Calls) -> None:
    """With samples, too: it has fewer than were asked for."""
    request = SampleRequest(inputs=INPUTS, sampling_params=PARAMS, request_id="one")
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(calls.late, lambda: calls.client.loop.call(calls.client.run(request)), 2)
        wait_until(lambda: [r.samples_missing for r in calls.requests] == [4], "the others are complete")
        assert calls.client.loop.call(calls.client.cancel("one", [1, 2])) == 1, "2 was complete"
        error = late.result(TIMEOUT_S)
    assert error.response is not None and error.response.prompt_indices == COMPLETE


def test_deadline_error_without_a_complete_prompt_has_no_response(calls: Calls) -> None:
    """Nor where the deadline came before any prompt was sampled."""
    assert calls.late(lambda: calls.sampler.sample([INPUTS[1], INPUTS[4]], PARAMS)).response is None
    with pytest.raises(DeadlineError) as raised:
        calls.sampler.sample(INPUTS, PARAMS, timeout_s=1e-9)
    assert raised.value.response is None


def test_deadline_error_of_an_iterator_has_no_response(calls: Calls) -> None:
    """It has yielded the complete prompts."""
    parts: list[SampleResponse] = []
    assert calls.late(lambda: parts.extend(calls.sampler.sample_iter(INPUTS, PARAMS))).response is None

    async def read() -> None:
        async for part in calls.sampler.sample_iter_async(INPUTS, PARAMS):
            parts.append(part)

    assert calls.late(lambda: asyncio.run(read())).response is None
    indices = [part.prompt_index for part in parts]
    assert sorted(indices) == sorted(COMPLETE * 2)


def test_response_of_a_deadline_error_is_a_list_where_responses_are(calls: Calls) -> None:
    """After `import twinkle_serve.as_twinkle`."""
    conventions.follow_twinkle()
    try:
        error = calls.late(lambda: calls.sampler.sample(INPUTS, PARAMS))
        again = pickle.loads(pickle.dumps(error)).response
        asynchronous = calls.late(lambda: asyncio.run(calls.sampler.sample_async(INPUTS, PARAMS))).response
    finally:
        conventions.follow_twinkle(False)
    for made in (error.response, again, asynchronous):
        assert isinstance(made, ResponseList) and isinstance(made, list)
        assert [item.prompt_index for item in made] == list(COMPLETE)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_deadline_error_does_not_keep_its_request(calls: Calls, asynchronous: bool) -> None:
    """A caller may keep the error: unfinished samples and the bookkeeping of the call are freed all the same."""
    requests: list[weakref.ref[Request]] = []

    def call() -> None:
        if asynchronous:
            asyncio.run(calls.sampler.sample_async(INPUTS, PARAMS))
        else:
            calls.sampler.sample(INPUTS, PARAMS)

    expire = calls._expire

    def remember() -> None:
        requests.extend(map(weakref.ref, calls.requests))
        expire()

    calls._expire = remember  # type: ignore[method-assign]
    error = calls.late(call)
    gc.collect()
    assert error.response is not None
    assert [request() for request in requests] == [None]


# -- between processes ---------------------------------------------------------------------------


@pytest.fixture
def finished() -> SampleResponse:
    """A router's response to prompts 1 and 3, without their inputs."""
    return replace(response([columns(0, ["a"]), columns(1, ["b"])], [], [[1], [3]]), prompt_indices=(1, 3))


def through_ray(error: Exception) -> Any:
    """What a caller by handle catches."""
    wrapped = RayTaskError("sample", "Traceback:\n", error, proctitle="router", pid=1, ip="127.0.0.1")
    caught = cloudpickle.loads(cloudpickle.dumps(wrapped)).as_instanceof_cause()
    assert isinstance(caught, type(error)) and isinstance(caught, RayTaskError)
    return caught


@pytest.mark.parametrize(
    "copied",
    [
        lambda error: pickle.loads(pickle.dumps(error)),
        lambda error: cloudpickle.loads(cloudpickle.dumps(error)),
        lambda error: ray.cloudpickle.loads(ray.cloudpickle.dumps(error)),
        lambda error: raised_error(through_ray(error)),
        copy.copy,
        copy.deepcopy,
    ],
    ids=["pickle", "cloudpickle", "ray", "wrapped", "copy", "deepcopy"],
)
def test_deadline_error_is_the_same_after_copying(copied: Callable[[Any], Any], finished: SampleResponse) -> None:
    """Message and response, also without a response."""
    for made in (finished, None):
        again = copied(DeadlineError(TEXT, made))
        assert type(again) is DeadlineError
        assert str(again) == TEXT and again.args == (TEXT,)
        assert again.response == made and getattr(again.response, "prompt_indices", (1, 3)) == (1, 3)
    assert DeadlineError(TEXT).response is None


def test_rays_wrapper_has_the_response_too(finished: SampleResponse) -> None:
    """By handle, `error.response` is there as it is on `error.cause`; its text has the message, not the response."""
    caught = through_ray(DeadlineError(TEXT, finished))
    assert caught.response == finished == caught.cause.response
    assert "SampleResponse" not in str(caught)


def inputs_of(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": [i], "user_data": {"id": i}} for i in range(count)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_service_gives_the_inputs_back_with_the_response(finished: SampleResponse, asynchronous: bool) -> None:
    """As they were when the call was sent; the router leaves them out. A dict of its own for each prompt."""
    inputs = inputs_of(40)
    inputs[3] = inputs[1]

    def answer(sent: SampleRequest) -> DeadlineError:
        assert as_list(sent.inputs) == inputs and not sent.return_inputs
        inputs[1]["user_data"] = None
        return DeadlineError(TEXT, finished)

    sampler = RunningSampler(ServiceClient(RouterHandle(answer), "sampler"))
    with pytest.raises(DeadlineError, match=f"^{TEXT}$") as raised:
        if asynchronous:
            asyncio.run(sampler.sample_async(inputs, timeout_s=600))
        else:
            sampler.sample(inputs, timeout_s=600)
    made = raised.value.response
    assert made is not None and made.prompt_indices == (1, 3)
    assert [sequence.decoded for sequence in made.sequences] == ["a", "b"]
    assert made.inputs == [{"input_ids": [1], "user_data": {"id": 1}}] * 2 and made.inputs[0] is not made.inputs[1]
    assert made[0].sequences[0].new_input_feature["user_data"] == {"id": 1}


def test_inputs_that_the_router_has_sent_back_stay(finished: SampleResponse) -> None:
    """Those that hold references, which Ray carries."""
    inputs: Any = [{"input_ids": [i], "user_data": ray.ObjectRef(b"1" * 28)} for i in range(4)]

    def answer(sent: SampleRequest) -> DeadlineError:
        assert sent.return_inputs
        return DeadlineError(TEXT, replace(finished, inputs=[sent.inputs[1], sent.inputs[3]]))

    sampler = RunningSampler(ServiceClient(RouterHandle(answer), "sampler"))
    with pytest.raises(DeadlineError) as raised:
        sampler.sample(inputs, timeout_s=600)
    assert raised.value.response is not None and raised.value.response.inputs == [inputs[1], inputs[3]]


def test_call_that_has_moved_has_the_response_of_its_last_router(
    finished: SampleResponse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one was full when the call came from a router that had died."""
    monkeypatch.setattr("twinkle_serve.sampler.client.RETRY_PAUSES_S", (0.0,))
    answers: list[Exception] = [ray.exceptions.ActorDiedError(), QueueFullError("full", 0.01)]
    client = ServiceClient(RouterHandle(lambda sent: (answers or [DeadlineError(TEXT, finished)]).pop(0)), "sampler")

    async def deployed(patience_s: float) -> bool:
        return True

    monkeypatch.setattr(client, "_is_deployed", deployed)
    with pytest.raises(DeadlineError) as raised:
        RunningSampler(client).sample(inputs_of(4), timeout_s=600)
    assert not answers
    assert raised.value.response is not None
    assert raised.value.response.inputs == [inputs_of(4)[1], inputs_of(4)[3]]


def test_router_keeps_no_frames_of_a_call_that_failed(finished: SampleResponse) -> None:
    """They hold its request, and a router collects garbage rarely."""
    raised: list[DeadlineError] = []

    def answer(sent: SampleRequest) -> DeadlineError:
        raised.append(DeadlineError(TEXT, finished))
        return raised[0]

    sampler = RunningSampler(ServiceClient(RouterHandle(answer), "sampler"))
    with pytest.raises(DeadlineError):
        sampler.sample(inputs_of(4), timeout_s=600)
    assert raised[0].__traceback__ is None
