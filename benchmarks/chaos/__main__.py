"""Tests a service under faults: whether samples are lost, and the cost in throughput.

    scripts/chaos --minutes N [--seed S] [--json FILE] [--engine vllm | fake] [--kill-engines-only]

A separate cluster with two engines gets a steady load of sampling calls on adapters and the model, a stream of new
versions of both, and an event about every --period-s: a process of the service or a trainer is killed or stopped, or
Ray's object store is filled. Exits with 1 if any sample was lost, doubled or mislabelled, or a call failed or hung.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from benchmarks.chaos.faults import ENGINE_KILLS
from benchmarks.chaos.record import Options
from benchmarks.chaos.report import as_json, summary
from benchmarks.chaos.run import run

ENGINE_KILLS_S = 20.0
"""Period of kills with --kill-engines-only."""


def parsed(arguments: list[str]) -> tuple[Options, Path | None]:
    """Returns the options of the run and the path for its figures."""
    default = Options()
    parser = argparse.ArgumentParser(
        prog="scripts/chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=default.minutes, help="of events")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--engine", choices=["vllm", "fake"], default=default.engine)
    parser.add_argument("--period-s", type=float, help="between events, from when all engines are ready; 10")
    parser.add_argument("--calm-s", type=float, default=default.calm_s, help="before the events, and after them")
    parser.add_argument("--bound-s", type=float, default=default.bound_s, help="longest wait for all engines")
    parser.add_argument("--kinds", nargs="+", default=[], metavar="KIND", help="of events, such as 'router killed'")
    parser.add_argument(
        "--kill-engines-only", action="store_true", help=f"replicas and cores, every {ENGINE_KILLS_S:g} s"
    )
    parser.add_argument("--overlapping", action="store_true", help="do not wait for all engines between events")
    parser.add_argument("--share", type=float, default=default.share, help="of the samples to score")
    given = parser.parse_args(arguments)
    kinds = tuple(given.kinds)
    if given.kill_engines_only:
        kinds = ENGINE_KILLS if given.engine == "vllm" else ENGINE_KILLS[:1]
    options = Options(
        engine=given.engine,
        minutes=given.minutes,
        seed=given.seed,
        period_s=given.period_s or (ENGINE_KILLS_S if given.kill_engines_only else default.period_s),
        calm_s=given.calm_s,
        bound_s=given.bound_s,
        kinds=kinds,
        overlapping=given.overlapping,
        share=given.share,
    )
    return options, given.json


if __name__ == "__main__":
    options, path = parsed(sys.argv[1:])
    done = run(options)
    result = as_json(done, shlex.join(["scripts/chaos", *sys.argv[1:]]))
    print(summary(result))
    if path is not None:
        path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    sys.exit(1 if done.findings else 0)
