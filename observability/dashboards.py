"""The dashboards: overview, engines, weights, gateway."""

from __future__ import annotations

from observability.expressions import APPLICATION, errors_share, mean, quantile, rate, series, total
from observability.panels import Dashboard, Panel, Query
from twinkle_serve.data_format import metrics
from twinkle_serve.data_format.metrics import Metric

PUBLISHED = total(metrics.UPDATES, where=f'outcome="published", {APPLICATION}')
READY = f'state="ready", {APPLICATION}'


def one(title: str, expression: str, unit: str = "short", legend: str = "", **options: object) -> Panel:
    """Returns a panel with a single query."""
    return Panel(title, (Query(expression, legend),), unit, **options)  # type: ignore[arg-type]


def spread(title: str, metric: Metric, unit: str = "s", by: str = "", description: str = "") -> Panel:
    """Returns a panel with the 50th and the 95th percentile of a histogram."""
    tag = f" {{{{{by}}}}}" if by else ""
    queries = tuple(Query(quantile(share, metric, by), f"{name}{tag}") for share, name in ((0.5, "p50"), (0.95, "p95")))
    return Panel(title, queries, unit, description or metric.description)


OVERVIEW = Dashboard(
    "overview",
    "Twinkle Serve: overview",
    metrics.RUNNING_CALLS.exported,
    [
        one("Engines ready", total(metrics.ENGINE_STATE, where=READY), kind="stat"),
        one("Engines", f"count({series(metrics.ENGINE_STATE, READY)})", kind="stat"),
        one("Running calls", total(metrics.RUNNING_CALLS), kind="stat"),
        one("Waiting prompts", total(metrics.QUEUE_PROMPTS), kind="stat"),
        one("Weights", f"max({series(metrics.WEIGHTS_VERSION)})", kind="stat"),
        one("Sessions", total(metrics.SESSIONS), kind="stat"),
        Panel(
            "Tokens per second",
            (
                Query(rate(metrics.SAMPLED_TOKENS), "sampled"),
                Query(rate(metrics.PROMPT_TOKENS), "of admitted prompts"),
            ),
        ),
        Panel(
            "Prompts and samples per second",
            (Query(rate(metrics.PROMPTS), "prompts admitted"), Query(rate(metrics.SAMPLES), "samples returned")),
        ),
        one("Calls per second, by outcome", rate(metrics.CALLS, "outcome"), legend="{{outcome}}", stacked=True),
        spread("Duration of calls", metrics.CALL_SECONDS),
        spread("Time in the queue", metrics.QUEUED_SECONDS),
        spread("Time to the first token", metrics.FIRST_TOKEN_SECONDS),
        Panel(
            "Queue",
            (
                Query(total(metrics.QUEUE_PROMPTS, "application"), "{{application}} prompts"),
                Query(total(metrics.QUEUE_TOKENS, "application"), "{{application}} expected tokens"),
            ),
        ),
        one("Samples per second, by stop reason", rate(metrics.SAMPLES, "reason"), legend="{{reason}}", stacked=True),
        one(
            "Tokens per second, by adapter",
            rate(metrics.SAMPLED_TOKENS, "adapter"),
            legend="{{adapter}}",
            stacked=True,
            description="Without a name: the model's own weights.",
        ),
    ],
)

ENGINES = Dashboard(
    "engines",
    "Twinkle Serve: engines",
    metrics.ENGINE_STATE.exported,
    [
        one(
            "State",
            f"max by (engine, state) ({series(metrics.ENGINE_STATE)}) == 1",
            legend="{{engine}}: {{state}}",
            kind="state-timeline",
        ),
        one(
            "Batch fill",
            f"max by (engine) ({series(metrics.ENGINE_BATCH_FILL)})",
            "percentunit",
            "{{engine}}",
            description=f"{metrics.ENGINE_BATCH_FILL.description} Above 1, some wait inside it.",
        ),
        one(
            "KV cache in use",
            f"max by (engine) ({series(metrics.ENGINE_KV_CACHE)})",
            "percentunit",
            "{{engine}}",
            most=1.0,
        ),
        one("Tokens per second", rate(metrics.SAMPLED_TOKENS, "engine"), legend="{{engine}}", stacked=True),
        one("Sequences", total(metrics.ENGINE_SEQUENCES, "engine"), legend="{{engine}}", stacked=True),
        spread("Time per token", metrics.TOKEN_SECONDS, by="engine"),
        Panel(
            "Prompt tokens per second",
            (
                Query(rate(metrics.COMPUTED_TOKENS, "engine"), "{{engine}} computed"),
                Query(rate(metrics.CACHED_TOKENS, "engine"), "{{engine}} cached"),
            ),
        ),
        one(
            "Prefix cache hits",
            f"{total(metrics.CACHED_TOKENS, 'engine')} / "
            f"({total(metrics.CACHED_TOKENS, 'engine')} + {total(metrics.COMPUTED_TOKENS, 'engine')})",
            "percentunit",
            "{{engine}}",
            most=1.0,
            description="Part of all prompt tokens that an engine did not have to compute.",
        ),
        one("Preemptions per second", rate(metrics.PREEMPTIONS, "engine"), legend="{{engine}}"),
        one("Losses", total(metrics.ENGINE_LOSSES, "engine"), legend="{{engine}}"),
        Panel(
            "Work done again",
            (
                Query(total(metrics.RETRIED_PROMPTS), "prompts sampled again"),
                Query(total(metrics.RESUMED_TOKENS), "tokens resumed from"),
                Query(total(metrics.POISONED_PROMPTS), "prompts given up"),
            ),
        ),
        one("Leases that ended", total(metrics.EXPIRED_LEASES, "holder"), legend="{{holder}}"),
    ],
)

WEIGHTS = Dashboard(
    "weights",
    "Twinkle Serve: weights",
    metrics.WEIGHTS_VERSION.exported,
    [
        one(
            "Version",
            f"max by (application, track) ({series(metrics.WEIGHTS_VERSION)})",
            legend="{{application}} {{track}}",
        ),
        one("Updates", total(metrics.UPDATES, "outcome"), legend="{{outcome}}"),
        one("Loaded bytes", total(metrics.UPDATE_BYTES, "application"), "bytes", "{{application}}"),
        one(
            "Seconds of an update, by phase",
            f"{total(metrics.UPDATE_SECONDS, 'phase')} / ignoring (phase) group_left () {PUBLISHED}",
            "s",
            "{{phase}}",
            description="Mean over all published updates since the router's start.",
            stacked=True,
        ),
        one("Staleness", mean(metrics.STALENESS, "application"), legend="{{application}}", description="Mean."),
        spread("Staleness by adapter", metrics.STALENESS, "short", "adapter"),
    ],
)

GATEWAY = Dashboard(
    "gateway",
    "Twinkle Serve: gateway",
    metrics.HTTP_REQUESTS.exported,
    [
        one("Requests per second, by status", rate(metrics.HTTP_REQUESTS, "status"), legend="{{status}}", stacked=True),
        one(
            "Requests per second, by route",
            rate(metrics.HTTP_REQUESTS, "method, route"),
            legend="{{method}} {{route}}",
            stacked=True,
        ),
        one("Errors", errors_share("$__rate_interval", APPLICATION), "percentunit", "status 500 and above"),
        spread("Duration of requests", metrics.HTTP_SECONDS),
        one(
            "Duration, by route",
            quantile(0.95, metrics.HTTP_SECONDS, "route"),
            "s",
            "{{route}}",
            description="95th percentile.",
        ),
        one(
            "Running calls of all samplers",
            f"sum by (application) ({series(metrics.RUNNING_CALLS, '')})",
            legend="{{application}}",
            description="By handle, too.",
        ),
    ],
)

DASHBOARDS = (OVERVIEW, ENGINES, WEIGHTS, GATEWAY)
