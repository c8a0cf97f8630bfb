"""Tiers, their order, and the service's log of a test that failed."""

from __future__ import annotations

import os
from collections.abc import Generator

# Before anything imports ray: no reports home, and no colour codes in what tests read.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import pytest

from tests.support import affected, service_logs

STAGES = ("tests/unit/", "tests/conformance/", "tests/integration/")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tiers")
    group.addoption("--nightly", action="store_true", help="run the tests marked `nightly` too")
    group.addoption("--affected", action="store_true", help="with --nightly: only nightly tests of what has changed")
    group.addoption("--base", metavar="REV", help="with --affected: changed since REV, not since main or HEAD~")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.affected and not config.option.nightly:
        raise pytest.UsageError("--affected selects nightly tests. Add --nightly.")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what is not of this tier."""
    selected = _of_tier(config, items)
    if len(selected) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected


def _of_tier(config: pytest.Config, items: list[pytest.Item]) -> list[pytest.Item]:
    if not config.option.nightly:
        return [item for item in items if not item.get_closest_marker("nightly")]
    if not config.option.affected:
        return items
    files = affected.nightly_tests(affected.changed_paths(config.rootpath, config.option.base))
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    return [item for item in nightly if item.path.relative_to(config.rootpath).as_posix() in files]


def pytest_runtest_logstart() -> None:
    service_logs.mark()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds what the service has logged since the test began to the report of a failure."""
    report = yield
    if report.failed and (text := service_logs.since_mark()):
        report.sections.append(("the service's log during this test", text))
    return report
