"""Parts of answers that completions and chat completions share."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

from twinkle_serve.data_format import SampledSequence, SampleResponse
from twinkle_serve.data_format.sample_updates import CallBegun
from twinkle_serve.gateway.samplers import Target


@dataclass(frozen=True, slots=True)
class Header:
    """The fields with which every answer and every chunk of a stream begins."""

    id: str
    object: str
    created: int
    model: str
    weights: str | None
    """Label of the weights that sampled it first; None before it is known."""

    @classmethod
    def of(cls, prefix: str, kind: str, target: Target, response: SampleResponse) -> Header:
        return cls(
            id=f"{prefix}-{uuid.uuid4().hex}",
            object=kind,
            created=int(time.time()),
            model=(response.columns.adapter[0] if len(response.columns) else "") or target.model,
            weights=response.columns.weight_versions[0][0][0] if len(response.columns) else None,
        )

    @classmethod
    def begun(cls, prefix: str, kind: str, target: Target, begun: CallBegun) -> Header:
        """Of a stream, before anything is sampled."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", kind, int(time.time()), begun.adapter or target.model, None)

    def fields(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.weights,
        }


def end_of(sequence: SampledSequence) -> dict[str, Any]:
    """Returns the fields of a finished choice: why it ended, and what sampled it."""
    return {
        "finish_reason": sequence.stop_reason,
        "seed": sequence.seed,
        "adapter": sequence.adapter or None,
        "weight_versions": [
            {"version": label, "start": start, "end": end} for label, start, end in sequence.weight_versions
        ],
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Returns `usage`."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def usage_of(response: SampleResponse) -> dict[str, int]:
    """Returns the exact usage: each prompt once, each sampled token."""
    return usage(sum(len(ids) for ids in response.prompts), len(response.columns.tokens))
