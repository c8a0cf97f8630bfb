"""The metrics of a replica, for Ray's Prometheus endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.serve import metrics

from twinkle_serve.data_format.metrics import Metric, MetricsSink

KINDS = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}


class RayMetrics(MetricsSink):
    """Makes each metric on its first value."""

    def __init__(self) -> None:
        self._made: dict[Metric, Any] = {}
        self._tags: dict[tuple[Metric, tuple[str, ...]], dict[str, str]] = {}
        """Tags by name, made once for each series."""

    def add(self, metric: Metric, value: float, tags: tuple[str, ...] = ()) -> None:
        counter = self._of(metric)
        if value > 0:
            counter.inc(value, self._named(metric, tags))
        else:  # Ray refuses it (ray 2.60, `Counter.inc`), and a counter that is not there yet is none to Prometheus
            counter._record(0.0, self._named(metric, tags))

    def set(self, metric: Metric, value: float, tags: tuple[str, ...] = ()) -> None:
        self._of(metric).set(value, self._named(metric, tags))

    def observe(self, metric: Metric, values: Sequence[float], tags: tuple[str, ...] = ()) -> None:
        histogram = self._of(metric)
        # As `Histogram.observe` does (ray 2.60), which takes three times as long for each value.
        named, record = histogram._get_final_tags(self._named(metric, tags)), histogram._metric.record
        for value in values:
            record(value, tags=named)

    def _of(self, metric: Metric) -> Any:
        """Returns Ray's metric."""
        made = self._made.get(metric)
        if made is None:
            options = {"boundaries": list(metric.boundaries)} if metric.kind == "histogram" else {}
            made = self._made[metric] = KINDS[metric.kind](
                metric.name, description=metric.description, tag_keys=metric.tags, **options
            )
        return made

    def _named(self, metric: Metric, tags: tuple[str, ...]) -> dict[str, str]:
        named = self._tags.get((metric, tags))
        if named is None:
            named = self._tags[metric, tags] = dict(zip(metric.tags, tags, strict=True))
        return named
