"""State of a running sampler, as plain values."""

from __future__ import annotations

from typing import TypedDict


class EngineStatus(TypedDict, total=False):
    """State of one engine. `state` and `sequences` are always there, the rest while the engine is in use."""

    state: str
    """starting, catching up, ready, draining, drained or dead."""
    sequences: int
    """Unfinished sequences that it was sent."""
    weights: str
    """Label of the model's own weights that it has loaded."""
    adapters: list[str]
    """Loaded adapter versions, as `name@version`."""
    engine: str
    """vllm, torch or fake."""
    device: str
    """cpu or cuda."""
    cpus: list[int]
    """Cores that its computing threads are bound to; empty if unbound."""
    max_model_len: int
    """Maximum tokens of a prompt and its sample together."""
    logprobs_mode: str
    """See `SampleResponse.logprobs_mode`."""


class SamplerStatus(TypedDict):
    """Engines, adapters and queues of a sampler."""

    model_id: str
    template: dict[str, object]
    """`template` of the config."""
    request_timeout_s: float
    """Deadline of calls that name none, in seconds."""
    engines: dict[str, EngineStatus]
    """By name."""
    groups_waiting: int
    """Prompts, or parts of their samples, that wait for an engine."""
    paused: bool
    asleep: bool
    weights: str
    """Label of the current weights."""
    adapters: dict[str, str]
    """Newest version of each adapter, by name."""
    adapter_versions: dict[str, list[str]]
    """Versions of each adapter that calls can name, by name, the newest last."""
    requests: int
    """Running calls."""
