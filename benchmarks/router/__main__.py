"""The router on a real cluster: calls per second, CPU per prompt, latency of control calls, and of cancels; telemetry.

    scripts/bench router [--engine fake] [--only calls cpu rpc control cancel telemetry] [--rounds 5] [--json FILE]

- calls: `--calls` calls of one prompt and `--samples` samples each, 64 at a time, through `connect` and `sample_async`,
  in turn with a reference graph: a trivial router, called by handle, 64 at a time, that calls a deployment of the same
  engine kind once per sample and gathers the answers. It checks nothing, encodes nothing, tracks no load, and returns a
  list of columns. Both get the same token ids, and every sample has `--tokens` tokens.
- cpu: CPU time of the processes during calls of 64 prompts of 8 samples.
- rpc: the router's CPU time per sent chunk and per returned item, by themselves.
- control: `status` from a separate process every 20 ms, from when 10,000 prompts are sent until none waits, or 20 s.
- cancel: see `benchmarks/router/cancel.py`.
- telemetry: see `benchmarks/router/telemetry.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

from benchmarks.common.report import Report, command
from benchmarks.router.calls import calls, cpu
from benchmarks.router.cancel import cancel
from benchmarks.router.control import control
from benchmarks.router.rpc import rpc
from benchmarks.router.telemetry import telemetry
from tests.support.ray_cluster import ray_cluster

PARTS = {"calls": calls, "cpu": cpu, "rpc": rpc, "control": control, "cancel": cancel, "telemetry": telemetry}
CORES = 8
"""Logical cores: the service and the reference are deployed side by side, and one of them works at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--engine", choices=["fake", "vllm"], default="fake", help="of calls, cpu, cancel and telemetry"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here too, after every part")
    options = parser.parse_args()
    report = Report(command("router", options), options.json)
    with ray_cluster(num_cpus=CORES):
        for part in options.only:
            figures = asyncio.run(PARTS[part](options))
            report.update(**{part: figures})
            print(part, json.dumps(figures, indent=2), flush=True)
    report.finish()


if __name__ == "__main__":
    main()
