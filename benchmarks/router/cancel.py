"""Measures how soon an engine frees the slot of a cancelled sequence, seen from outside: a stream waits for the slot.

With one slot: a call has two prompts. The first fills the context except for a few tokens and ends soon; the second
runs until it is cancelled. A stream of one token, which bypasses the router's queue, waits in the engine for the slot.
The time from the cancel to its token is an upper bound: it includes the token's own step and its way back. `alone` is
the time of that stream on an idle engine, its way there included.

With two slots, for `min_groups=1`: the first prompt leaves room for more tokens. Two streams wait, a long one and one
of one token. The long one gets the slot of the prompt that ends, the short one the slot of the dropped prompt. Both
tokens take the same way, so the time between them is the time between the ends of the two prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from ray import serve

from benchmarks.common.engines import EngineArgs
from benchmarks.common.report import Figures
from benchmarks.router.service import started
from twinkle_serve.sampler import Rollouts, RunningSampler

CONTEXT = 2048
LEAST_ROUNDS = 5
ENGINE_ARGS: dict[str, EngineArgs] = {
    "fake": {"token_latency_s": 0.005},
    "vllm": {"dtype": "float32", "kv_cache_memory_bytes": 2**28},
}


class Waiter:
    """A stream, read in a thread until its first delta, then abandoned."""

    def __init__(self, sampler: RunningSampler, tokens: int) -> None:
        self._sampler, self._tokens = sampler, tokens
        self.sent = time.perf_counter()
        self.arrived = 0.0
        self._may_end = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        prompt = {"input_ids": np.full(4, 50, np.int32)}
        deltas = self._sampler.sample_stream(prompt, {"max_tokens": self._tokens, "ignore_eos": True})
        next(deltas)
        self.arrived = time.perf_counter()
        self._may_end.wait()  # and is cancelled as the iterator goes

    def first(self) -> float:
        """Waits for the first delta and returns its time of arrival; the stream goes on."""
        while not self.arrived and self._thread.is_alive():
            time.sleep(0.001)
        return self.arrived

    def end(self) -> None:
        self._may_end.set()
        self._thread.join()


async def cancel(options: argparse.Namespace) -> Figures:
    """Times in ms until an engine frees the slots of cancelled sequences."""
    figures: Figures = {}
    rounds = max(LEAST_ROUNDS, options.rounds)
    for slots, measure in ((1, _one_slot), (2, _two_slots)):
        args = {"max_model_len": CONTEXT, "max_num_seqs": slots, **ENGINE_ARGS[options.engine]}
        sampler = await started(f"slots{slots}", options.engine, args)
        figures |= await asyncio.to_thread(measure, sampler, rounds)
        await asyncio.to_thread(serve.delete, f"slots{slots}")
    return figures


def _one_slot(sampler: RunningSampler, rounds: int) -> Figures:
    ways: dict[str, Callable[[Rollouts], object]] = {
        "cancel": lambda rollouts: rollouts.cancel([1]),
        "close": lambda rollouts: rollouts.close(),
    }
    figures = {"alone": _ms([_alone(sampler) for _ in range(rounds)])}
    for way, act in ways.items():
        figures[way] = _ms([_cancelled(sampler, act) for _ in range(rounds)])
    return figures


def _two_slots(sampler: RunningSampler, rounds: int) -> Figures:
    return {"min_groups": _ms([_min_groups(sampler) for _ in range(rounds)])}


def _alone(sampler: RunningSampler) -> float:
    _settle(sampler)
    waiter = Waiter(sampler, 1)
    taken = waiter.first() - waiter.sent
    waiter.end()
    return taken


def _cancelled(sampler: RunningSampler, act: Callable[[Rollouts], object]) -> float | None:
    _settle(sampler)
    rollouts = _two_prompts(sampler, 4, None)
    next(rollouts)  # the second prompt runs now, or is about to
    _wait_for(sampler, 1)
    waiter = Waiter(sampler, 1)
    _wait_for(sampler, 2)
    time.sleep(0.05)  # lets the stream get from the router to the engine
    began = time.perf_counter()
    act(rollouts)
    taken = waiter.first() - began
    waiter.end()
    rollouts.close()
    return taken if taken > 0 else None


def _min_groups(sampler: RunningSampler) -> float | None:
    _settle(sampler)
    rollouts = _two_prompts(sampler, 120, 1)
    _wait_for(sampler, 2)
    long = Waiter(sampler, CONTEXT - 8)
    _wait_for(sampler, 3)
    short = Waiter(sampler, 1)
    _wait_for(sampler, 4)
    taken = short.first() - long.first()
    for waiter in (long, short):
        waiter.end()
    assert len(list(rollouts)) == 1
    return taken if taken > 0 else None


def _two_prompts(sampler: RunningSampler, room: int, min_groups: int | None) -> Rollouts:
    """Starts a call of a prompt with room for `room` tokens and one with nearly the whole context."""
    rng = np.random.default_rng(time.time_ns())
    prompts = [{"input_ids": rng.integers(32, 127, length).astype(np.int32)} for length in (CONTEXT - room, 4)]
    return sampler.sample_iter(prompts, {"max_tokens": None, "ignore_eos": True}, min_groups=min_groups)


def _settle(sampler: RunningSampler) -> None:
    while _sequences(sampler):
        time.sleep(0.01)


def _wait_for(sampler: RunningSampler, sequences: int) -> None:
    while _sequences(sampler) < sequences:
        time.sleep(0.002)


def _sequences(sampler: RunningSampler) -> int:
    return sum(int(engine["sequences"]) for engine in sampler.status()["engines"].values())


def _ms(taken: Sequence[float | None]) -> Figures:
    """Summarizes seconds. None marks a round whose slot was free before the cancel; those are counted as void."""
    values = sorted(seconds * 1e3 for seconds in taken if seconds is not None)
    if not values:
        return {"rounds": 0}
    return {
        "median_ms": round(statistics.median(values), 1),
        "max_ms": round(values[-1], 1),
        "rounds": len(values),
        "void": len(taken) - len(values),
    }
