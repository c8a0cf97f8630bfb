"""Callers of a service that has gone."""

from __future__ import annotations

import threading
from typing import Any
from unittest.mock import Mock

import pytest
from ray import serve
from ray.exceptions import ActorDiedError

from twinkle_serve.errors import EngineError
from twinkle_serve.sampler import service
from twinkle_serve.sampler.service import ServiceBackend


class Gone:
    """A handle whose router has died, and of whose cluster nothing is left."""

    def options(self, **options: Any) -> Gone:
        return self

    def __getattr__(self, method: str) -> Any:
        call = Mock()
        call.remote.return_value.result.side_effect = ActorDiedError()
        return call


def test_call_to_a_cluster_that_has_gone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's own status waits for ever there, and Ray ends the process after a minute; the caller hears before."""
    released = threading.Event()
    monkeypatch.setattr(serve, "status", released.wait)
    monkeypatch.setattr(service, "CONTROLLER_S", 0.05)
    backend = ServiceBackend(Gone(), "sampler")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"did not answer: ActorDiedError.*where its service still runs"):
        backend.call("sample", [1], timeout_s=100.0)
    released.set()
