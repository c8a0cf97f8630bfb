"""Dashboards and alert rules: they are those of the metric table, and name nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from observability.alerts import ALERTS
from observability.dashboards import DASHBOARDS
from observability.generate import HERE, files
from observability.launcher import CannotStartError, configuration, find_discovery, start_prometheus, targets
from twinkle_serve.data_format.metrics import METRICS

NAME = re.compile(r"\bray_twinkle_\w+")
SUFFIXES = ("_bucket", "_sum", "_count")
EXPORTED = {
    metric.exported + suffix: metric
    for metric in METRICS
    for suffix in (SUFFIXES if metric.kind == "histogram" else ("",))
}
EXPRESSIONS = [
    *(query.expression for dashboard in DASHBOARDS for panel in dashboard.panels for query in panel.queries),
    *(condition.expression for alert in ALERTS for condition in alert.conditions),
]


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_checked_in_file_is_what_the_table_gives(path: Path) -> None:
    """After a change: `python -m observability.generate`."""
    assert path.read_text(encoding="utf-8") == files()[path]


def test_no_other_dashboard_is_checked_in() -> None:
    """Grafana would show one that nobody generates any more."""
    assert {path for path in files() if path.suffix == ".json"} == set((HERE / "grafana" / "dashboards").iterdir())


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expression_names_only_metrics_and_tags_that_exist(expression: str) -> None:
    """Names as Ray exports them, with the suffixes of their kind."""
    names = NAME.findall(expression)
    assert names
    assert not set(names) - EXPORTED.keys()
    known = {"application", "le", *(tag for name in names for tag in EXPORTED[name].tags)}
    tags = re.findall(r"(\w+)=~?\"", expression)
    grouped = [tag for by in re.findall(r"by \(([^)]*)\)", expression) for tag in by.split(", ")]
    assert not {*tags, *grouped} - known


def test_every_metric_is_in_a_dashboard_or_an_alert() -> None:
    """A metric that nobody sees is a cost without a use."""
    shown = {EXPORTED[name].name for expression in EXPRESSIONS for name in NAME.findall(expression)}
    assert shown == {metric.name for metric in METRICS}


def test_names_follow_prometheus() -> None:
    """A base unit or a count; `_total` is Ray's."""
    for metric in METRICS:
        assert re.fullmatch(r"twinkle_[a-z_]+", metric.name)
        assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket", "_ms", "_percent")), metric.name
        assert bool(metric.boundaries) == (metric.kind == "histogram")
        assert all(len(tags) == len(metric.tags) and metric.kind == "counter" for tags in metric.initial)
        assert len({metric.description for metric in METRICS}) == len(METRICS)


def test_panels_do_not_overlap_and_fill_their_rows() -> None:
    """Grafana would move them."""
    for dashboard in DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        for panel in dashboard.json()["panels"]:
            at = panel["gridPos"]
            assert at["x"] + at["w"] <= 24
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert not cells & taken
            taken |= cells


def test_prometheus_scrapes_what_ray_names_and_reads_the_alerts(tmp_path: Path) -> None:
    """The file of the cluster that was found, and not another cluster's."""
    discovery = tmp_path / "prom_metrics_service_discovery.json"
    discovery.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": ["127.0.0.1:1", "127.0.0.1:2"]}]))
    assert find_discovery(tmp_path) == discovery
    assert targets(discovery) == ["127.0.0.1:1", "127.0.0.1:2"]
    document = yaml.safe_load(configuration(discovery))
    assert document["scrape_configs"][0]["file_sd_configs"][0]["files"] == [str(discovery)]
    assert [Path(path).is_file() for path in document["rule_files"]] == [True]


def test_missing_cluster_is_reported_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(CannotStartError, match=r"no Ray cluster .* runs on this machine.* give --ray-dir"):
        find_discovery(tmp_path)


def test_missing_prometheus_is_reported_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotStartError, match="apt-get install prometheus"):
        start_prometheus(tmp_path, tmp_path, 1, None)
