"""A pytest plugin that writes the outcome of each test to a JSON file as it ends: `--outcomes FILE`.

So a run that is cut short keeps the tests that had ended.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="write each test's outcome and seconds here")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.outcomes is not None:
        config.pluginmanager.register(Outcomes(config.option.outcomes))


class Outcomes:
    """Collects outcomes: passed, failed or skipped, by test."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tests: dict[str, dict[str, object]] = {}
        self._write(finished=False)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Records the worst outcome of set-up, call and tear-down, and the sum of their seconds."""
        test = self._tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        if report.outcome != "passed":
            test["outcome"] = report.outcome
        test["seconds"] = round(float(str(test["seconds"])) + report.duration, 2)
        if report.when == "teardown":
            self._write(finished=False)

    def pytest_sessionfinish(self) -> None:
        self._write(finished=True)

    def _write(self, *, finished: bool) -> None:
        ended = {"tests": self._tests} if finished else {"unfinished": True, "tests": self._tests}
        self._path.write_text(json.dumps(ended, indent=2) + "\n")
