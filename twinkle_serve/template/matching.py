"""Relates the ids of an InputFeature to its messages: which messages they hold, and the tokens of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.messages import checksum, ids_checksum, tools_checksum
from twinkle_serve.data_format.plain import as_items, is_absent
from twinkle_serve.errors import PromptError
from twinkle_serve.template.ending import Ending
from twinkle_serve.template.template import Template

REMEDY = (
    'Pass {"messages": …} only to encode them again, or leave messages out to use input_ids as they are, without them.'
)
NONE = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Continuation:
    """The rest of a prompt that begins with the ids of a feature."""

    following: NDArray[np.int32] = field(default_factory=lambda: NONE)
    """Token ids to append, shape [S]."""
    resumed_at: int | None = None
    """Index of the first sampled token of the unfinished message; None if the message is new."""
    written: str | None = None
    """Text of the unfinished message before its sampled tokens, if the caller wrote it."""


@dataclass(frozen=True, slots=True)
class _Covered:
    """`encoded` of a feature."""

    ids: int
    checksum: int
    messages: list[int]
    tools: int
    start: int
    written: str | None

    @classmethod
    def of(cls, encoded: Any, where: str) -> _Covered:
        try:
            return cls(
                ids=int(encoded["ids"]),
                checksum=int(encoded["checksum"]),
                messages=[int(number) for number in encoded["messages"]],
                tools=int(encoded["tools"]),
                start=int(encoded["assistant_start"]),
                written=None if encoded.get("written") is None else str(encoded["written"]),
            )
        except (TypeError, KeyError, ValueError, OverflowError, AttributeError):
            raise PromptError(
                f"{where}.encoded was not written by new_input_feature: {encoded!r}. Leave it out."
            ) from None


def match_messages(
    item: Mapping[str, object], ids: NDArray[np.int32], where: str, template: Template, ending: Ending
) -> Continuation:
    """Proves that `ids` hold the first messages of a feature, and encodes the others.

    They do if `encoded` says so and its checksums are right, or if their text is the beginning of the rendered
    conversation. Tokens that the caller appended must be those of messages that the caller appended.

    Raises:
        PromptError: the relation cannot be proven, or the messages that follow cannot be encoded.
    """
    if is_absent(item.get("messages")):
        return Continuation()
    ending.check(item["messages"], where)
    if is_absent(item.get("encoded")):
        return _match_text(item, ids, where, template, ending, "")
    covered = _Covered.of(item["encoded"], where)
    if len(ids) < covered.ids or ids_checksum(ids[: covered.ids]) != covered.checksum:
        detail = f", and they are not the {covered.ids} tokens that new_input_feature returned"
        return _match_text(item, ids, where, template, ending, detail)
    messages = _check_covered(item, covered, where)
    added = ids[covered.ids :]
    sampled = 0 <= covered.start < covered.ids
    if len(messages) == len(covered.messages):
        if len(added):
            raise PromptError(
                f"{where}.input_ids has {len(added)} tokens more than its messages cover, and no message was appended "
                f"for them. {REMEDY}"
            )
        begun = sampled or covered.written is not None
        return Continuation(resumed_at=covered.start if begun else None, written=covered.written)
    if not sampled or messages[len(covered.messages) - 1].get("role") != "assistant":
        raise PromptError(f"{where}: its input_ids do not end with a sampled message that others can follow. {REMEDY}")
    continued = ending.continues(messages, where)
    following = template.renderer.encode_after(
        ids[: covered.ids],
        messages,
        len(covered.messages),
        item.get("tools"),
        where,
        ending.generation_prompt,
        continue_final_message=continued,
    )
    if len(added):
        following = _after_added(added, following, where, template, len(covered.messages))
    if not continued:
        return Continuation(following)
    return Continuation(following, len(ids) + len(following), template.renderer.final_text(messages, where))


def _check_covered(item: Mapping[str, object], covered: _Covered, where: str) -> list[Any]:
    """Returns the messages, of which the covered ones and the tools are as they were."""
    messages = as_items(item["messages"])
    if messages is None:
        raise PromptError(f"{where}.messages must be a list of at least one message, got {item['messages']!r}.")
    if len(messages) < len(covered.messages):
        raise PromptError(
            f"{where} has {len(messages)} messages, its input_ids cover {len(covered.messages)}. {REMEDY}"
        )
    for j, (message, expected) in enumerate(zip(messages, covered.messages, strict=False)):
        if not isinstance(message, Mapping) or checksum(message) != expected:
            raise PromptError(f"{where}.messages[{j}] does not match its input_ids. {REMEDY}")
    if tools_checksum(item.get("tools")) != covered.tools:
        raise PromptError(f"{where}.tools do not match its input_ids. {REMEDY}")
    return messages


def _after_added(
    added: NDArray[np.int32], following: NDArray[np.int32], where: str, template: Template, first: int
) -> NDArray[np.int32]:
    """Returns the rest of `following` after the tokens that the caller appended for it.

    Space before them may be missing: Twinkle's rollouts leave out the line break after the end of a turn.
    """
    text, expected = template.decode(added), template.decode(following)
    space = len(expected) - len(expected.lstrip())
    for skipped in range(space + 1):
        if expected.startswith(text, skipped):
            return template.tokenize(expected[skipped + len(text) :], where)
    raise PromptError(
        f"{where}.messages[{first}] is not covered: the {len(added)} tokens that were appended to input_ids are not "
        f"those of the messages that were appended. Append one of both. {REMEDY}"
    )


def _match_text(
    item: Mapping[str, object],
    ids: NDArray[np.int32],
    where: str,
    template: Template,
    ending: Ending,
    detail: str,
) -> Continuation:
    """Matches the text of `ids` with that of the rendered messages."""
    messages, tools, text = item["messages"], item.get("tools"), template.decode(ids)
    if not ending.is_open(messages):
        whole = template.renderer.text(messages, tools, where)
        if whole.startswith(text):
            wanted = whole if ending.generation_prompt else template.renderer.text(messages, tools, where, False)
            return Continuation(template.tokenize(wanted[len(text) :], where))
    else:
        closed = template.renderer.text(messages, tools, where, False)
        rest = closed[len(text) :]
        if closed.startswith(text) and not template.message_parser().without_special(rest).strip():
            if not ending.generation_prompt:
                return Continuation()
            return Continuation(resumed_at=len(ids), written=template.renderer.final_text(messages, where))
        if closed.startswith(text) and not ending.continues(messages, where):  # scored as it stands
            return Continuation(template.tokenize(rest, where))
        if closed.startswith(text):
            opened = template.renderer.text(messages, tools, where, continue_final_message=True)
            following = template.tokenize(opened[len(text) :], where)
            return Continuation(following, len(ids) + len(following), template.renderer.final_text(messages, where))
    which = _first_uncovered(item, text, where, template)
    raise PromptError(f"{where}: input_ids are not the tokens of its messages{which}{detail}. {REMEDY}")


def _first_uncovered(item: Mapping[str, object], text: str, where: str, template: Template) -> str:
    """Names the first message whose rendering is not in the text."""
    messages = as_items(item["messages"]) or []
    for j in range(len(messages)):
        try:
            rendered = template.renderer.text(messages[: j + 1], item.get("tools"), where, False)
        except PromptError:
            continue
        if not text.startswith(rendered.rstrip()):
            return f": the first that they do not hold as the chat template writes it is messages[{j}]"
    return ""
