"""Alert rules for Prometheus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from observability.expressions import errors_share, mean, rate, series
from twinkle_serve.data_format import metrics


@dataclass(frozen=True, slots=True)
class Condition:
    """A comparison; that of each application stands for itself."""

    expression: str
    comparison: Literal[">", "=="]
    threshold: float

    def __str__(self) -> str:
        return f"{self.expression} {self.comparison} {self.threshold:g}"


@dataclass(frozen=True, slots=True)
class Alert:
    """A rule, whose conditions hold together."""

    name: str
    conditions: tuple[Condition, ...]
    lasts: str
    """How long they must hold."""
    summary: str
    remedy: str
    severity: Literal["warning", "critical"] = "warning"

    def rule(self) -> dict[str, Any]:
        """Returns what Prometheus reads."""
        return {
            "alert": self.name,
            "expr": " and ".join(map(str, self.conditions)),
            "for": self.lasts,
            "labels": {"severity": self.severity},
            "annotations": {"summary": self.summary, "description": self.remedy},
        }


BY = "application"
STATES = series(metrics.ENGINE_STATE, 'state="ready"')
FAILED_UPDATES = series(metrics.UPDATES, 'outcome="failed"')

ALERTS = (
    Alert(
        "TwinkleEngineLost",
        (Condition(f"sum by (application, engine) (increase({series(metrics.ENGINE_LOSSES, '')}[10m]))", ">", 0),),
        "0m",
        "{{ $labels.application }}: {{ $labels.engine }} was lost.",
        "Its prompts are sampled elsewhere, and Serve replaces it. `GET /status` has its last failure; a crash that "
        "repeats is in the log.",
    ),
    Alert(
        "TwinkleEnginesMissing",
        (Condition(f"count by ({BY}) ({STATES}) - sum by ({BY}) ({STATES})", ">", 0),),
        "10m",
        "{{ $labels.application }}: {{ $value }} engines have not been ready for 10 minutes.",
        "`serve status` says why an engine does not start. A drained one needs `undrain_engine`.",
        "critical",
    ),
    Alert(
        "TwinkleQueueGrows",
        (
            Condition(f"sum by ({BY}) (min_over_time({series(metrics.QUEUE_PROMPTS, '')}[10m]))", ">", 0),
            Condition(f"sum by ({BY}) (deriv({series(metrics.QUEUE_PROMPTS, '')}[10m]))", ">", 0.1),
        ),
        "10m",
        "{{ $labels.application }}: the queue has grown for 20 minutes, by {{ $value }} prompts per second.",
        "Callers ask for more than the engines sample: add engines, or ask for less.",
    ),
    Alert(
        "TwinkleStaleness",
        (Condition(mean(metrics.STALENESS, BY, "", "10m"), ">", 4),),
        "10m",
        "{{ $labels.application }}: samples are {{ $value }} versions old when their calls end.",
        "Calls outlast the trainer's steps: send smaller ones, with `min_groups` or a `sample_timeout_s`, or publish "
        "less often.",
    ),
    Alert(
        "TwinkleNoProgress",
        (
            Condition(f"sum by ({BY}) (min_over_time({series(metrics.RUNNING_CALLS, '')}[5m]))", ">", 0),
            Condition(rate(metrics.SAMPLED_TOKENS, BY, "", "5m"), "==", 0),
        ),
        "10m",
        "{{ $labels.application }}: calls run, and no sample has ended for 15 minutes.",
        "The engines hang, are paused or asleep, or none is ready: see `GET /status`. Long samples count when they "
        "end.",
        "critical",
    ),
    Alert(
        "TwinkleCallsFail",
        (Condition(rate(metrics.CALLS, BY, 'outcome=~"failed|deadline"', "10m"), ">", 0.01),),
        "5m",
        "{{ $labels.application }}: {{ $value }} calls per second fail or pass their deadline.",
        "`GET /telemetry` lists the failures of the last hour.",
    ),
    Alert(
        "TwinklePoisonedPrompt",
        (Condition(f"sum by ({BY}) (increase({series(metrics.POISONED_PROMPTS, '')}[30m]))", ">", 0),),
        "0m",
        "{{ $labels.application }}: a prompt ended engine after engine, and was given up.",
        "`GET /telemetry` names the prompt. Report it to the engine's developers.",
    ),
    Alert(
        "TwinkleWeightUpdatesFail",
        (Condition(f"sum by ({BY}) (increase({FAILED_UPDATES}[30m]))", ">", 0),),
        "0m",
        "{{ $labels.application }}: an update of the weights failed.",
        "The engines go on with the earlier weights. `GET /telemetry` has the reason.",
    ),
    Alert(
        "TwinkleGatewayErrors",
        (Condition(errors_share("5m", "", BY), ">", 0.05),),
        "5m",
        "{{ $labels.application }}: the gateway answers a part of {{ $value }} of its requests with a status of 500 or "
        "above.",
        "503 is a sampler that is starting or refuses more calls; 500 is a bug, and in the log.",
    ),
)


def rules() -> dict[str, Any]:
    """Returns Prometheus's file of rules."""
    return {"groups": [{"name": "twinkle-serve", "rules": [alert.rule() for alert in ALERTS]}]}
