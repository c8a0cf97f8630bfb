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
TAIL = 64
"""Characters by which the end of a rendered conversation is recognised."""


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
            written = encoded.get("written")
            return cls(
                ids=int(encoded["ids"]),
                checksum=int(encoded["checksum"]),
                messages=[int(number) for number in encoded["messages"]],
                tools=int(encoded["tools"]),
                start=int(encoded["assistant_start"]),
                written=written if isinstance(written, str) else None,
            )
        except (TypeError, KeyError, ValueError, OverflowError, AttributeError):
            raise PromptError(
                f"{where}.encoded was not written by new_input_feature: {encoded!r}. Leave it out."
            ) from None


def match_messages(
    item: Mapping[str, object], ids: NDArray[np.int32], where: str, template: Template, ending: Ending
) -> Continuation:
    """Proves that `ids` hold the first messages of a feature, and encodes the others.

    They do if `encoded` says so and its checksums are right, or if they are the beginning of the rendered conversation.
    Tokens that the caller appended must be those of messages that the caller appended.

    Raises:
        PromptError: the relation cannot be proven, or the messages that follow cannot be encoded.
    """
    if is_absent(item.get("messages")):
        return Continuation()
    ending.check(item["messages"], where)
    rendered = _Rendered(item, ids, where, template, ending)
    if is_absent(item.get("encoded")):
        return rendered.match("")
    covered = _Covered.of(item["encoded"], where)
    if len(ids) < covered.ids or ids_checksum(ids[: covered.ids]) != covered.checksum:
        return rendered.match(f", and they are not the {covered.ids} tokens that new_input_feature returned")
    messages = _check_covered(item, covered, where)
    added = ids[covered.ids :]
    sampled = 0 <= covered.start < covered.ids
    if len(messages) == len(covered.messages):
        if len(added):
            raise PromptError(
                f"{where}.input_ids has {len(added)} tokens more than its messages cover, and no message was appended "
                f"for them. {REMEDY}"
            )
        if not sampled and covered.written is None:
            return rendered.opened()
        return Continuation(resumed_at=covered.start, written=covered.written)
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
    text, expected = _exact_text(template, added, where), template.decode(following)
    space = len(expected) - len(expected.lstrip())
    for skipped in range(space + 1):
        if text is not None and expected.startswith(text, skipped):
            return template.tokenize(expected[skipped + len(text) :], where)
    raise PromptError(
        f"{where}.messages[{first}] is not covered: the {len(added)} tokens that were appended to input_ids are not "
        f"those of the messages that were appended. Append one of both. {REMEDY}"
    )


def _exact_text(template: Template, ids: NDArray[np.int32], where: str) -> str | None:
    """Text of tokens; None if it does not stand for them: one has no text, or a special token is spelled out."""
    text = template.decode(ids)
    again = template.tokenize(text, where)
    special = template.special_ids
    if [i for i in ids.tolist() if i in special] != [i for i in again.tolist() if i in special]:
        return None
    return text if all(map(template.text_of, ids.tolist())) else None


class _Rendered:
    """A feature whose ids are compared with the rendering of its messages."""

    def __init__(
        self, item: Mapping[str, object], ids: NDArray[np.int32], where: str, template: Template, ending: Ending
    ) -> None:
        self._messages, self._tools = item["messages"], item.get("tools")
        self._ids, self._where, self._template, self._ending = ids, where, template, ending

    def match(self, detail: str) -> Continuation:
        """Returns the tokens that follow the ids in the rendered messages.

        Args:
            detail: more about the ids, for the error.

        Raises:
            PromptError: the ids are not the beginning of the rendered messages.
        """
        asks = self._ending.generation_prompt
        if not self._ending.is_open(self._messages):
            rest = self._after(self._text(True))
            if rest is not None and not asks:
                rest = self._after(self._text(False))
                rest = NONE if rest is None else rest  # the ids open a turn
            if rest is not None:
                return Continuation(rest)
        elif (rest := self._after(self._text(False))) is not None:
            parser = self._template.message_parser()
            if not parser.without_special(self._template.decode(rest)).strip():
                return Continuation(resumed_at=len(self._ids), written=self._written) if asks else Continuation()
            if not self._ending.continues(self._messages, self._where):  # scored as it stands
                return Continuation(rest)
            opened = self._template.renderer.text(self._messages, self._tools, self._where, continue_final_message=True)
            if (rest := self._after(opened)) is not None:
                return Continuation(rest, len(self._ids) + len(rest), self._written)
        raise PromptError(
            f"{self._where}: input_ids are not the tokens of its messages{self._first_uncovered()}{detail}. {REMEDY}"
        )

    def opened(self) -> Continuation:
        """Opens a turn after ids that hold all messages, of which none was sampled, unless they open it themselves."""
        if not self._ending.generation_prompt:
            return Continuation()
        if self._ending.continues(self._messages, self._where):
            return self.match("")
        text, before = self._template.decode(self._ids), self._text(False)
        opening = self._text(True).removeprefix(before)
        if text.endswith(opening) or not text.endswith(before[-TAIL:]):
            return Continuation()
        return Continuation(self._template.tokenize(opening, self._where))

    @property
    def _written(self) -> str:
        return self._template.renderer.final_text(self._messages, self._where)

    def _text(self, generation_prompt: bool) -> str:
        return self._template.renderer.text(self._messages, self._tools, self._where, generation_prompt)

    def _after(self, rendered: str) -> NDArray[np.int32] | None:
        """Tokens of rendered text after the ids; None if the ids are not its beginning."""
        tokens, count = self._template.tokenize(rendered, self._where), len(self._ids)
        if np.array_equal(tokens[:count], self._ids):
            return tokens[count:]
        text = _exact_text(self._template, self._ids, self._where) if self._template.use_chat_template else None
        if text is None or not rendered.startswith(text):
            return None
        return self._template.tokenize(rendered[len(text) :], self._where)

    def _first_uncovered(self) -> str:
        """Names the first message whose rendering is not in the text."""
        messages, text = as_items(self._messages) or [], self._template.decode(self._ids)
        for j in range(len(messages)):
            try:
                rendered = self._template.renderer.text(messages[: j + 1], self._tools, self._where, False)
            except PromptError:
                continue
            if not text.startswith(rendered.rstrip()):
                return f": the first that they do not hold as the chat template writes it is messages[{j}]"
        return ""
