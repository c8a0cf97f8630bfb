"""The share of a busy router's CPU that metrics, log lines and traces take.

py-spy looks at the stacks of the router's process, RATE times a second, while callers keep it busy. Threads that wait
are left out, so a sample is a piece of CPU time. Samples with a frame of TELEMETRY belong to telemetry, with all that
it calls: Ray's metrics, logging, OpenTelemetry. Shares depend little on the speed of the machine and on its other
users. Ray's own threads have no Python stacks; with them the shares would be lower.

py-spy reads the memory of another process, which takes root, or 0 in /proc/sys/kernel/yama/ptrace_scope.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TypeAlias

from ray import serve

from benchmarks.common.cpu_time import pid_of
from benchmarks.common.report import Figures
from benchmarks.router.service import engine_args, prompts_of, started
from tests.support.collector import collector
from twinkle_serve.sampler import RunningSampler

RATE = 100
"""Looks at the stacks per second."""
ROUND_S = 20
"""Four periods in which the router hands its counts to Ray, and two lines of its log."""
AT_A_TIME = 64

TELEMETRY = re.compile(
    r"/(?:twinkle_serve/(?:routing/telemetry|traces)|deployments/(?:metrics|log_config)|logging/\w+|opentelemetry/.+)\.py:"
    r"|^Admission\._traced \("
    r"|^Router\.(?:_count_first_token|_count_sent|_report_staleness|_keep_telemetry|_state) \("
    r"|^(?:GroupScheduler\._count|Track\.staleness|Request\.prompt_tokens) \("
)
"""A frame of telemetry, as py-spy writes it: `Class.function (/path/of/file.py:line)`."""
WAITING = re.compile(
    r"/(?:threading|concurrent/futures/thread|queue|selectors|twinkle_serve/parent)\.py:"
    r"|_event_loop \(.+/serve/_private/|^Worker\.main_loop \(|^_run \(.+/uvicorn/"
)
"""The innermost frame of a thread that waits, or of an event loop that runs nothing written in Python."""

Stacks: TypeAlias = Counter[str]
"""Samples by stack: frames from the outermost one, joined by semicolons."""


CASES = {
    "single calls": (1, 1, None),
    "batches": (64, 8, None),
    "single calls, 1% traced": (1, 1, 0.01),
    "single calls, all traced": (1, 1, 1.0),
}
"""Prompts of a call, samples of a prompt, and the traced part of the calls; None: without traces."""


async def telemetry(options: argparse.Namespace) -> Figures:
    """Shares of each case, in percent."""
    figures: Figures = {"looks_per_s": RATE, "seconds_per_round": ROUND_S}
    with collector() as received:
        for name, (prompts, samples, ratio) in CASES.items():
            traces = None if ratio is None else {"endpoint": received.endpoint, "sample_ratio": ratio}
            sampler = await started("sampler", options.engine, engine_args(options), traces=traces)
            rounds = [await _sampled(sampler, prompts, samples, options.tokens) for _ in range(options.rounds + 1)]
            figures[name] = _shares(rounds[1:])  # the first one warms up
            print(name, figures[name], flush=True)
            await asyncio.to_thread(serve.delete, "sampler")
            received.spans.clear()
    return figures


async def _sampled(sampler: RunningSampler, prompts: int, samples: int, tokens: int) -> Stacks:
    """Returns what py-spy sees of the router while calls keep it busy."""
    numbers = count()
    over = asyncio.Event()
    params = {"max_tokens": tokens, "ignore_eos": True}

    async def caller() -> None:
        while not over.is_set():
            await sampler.sample_async(prompts_of(prompts, next(numbers)), params, num_samples=samples)

    callers = [asyncio.create_task(caller()) for _ in range(max(8, AT_A_TIME // prompts))]
    try:
        return await _stacks(pid_of("router replica"))
    finally:
        over.set()
        await asyncio.gather(*callers)


async def _stacks(pid: int) -> Stacks:
    """Runs py-spy for ROUND_S on a process."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "stacks"
        profiler = await asyncio.create_subprocess_exec(
            *("py-spy", "record", "--pid", str(pid), "--rate", str(RATE), "--duration", str(ROUND_S)),
            *("--format", "raw", "--full-filenames", "--output", str(out)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await asyncio.wait_for(profiler.communicate(), ROUND_S + 60)
        if profiler.returncode:
            raise RuntimeError(f"py-spy ended with {profiler.returncode}: {said.decode()}")
        lines = (await asyncio.to_thread(out.read_text)).splitlines()
    stacks = Counter({stack: int(number) for stack, _, number in (line.rpartition(" ") for line in lines)})
    return Counter({stack: number for stack, number in stacks.items() if not _waits(stack)})


def _waits(stack: str) -> bool:
    innermost = stack.rpartition(";")[2]
    return not innermost or WAITING.search(innermost) is not None


def _shares(rounds: Sequence[Stacks]) -> Figures:
    """Returns the share of telemetry over all rounds, its standard error by the differences between rounds, and the
    functions that have most of it."""
    totals = [each.total() for each in rounds]
    functions = [_telemetry(each) for each in rounds]
    found = [each.total() for each in functions]
    share = sum(found) / sum(totals)
    squares = sum((part - share * total) ** 2 for part, total in zip(found, totals, strict=True))
    error = math.sqrt(squares * len(rounds) / max(1, len(rounds) - 1)) / sum(totals)
    largest = sum(functions, Counter[str]()).most_common(5)
    return {
        "percent": round(100 * share, 2),
        "standard_error": round(100 * error, 2),
        "rounds": [round(100 * part / total, 2) for part, total in zip(found, totals, strict=True)],
        "samples": sum(totals),
        "largest": {name: round(100 * number / sum(totals), 2) for name, number in largest},
    }


def _telemetry(stacks: Stacks) -> Counter[str]:
    """Returns the samples of telemetry by the function through which their stacks enter it."""
    entered: Counter[str] = Counter()
    for stack, number in stacks.items():
        if (frame := next(filter(TELEMETRY.search, stack.split(";")), None)) is not None:
            entered[frame.partition(" ")[0]] += number
    return entered
