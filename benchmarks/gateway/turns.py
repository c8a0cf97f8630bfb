"""Conversations of growing length, in a session and rendered anew each turn: tokens that are tokenised and computed."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gateway.workloads import CHAT, Endpoint, text

TURNS = (8, 32, 128)
USER_CHARACTERS = 4
TOKENS = 6
"""A sample ends earlier where the model ends it."""
TEMPERATURE = 3.0
"""Samples are then rarely the tokens that their own text becomes, as with the large vocabulary of a real model."""


@dataclass(slots=True)
class Turns:
    """The turns of a conversation so far."""

    turns: int = 0
    inexact: int = 0
    """Turns whose prompt does not begin with all tokens of the turns before it, as they were sampled."""
    tokenized: int = 0
    """Tokens that were made from text."""
    computed: int = 0
    """Tokens of prompts that no earlier turn had begun with, so that no cache has them."""
    seconds: float = 0.0


async def conversation(endpoint: Endpoint, rng: random.Random, *, in_session: bool) -> dict[int, Turns]:
    """Holds one conversation. Returns the sums after each of TURNS."""
    path = f"/session/{uuid.uuid4().hex}{CHAT.path}" if in_session else CHAT.path
    messages: list[dict[str, str]] = []
    before: list[int] = []
    sums, found = Turns(), {}
    for number in range(1, max(TURNS) + 1):
        messages.append({"role": "user", "content": text(rng, USER_CHARACTERS)})
        body = {"model": endpoint.model, "max_tokens": TOKENS, "temperature": TEMPERATURE, "return_token_ids": True}
        began = time.perf_counter()
        answer = await endpoint.http.post_json(path, {**body, "messages": messages})
        sums.seconds += time.perf_counter() - began
        (choice,) = answer["choices"]
        prompt, sampled = answer["prompt_token_ids"], choice["token_ids"]
        known = common(before, prompt)
        sums.turns = number
        sums.inexact += known < len(before)
        sums.tokenized += len(prompt) - (known if in_session else 0)
        sums.computed += len(prompt) - known
        if number in TURNS:
            found[number] = Turns(sums.turns, sums.inexact, sums.tokenized, sums.computed, sums.seconds)
        before = [*prompt, *sampled]
        messages.append({"role": "assistant", "content": choice["message"]["content"] or ""})
    return found


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns how many tokens both begin with."""
    same = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        same += 1
    return same
