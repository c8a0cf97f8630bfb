"""Calls to a service on a real Ray cluster that end early, or outlive engine, router and caller; on the fake engine."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import ray
from ray import serve

from tests.support.deploy import deployed
from tests.support.eventually import wait_until
from tests.support.processes import replica_process
from tests.support.service import QUESTIONS, is_idle
from twinkle_serve import SamplingParams, connect
from twinkle_serve.errors import DeadlineError, PromptError, ServiceError
from twinkle_serve.sampler import RunningSampler

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
TOKEN_S = 0.02
SLOW: dict[str, Any] = {"max_tokens": 2500, "ignore_eos": True}
"""Fifty seconds on the slow service."""
LONG_BEFORE_ITS_END_S = 25


@pytest.fixture(scope="module")
def slow(cluster: None) -> Iterator[RunningSampler]:
    """Two engines that take TOKEN_S a token."""
    engine_args = {"max_model_len": 3000, "max_num_seqs": 8, "token_latency_s": TOKEN_S}
    with deployed("slow", engine="fake", device_mesh={"dp_size": 2}, engine_args=engine_args) as service:
        yield service


@pytest.fixture(autouse=True)
def nothing_left_behind(slow: RunningSampler) -> Iterator[None]:
    """After each test the service holds no request and its engines no sequence."""
    yield
    wait_until(functools.partial(is_idle, slow), "the service is idle")


def test_deadline_ends_the_call_and_frees_the_engines(slow: RunningSampler) -> None:
    """In sample and in sample_iter, while queued and while running; then the next call finds room."""
    many = QUESTIONS * 4
    for run in (
        lambda: slow.sample(many, SLOW, timeout_s=0.5),
        lambda: list(slow.sample_iter(many, SLOW, timeout_s=0.5)),
    ):
        started = time.monotonic()
        with pytest.raises(DeadlineError, match=r"timeout_s=0.5 passed when 0 of 48 samples were done; 2 of 2 engines"):
            run()
        assert time.monotonic() - started < LONG_BEFORE_ITS_END_S
        wait_until(lambda: is_idle(slow), "the engines are free", timeout_s=LONG_BEFORE_ITS_END_S)
    assert len(slow.sample(many, {"max_tokens": 1}, timeout_s=60).sequences) == 48


def test_deadline_error_has_the_prompts_that_were_complete(slow: RunningSampler) -> None:
    """The samples and inputs that the whole call would have returned, through the client and by handle."""
    many, params = QUESTIONS * 8, {"max_tokens": 20, "ignore_eos": True, "seed": 2}  # six times TOKEN_S * 20
    whole = slow.sample(many, params)
    with pytest.raises(DeadlineError) as late:
        slow.sample(many, params, timeout_s=2.0)
    by_handle: Any = serve.get_app_handle("slow").sample.remote(many, params, timeout_s=2.0)
    with pytest.raises(DeadlineError) as late_by_handle:
        by_handle.result()
    cause: Any = late_by_handle.value
    assert cause.cause.response is late_by_handle.value.response
    for error in (late.value, late_by_handle.value):
        assert error.response is not None and 0 < len(error.response) < len(many)
        assert list(error.response.prompt_indices) == sorted(error.response.prompt_indices)
        for part in error.response:
            assert part.sequences[0].tokens == whole[part.prompt_index].sequences[0].tokens
            assert part.inputs == [many[part.prompt_index]]


def test_cancelled_call_frees_the_engines(slow: RunningSampler) -> None:
    """A cancelled response, and an iterator that is left, or never begun."""
    response = serve.get_app_handle("slow").sample.remote(QUESTIONS, SLOW)
    wait_until(lambda: not is_idle(slow), "the call has started")
    response.cancel()
    wait_until(lambda: is_idle(slow), "the cancelled call is gone", timeout_s=LONG_BEFORE_ITS_END_S)
    parts = slow.sample_iter([*QUESTIONS, QUESTIONS[0]], {"max_tokens": 100, "ignore_eos": True}, num_samples=1)
    next(parts)
    parts.close()
    wait_until(lambda: is_idle(slow), "the iterator's call is gone", timeout_s=LONG_BEFORE_ITS_END_S)
    unused = slow.sample_iter(QUESTIONS, SLOW)
    wait_until(lambda: not is_idle(slow), "its call is sent at once")
    del unused
    wait_until(lambda: is_idle(slow), "the unused iterator's call is gone", timeout_s=LONG_BEFORE_ITS_END_S)


async def test_cancelled_coroutine_frees_the_engines(slow: RunningSampler) -> None:
    """And a bystander finishes."""
    bystander = asyncio.ensure_future(slow.sample_async(QUESTIONS[0], {"max_tokens": 100, "ignore_eos": True}))
    doomed = asyncio.ensure_future(slow.sample_async(QUESTIONS, SLOW))
    while (await serve.get_app_handle("slow").status.remote())["requests"] < 2:
        pass
    doomed.cancel()
    with pytest.raises(asyncio.CancelledError):
        await doomed
    assert len((await bystander).sequences[0].tokens) == 100


def test_cancelling_one_call_leaves_those_that_it_set_off(slow: RunningSampler) -> None:
    """B waits behind A and is sent when one of A's prompts finishes: it is B's own work, not A's."""
    handle = serve.get_app_handle("slow")
    params = {"max_tokens": 100, "ignore_eos": True}
    a = handle.sample.remote(QUESTIONS * 2 + QUESTIONS[:11], params)  # 35 prompts, 20 of which run at a time
    wait_until(lambda: slow.status()["groups_waiting"] == 15, "A has filled the engines")
    b = handle.sample.remote(QUESTIONS[0], params)
    wait_until(lambda: slow.status()["groups_waiting"] == 16, "B waits behind it")
    wait_until(lambda: slow.status()["groups_waiting"] == 0, "B is sent")
    a.cancel()
    assert len(b.result(timeout_s=30).sequences[0].tokens) == 100


def test_streams_that_are_closed_cost_no_other_its_engine(slow: RunningSampler) -> None:
    """Many, in the middle, at the same time: the engines stay in use, and those that are left end as they should."""

    def stream(leave_after: int) -> str | None:
        deltas = slow.sample_stream(QUESTIONS[0], {"max_tokens": 40, "ignore_eos": True})
        for number, (_, reason) in enumerate(deltas):
            if number == leave_after or reason is not None:
                return reason
        raise AssertionError("a stream ended without a reason")

    with ThreadPoolExecutor(16) as pool:
        for _ in range(4):
            ended = set(pool.map(stream, [*range(8), *[1000] * 8]))
            assert ended == {None, "length"}
            assert {engine["state"] for engine in slow.status()["engines"].values()} == {"ready"}


def test_engine_that_died_without_work_is_not_waited_for(slow: RunningSampler) -> None:
    """Serve would keep a call to it until it is replaced; the router sends its work elsewhere."""
    replica_process("slow", "engine-dp1").kill()
    response = slow.sample(QUESTIONS, {"max_tokens": 2, "seed": 1}, num_samples=2)
    assert len(response.sequences) == 24
    wait_until(lambda: slow.status()["engines"]["engine-dp1"]["state"] == "ready", "engine-dp1 is back")


def test_busy_service_encodes_and_decodes(slow: RunningSampler) -> None:
    """As it would sample, through the client and by handle, while its engines have no room."""
    ids = [part.prompt_token_ids for part in slow.sample(QUESTIONS, {"max_tokens": 1})]
    handle = serve.get_app_handle("slow")
    with slow.sample_iter(QUESTIONS * 2, SLOW):
        wait_until(lambda: slow.status()["groups_waiting"] > 0, "the engines have no room")
        assert slow.encode(QUESTIONS) == list(handle.encode.remote(QUESTIONS).result()) == ids
        assert slow.count_tokens(QUESTIONS) == handle.count_tokens.remote(QUESTIONS).result() == [*map(len, ids)]
        texts = slow.decode(ids)
        assert handle.decode.remote(ids).result() == texts and "12+12=" in texts[0]
        assert slow.decode(ids[0]) == handle.decode.remote(ids[0]).result() == texts[0]
        with pytest.raises(PromptError, match=r"token_ids\[1\]\[0\] must be between 0 and"):
            slow.decode([[1], [10**6]])


@pytest.mark.nightly
def test_samples_of_a_killed_engine_are_sampled_elsewhere(slow: RunningSampler) -> None:
    """Each sample comes once, the same as undisturbed; the engine comes back by itself."""
    params = SamplingParams(max_tokens=100, ignore_eos=True, seed=5)
    expected = slow.sample(QUESTIONS, params, num_samples=2)
    assert {seq.engine for seq in expected.sequences} == {"engine-dp0", "engine-dp1"}
    response = serve.get_app_handle("slow").sample.remote(QUESTIONS, params, num_samples=2)
    wait_until(lambda: slow.status()["engines"]["engine-dp0"]["sequences"] > 0, "engine-dp0 has work")
    replica_process("slow", "engine-dp0").kill()
    result = response.result(timeout_s=60)
    assert [seq.tokens for seq in result.sequences] == [seq.tokens for seq in expected.sequences]
    wait_until(lambda: slow.status()["engines"]["engine-dp0"]["state"] == "ready", "engine-dp0 is back")
    again = slow.sample(QUESTIONS, params, num_samples=2)
    assert {seq.engine for seq in again.sequences} == {"engine-dp0", "engine-dp1"}


def test_calls_outlive_the_router(slow: RunningSampler) -> None:
    """Killed under four kinds of call, it is replaced, and they end as if nothing had been: exact, each prompt once."""
    options: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "seed": 4}
    reference = slow.sample(QUESTIONS, options, num_samples=2)
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(slow.sample, QUESTIONS, options, num_samples=2)
        other = pool.submit(asyncio.run, slow.sample_async(QUESTIONS, options, num_samples=2, timeout_s=60))
        parts = slow.sample_iter(QUESTIONS * 2, options, num_samples=2)
        first = next(parts)
        stream = slow.sample_stream(QUESTIONS[0], {"max_tokens": 100, "ignore_eos": True})
        assert next(stream)
        replica_process("slow", "router").kill()
        rest = list(parts)
        with pytest.raises(ServiceError, match="did not answer: ActorDiedError"):
            list(stream)
        assert whole.result().columns.tokens.tolist() == reference.columns.tokens.tolist()
        assert other.result().columns.tokens.tolist() == reference.columns.tokens.tolist()
    assert sorted(part.prompt_index for part in [first, *rest]) == list(range(2 * len(QUESTIONS)))
    assert {len(part.sequences) for part in [first, *rest]} == {2}
    assert all(part.inputs == [(QUESTIONS * 2)[part.prompt_index]] for part in [first, *rest])


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_caller_that_is_gone_leaves_nothing(slow: RunningSampler, how: str) -> None:
    """Engines and queue are free of its call long before that would have ended: by the end of its connection, or by its
    lease where it is silent."""

    @ray.remote
    class Trainer:
        def pid(self) -> int:
            return os.getpid()

        def sample(self, lease_s: float) -> None:
            from twinkle_serve import timing

            timing.CALL_LEASE_S = lease_s
            connect("slow").sample(QUESTIONS * 4, SLOW, num_samples=4)

    trainer: Any = Trainer.remote()  # type: ignore[attr-defined]
    process = psutil.Process(ray.get(trainer.pid.remote()))
    trainer.sample.remote(600.0 if how == "killed" else 2.0)
    wait_until(lambda: not is_idle(slow), "the call runs")
    process.send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    try:
        wait_until(lambda: is_idle(slow), "the call is given up", timeout_s=LONG_BEFORE_ITS_END_S)
    finally:
        ray.kill(trainer)
