"""A closed loop of callers, and what it measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from twinkle_serve.cli.client import Sampling
from twinkle_serve.errors import TwinkleServeError

PERCENTILES = (50, 90, 99)


class Samples(Protocol):
    """A client that samples; see `Client.sample`."""

    def sample(self, inputs: Sequence[Mapping[str, Any]], sampling: Sampling) -> Any: ...


@dataclass(slots=True)
class Measured:
    """What a load has measured."""

    seconds: float = 0.0
    """From the first call to the end of the last."""
    call_s: list[float] = field(default_factory=list)
    """Duration of each complete call."""
    samples: int = 0
    tokens: int = 0
    """Sampled tokens."""
    prompt_tokens: int = 0
    errors: list[str] = field(default_factory=list)
    """Of calls that failed."""

    def percentile(self, percent: float) -> float | None:
        """Returns a percentile of the calls' durations, seconds; None without calls."""
        ordered = sorted(self.call_s)
        return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))] if ordered else None

    @property
    def plain(self) -> dict[str, Any]:
        """The same as plain values."""
        elapsed = max(self.seconds, 1e-9)
        return {
            "seconds": self.seconds,
            "calls": len(self.call_s),
            "failed_calls": len(self.errors),
            "samples": self.samples,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "calls_per_s": len(self.call_s) / elapsed,
            "tokens_per_s": self.tokens / elapsed,
            "latency_s": {
                **{f"p{percent}": self.percentile(percent) for percent in PERCENTILES},
                "max": max(self.call_s, default=None),
            },
            "first_error": self.errors[0] if self.errors else None,
        }


def run_load(
    client: Samples,
    inputs: Callable[[int], Sequence[Mapping[str, Any]]],
    sampling: Sampling,
    *,
    concurrency: int,
    seconds: float,
    max_calls: int | None = None,
    progress: Callable[[Measured], None] = lambda measured: None,
) -> Measured:
    """Calls a service from so many callers at once, each again as soon as its call has ended.

    Calls that have begun when the time is over are completed, and count.

    Args:
        inputs: inputs of a call, by its number.
        seconds: no call begins later.
        max_calls: no further call begins; None: as many as there is time for.
        progress: called about four times a second.

    Raises:
        TwinkleServeError: the first error, if every call failed.
    """
    measured, lock = Measured(), threading.Lock()
    numbers, failures = iter(range(max_calls if max_calls is not None else 1 << 62)), []
    stop = threading.Event()
    began = time.monotonic()

    def call_again_and_again() -> None:
        while not stop.is_set() and time.monotonic() - began < seconds:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            start = time.monotonic()
            try:
                response = client.sample(inputs(number), sampling)
            except TwinkleServeError as error:
                with lock:
                    measured.errors.append(f"{type(error).__name__}: {error}")
                    failures.append(error)
                if len(failures) >= concurrency and not measured.call_s:
                    return  # nothing works
                continue
            took_s = time.monotonic() - start
            with lock:
                measured.call_s.append(took_s)
                measured.samples += len(response.columns)
                measured.tokens += len(response.columns.tokens)
                measured.prompt_tokens += sum(len(prompt) for prompt in response.prompts)

    callers = [threading.Thread(target=call_again_and_again, daemon=True) for _ in range(concurrency)]
    try:
        for caller in callers:
            caller.start()
        while any(caller.is_alive() for caller in callers):
            next((caller for caller in callers if caller.is_alive()), callers[0]).join(0.25)
            with lock:
                measured.seconds = time.monotonic() - began
                progress(measured)
    finally:
        stop.set()
    measured.seconds = time.monotonic() - began
    if failures and not measured.call_s:
        raise failures[0]
    return measured
