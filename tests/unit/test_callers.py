"""Callers of a service that has gone."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
from ray import serve
from ray.exceptions import ActorDiedError, GetTimeoutError

from tests.unit.test_response import columns, response
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.inputs import unpacked
from twinkle_serve.errors import DeadlineError, EngineError
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
    backend = ServiceBackend(Handle(ActorDiedError()), "sampler")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"did not answer: ActorDiedError.*where its service still runs"):
        backend.call("sample", [1], timeout_s=100.0)
    released.set()


def test_call_whose_router_says_nothing_ends_by_its_deadline() -> None:
    """The deadline is what passed, whatever the router was doing; of a control call it is the router that is late."""
    backend = ServiceBackend(Handle(GetTimeoutError()), "sampler")  # type: ignore[arg-type]
    with pytest.raises(DeadlineError, match=r"timeout_s=100 passed.*sent 1 times"):
        backend.call("sample", [1], timeout_s=100.0)
    with pytest.raises(EngineError, match="did not answer in time"):
        backend.call("status", timeout_s=1.0)


def test_response_has_the_inputs_as_they_were_sent() -> None:
    """The router does not send them back: the caller has them, whatever became of its own since."""
    inputs = [{"input_ids": [i], "user_data": {"id": i}} for i in range(3)]
    parts = [columns(0, ["a"]), columns(1, ["b"])]

    def answer(sent: Any, *, return_inputs: bool, **options: Any) -> SampleResponse:
        assert unpacked(sent) == inputs and not return_inputs
        inputs[2]["user_data"] = None
        return replace(response(parts, [], [[2], [0]]), prompt_indices=(2, 0))

    made = ServiceBackend(Handle(answer), "sampler").call("sample", inputs, timeout_s=100.0)  # type: ignore[arg-type]
    assert [item["user_data"] for item in made.inputs] == [{"id": 2}, {"id": 0}]
    assert made[1].inputs[0] == {"input_ids": [0], "user_data": {"id": 0}}
    assert made.sequences[0].new_input_feature["user_data"] == {"id": 2}
