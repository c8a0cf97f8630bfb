"""The metrics of a replica, for Ray's Prometheus endpoint."""

from __future__ import annotations

from typing import TypeVar

from ray.serve import metrics
from ray.util.metrics import Metric as RayMetric

from twinkle_serve.data_format.metrics import Metric, MetricsSink

M = TypeVar("M", bound=RayMetric)


class RayMetrics(MetricsSink):
    """Makes each metric on its first value."""

    def __init__(self) -> None:
        self._made: dict[Metric, RayMetric] = {}

    def add(self, metric: Metric, value: float, tags: tuple[str, ...] = ()) -> None:
        counter = self._of(metric, metrics.Counter)
        if value > 0:
            counter.inc(value, self._tags(metric, tags))
        else:  # Ray refuses it (ray 2.60, `Counter.inc`), and a counter that is not there yet is none to Prometheus
            counter._record(0.0, self._tags(metric, tags))

    def set(self, metric: Metric, value: float, tags: tuple[str, ...] = ()) -> None:
        self._of(metric, metrics.Gauge).set(value, self._tags(metric, tags))

    def observe(self, metric: Metric, value: float, tags: tuple[str, ...] = ()) -> None:
        self._of(metric, metrics.Histogram).observe(value, self._tags(metric, tags))

    def _of(self, metric: Metric, kind: type[M]) -> M:
        made = self._made.get(metric)
        if made is None:
            options = {"boundaries": list(metric.boundaries)} if metric.kind == "histogram" else {}
            made = self._made[metric] = kind(
                metric.name, description=metric.description, tag_keys=metric.tags, **options
            )
        assert isinstance(made, kind)
        return made

    @staticmethod
    def _tags(metric: Metric, tags: tuple[str, ...]) -> dict[str, str]:
        return dict(zip(metric.tags, tags, strict=True))
