"""The metrics of a service: names, units and tags by Prometheus's conventions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["counter", "gauge", "histogram"]

CALL_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
WAIT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
TOKEN_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
VERSIONS = (0.0, 1.0, 2.0, 3.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True, slots=True, eq=False)  # hashed by identity: each count is a look-up
class Metric:
    """One metric. Ray adds the tags `application` and `deployment`, and the prefix `ray_` to its name."""

    name: str
    kind: Kind
    description: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()
    """Upper limits of a histogram's buckets."""
    initial: tuple[tuple[str, ...], ...] = ()
    """Tags with which a router exports a counter as 0 at its start: Prometheus does not count the increase by which a
    counter appears."""

    @property
    def exported(self) -> str:
        """Name at Ray's endpoint for Prometheus; that of a histogram has `_bucket`, `_sum` or `_count` behind it."""
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


class MetricsSink(Protocol):
    """Takes the values of metrics. `tags` are values, in the order of the metric's own."""

    def add(self, metric: Metric, value: float, tags: tuple[str, ...] = ()) -> None:
        """Increases a counter."""

    def set(self, metric: Metric, value: float, tags: tuple[str, ...] = ()) -> None:
        """Sets a gauge."""

    def observe(self, metric: Metric, values: Sequence[float], tags: tuple[str, ...] = ()) -> None:
        """Adds values to a histogram."""


CALLS = Metric(
    "twinkle_calls",
    "counter",
    "Calls that have ended, by outcome.",
    ("outcome", "adapter"),
    initial=(("complete", ""), ("deadline", ""), ("failed", "")),
)
CALL_SECONDS = Metric("twinkle_call_seconds", "histogram", "Duration of calls.", ("adapter",), CALL_S)
QUEUED_SECONDS = Metric(
    "twinkle_queued_seconds", "histogram", "Time of prompts from admission to their engine.", (), WAIT_S
)
FIRST_TOKEN_SECONDS = Metric(
    "twinkle_first_token_seconds",
    "histogram",
    "Time from admission of streamed calls to a token.",
    (),
    WAIT_S,
)
TOKEN_SECONDS = Metric(
    "twinkle_token_seconds",
    "histogram",
    "Time of a prompt's samples on their engine for each token of the longest one.",
    ("engine",),
    TOKEN_S,
)
PROMPTS = Metric("twinkle_prompts", "counter", "Prompts of admitted calls.", ("adapter",))
PROMPT_TOKENS = Metric("twinkle_prompt_tokens", "counter", "Tokens of the prompts of admitted calls.", ("adapter",))
SAMPLES = Metric("twinkle_samples", "counter", "Samples that engines have returned.", ("engine", "adapter", "reason"))
SAMPLED_TOKENS = Metric("twinkle_sampled_tokens", "counter", "Tokens of these samples.", ("engine", "adapter"))
STALENESS = Metric(
    "twinkle_sampler_staleness",
    "histogram",
    "Versions, of its adapter or else of the model, published between the one that sampled a request and its end.",
    ("adapter",),
    VERSIONS,
)
RUNNING_CALLS = Metric("twinkle_running_calls", "gauge", "Running calls.")
QUEUE_PROMPTS = Metric("twinkle_queue_prompts", "gauge", "Prompts, or parts of their samples, that wait for an engine.")
QUEUE_TOKENS = Metric("twinkle_queue_tokens", "gauge", "Tokens that they are expected to have.")
ENGINE_STATE = Metric(
    "twinkle_engine_state", "gauge", "1 for the state that an engine is in, 0 for the others.", ("engine", "state")
)
ENGINE_SEQUENCES = Metric("twinkle_engine_sequences", "gauge", "Unfinished sequences of an engine.", ("engine",))
ENGINE_BATCH_FILL = Metric(
    "twinkle_engine_batch_fill_ratio", "gauge", "Sequences that an engine runs, of those that it can.", ("engine",)
)
ENGINE_KV_CACHE = Metric("twinkle_engine_kv_cache_ratio", "gauge", "Used part of the KV cache.", ("engine",))
COMPUTED_TOKENS = Metric(
    "twinkle_engine_computed_prompt_tokens", "counter", "Prompt tokens that an engine has computed.", ("engine",)
)
CACHED_TOKENS = Metric(
    "twinkle_engine_cached_prompt_tokens", "counter", "Prompt tokens that it had in its prefix cache.", ("engine",)
)
PREEMPTIONS = Metric(
    "twinkle_engine_preemptions", "counter", "Samples that an engine put off for lack of KV cache.", ("engine",)
)
ENGINE_LOSSES = Metric("twinkle_engine_losses", "counter", "Engines that ended or stopped answering.", ("engine",))
RETRIED_PROMPTS = Metric(
    "twinkle_retried_prompts", "counter", "Prompts, or parts of them, sampled again after that.", initial=((),)
)
RESUMED_TOKENS = Metric("twinkle_resumed_tokens", "counter", "Tokens that samples were resumed from.", initial=((),))
POISONED_PROMPTS = Metric(
    "twinkle_poisoned_prompts", "counter", "Prompts that failed because they end engines.", initial=((),)
)
WEIGHTS_VERSION = Metric(
    "twinkle_weights_version", "gauge", "Number of the current version of the model's weights.", ("track",)
)
UPDATES = Metric(
    "twinkle_weight_updates",
    "counter",
    "Updates of the model's weights, by outcome.",
    ("outcome",),
    initial=(("published",), ("failed",)),
)
UPDATE_SECONDS = Metric(
    "twinkle_weight_update_seconds",
    "counter",
    "Time that published updates took: upload, seal, prepare, wait, pause, load, commit.",
    ("phase",),
    initial=tuple((phase,) for phase in ("upload", "seal", "prepare", "wait", "pause", "load", "commit")),
)
UPDATE_BYTES = Metric(
    "twinkle_weight_update_bytes", "counter", "Bytes of the weights that updates have loaded.", initial=((),)
)
EXPIRED_LEASES = Metric(
    "twinkle_expired_leases",
    "counter",
    "Leases whose holder was silent.",
    ("holder",),
    initial=(("caller",), ("trainer",)),
)
SESSIONS = Metric("twinkle_sessions", "gauge", "Sessions of the gateway's clients.")
HTTP_REQUESTS = Metric(
    "twinkle_gateway_requests", "counter", "Answered requests of the gateway.", ("route", "method", "status")
)
HTTP_SECONDS = Metric("twinkle_gateway_request_seconds", "histogram", "Duration of these.", ("route",), CALL_S)

METRICS = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
"""All of them."""
