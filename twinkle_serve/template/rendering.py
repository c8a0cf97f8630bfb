"""Renders the conversations of inputs with a template, and checks that nothing is left out of the text."""

from __future__ import annotations

import contextlib
import itertools
import re
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.messages import ChatMessage
from twinkle_serve.data_format.plain import as_items
from twinkle_serve.errors import PromptError
from twinkle_serve.template.conversation import (
    conversation,
    require_continuable,
    with_last_arguments,
    write_results,
    writes_objects,
)
from twinkle_serve.template.reading import AFTER_SAMPLED, ReadingCheck
from twinkle_serve.template.tools import copied_tools

if TYPE_CHECKING:
    from twinkle_serve.template.template import Template

SAMPLED_TURN = "@@the-turn-that-was-sampled@@"
"""Placeholder of the sampled message while the text around it is rendered."""
OPEN_END = "@@the-end-of-what-is-continued@@"
"""Marks the end of a message that is continued while the text before it is rendered."""


class Renderer:
    """Renders messages as callers write them with one template. Not thread-safe."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._reading = ReadingCheck(self._render)

    def _render(self, messages: list[ChatMessage], tools: list[object] | None, generation_prompt: bool) -> str:
        return self._template.render(messages, tools, generation_prompt=generation_prompt)

    def text(
        self,
        messages: object,
        tools: object,
        where: str,
        generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
    ) -> str:
        """Renders a conversation; arguments and errors as of `encode`."""
        own_tools = copied_tools(tools, where)
        copied = conversation(messages, where, own_tools)
        if continue_final_message:
            return self._open(copied, own_tools, where, 0)
        return self._rendered(copied, own_tools, where, generation_prompt)

    def final_text(self, messages: object, where: str) -> str:
        """The text of the last message.

        Raises:
            PromptError: an invalid message, or one that cannot be continued.
        """
        items = as_items(messages) or []
        (message,) = conversation(items[-1:], where)
        return require_continuable(message, f"{where}.messages[{len(items) - 1}]")

    def encode_after(
        self,
        ids: NDArray[np.int32],
        messages: object,
        covered: int,
        tools: object,
        where: str,
        generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
    ) -> NDArray[np.int32]:
        """Renders and tokenises the messages after a sampled one.

        The chat template's text after the sampled message: the end of its turn, the later messages and the beginning of
        the next turn. The sampled message itself is not rendered, so its tokens never change.

        Args:
            ids: token ids of the first `covered` messages, shape [P].
            messages: all messages of the conversation.
            covered: number of messages that `ids` cover, the last of them sampled.
            tools: tools of the conversation.
            where: name of the input in error messages.
            generation_prompt: as of `encode`.
            continue_final_message: as of `encode`.

        Returns:
            Token ids to append to `ids`, shape [S].

        Raises:
            PromptError: as of `encode`, or the chat template does not write the sampled message exactly once.
        """
        own_tools = copied_tools(tools, where)
        copied = conversation(messages, where, own_tools)
        said = copied[covered - 1]

        def parts(sampled: ChatMessage) -> list[str]:
            marked = [*copied[: covered - 1], sampled, *copied[covered:]]
            if continue_final_message:
                text = self._open(marked, own_tools, where, covered)
            else:
                text = self._rendered(marked, own_tools, where, generation_prompt, covered)
            return text.split(SAMPLED_TURN)

        if "tool_calls" in said:
            # Some templates write results only after a message with calls, and by the calls' names.
            called = with_last_arguments(said, {"value": SAMPLED_TURN})
            with contextlib.suppress(PromptError):
                following = parts(called)
                alone = self._rendered([*copied[: covered - 1], called], own_tools, where, False, covered)
                rest = self._after_call(ids, following, alone.split(SAMPLED_TURN))
                if rest is not None:
                    return self._template.tokenize(rest, where)
        texts = parts({"role": "assistant", "content": SAMPLED_TURN})
        if len(texts) != 2:
            raise PromptError(
                f"{where}: the chat template writes {where}.messages[{covered - 1}] {len(texts) - 1} times, so that "
                'no text follows its tokens. Pass {"messages": …} only to encode them again.'
            )
        return self._without_end(int(ids[-1]), self._template.tokenize(texts[1], where))

    def _after_call(self, ids: NDArray[np.int32], whole: list[str], alone: list[str]) -> str | None:
        """Returns the text that follows a sampled call.

        Args:
            ids: token ids that end with the call.
            whole: rendered text of all messages before and after the last argument of the call.
            alone: the same if no message follows.

        Returns:
            None if the special tokens that end the sample are not those with which the chat template ends a call.
        """
        if len(whole) != 2 or len(alone) != 2:
            return None
        last = itertools.takewhile(self._template.special_ids.__contains__, reversed(ids.tolist()))
        ends = [*map(self._template.text_of, last)][::-1]
        at = whole[1].find("".join(ends))
        if not ends or at < 0 or not alone[1].startswith(whole[1][: at + len(ends[0])]):
            return None
        return whole[1][at + len("".join(ends)) :]

    def _without_end(self, last: int, suffix: NDArray[np.int32]) -> NDArray[np.int32]:
        """Removes the end of turn at the beginning of `suffix` if the token `last` has already ended the turn."""
        ends = self._template.special_ids | self._template.end_ids
        first = next((i for i, token in enumerate(suffix.tolist()) if token in ends), None)
        if first is None or self._template.decode(suffix[:first]).strip():
            return suffix
        end = int(suffix[first])
        return suffix[first + 1 :] if last == end or {last, end} <= self._template.end_ids else suffix

    def _open(self, messages: list[ChatMessage], tools: list[object] | None, where: str, first: int) -> str:
        """Renders a conversation up to the end of its last message's text; `first` as of `_rendered`.

        Reasoning in the text follows the beginning of a turn as it is, if the chat template writes it otherwise.
        """
        last = messages[-1]
        content = require_continuable(last, f"{where}.messages[{len(messages) - 1}]")
        marked = [*messages[:-1], {**last, "content": content + OPEN_END}]
        text, *rest = self._rendered(marked, tools, where, False, first).split(OPEN_END)
        # Space that a template removes at the beginning of every message is no change.
        stripped = content.lstrip()
        before = text.removesuffix(stripped).rstrip()
        opening, closing = self._template.message_parser().reasoning or ("", "")
        thinks = bool(opening) and stripped.startswith(opening)
        unread = last.get("reasoning_content", "").strip() not in text
        if len(rest) == 1 and text.endswith(stripped) and not (thinks and before.endswith(closing)) and not unread:
            return text
        if thinks and "reasoning_content" not in last and len(messages) > 1:
            turn = self._rendered(messages[:-1], tools, where, True, first)
            turn = re.sub(re.escape(opening) + r"\s*\Z", "", turn)
            if text.startswith(turn) and not turn.rstrip().endswith(closing):
                return turn + content
        raise PromptError(
            f"{where}.messages[{len(messages) - 1}] cannot be continued: the chat template writes it in other "
            "words. Pass input_ids, which are always continued."
        )

    def _rendered(
        self,
        messages: list[ChatMessage],
        tools: list[object] | None,
        where: str,
        generation_prompt: bool,
        first: int = 0,
    ) -> str:
        """Renders copies of messages and tools, and checks that the messages from `first` on are in the text."""
        if not self._writes_objects(messages):
            messages = write_results(messages)
        system = self._template.system
        added = system is not None and all(message["role"] != "system" for message in messages)
        if added:
            messages = [{"role": "system", "content": system}, *messages]
        try:
            text = self._render(messages, tools, generation_prompt)
        except PromptError as error:
            raise PromptError(f"{where}: {error}") from error
        except Exception as error:  # a model's template may raise anything
            raise PromptError(
                f"{where}: the chat template refuses the messages: {type(error).__name__}: {error}"
                + (f". {AFTER_SAMPLED}" if first else "")
            ) from error
        if self._checks:
            self._reading.require_written(messages, tools, generation_prompt, where, first, int(added))
        return text

    @property
    def _checks(self) -> bool:
        """Whether the text is that of the model's chat template."""
        return self._template.use_chat_template and not self._template.renders_itself

    def _writes_objects(self, messages: list[ChatMessage]) -> bool:
        """Whether there are tools' results that are dicts, and the chat template writes them as JSON by itself."""
        objects = any(isinstance(message["content"], dict) for message in messages)
        return objects and self._checks and self._object_results

    @cached_property
    def _object_results(self) -> bool:
        return writes_objects(lambda messages: self._render(messages, None, False))
