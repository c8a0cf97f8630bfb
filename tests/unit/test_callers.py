"""Callers of a service that has gone."""

from __future__ import annotations

import threading
from typing import Any
from unittest.mock import Mock

import pytest
from ray import serve
from ray.exceptions import ActorDiedError, GetTimeoutError

from twinkle_serve.errors import DeadlineError, EngineError
from twinkle_serve.sampler import service
from twinkle_serve.sampler.service import ServiceBackend


class Gone:
    """A handle whose calls end with an error of Ray's."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def options(self, **options: Any) -> Gone:
        return self

    def __getattr__(self, method: str) -> Any:
        call = Mock()
        call.remote.return_value.result.side_effect = self._error
        return call


def test_call_to_a_cluster_that_has_gone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's own status waits for ever there, and Ray ends the process after a minute; the caller hears before."""
    released = threading.Event()
    monkeypatch.setattr(serve, "status", released.wait)
    monkeypatch.setattr(service, "CONTROLLER_S", 0.05)
    backend = ServiceBackend(Gone(ActorDiedError()), "sampler")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"did not answer: ActorDiedError.*where its service still runs"):
        backend.call("sample", [1], timeout_s=100.0)
    released.set()


def test_call_whose_router_says_nothing_ends_by_its_deadline() -> None:
    """The deadline is what passed, whatever the router was doing; of a control call it is the router that is late."""
    backend = ServiceBackend(Gone(GetTimeoutError()), "sampler")  # type: ignore[arg-type]
    with pytest.raises(DeadlineError, match=r"timeout_s=100 passed.*sent 1 times"):
        backend.call("sample", [1], timeout_s=100.0)
    with pytest.raises(EngineError, match="did not answer in time"):
        backend.call("status", timeout_s=1.0)
