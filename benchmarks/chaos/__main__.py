"""Tests a service under faults: whether samples are lost, and the cost in throughput.

    scripts/chaos --minutes N [--seed S] [--json FILE] [--engine vllm | fake] [--kill-engines-only]
    scripts/chaos --short [--seed S] [--json FILE]

A separate cluster with two engines and a gateway gets a steady load of sampling calls on adapters and the model, agents
with sessions over HTTP, a stream of new versions of both, and an event about every --period-s: a process of the service
or a trainer is killed or stopped, or Ray's object store is filled. Exits with 1 if any sample or acknowledged turn was
lost, doubled or mislabelled, or a call failed or hung.
Other options override those of --short.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.chaos.faults import ENGINE_KILLS
from benchmarks.chaos.record import SHORT, Options
from benchmarks.chaos.report import as_json, summary
from benchmarks.chaos.run import run

ENGINE_KILLS_S = 20.0
"""Period of kills with --kill-engines-only."""


def parsed(arguments: list[str]) -> tuple[Options, Path | None]:
    """Returns the options of the run and the path for its figures."""
    parser = argparse.ArgumentParser(
        prog="scripts/chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="half a minute on the fake engine, kills only")
    parser.add_argument("--minutes", type=float, help="of events; 5")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--engine", choices=["vllm", "fake"], help="vllm")
    parser.add_argument("--period-s", type=float, help="between events, from when all engines are ready; 10")
    parser.add_argument("--calm-s", type=float, help="before the events, and after them; 30")
    parser.add_argument("--bound-s", type=float, help="longest wait for all engines; 180")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="of events, such as 'router killed'; all")
    parser.add_argument(
        "--kill-engines-only", action="store_true", help=f"replicas and cores, every {ENGINE_KILLS_S:g} s"
    )
    parser.add_argument("--overlapping", action="store_true", help="do not wait for all engines between events")
    parser.add_argument("--share", type=float, help="of the samples to score; 1")
    given = vars(parser.parse_args(arguments))
    options, path = SHORT if given.pop("short") else Options(), given.pop("json")
    if given.pop("kill_engines_only"):
        with_cores = (given["engine"] or options.engine) == "vllm"
        options = replace(options, kinds=ENGINE_KILLS if with_cores else ENGINE_KILLS[:1], period_s=ENGINE_KILLS_S)
    if given["kinds"] is not None:
        given["kinds"] = tuple(given["kinds"])
    given["overlapping"] = given["overlapping"] or None
    return replace(options, **{name: value for name, value in given.items() if value is not None}), path


if __name__ == "__main__":
    options, path = parsed(sys.argv[1:])
    done = run(options)
    result = as_json(done, shlex.join(["scripts/chaos", *sys.argv[1:]]))
    print(summary(result))
    if path is not None:
        path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    sys.exit(1 if done.findings else 0)
