"""What a caller of a service sends, and what it makes of the answers, or of none."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import ray
from ray import serve
from ray.exceptions import ActorDiedError, RayTaskError

from tests.support.responses import columns, response
from tests.support.router_handle import RouterHandle
from twinkle_serve import timing
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.inputs import as_list
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.errors import DeadlineError, PromptError, RequestError, ServiceError
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler import RunningSampler
from twinkle_serve.sampler import client as client_module
from twinkle_serve.sampler.client import ServiceClient
from twinkle_serve.sampler.lease_keeper import keep_renewed


def sample(client: ServiceClient, inputs: Any) -> SampleResponse:
    """Samples through the client, as a sampler does."""
    return client.loop.call(client.run(client.prepare(SampleRequest(inputs=inputs, timeout_s=100.0))))


def test_call_to_a_cluster_that_has_gone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's own status waits for ever there, and Ray ends the process after a minute; the caller hears before."""
    released = threading.Event()
    monkeypatch.setattr(serve, "status", released.wait)
    monkeypatch.setattr(timing, "CONTROLLER_TIMEOUT_S", 0.05)
    backend = ServiceClient(RouterHandle(ActorDiedError()), "sampler")
    with pytest.raises(ServiceError, match=r"did not answer: ActorDiedError.*where its service still runs"):
        sample(backend, [1])
    released.set()


def test_call_whose_router_says_nothing_ends_by_its_deadline() -> None:
    """Whatever the router was doing, and also of a control call, whose deadline is the client's own."""
    backend = ServiceClient(RouterHandle(TimeoutError()), "sampler")
    with pytest.raises(DeadlineError, match=r"timeout_s=100 passed.*sent 1 times"):
        sample(backend, [1])
    with pytest.raises(
        DeadlineError, match="status did not end within 1 s, and the router of 'sampler' did not say so"
    ):
        backend.loop.call(backend.call(1.0, RouterAPI.status))


def inputs_of(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": [i], "user_data": {"id": i}} for i in range(count)]


def answer_to(sent: Any, indices: Sequence[int], inputs: list[dict[str, Any]]) -> SampleResponse:
    """A router's response to some inputs of a call."""
    prompts = [as_list(sent)[i]["input_ids"] for i in indices]  # type: ignore[index]
    parts = [columns(number, ["a"]) for number in range(len(indices))]
    return replace(response(parts, inputs, prompts), prompt_indices=tuple(indices))


def test_response_has_the_inputs_as_they_were_sent() -> None:
    """The router does not send them back: the caller has them, whatever became of its own since. A dict a prompt."""
    inputs = inputs_of(40)
    inputs[39] = inputs[38]

    def answer(sent: SampleRequest) -> SampleResponse:
        assert as_list(sent.inputs) == inputs and not sent.return_inputs
        inputs[2]["user_data"] = None
        return answer_to(sent.inputs, (2, 38, 39), [])

    made = sample(ServiceClient(RouterHandle(answer), "sampler"), inputs)
    assert made.inputs == [{"input_ids": [i], "user_data": {"id": i}} for i in (2, 38, 38)]
    assert made.sequences[0].new_input_feature["user_data"] == {"id": 2}
    made.inputs[1]["reward"] = 1.0
    assert made[1].inputs[0]["reward"] == copy.deepcopy(made).inputs[1]["reward"] == 1.0
    assert "reward" not in made.inputs[2]


def test_call_is_sent_again_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its router has died, what its caller has done to its inputs since is not in it."""
    monkeypatch.setattr(client_module, "RETRY_PAUSES_S", (0.0,))
    monkeypatch.setattr(serve, "status", lambda: Mock(applications={"sampler": None}))
    inputs = inputs_of(3)
    died = [ActorDiedError()]

    def answer(sent: SampleRequest) -> Any:
        assert as_list(sent.inputs) == inputs_of(3)
        inputs[2]["user_data"] = None
        return died.pop() if died else answer_to(sent.inputs, (0, 1, 2), [])

    made = sample(ServiceClient(RouterHandle(answer), "sampler"), inputs)
    assert made.inputs == inputs_of(3) and not died


def test_router_death_that_serve_reports_as_a_cancellation_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the router is not told to cancel the call, which has the same id when it is sent again."""
    monkeypatch.setattr(client_module, "RETRY_PAUSES_S", (0.0,))
    monkeypatch.setattr(serve, "status", lambda: Mock(applications={"sampler": None}))
    calls: list[str] = []

    def answer(sent: Any) -> Any:
        calls.append(sent if isinstance(sent, str) else "run")
        return answer_to(sent.inputs, (0,), []) if len(calls) > 1 else asyncio.CancelledError()

    assert len(sample(ServiceClient(RouterHandle(answer), "sampler"), inputs_of(1)).sequences) == 1
    assert calls == ["run", "run"]


def test_leases_are_renewed_after_a_failed_renewal() -> None:
    """Whatever it raises, until the keeper itself is cancelled."""
    errors: list[BaseException] = [ActorDiedError(), asyncio.CancelledError(), TimeoutError()]

    async def keep() -> None:
        renewed = asyncio.Event()

        async def renew() -> None:
            if errors:
                raise errors.pop()
            renewed.set()

        keeper = asyncio.ensure_future(keep_renewed(renew, 0.0))
        await asyncio.wait_for(renewed.wait(), 60)
        keeper.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeper

    asyncio.run(keep())


def test_prompts_of_a_call_that_is_about_to_be_sent_can_be_cancelled() -> None:
    """The first call of a client asks for the default deadline first; the router hears of the call, then of this."""
    asked, released = threading.Event(), threading.Event()
    calls: list[str] = []

    class Handle(RouterHandle):
        """Notes the order of calls."""

        @property
        def status(self) -> Any:
            async def status() -> dict[str, float]:
                asked.set()
                await asyncio.to_thread(released.wait)
                return {"request_timeout_s": 100.0}

            return Mock(remote=status)

        @property
        def cancel(self) -> Any:
            async def cancel(request_id: str, inputs: list[int] | None) -> int:
                for _ in range(3):  # turns of the event loop that a message takes too
                    await asyncio.sleep(0)
                calls.append(f"cancel {inputs}")
                return 1

            return Mock(remote=cancel)

    def answer(sent: SampleRequest) -> SampleResponse:
        calls.append("run_iter")
        return answer_to(sent.inputs, (1,), [])

    client = ServiceClient(Handle(answer), "sampler")
    responses = RunningSampler(client).sample_iter(inputs_of(2))
    asked.wait()
    cancelled = client.loop.start(client.cancel(responses._request_id, [0]))
    client.loop.call(asyncio.sleep(0))  # it waits now
    released.set()
    assert cancelled.result(10) == 1
    assert len(list(responses)) == 1
    assert calls == ["run_iter", "cancel [0]"]


def test_inputs_that_hold_references_are_left_to_ray() -> None:
    """It counts those that it pickles itself; the router sends such inputs back."""
    reference = ray.ObjectRef(b"1" * 28)
    inputs: Any = [{"input_ids": [i], "user_data": reference} for i in range(2)]

    def answer(sent: SampleRequest) -> SampleResponse:
        assert [item["user_data"] for item in sent.inputs] == [reference] * 2 and sent.return_inputs
        inputs.pop()
        return answer_to(sent.inputs, (0, 1), sent.inputs)

    made = sample(ServiceClient(RouterHandle(answer), "sampler"), inputs)
    assert [item["input_ids"] for item in made.inputs] == [[0], [1]]


def test_arrays_beside_references_are_copied_by_the_call() -> None:
    """The caller fills them again while the call runs."""
    reference, ids = ray.ObjectRef(b"1" * 28), np.array([3, 4], np.int32)
    inputs: Any = [{"input_ids": ids, "user_data": [reference, {"rows": [ids]}]}]

    def answer(sent: SampleRequest) -> SampleResponse:
        ids.fill(0)
        assert sent.inputs[0]["input_ids"].tolist() == sent.inputs[0]["user_data"][1]["rows"][0].tolist() == [3, 4]
        return answer_to(sent.inputs, (0,), sent.inputs)

    sample(ServiceClient(RouterHandle(answer), "sampler"), inputs)
    assert ids.tolist() == [0, 0]


def test_async_call_takes_its_inputs_when_it_is_made() -> None:
    """Not when it is awaited: the caller may fill the array again for the next call. Errors come when it is awaited."""
    ids = np.zeros(2, np.int32)

    def answer(sent: SampleRequest) -> SampleResponse:
        return answer_to(sent.inputs, (0,), as_list(sent.inputs))  # type: ignore[arg-type]

    sampler = RunningSampler(ServiceClient(RouterHandle(answer), "sampler"))

    async def run() -> list[Any]:
        calls = []
        for number in range(3):
            ids.fill(number)
            calls.append(sampler.sample_async({"input_ids": ids}, timeout_s=10))
        invalid: Any = {"best_of": 3}
        calls.append(sampler.sample_async({"input_ids": ids}, **invalid))
        answers: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
        return answers

    *responses, error = asyncio.run(run())
    assert [response.prompts[0].tolist() for response in responses] == [[0, 0], [1, 1], [2, 2]]
    assert isinstance(error, TypeError)


def test_inputs_that_cannot_be_sent_are_refused() -> None:
    """Before anything is sent; what is none at all is for the router to refuse."""
    refused = RequestError("inputs is empty")
    backend = ServiceClient(RouterHandle(lambda sent: refused), "sampler")
    with pytest.raises(PromptError, match=r"inputs\[0:1\] cannot be sent: TypeError.*lock"):
        sample(backend, [{"user_data": threading.Lock()}])
    invalid: list[Any] = [[], "text"]
    for inputs in invalid:
        with pytest.raises(RequestError, match="inputs is empty"):
            sample(backend, inputs)


def test_bug_in_the_router_is_no_deadline() -> None:
    """Though it may be a TimeoutError, of something else."""

    def bug(sent: SampleRequest) -> SampleResponse:
        raise TimeoutError("of something else")

    with pytest.raises(ServiceError, match=r"a bug in the router.*TimeoutError: of something else"):
        sample(ServiceClient(RouterHandle(bug), "sampler"), [{"input_ids": [1]}])
    error = RayTaskError("status", "traceback", TimeoutError("of something else")).as_instanceof_cause()
    client = ServiceClient(RouterHandle(error), "sampler")
    with pytest.raises(ServiceError, match=r"a bug in the router of 'sampler'.*of something else"):
        client.loop.call(client.call(1.0, RouterAPI.status))
