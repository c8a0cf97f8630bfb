"""What a caller of a service sends, and what it makes of the answers, or of none."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import ray
from ray import serve
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError

from tests.support.responses import columns, response
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.inputs import as_list
from twinkle_serve.errors import DeadlineError, EngineError, PromptError, RequestError
from twinkle_serve.sampler import service
from twinkle_serve.sampler.service import ServiceBackend


class Handle:
    """A handle whose calls all end alike."""

    def __init__(self, end: Any) -> None:
        """
        Args:
            end: what a call returns, an error that it raises, or a function of its arguments.
        """
        self._end = end

    def options(self, **options: Any) -> Handle:
        return self

    def __getattr__(self, method: str) -> Any:
        def remote(*args: Any, **options: Any) -> Any:
            end = self._end(*args, **options) if callable(self._end) else self._end
            return Mock(**{"result.side_effect": [end]})

        return Mock(remote=remote)


def test_call_to_a_cluster_that_has_gone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's own status waits for ever there, and Ray ends the process after a minute; the caller hears before."""
    released = threading.Event()
    monkeypatch.setattr(serve, "status", released.wait)
    monkeypatch.setattr(service, "CONTROLLER_S", 0.05)
    backend = ServiceBackend(Handle(ActorDiedError()), "sampler")
    with pytest.raises(EngineError, match=r"did not answer: ActorDiedError.*where its service still runs"):
        backend.call("sample", [1], timeout_s=100.0)
    released.set()


def test_call_whose_router_says_nothing_ends_by_its_deadline() -> None:
    """The deadline is what passed, whatever the router was doing; of a control call it is the router that is late."""
    backend = ServiceBackend(Handle(GetTimeoutError()), "sampler")
    with pytest.raises(DeadlineError, match=r"timeout_s=100 passed.*sent 1 times"):
        backend.call("sample", [1], timeout_s=100.0)
    with pytest.raises(EngineError, match="did not answer in time"):
        backend.call("status", timeout_s=1.0)


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

    def answer(sent: Any, *, return_inputs: bool, **options: Any) -> SampleResponse:
        assert as_list(sent) == inputs and not return_inputs
        inputs[2]["user_data"] = None
        return answer_to(sent, (2, 38, 39), [])

    made = ServiceBackend(Handle(answer), "sampler").call("sample", inputs, timeout_s=100.0)
    assert made.inputs == [{"input_ids": [i], "user_data": {"id": i}} for i in (2, 38, 38)]
    assert made.sequences[0].new_input_feature["user_data"] == {"id": 2}
    made.inputs[1]["reward"] = 1.0
    assert made[1].inputs[0]["reward"] == copy.deepcopy(made).inputs[1]["reward"] == 1.0
    assert "reward" not in made.inputs[2]


def test_call_is_sent_again_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its router has died, what its caller has done to its inputs since is not in it."""
    monkeypatch.setattr(service, "PAUSES_S", (0.0,))
    monkeypatch.setattr(serve, "status", lambda: Mock(applications={"sampler": None}))
    inputs = inputs_of(3)
    died = [ActorDiedError()]

    def answer(sent: Any, **options: Any) -> Any:
        assert as_list(sent) == inputs_of(3)
        inputs[2]["user_data"] = None
        return died.pop() if died else answer_to(sent, (0, 1, 2), [])

    made = ServiceBackend(Handle(answer), "sampler").call("sample", inputs, timeout_s=100.0)
    assert made.inputs == inputs_of(3) and not died


def test_inputs_that_hold_references_are_left_to_ray() -> None:
    """It counts those that it pickles itself; the router sends such inputs back."""
    reference = ray.ObjectRef(b"1" * 28)
    inputs: Any = [{"input_ids": [i], "user_data": reference} for i in range(2)]

    def answer(sent: Any, *, return_inputs: bool, **options: Any) -> SampleResponse:
        assert [item["user_data"] for item in sent] == [reference] * 2 and return_inputs
        inputs.pop()
        return answer_to(sent, (0, 1), sent)

    made = ServiceBackend(Handle(answer), "sampler").call("sample", inputs, timeout_s=100.0)
    assert [item["input_ids"] for item in made.inputs] == [[0], [1]]


def test_inputs_that_cannot_be_sent_are_refused() -> None:
    """Before anything is sent; what is none at all is for the router to refuse."""
    refused = RequestError("inputs is empty")
    backend = ServiceBackend(Handle(lambda sent, **options: refused), "sampler")
    with pytest.raises(PromptError, match=r"inputs\[0:1\] cannot be sent: TypeError.*lock"):
        backend.call("sample", [{"user_data": threading.Lock()}], timeout_s=100.0)
    for none in list[Any]([[], "text"]):
        with pytest.raises(RequestError, match="inputs is empty"):
            backend.call("sample", none, timeout_s=100.0)


def test_bug_in_the_router_is_no_deadline() -> None:
    """Though it may be a TimeoutError, which Ray raises as both."""
    bug = RayTaskError("sample", "traceback", TimeoutError("of something else")).as_instanceof_cause()
    assert isinstance(bug, TimeoutError)
    backend = ServiceBackend(Handle(bug), "sampler")
    with pytest.raises(EngineError, match=r"a bug in the router of 'sampler'.*of something else"):
        backend.call("sample", [{"input_ids": [1]}], timeout_s=100.0)
