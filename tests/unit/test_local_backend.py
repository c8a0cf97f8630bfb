"""A sampler in this process, on the fake engine: what happens at its edges."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.support.eventually import wait_until
from tests.support.lora import random_adapter, save_adapter
from tests.support.samplers import FakeSampler
from twinkle_serve.adapters import PREFIX
from twinkle_serve.checkpoint import buckets
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.errors import (
    AdapterError,
    ConfigError,
    DeadlineError,
    EngineDeadError,
    EngineError,
    RequestError,
    TwinkleServeError,
)
from twinkle_serve.sampler import RunningSampler
from twinkle_serve.sampler.local import LocalClient
from twinkle_serve.sampler.loop_thread import ITEMS_AHEAD

QUESTION = {"messages": [{"role": "user", "content": "12+34="}]}
ENDLESS = {"max_tokens": 900, "ignore_eos": True}
TIMEOUT_S = 20.0


def make(**engine_args: Any) -> tuple[RunningSampler, LocalClient]:
    args = {"model_id": "demo", "engine": "fake", "engine_args": engine_args}
    backend = LocalClient(ServiceArgs.model_validate(args))
    return RunningSampler(backend), backend


@pytest.fixture
def sampler() -> Iterator[RunningSampler]:
    made, _ = make()
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return [save_adapter(directory / str(i), seed=i) for i in range(2)]


def soon(call: Any) -> Any:
    """What a call returns or raises; that it does either soon."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(TIMEOUT_S)


def test_iterator_ends_as_often_as_it_is_asked(sampler: RunningSampler) -> None:
    """Exhausted or failed, `next` ends at once."""
    stream = sampler.sample_stream(QUESTION, {"max_tokens": 3})
    list(stream)
    assert soon(lambda: next(stream, "end")) == "end"
    failed = sampler.sample_iter([], {})
    with pytest.raises(TwinkleServeError):
        next(failed)
    assert soon(lambda: next(failed, "end")) == "end"


def test_slow_reader_gets_what_was_done_and_then_the_deadline(sampler: RunningSampler) -> None:
    """Nothing is passed over: all that was finished in time, then a DeadlineError. Never an early end."""
    prompts = [QUESTION] * (3 * ITEMS_AHEAD)
    parts = sampler.sample_iter(prompts, {"max_tokens": 2}, timeout_s=3.0)
    read = [next(parts)]
    time.sleep(3.2)  # past the deadline
    read.extend(parts)
    assert sorted(part.prompt_index for part in read) == list(range(len(prompts))), "all were done in time"
    slow, _ = make(token_latency_s=0.01)
    parts = slow.sample_iter([QUESTION] * 3, {"max_tokens": 500, "ignore_eos": True}, timeout_s=1.0)
    with pytest.raises(DeadlineError, match=r"timeout_s=1 passed when 0 of 3 samples were done"):
        list(parts)
    slow.shutdown()


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


def test_async_iterator_after_shutdown_raises() -> None:
    """EngineDeadError from the next item; closing it is no error."""
    sampler, _ = make(token_latency_s=0.02)

    async def read() -> None:
        stream: Any = sampler.sample_stream_async(QUESTION, ENDLESS)
        await anext(stream)
        await asyncio.to_thread(sampler.shutdown)
        with pytest.raises(EngineDeadError, match="was shut down"):
            await anext(stream)
        await stream.aclose()

    asyncio.run(read())


@pytest.mark.parametrize("method", ["sample_stream_async", "sample_iter_async"])
def test_closed_async_iterator_has_ended_its_call(method: str) -> None:
    """When `aclose` returns, nothing of the call runs any more, even where the event loop is blocked next."""
    sampler, _ = make(token_latency_s=0.02)

    async def read() -> None:
        if method == "sample_stream_async":
            items: Any = sampler.sample_stream_async(QUESTION, ENDLESS)
        else:
            items = sampler.sample_iter_async([{"input_ids": [i]} for i in range(5, 37)], {"max_tokens": 900})
        await anext(items)
        assert sampler.status()["requests"] == 1
        await items.aclose()
        assert sampler.status()["requests"] == 0

    asyncio.run(read())
    sampler.shutdown()


def test_interrupted_iterator_cancels_its_call() -> None:
    """Ctrl-C in `next`, though the traceback that a shell keeps refers to the iterator."""
    sampler, _ = make(token_latency_s=0.02)
    responses = sampler.sample_iter(QUESTION, ENDLESS)
    wait_until(lambda: sampler.status()["requests"] == 1, "it runs")
    responses._parts._arrived = Mock(get=Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        next(responses)
    wait_until(lambda: sampler.status()["requests"] == 0, "it is cancelled", timeout_s=5.0)
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


def test_sampler_does_not_hang_in_a_forked_process(sampler: RunningSampler) -> None:
    """Its thread is not there: a call says so."""
    child = os.fork()
    if not child:
        code = 1
        try:
            sampler.sample(QUESTION, {"max_tokens": 2})
        except EngineDeadError as error:
            code = 0 if "forked" in str(error) else 2
        finally:
            os._exit(code)
    assert soon(lambda: os.waitpid(child, 0)) == (child, 0)


def test_adapter_of_one_call_fails_no_neighbour(sampler: RunningSampler, adapters: list[Path]) -> None:
    """Base model and two adapters in one batch; one of them cannot be loaded when it is needed."""
    sampler.add_adapter_to_model("good", adapters[0])
    sampler.add_adapter_to_model("bad", adapters[1])
    backend: Any = sampler._client
    server = backend._service._server

    async def refuse(version: Any) -> None:
        if version.name == "bad":
            raise AdapterError("no room for it")
        await type(server).load_adapter(server, version)

    server.load_adapter = refuse
    engine = backend._router._engines.active["local"]
    for loading in list(engine.adapters):  # as if the engine were new
        del engine.adapters[loading]

    async def run() -> list[Any]:
        names = ["", "bad", "good"] * 3
        calls = [sampler.sample_async(QUESTION, {"max_tokens": 3}, name) for name in names]
        answers: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
        return answers

    results = asyncio.run(run())
    assert [type(result).__name__ for result in results] == ["SampleResponse", "AdapterError", "SampleResponse"] * 3


def test_adapter_versions_are_freed(adapters: list[Path]) -> None:
    """By a new version, by removal, by path, and after a call that was using it: the engine keeps what is meant."""
    sampler, backend = make(token_latency_s=0.02)
    server: Any = backend._service._server

    def held() -> set[str]:
        return {version.label for version in server._adapters.values()}

    def settled(expected: set[str]) -> None:
        wait_until(lambda: held() == expected, f"the engine has {expected}")

    sampler.add_adapter_to_model("policy", adapters[0])
    sampler.add_adapter_to_model("policy", adapters[1])
    settled({"policy@2"})
    stream = sampler.sample_stream(QUESTION, {"max_tokens": 60, "ignore_eos": True}, "policy")
    read = [next(stream)]
    sampler.add_adapter_to_model("policy", adapters[0])
    assert held() == {"policy@2", "policy@3"} and server._uses, "the stream is on the version that it began with"
    read.extend(stream)
    assert read[-1] == (read[-1][0], "length")
    settled({"policy@3"})
    path = str(adapters[1])
    sampler.sample(QUESTION, {"max_tokens": 2}, adapter_path=path)
    sampler.remove_adapter(path)
    sampler.remove_adapter("policy")
    settled(set())
    assert sampler.sample(QUESTION, {"max_tokens": 2}, adapter_path=path).sequences[0].adapter == f"{path}@2"
    assert not server._engine._adapters.keys() - server._adapters.keys()
    sampler.shutdown()


def test_paths_do_not_pass_for_versions_of_others(
    sampler: RunningSampler, adapters: list[Path], tmp_path: Path
) -> None:
    """A directory named like the label of another one is itself."""
    import shutil

    plain, tricky = tmp_path / "ck", tmp_path / "ck@1"
    shutil.copytree(adapters[0], plain)
    shutil.copytree(adapters[1], tricky)
    params = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    by_path = [sampler.sample(QUESTION, params, adapter_path=str(path)) for path in (plain, tricky, plain)]
    labels = [response.sequences[0].adapter for response in by_path]
    assert labels == [f"{plain}@1", f"{tricky}@1", f"{plain}@1"]
    tokens = [response.sequences[0].tokens for response in by_path]
    assert tokens[0] == tokens[2] != tokens[1]


def test_verify_refuses_what_the_other_sampler_cuts(sampler: RunningSampler) -> None:
    """Figures over tokens that were never scored would be worse than none."""
    response = sampler.sample(QUESTION, {"max_tokens": 8, "ignore_eos": True})
    other, _ = make()
    for strategy in ("left", "right"):
        other.set_template("Template", max_length=10, truncation_strategy=strategy)
        with pytest.raises(RequestError, match="cuts what it scores"):
            sampler.verify(response, against=other)
    other.shutdown()


WITH_TESTS = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

FORKED = """
import os, signal, sys
from tests.support.samplers import FakeSampler
from twinkle_serve.errors import EngineDeadError

sampler = FakeSampler("demo", {"token_latency_s": 0.01})
prompt, endless = {"input_ids": [20, 21]}, {"max_tokens": 900, "ignore_eos": True}
calls = {
    "stream": sampler.sample_stream(prompt, endless),
    "rollouts": sampler.sample_iter([prompt] * 2, endless),
    "pause": sampler.pause(),
}
calls["pause"].resume()
next(calls["stream"])
if (child := os.fork()) == 0:
    signal.alarm(20)  # ends a child that hangs
    reads = {
        "stream": lambda: next(calls["stream"]),
        "rollouts": lambda: next(calls["rollouts"]),
        "cancel": lambda: calls["rollouts"].cancel(),
        "sample": lambda: sampler.sample(prompt, endless),
        "status": sampler.status,
    }
    for name, read in reads.items():
        try:
            read()
        except EngineDeadError as error:
            assert "forked" in str(error), error
            print(name, flush=True)
    calls["rollouts"].close()
    calls["stream"].close()
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
next(calls["stream"])
print("cancelled", calls["rollouts"].cancel())
sampler.shutdown()
"""


def test_iterators_from_before_a_fork_raise_in_the_child(tmp_path: Path) -> None:
    """At once, as every other call does there; in the parent they go on."""
    script = tmp_path / "script.py"
    script.write_text(FORKED)
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120, check=False, env=WITH_TESTS
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["stream", "rollouts", "cancel", "sample", "status", "cancelled", "2"]


LOCKED = """
import os, sys, time
from tests.support.samplers import FakeSampler
sampler = FakeSampler("demo", state_dir=sys.argv[1])
if os.fork():
    print(os.getpid(), flush=True)
time.sleep(600)  # the child holds whatever its parent has opened
"""


def test_second_sampler_on_a_state_dir_names_the_first(tmp_path: Path) -> None:
    """In another process or in this one; it is free once the first one has ended, by itself or killed."""
    script, state = tmp_path / "script.py", tmp_path / "state"
    script.write_text(LOCKED)
    process = subprocess.Popen(
        [sys.executable, str(script), str(state)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=WITH_TESTS,
    )
    try:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        with pytest.raises(ConfigError, match=f"state_dir .* is in use by pid {pid} on .*name another state_dir"):
            FakeSampler("demo", state_dir=str(state))
        process.kill()
        process.wait()
        first = FakeSampler("demo", state_dir=f"file://{state}")
        with pytest.raises(ConfigError, match=f"is in use by pid {os.getpid()} "):
            FakeSampler("demo", state_dir=str(state))
        first.shutdown()
        FakeSampler("demo", state_dir=str(state)).shutdown()
    finally:
        os.killpg(process.pid, signal.SIGKILL)


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


def test_base_tensors_of_an_adapter_are_compared_with_the_weights_that_it_is_added_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the last update, not the checkpoint's; tied names too. The adapter stays through later updates."""
    sampler, backend = make()
    server = backend._service._server
    assert server is not None
    model = random_adapter(modules=("q_proj",))
    config, old = model.peft_config["default"], {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sampler.add_adapter_to_model("first", config, state_dict=old)

    def scaled(factor: int) -> dict[str, Any]:
        return {name: tensor if "lora_" in name else tensor * factor for name, tensor in old.items()}

    def own(factor: int) -> dict[str, Any]:
        names = {name: name.removeprefix(PREFIX).replace(".base_layer.", ".") for name in old if "lora_" not in name}
        return {names[name]: tensor for name, tensor in scaled(factor).items() if name in names}

    sampler.update_weights(own(2), "doubled", bucket_bytes=2**18)
    with pytest.raises(AdapterError, match="with values that the model's weights 'doubled' do not have"):
        sampler.add_adapter_to_model("second", config, state_dict=old)
    in_bfloat16 = {name: tensor if "lora_" in name else tensor.bfloat16() for name, tensor in scaled(2).items()}
    for tensors in (scaled(2), in_bfloat16):
        label = sampler.add_adapter_to_model("second", config, state_dict=tensors)
    norm = f"{PREFIX}model.norm.weight"
    with pytest.raises(AdapterError, match=r"'model.norm.weight' with values that the model's weights 'doubled' do"):
        sampler.add_adapter_to_model("second", config, state_dict={**scaled(2), norm: old[norm]})
    sampler.update_weights(own(3), "tripled")
    versions = list(server._adapters.values())
    assert {version.weights for version in versions} == {0, 1}

    async def reload() -> None:
        """As an engine that starts anew."""
        await server.keep_adapters([])
        for version in versions:
            await server.load_adapter(version)

    backend.loop.call(reload())
    assert sampler.sample(QUESTION, {"max_tokens": 2}, label).sequences[0].adapter == label
    load = server.load_adapter

    async def update_first(version: AdapterVersion) -> None:
        upload = await server._store.begin_weights("meanwhile", await server.model_spec())
        for index, part in enumerate(buckets(own(4).items())):
            await server._store.append_weights(upload, index, part)
        await server._store.commit_weights(await server._store.seal_weights(upload))
        await load(version)

    monkeypatch.setattr(server, "load_adapter", update_first)
    with pytest.raises(AdapterError, match=r"weights were updated to 'meanwhile' meanwhile\. Add it again"):
        sampler.add_adapter_to_model("third", config, state_dict=scaled(3))
    sampler.shutdown()


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
