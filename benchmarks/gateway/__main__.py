"""The HTTP gateway and vLLM's own server, in turn: the same requests, model, engine arguments, core and client.

    scripts/bench gateway [--only alone flight streams batch chat-alone chat-flight chat-streams native floor turns]
        [--servers vllm gateway two proxy] [--rounds 5] [--json FILE]

Servers:

- vllm: `vllm serve`.
- gateway: a gateway of one replica that listens itself, over a service with one engine.
- two: the same with two replicas.
- proxy: a gateway behind Serve's proxy.

Parts:

- alone, chat-alone: 40 completions of 16 tokens, one after the other.
- flight, chat-flight: 512 of them, 64 at a time.
- streams, chat-streams: 96 streams of 64 tokens, 32 at a time.
- batch: 64 prompts of 8 samples of 64 tokens in one request to `/v1/completions`.
- native: as many by `/sample`, as tensors and as JSON, and by handle.
- floor: an application that does nothing, behind Serve's proxy: 100 requests one after the other, 512 of them 64 at a
  time, and 32 streams of 64 events.
- turns: a conversation of up to 128 turns, in a session and without: tokens made from text, and tokens of prompts that
  no earlier turn had begun with.

A round runs each part on each server, next to each other in time, and ratios are of the same round, since the
machine's speed drifts. CPU is that of the server's processes; the client's, on the same cores, is `client_cpu`.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TypeAlias

import uvloop
from ray import serve

from benchmarks.common.report import Figures, Report, command, quartiles
from benchmarks.gateway import floor, native, turns
from benchmarks.gateway.servers import Processes, Server, Servers, cpu_seconds, free_port, own_cpu_seconds
from benchmarks.gateway.workloads import WORKLOADS, Done
from tests.support.ray_cluster import ray_cluster

PARTS = (*WORKLOADS, "native", "floor", "turns")
SERVERS = ("vllm", "gateway", "two", "proxy")
BASELINES = ("vllm", "handle")


class Measured:
    """One part on one server."""

    def __init__(self, done: Done, seconds: float, cpu_s: float, client_cpu_s: float) -> None:
        self.tokens_per_s = done.tokens / seconds
        self.requests_per_s = done.requests / seconds
        self.cpu_s_per_1000 = cpu_s / done.requests * 1000
        self.client_cpu_s_per_1000 = client_cpu_s / done.requests * 1000
        self.ms = [s * 1e3 for s in done.seconds_of_requests]
        self.first_ms = [s * 1e3 for s in done.seconds_to_first]

    @property
    def p50_ms(self) -> float:
        return statistics.median(self.ms)

    def __str__(self) -> str:
        first = f"first {statistics.median(self.first_ms):6.1f} ms " if self.first_ms else ""
        return (
            f"{self.tokens_per_s:7,.0f} tok/s {self.requests_per_s:6.1f}/s p50 {self.p50_ms:7.1f} ms {first}"
            f"cpu {self.cpu_s_per_1000:6.1f} client {self.client_cpu_s_per_1000:4.1f} s"
        )


Results: TypeAlias = defaultdict[str, defaultdict[str, list[Measured]]]
"""By part and server, one for each round."""


async def measured(work: Awaitable[Done], processes: Processes) -> Measured:
    """Times work, and the CPU time of the server and of this process."""
    before, own, began = cpu_seconds(processes()), own_cpu_seconds(), time.perf_counter()
    done = await work
    seconds = time.perf_counter() - began
    spent = sum(s - before.get(pid, 0.0) for pid, s in cpu_seconds(processes()).items())
    return Measured(done, seconds, spent, own_cpu_seconds() - own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here too, after every round")
    options = parser.parse_args()
    report = Report(command("gateway", options), options.json)
    with ExitStack() as stack:
        stack.enter_context(ray_cluster(num_cpus=32, with_serve=False))
        serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
        stack.callback(serve.shutdown)
        uvloop.run(_run(options, report))
    report.finish()


async def _run(options: argparse.Namespace, report: Report) -> None:
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="tsb", ignore_cleanup_errors=True))
        servers = Servers(stack, Path(directory))
        names = {*options.servers, *({"floor"} & set(options.only)), *(["gateway"] if "native" in options.only else [])}
        started = await servers.start(names)
        results: Results = defaultdict(lambda: defaultdict(list))
        for number in range(options.rounds + 1):  # the first one warms up
            for part in options.only:
                if part != "turns":
                    await _round(part, number, servers, started, results)
            if number:
                report.update(**{part: figures(by_server) for part, by_server in results.items()})
        if "turns" in options.only:
            report.update(turns=await _turns(started))


async def _round(part: str, number: int, servers: Servers, started: Mapping[str, Server], results: Results) -> None:
    works = _works(part, number, servers, started)
    for name in list(works)[:: 1 if number % 2 else -1]:
        server, work = works[name]
        done = await measured(work(), server.processes)
        if number:
            results[part][name].append(done)
            print(f"round {number} {part:14}{name:9}{done}", flush=True)


Work: TypeAlias = Callable[[], Awaitable[Done]]


def _works(part: str, number: int, servers: Servers, started: Mapping[str, Server]) -> dict[str, tuple[Server, Work]]:
    """Returns what a part runs, by the name under which it is reported."""

    def rng(name: str) -> random.Random:
        return random.Random(f"{number} {part} {name}")

    if part == "floor":
        server = started["floor"]
        return {name: (server, functools.partial(run, server.endpoint)) for name, run in floor.WORKLOADS.items()}
    if part == "native":
        server = started["gateway"]
        works = {
            name: (server, functools.partial(run, server.endpoint, rng(name))) for name, run in native.FORMS.items()
        }
        assert servers.sampler is not None
        return {"handle": (server, functools.partial(native.by_handle, servers.sampler, rng("handle"))), **works}
    return {
        name: (server, functools.partial(WORKLOADS[part], server.endpoint, rng(name)))
        for name, server in started.items()
        if name != "floor"
    }


async def _turns(started: Mapping[str, Server]) -> Figures:
    """Holds the same conversation in a session and without, and with vLLM's server."""
    found: Figures = {}
    for name, server, in_session in (
        ("session", "gateway", True),
        ("rendered anew", "gateway", False),
        ("vllm", "vllm", False),
    ):
        if server in started:
            sums = await turns.conversation(started[server].endpoint, random.Random(1), in_session=in_session)
            found[name] = [asdict(each) for each in sums.values()]
            print(f"turns {name}: {found[name]}", flush=True)
    return found


def figures(by_server: Mapping[str, Sequence[Measured]]) -> Figures:
    """Figures of one part: medians, percentiles over all rounds, and ratios to each baseline within a round."""
    found: Figures = {name: _medians(rounds) for name, rounds in by_server.items()}
    for baseline in BASELINES:
        for name in by_server.keys() - {baseline}:
            if baseline in by_server:
                pairs = list(zip(by_server[name], by_server[baseline], strict=True))
                found[f"{name} over {baseline}"] = _ratios(pairs)
    if {"gateway", "two"} <= by_server.keys():
        found["two over gateway"] = _ratios(list(zip(by_server["two"], by_server["gateway"], strict=True)))
    return found


def _medians(rounds: Sequence[Measured]) -> Figures:
    every = sorted(ms for each in rounds for ms in each.ms)
    first = sorted(ms for each in rounds for ms in each.first_ms)
    found: Figures = {
        "tokens_per_s": round(statistics.median(each.tokens_per_s for each in rounds)),
        "requests_per_s": round(statistics.median(each.requests_per_s for each in rounds), 1),
        "p50_ms": round(statistics.median(every), 2),
        "p99_ms": round(every[int(0.99 * (len(every) - 1))], 2),
        "cpu_s_per_1000_requests": round(statistics.median(each.cpu_s_per_1000 for each in rounds), 2),
        "client_cpu_s_per_1000_requests": round(statistics.median(each.client_cpu_s_per_1000 for each in rounds), 2),
    }
    if first:
        found["first_p50_ms"] = round(statistics.median(first), 1)
        found["first_p99_ms"] = round(first[int(0.99 * (len(first) - 1))], 1)
    return found


def _ratios(pairs: Sequence[tuple[Measured, Measured]]) -> Figures:
    found: Figures = {
        "requests_per_s": quartiles([a.requests_per_s / b.requests_per_s for a, b in pairs]),
        "p50": quartiles([a.p50_ms / b.p50_ms for a, b in pairs]),
        "cpu": quartiles([a.cpu_s_per_1000 / b.cpu_s_per_1000 for a, b in pairs]),
    }
    if pairs[0][0].first_ms:
        found["first"] = quartiles([statistics.median(a.first_ms) / statistics.median(b.first_ms) for a, b in pairs])
    return found


if __name__ == "__main__":
    main()
