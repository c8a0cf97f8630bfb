"""The metrics of a replica, for Ray's Prometheus endpoint."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ray._raylet import Sum  # type: ignore[attr-defined]  # as `ray.util.metrics` does
from ray.serve import metrics

from twinkle_serve.data_format.metrics import Metric, MetricsSink

KINDS = {"counter": metrics.Counter, "gauge": metrics.Gauge}
COLLECT_S = 1.0
"""Values of histograms are collected for so long, and handed to Ray together."""


class RayMetrics(MetricsSink):
    """Makes each metric on its first value. `observe` needs a running event loop."""

    def __init__(self) -> None:
        self._made: dict[Metric, Any] = {}
        self._tags: dict[tuple[Metric, tuple[str, ...]], dict[str, str]] = {}
        """Tags by name, made once for each series."""
        self._histograms: dict[Metric, _Histogram] = {}
        self._observed: defaultdict[tuple[Metric, tuple[str, ...]], list[float]] = defaultdict(list)
        """Values that Ray does not have yet."""

    def add(self, metric: Metric, value: float, tags: tuple[str, ...] = ()) -> None:
        counter = self._of(metric)
        if value > 0:
            counter.inc(value, self._named(metric, tags))
        else:  # Ray refuses it (ray 2.60, `Counter.inc`), and a counter that is not there yet is none to Prometheus
            counter._record(0.0, self._named(metric, tags))

    def set(self, metric: Metric, value: float, tags: tuple[str, ...] = ()) -> None:
        self._of(metric).set(value, self._named(metric, tags))

    def observe(self, metric: Metric, values: Sequence[float], tags: tuple[str, ...] = ()) -> None:
        if not self._observed:
            asyncio.get_running_loop().call_later(COLLECT_S, self._hand_over)
        self._observed[metric, tags].extend(values)

    def _hand_over(self) -> None:
        observed, self._observed = self._observed, defaultdict(list)
        for (metric, tags), values in observed.items():
            if (histogram := self._histograms.get(metric)) is None:
                histogram = self._histograms[metric] = _Histogram(metric)
            histogram.add(values, tags)

    def _of(self, metric: Metric) -> Any:
        """Returns Ray's metric."""
        made = self._made.get(metric)
        if made is None:
            made = self._made[metric] = KINDS[metric.kind](
                metric.name, description=metric.description, tag_keys=metric.tags
            )
        return made

    def _named(self, metric: Metric, tags: tuple[str, ...]) -> dict[str, str]:
        named = self._tags.get((metric, tags))
        if named is None:
            named = self._tags[metric, tags] = dict(zip(metric.tags, tags, strict=True))
        return named


class _Histogram:
    """The series of a histogram, `_bucket`, `_sum` and `_count`, as sums.

    Ray's own histogram (ray 2.60) takes 4 µs for each value, here and again in the node's agent, and exports each as
    the middle of its bucket.
    """

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        # As the metrics of Serve do.
        self._own = metrics._add_serve_metric_default_tags({})
        keys = metrics._add_serve_metric_tags(metric.tags)
        self._bucket = Sum(f"{metric.name}_bucket", metric.description, (*keys, "le"))
        self._sum = Sum(f"{metric.name}_sum", metric.description, keys)
        self._count = Sum(f"{metric.name}_count", metric.description, keys)
        self._series: dict[tuple[str, ...], tuple[dict[str, str], list[dict[str, str]]]] = {}
        """Tags by name, and those of each bucket."""

    def add(self, values: Sequence[float], tags: tuple[str, ...]) -> None:
        if is_new := tags not in self._series:
            named = self._own | dict(zip(self._metric.tags, tags, strict=True))
            limits = [*(f"{limit:g}" for limit in self._metric.boundaries), "+Inf"]
            self._series[tags] = named, [{**named, "le": limit} for limit in limits]
        named, buckets = self._series[tags]
        ordered = sorted(values)
        below = [*(bisect_right(ordered, limit) for limit in self._metric.boundaries), len(ordered)]
        for bucket, number in zip(buckets, below, strict=True):
            if number or is_new:  # a bucket that appears later would not count its first values
                self._bucket.record(number, tags=bucket)
        self._sum.record(sum(ordered), tags=named)
        self._count.record(len(ordered), tags=named)
