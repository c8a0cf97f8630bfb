"""State of a running sampler, as plain values."""

from __future__ import annotations

from typing import TypedDict


class EngineStatus(TypedDict, total=False):
    """State of one engine. `state`, `track` and `sequences` are always there, the rest while the engine is in use."""

    state: str
    """starting, catching up, ready, draining, drained or dead."""
    track: str
    """Name of its track."""
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
    max_num_seqs: int
    """Sequences that it can run at once."""
    batch_fill: float
    """Sequences that it ran at the last probe, of those that it can run at once; above 1 where more wait inside it."""
    kv_cache: float
    """Used part of its KV cache at the last probe, 0 to 1; left out without one of fixed size."""
    prefix_hits: float
    """Part of the prompt tokens since its start that were in its prefix cache, 0 to 1."""
    preemptions: int
    """Samples that it has put off since its start, for lack of KV cache."""
    tokens_per_s: float
    """Sampled tokens per second in the last 5 s."""
    last_failure: str
    """Why it was last lost; left out if it never was. There for every engine."""


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
    """Label of the current weights of the first track, which is that of calls that name none."""
    tracks: dict[str, str]
    """Label of the current weights of each track, by name, in the config's order."""
    weights_versions: list[str]
    """Labels of the weights that `use_weights` takes, the oldest first."""
    adapters: dict[str, str]
    """Newest version of each adapter, by name."""
    adapter_versions: dict[str, list[str]]
    """Versions of each adapter that calls can name, by name, the newest last."""
    requests: int
    """Running calls."""
