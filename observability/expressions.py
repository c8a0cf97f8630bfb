"""PromQL over the metrics of a service."""

from __future__ import annotations

from twinkle_serve.data_format import metrics
from twinkle_serve.data_format.metrics import Metric

RATE_WINDOW = "$__rate_interval"
"""Grafana's: at least four scrapes."""

APPLICATION = 'application=~"$application"'
"""The applications that a dashboard's variable selects."""


def series(metric: Metric, where: str = APPLICATION, suffix: str = "") -> str:
    """Returns the series of a metric.

    Args:
        where: conditions on its tags.
        suffix: of a histogram: bucket, sum or count.
    """
    assert (metric.kind == "histogram") == bool(suffix), metric.name
    return f"{metric.exported}{'_' if suffix else ''}{suffix}{f'{{{where}}}' if where else ''}"


def rate(metric: Metric, by: str = "", where: str = APPLICATION, window: str = RATE_WINDOW) -> str:
    """Returns the increase per second of a counter, summed over all tags but `by`."""
    return f"sum{_by(by)}(rate({series(metric, where)}[{window}]))"


def total(metric: Metric, by: str = "", where: str = APPLICATION) -> str:
    """Returns the sum of a metric over all tags but `by`."""
    return f"sum{_by(by)}({series(metric, where)})"


def quantile(share: float, metric: Metric, by: str = "", where: str = APPLICATION, window: str = RATE_WINDOW) -> str:
    """Returns a quantile of a histogram."""
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({share:g}, sum by ({labels}) (rate({series(metric, where, 'bucket')}[{window}])))"


def mean(metric: Metric, by: str = "", where: str = APPLICATION, window: str = RATE_WINDOW) -> str:
    """Returns the mean of a histogram's values."""
    summed, count = (f"rate({series(metric, where, suffix)}[{window}])" for suffix in ("sum", "count"))
    return f"sum{_by(by)}({summed}) / sum{_by(by)}({count})"


def errors_share(window: str, where: str = "", by: str = "") -> str:
    """Returns the part of the gateway's requests that it answered with a status of 500 or above."""
    also = f", {where}" if where else ""
    failed = rate(metrics.HTTP_REQUESTS, by, f'status=~"5.."{also}', window)
    every = rate(metrics.HTTP_REQUESTS, by, where, window)
    return f"({failed} or 0 * {every}) / {every}"


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""
