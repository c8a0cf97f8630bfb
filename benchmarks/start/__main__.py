"""Start of a bare engine, of vLLM's own server and of the service, in turn: seconds to the first sample, and memory.

    scripts/bench start [--ways bare endpoint sampler service service2 gateway] [--rounds 5] [--cold] [--json FILE]

- bare: a script with an AsyncLLM.
- endpoint: `vllm serve`.
- sampler: a script with a `vLLMSampler`.
- service, service2: `scripts/serve` with one and two engines, without a gateway. It is ready once each engine has
  sampled.
- gateway: the same with one engine and a gateway, which answers then. `gateway_pss_mib` is that of its process.

All have the demo model and the same engine arguments. Seconds are from the start of the process to its first sample,
and from Ctrl-C, or the end of the script, to the end of its last process. Memory is the PSS of all its processes, in
which shared pages count once. --cold drops the page cache before each start, as root.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import psutil
import yaml

from benchmarks.calls.ways import Job, endpoint
from benchmarks.common.engines import EngineArgs
from benchmarks.common.report import Figures, Report, command, quartiles
from tests.support.scripts_serve import config_with, ended, own_environment, ready, start
from twinkle_serve import hub
from twinkle_serve.engines.vllm import cpu_defaults

ENGINE_ARGS: EngineArgs = {"max_model_len": 512, "dtype": "float32", "kv_cache_memory_bytes": 2**29}
WAYS = ("bare", "endpoint", "sampler", "service", "service2", "gateway")
START_S = 600.0


@dataclass(frozen=True, slots=True)
class Started:
    """One start of one way."""

    start_s: float
    stop_s: float
    pss_mib: float
    gateway_pss_mib: float = 0.0


Results: TypeAlias = defaultdict[str, list[Started]]
"""By way, one for each round."""


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each start")
    parser.add_argument("--port", type=int, default=18765, help="of vllm serve")
    parser.add_argument("--json", type=Path, help="write the figures here too, after every round")
    options = parser.parse_args()
    report = Report(command("start", options), options.json)
    results: Results = defaultdict(list)
    for number in range(options.rounds):
        for way in options.ways[:: 1 if number % 2 == 0 else -1]:
            if options.cold:
                await asyncio.to_thread(drop_page_cache)
            results[way].append(await started(way, options.port))
            print(f"round {number + 1} {way:10}{results[way][-1]}", flush=True)
        report.update(**{way: figures(each, results.get("bare", [])) for way, each in results.items()})
    report.finish()


def drop_page_cache() -> None:
    """Makes every process read its files from the disk again."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


async def started(way: str, port: int) -> Started:
    """Starts a way, waits for its first sample, and stops it."""
    with tempfile.TemporaryDirectory(prefix="tsb", ignore_cleanup_errors=True) as directory:
        began = time.perf_counter()
        async with running(way, port, Path(directory)) as process:
            up = time.perf_counter()
            family = [process, *process.children(recursive=True)]
            pss_mib = {member: member.memory_full_info().pss / 2**20 for member in family}
            gateway = sum(pss_mib[member] for member in family if ":gateway" in " ".join(member.cmdline()))
            stopping = time.perf_counter()
        return Started(up - began, time.perf_counter() - stopping, sum(pss_mib.values()), gateway)


@asynccontextmanager
async def running(way: str, port: int, directory: Path) -> AsyncIterator[psutil.Process]:
    """A way that has sampled, by its first process; everything of it has ended afterwards."""
    if way == "endpoint":
        async with endpoint(str(hub.DEMO), ENGINE_ARGS, {}, port, directory / "log") as served:
            await served.sample(Job(ids=[20, 21], tokens=2))
            yield served.processes()[0]
    elif way.startswith("service") or way == "gateway":
        config = config_with(
            directory / "config.yaml",
            device_mesh={"dp_size": 2 if way == "service2" else 1, "device_type": "cpu"},
            engine_args=ENGINE_ARGS,
        )
        if way != "gateway":
            remove_gateway(config)
        with own_environment() as environment:
            process = start(config, environment, directory / "log")
            await asyncio.to_thread(ready, process, directory / "log")
            yield psutil.Process(process.pid)
            process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(ended, process, START_S) == 0
    else:
        args = (
            ENGINE_ARGS if way == "sampler" else {"model": str(hub.DEMO), **cpu_defaults(str(hub.DEMO), ENGINE_ARGS, 1)}
        )
        script = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "benchmarks.start.script", way, json.dumps(args)],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert script.stdout is not None and script.stdin is not None
        async with asyncio.timeout(START_S):
            assert await script.stdout.readline() == b"sampled\n"
        yield psutil.Process(script.pid)
        script.stdin.close()
        assert await script.wait() == 0


def remove_gateway(config: Path) -> None:
    """Leaves the sampler alone in a config."""
    document = yaml.safe_load(config.read_text())
    del document["applications"][1:]
    config.write_text(yaml.safe_dump(document))


def figures(rounds: Sequence[Started], bare: Sequence[Started]) -> Figures:
    """Medians of one way, and ratios of its start to the bare engine's within a round."""
    found: Figures = {
        "start_s": round(statistics.median(each.start_s for each in rounds), 1),
        "stop_s": round(statistics.median(each.stop_s for each in rounds), 1),
        "pss_mib": round(statistics.median(each.pss_mib for each in rounds)),
    }
    if gateway := statistics.median(each.gateway_pss_mib for each in rounds):
        found["gateway_pss_mib"] = round(gateway)
    if len(bare) == len(rounds):
        found["start over bare"] = quartiles([way.start_s / b.start_s for way, b in zip(rounds, bare, strict=True)])
    return found


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    asyncio.run(main())
