"""A service under test: prompts for it, and whether it has anything to do."""

from __future__ import annotations

from twinkle_serve.sampler import RunningSampler

QUESTIONS = [{"messages": [{"role": "user", "content": f"{a}+{a}="}]} for a in range(12, 24)]


def is_idle(service: RunningSampler) -> bool:
    status = service.status()
    sequences = sum(engine["sequences"] for engine in status["engines"].values())
    return not (sequences or status["requests"] or status["groups_waiting"])
