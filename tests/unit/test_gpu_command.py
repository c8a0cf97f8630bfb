"""`scripts/gpu`: its parts, their deadlines, and its summary. The parts themselves run on a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import gpu

UNFINISHED = {"unfinished": True, "tokens_per_s": {"bare": 2, "service": 1}, "ratio": {"median": 0.5, "all": [0.5]}}
HANGING = f"""
import json, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(json.dumps({{**json.loads('''{json.dumps(UNFINISHED)}'''), "child": child.pid}}))
time.sleep(60)
"""


def options(out: Path, *arguments: str) -> argparse.Namespace:
    return gpu.parsed(["--device", "cpu", "--out", str(out), *arguments])


def test_parts_are_chosen_by_only_and_skip(tmp_path: Path) -> None:
    """--skip wins over --only, the order stays, and no part left is an error."""
    assert options(tmp_path).parts == ["tests", "overhead", "weights"]
    assert options(tmp_path, "--only", "weights", "tests", "--skip", "tests").parts == ["weights"]
    with pytest.raises(SystemExit):
        options(tmp_path, "--skip", *gpu.PARTS)


def test_part_past_its_deadline_is_stopped_with_its_children_and_keeps_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Children in sessions of their own, as Ray starts them, end too."""
    monkeypatch.setattr(gpu, "STOP_S", 0.5)
    (tmp_path / "hanging_part.py").write_text(HANGING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "command", lambda part, options: ["hanging_part"])
    outcome = gpu.run_part("overhead", options(tmp_path), limit_s=2.0)
    assert outcome.state == "timed out"
    assert outcome.figures == {
        "tokens_per_s": {"bare": 2, "service": 1},
        "ratio": 0.5,
        "rounds": 1,
        "unfinished": True,
    }
    child = json.loads((tmp_path / "overhead.json").read_text())["child"]
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_part_that_fails_and_one_that_writes_nothing_are_told_apart_from_those_that_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the exit status; figures of an earlier run do not count."""
    (tmp_path / "overhead.json").write_text(json.dumps(UNFINISHED))
    monkeypatch.setattr(gpu, "command", lambda part, options: ["platform"])  # ends at once, with 0
    assert gpu.run_part("overhead", options(tmp_path), 60).state == "passed"
    monkeypatch.setattr(gpu, "command", lambda part, options: ["no_such_module"])
    failed = gpu.run_part("overhead", options(tmp_path), 60)
    assert (failed.state, failed.figures) == ("failed", {})
    assert "no_such_module" in (tmp_path / "overhead.log").read_text()


def test_summary_names_every_part(tmp_path: Path) -> None:
    """Those that ran with their figures, the others as skipped."""
    outcome = gpu.Outcome(state="passed", seconds=61.2, limit_s=85.0, figures={"passed": 4})
    chosen = options(tmp_path, "--only", "tests")
    lines = gpu.summary(gpu.as_json(chosen, {"tests": outcome})).splitlines()
    assert f"python {sys.version.split()[0]}" in lines[1]
    assert [line.split()[:2] for line in lines[2:]] == [
        ["tests", "passed"],
        ["overhead", "skipped"],
        ["weights", "skipped"],
    ]


def test_outcomes_of_tests_are_counted_and_failures_named() -> None:
    """The summary shows how many tests passed, and which failed."""
    tests = {"a": {"outcome": "passed"}, "b": {"outcome": "failed"}, "c": {"outcome": "passed"}}
    assert gpu.key_figures("tests", {"tests": tests}) == {"passed": 2, "failed": 1, "failures": ["b"]}
