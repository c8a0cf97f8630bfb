"""Tiers, their order, and the service's log of a test that failed."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

# Before anything imports ray: no reports home, and no colour codes in what tests read.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import pytest

from tests.support import affected, service_logs

if TYPE_CHECKING:
    from twinkle_serve.sampler import RunningSampler


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
    """Deselects other tiers, marks unit tests, and sorts."""
    selected = _of_tier(config, items)
    if len(selected) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = sorted(selected, key=_place)
    for item in items:
        if _stage(item) == 0:
            item.add_marker("unit")


def _place(item: pytest.Item) -> tuple[int, str, bool]:
    """Sort key: stage, folder (its fixtures end with it), then tests that leave an engine dead."""
    return _stage(item), item.path.parent.as_posix(), item.get_closest_marker("ends_engine") is not None


def _stage(item: pytest.Item) -> int:
    """Unit tests; then without a cluster, in one of their own, in the shared one, and last on the shared vLLM service.

    This process can be in one cluster at a time, and nothing else should run beside the engines of that service.
    """
    if _file(item).startswith("tests/unit/"):
        return 0
    if not item.get_closest_marker("ray"):
        return 1
    if item.get_closest_marker("own_cluster"):
        return 2
    return 4 if item.get_closest_marker("vllm") else 3


def _of_tier(config: pytest.Config, items: list[pytest.Item]) -> list[pytest.Item]:
    nightly = {item: _file(item) for item in items if item.get_closest_marker("nightly")}
    if unknown := set(nightly.values()) - affected.ALL:
        raise pytest.UsageError(f"nightly tests in {', '.join(unknown)}, which tests/support/affected.py does not know")
    if not config.option.nightly:
        return [item for item in items if item not in nightly]
    if not config.option.affected:
        return items
    files = affected.nightly_tests(affected.changed_paths(config.rootpath, config.option.base))
    return [item for item, file in nightly.items() if file in files]


def _file(item: pytest.Item) -> str:
    return item.path.relative_to(item.config.rootpath).as_posix()


def pytest_runtest_logstart() -> None:
    service_logs.mark()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds what the service has logged since the test began to the report of a failure."""
    report = yield
    if report.failed and (text := service_logs.since_mark()):
        report.sections.append(("the service's log during this test", text))
    return report


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """The Ray cluster that tests share: 32 cores, as Ray counts, and Serve with HTTP on a free port."""
    from tests.support.ray_cluster import ray_cluster

    with ray_cluster(num_cpus=32, with_http=True):
        yield


@pytest.fixture(scope="session")
def specified(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The specification's snippet of the vLLM sampler, once it has run: its names, the sampler among them."""
    from tests.support.lora import save_adapter
    from tests.support.specification import VLLM_SAMPLER, as_twinkle, run

    with as_twinkle():
        names = run(VLLM_SAMPLER, LORA=str(save_adapter(tmp_path_factory.mktemp("specification") / "lora")))
    names["sampler"].remove_adapter("my_lora")
    yield names
    names["sampler"].shutdown()


@pytest.fixture(scope="session")
def vllm_service(specified: dict[str, Any]) -> RunningSampler:
    """The vLLM service that tests share, two engines with `failover: resume`: the sampler of that snippet."""
    sampler: RunningSampler = specified["sampler"]
    return sampler
