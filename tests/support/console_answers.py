"""Answers of a gateway with many engines and an hour of history, for the console's tests and screenshots."""

from __future__ import annotations

import math
import time
from typing import Any

STATES = ("ready",) * 12 + ("catching up", "starting", "draining", "drained", "dead")


def many_engines(count: int) -> dict[str, Any]:
    """An answer of /status."""
    return {
        "model_id": "org/model-with-a-long-name-7B-Instruct",
        "template": {"name": "Template"},
        "request_timeout_s": 600.0,
        "engines": {f"engine-dp{i}": _engine(i) for i in range(count)},
        "groups_waiting": 1234,
        "paused": False,
        "asleep": False,
        "weights": "step-120@120",
        "tracks": {"main": "step-120@120"},
        "adapters": {"my_lora": "my_lora@9"},
        "adapter_versions": {"my_lora": ["my_lora@8", "my_lora@9"]},
        "requests": 17,
    }


def _engine(i: int) -> dict[str, Any]:
    state = STATES[i % len(STATES)]
    failure = {"last_failure": f"engine-dp{i} did not answer for 15 s"} if i % 10 == 7 else {}
    if state in ("starting", "dead"):
        return {"state": state, "track": "main", "sequences": 0, **failure}
    return {
        "state": state,
        "track": "main",
        "sequences": 200 + i,
        "weights": "step-119@119" if state == "catching up" else "step-120@120",
        "adapters": [f"my_lora@{version}" for version in range(4, 4 + i % 7)],
        "engine": "vllm",
        "device": "cuda",
        "cpus": [],
        "max_model_len": 32768,
        "logprobs_mode": "raw_logprobs",
        "max_num_seqs": 256,
        "batch_fill": 0.05 + (i * 37 % 100) / 100,
        "kv_cache": (i * 53 % 100) / 100,
        "prefix_hits": 0.6,
        "preemptions": i % 3,
        "tokens_per_s": 1500.0 + 10 * i,
        **failure,
    }


def many_calls(count: int) -> dict[str, Any]:
    """An answer of /calls."""
    return {
        "calls": [
            {
                "id": f"{i:032x}",
                "caller": f"{i:032x}",
                "track": "main",
                "adapter": "an_adapter_with_quite_a_long_name@12" if i % 2 else "",
                "age_s": 90.0 - i,
                "left_s": None if i % 3 else 510.0 + i,
                "prompts": 64,
                "samples": 512,
                "samples_done": i,
            }
            for i in range(count)
        ]
    }


def full_hour() -> dict[str, Any]:
    """An answer of /telemetry."""
    now = time.time()
    events = [
        {"time": now - 60.0 * i, "kind": "weights", "engine": "", "text": f"step-{120 - i}@{120 - i} in 4.7 s"}
        for i in range(1, 55, 3)
    ]
    lost = {
        "kind": "engine lost",
        "engine": "engine-dp7",
        "text": "did not answer for 15 s; 3 prompts are sampled elsewhere",
    }
    events += [{"time": now - 1800.0, **lost}]
    events += [
        {"time": now - 1700.0, "kind": "engine ready", "engine": "engine-dp7", "text": "with weights step-90@90"}
    ]
    return {
        "now": now,
        "period_s": 5.0,
        "points": [_point(now, i) for i in range(719, -1, -1)],
        "events": sorted(events, key=lambda event: event["time"]),
    }


def _point(now: float, i: int) -> dict[str, Any]:
    wave = math.sin(i / 40)
    quiet = 300 < i < 340
    return {
        "time": now - 5.0 * i,
        "tokens_per_s": 0.0 if quiet else 150_000 + 40_000 * wave,
        "prompt_tokens_per_s": 0.0 if quiet else 90_000 - 30_000 * wave,
        "samples_per_s": 310.0,
        "calls": 3,
        "failed_calls": int(i == 360),
        "running_calls": 17,
        "sequences": 0 if quiet else 20_000,
        "waiting": 0 if quiet else int(900 + 800 * wave),
        "call_s": None if quiet else [31.0 + 4 * wave, 88.0 + 9 * wave],
        "queued_s": None if quiet else [2.0 + wave, 9.0 + 4 * wave],
        "staleness": None if quiet else 1.2 + wave / 2,
        "engines_ready": 91,
        "weights": "step-120@120",
    }
