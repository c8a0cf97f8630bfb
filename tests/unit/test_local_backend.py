"""A sampler in this process, on the fake engine: how it starts, fails and ends."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.eventually import wait_until
from tests.support.local_sampler import ENDLESS, QUESTION, TIMEOUT_S, make, soon
from twinkle_serve.config import ServiceArgs
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.errors import (
    AdapterError,
    DeadlineError,
    EngineDeadError,
    EngineError,
    RequestError,
)
from twinkle_serve.sampler import RunningSampler
from twinkle_serve.sampler.local import LocalClient


def test_shutdown_ends_what_runs_with_an_error() -> None:
    """A call, a stream and a later call raise EngineDeadError; none hangs, and none ends as if it were complete."""
    sampler, _ = make(token_latency_s=0.02)
    stream = sampler.sample_stream(QUESTION, ENDLESS)
    next(stream)
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(sampler.sample, QUESTION, ENDLESS)
        wait_until(lambda: sampler.status()["requests"] == 2, "both run")
        sampler.shutdown()
        with pytest.raises(EngineDeadError, match="was shut down"):
            call.result(TIMEOUT_S)
    with pytest.raises(EngineDeadError, match="was shut down"):
        list(stream)
    for method in (sampler.status, lambda: sampler.sample(QUESTION), lambda: next(sampler.sample_iter(QUESTION))):
        with pytest.raises(EngineDeadError, match="was shut down"):
            soon(method)
    sampler.shutdown()


def test_sampler_that_cannot_start_says_why_and_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its engine is stopped, also where the router fails to start."""
    stopped: list[EngineServer] = []
    stop = EngineServer.stop

    async def recorded(server: EngineServer) -> None:
        stopped.append(server)
        await stop(server)

    monkeypatch.setattr(EngineServer, "stop", recorded)
    args = {"model_id": "demo", "engine": "fake", "adapters": {"policy": str(tmp_path)}}
    with pytest.raises(AdapterError, match=str(tmp_path)):
        LocalClient(ServiceArgs.model_validate(args))
    assert len(stopped) == 1


def test_dead_engine_fails_calls_at_once() -> None:
    """Nobody replaces an engine of this process, so nothing waits for it: neither what runs nor what comes."""
    sampler, backend = make(token_latency_s=0.02)

    async def dead() -> None:
        raise EngineDeadError("it died")

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(sampler.sample, QUESTION, ENDLESS)
        wait_until(lambda: sampler.status()["requests"] == 1, "the call runs")
        backend._service._server._engine.check_health = dead  # type: ignore[union-attr, method-assign]
        with pytest.raises(EngineError):
            running.result(TIMEOUT_S)
    with pytest.raises(EngineDeadError, match=r"it died\. Make a new sampler"):
        soon(lambda: sampler.sample(QUESTION, ENDLESS))
    sampler.shutdown()


def test_forgotten_sampler_ends_its_thread() -> None:
    """Without shutdown, when the last reference goes; an iterator that is still read is a reference."""
    before = threading.active_count()
    sampler, backend = make()
    stream = sampler.sample_stream(QUESTION, {"max_tokens": 3})
    thread = backend.loop.thread
    del sampler, backend
    gc.collect()
    assert "".join(text for text, _ in stream)
    del stream
    gc.collect()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive() and threading.active_count() <= before + 1


def test_verify_refuses_what_the_other_sampler_cuts(sampler: RunningSampler) -> None:
    """Figures over tokens that were never scored would be worse than none."""
    response = sampler.sample(QUESTION, {"max_tokens": 8, "ignore_eos": True})
    other, _ = make()
    for strategy in ("left", "right"):
        other.set_template("Template", max_length=10, truncation_strategy=strategy)
        with pytest.raises(RequestError, match="cuts what it scores"):
            sampler.verify(response, against=other)
    other.shutdown()


def test_control_call_past_its_time_is_a_deadline_error(
    sampler: RunningSampler, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any kind. Nothing of it is in effect, and the next call works."""
    from twinkle_serve import hub
    from twinkle_serve.checkpoint import named_tensors

    weights = dict(named_tensors(hub.DEMO))
    with pytest.raises(DeadlineError, match="did not end within 1e-06 s"):
        sampler.update_weights(weights, "one", timeout_s=1e-6)
    with monkeypatch.context() as patch:
        patch.setattr("twinkle_serve.timing.CONTROL_TIMEOUT_S", 1e-6)
        calls: list[Any] = [
            lambda: sampler.add_adapter_to_model("policy", adapters[0]),
            sampler.reset_prefix_cache,
            sampler.get_state_keys,
        ]
        for call in calls:
            with pytest.raises(DeadlineError, match="did not end within 1e-06 s"):
                call()
    status = sampler.status()
    assert not status["paused"] and status["weights"] == "initial" and not status["adapters"]
    assert sampler.update_weights(weights, "one") == "one"
    assert sampler.add_adapter_to_model("policy", adapters[0]).startswith("policy@")


def test_ctrl_c_in_shutdown_is_the_callers_and_the_engine_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of an engine is left to a caller that goes on."""
    sampler, backend = make()
    server = backend._service._server
    assert server is not None
    stop, began, released = server.stop, threading.Event(), threading.Event()

    async def slow() -> None:
        began.set()
        await asyncio.to_thread(released.wait)
        await stop()

    def interrupt() -> None:
        began.wait()
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(server, "stop", slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process of a shell ignores it
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            sampler.shutdown()
        assert backend.loop.thread.is_alive()
    finally:
        signal.signal(signal.SIGINT, before)
        released.set()
    wait_until(lambda: not backend.loop.thread.is_alive(), "the engine has ended, and its loop")
    with pytest.raises(EngineDeadError):
        sampler.sample(QUESTION)
