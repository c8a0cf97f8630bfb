"""Turns of sessions without an engine: samples with a given text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.support.turns import Made, prompt_of, response_of, tokens_of
from twinkle_serve.config import SessionArgs
from twinkle_serve.data_format import SampleColumns, SampleResponse
from twinkle_serve.data_format.messages import ids_checksum
from twinkle_serve.sessions import Conversation, SessionStore, SessionTurn, Turn
from twinkle_serve.sessions.records import Sample
from twinkle_serve.sessions.turn import RAW
from twinkle_serve.template import Template


def args(**changed: Any) -> SessionArgs:
    return SessionArgs.model_validate(changed)


def begin(store: SessionStore, session: str, messages: Any, tools: Any = None, variant: str = "") -> SessionTurn:
    """Looks a conversation up."""
    conversation = Conversation.of_messages(messages, tools, variant)
    return SessionTurn(conversation, store.find(session, conversation.query))


def sampled(turn: SessionTurn, template: Template, *texts: str) -> SampleResponse:
    """The response to a turn, with samples of these texts."""
    return samples_of(prompt_of(turn.input, template), template, *texts)


def samples_of(prompt: Made, template: Template, *texts: str) -> SampleResponse:
    """The response to a prompt, with samples of these texts."""
    parts = [response_of(prompt, template, text) for text in texts]
    joined = SampleColumns.concat([part.columns for part in parts])
    for i, part in enumerate(parts):
        part.columns.sample[:] = i
    return SampleResponse(
        columns=joined,
        prompts=parts[0].prompts,
        inputs=parts[0].inputs,
        logprobs_mode="raw_logprobs",
        parser=template.message_parser(),
        turns=parts[0].turns,
        prompt_indices=(0,),
    )


def play(
    store: SessionStore,
    template: Template,
    messages: Any,
    *texts: str,
    session: str = "s",
    tools: Any = None,
    shown: Sequence[dict[str, Any]] | None = None,
) -> list[int]:
    """One turn with samples of these texts. Returns their nodes."""
    turn = begin(store, session, messages, tools)
    return store.append(session, turn.record(sampled(turn, template, *texts), shown))


def play_raw(store: SessionStore, template: Template, prompt: Any, text: str, session: str = "s") -> list[int]:
    """One turn of a raw prompt, text or ids, with a sample of this text."""
    by_text = isinstance(prompt, str)
    conversation = Conversation.of_text(prompt) if by_text else Conversation.of_ids(prompt)
    turn = SessionTurn(conversation, store.find(session, conversation.query))
    item = turn.input_after(tokens_of(template, turn.rest)) if by_text else turn.input
    response = samples_of(prompt_of(item, template), template, text)
    return store.append(session, turn.record(response, texts=[text]))


def raw_turn(number: int, before: Turn | None = None, *, tokens: int = 4) -> Turn:
    """A turn of a raw prompt, which follows node `number - 1` of that turn."""
    ids = np.arange(tokens, dtype=np.int32)
    prompt = ids if before is None else np.concatenate([before.prompt, before.samples[0].tokens, ids])
    sample = Sample(
        tokens=ids,
        logprobs=-ids.astype(np.float32),
        weight_versions=(("initial", 0),),
        adapter="",
        seed=number,
        stop_reason="stop",
        engine="engine-dp0",
    )
    return Turn(
        id=f"turn {number}",
        root=RAW,
        raw=True,
        parent=None if before is None else number - 1,
        prompt=ids,
        prompt_length=len(prompt),
        prompt_checksum=ids_checksum(prompt),
        samples=(sample,),
    )
