"""Messages to token ids, by the model's own chat template."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.messages import MessageParser
from twinkle_serve.data_format.prompts import TruncationStrategy
from twinkle_serve.data_format.tool_calls import ToolParser, recognise_tool_parser, tool_parser
from twinkle_serve.errors import ModelNotFoundError, PromptError, TemplateError, unknown_name
from twinkle_serve.extras import require_extra
from twinkle_serve.template.conversation import CallForm, conversation, find_call_form

REASONING = ("<think>", "</think>")
"""Tags of the models that think before they answer: Qwen's, DeepSeek's and those that followed them."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers write for bytes that are no whole character."""
SAMPLED_TURN = "@@the-turn-that-was-sampled@@"
"""Stands for a message while the text around it is rendered."""


class Template:
    """The chat template and tokenizer of one model. Inputs are never changed.

    To render in another way, override `render`; to read samples in another way, override `message_parser`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        system: str | None = None,
        max_length: int | None = None,
        truncation_strategy: TruncationStrategy = "raise",
        enable_thinking: bool | None = None,
        tool_parser: str | ToolParser | None = "auto",
        use_chat_template: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        """
        Args:
            model: directory of the model.
            system: system prompt of conversations that have none.
            max_length: most tokens of a prompt.
            truncation_strategy: what becomes of a longer prompt. raise: PromptError. left, right: the side that is
                cut. delete: it is left out of the call.
            enable_thinking: handed to the chat template. None: as the chat template has it.
            tool_parser: how the model writes its tool calls, a name in TOOL_PARSERS or a parser. auto: as its chat
                template does. None: it writes none.
            use_chat_template: False is for base models: the text of an only user message is the prompt.

        Raises:
            ModelNotFoundError: it has no tokenizer.
            TemplateError: an argument that is none, or that the model's chat template does not read.
        """
        self.model = Path(model)
        self.trust_remote_code = trust_remote_code
        self.tokenizer = _tokenizer(self.model, trust_remote_code)
        self.system = system
        self.max_length = max_length
        self.truncation_strategy: TruncationStrategy = truncation_strategy
        self.enable_thinking = enable_thinking
        self.use_chat_template = use_chat_template
        self.tool_parser: str | ToolParser | None = tool_parser
        self._check()

    def __reduce__(self) -> Any:
        """A template travels without its tokenizer, which is loaded anew from the model's directory."""
        state = {name: value for name, value in vars(self).items() if name not in ("tokenizer", "_text_of")}
        return _rebuilt, (type(self), state)

    def _check(self) -> None:
        _check_type("system", self.system, str)
        _check_type("max_length", self.max_length, int)
        _check_type("enable_thinking", self.enable_thinking, bool)
        if self.max_length is not None and self.max_length < 1:
            raise TemplateError(f"max_length must be at least 1, got {self.max_length}.")
        known: tuple[str, ...] = get_args(TruncationStrategy)
        if self.truncation_strategy not in known:
            raise TemplateError(
                f"{unknown_name('truncation_strategy', self.truncation_strategy, known)}. A prompt is never split."
            )
        if self.max_length is None and self.truncation_strategy != "raise":
            raise TemplateError(f"truncation_strategy={self.truncation_strategy!r} needs max_length, which is not set.")
        asked = self.enable_thinking is not None and not self._renders_itself
        if asked and "enable_thinking" not in self._variables:
            raise TemplateError(
                f"enable_thinking={self.enable_thinking}: the chat template of {self.model} does not read it. "
                f"Leave it out. It reads: {', '.join(sorted(self._variables)) or 'nothing, since there is none'}."
            )
        if self.tool_parser == "auto":
            self.tool_parser = recognise_tool_parser(self._source or "")
        elif isinstance(self.tool_parser, str):
            tool_parser(self.tool_parser)
        elif not isinstance(self.tool_parser, ToolParser | None):
            raise TemplateError(f"tool_parser must be a name, a ToolParser or None, got {self.tool_parser!r}.")

    @property
    def _renders_itself(self) -> bool:
        return type(self).render is not Template.render

    @cached_property
    def _source(self) -> str | None:
        """Text of the chat template; of the one for tools where the model has several."""
        if not self.use_chat_template or self.tokenizer.chat_template is None:
            return None
        source: str = self.tokenizer.get_chat_template(tools=[{}])
        return source

    @cached_property
    def _variables(self) -> frozenset[str]:
        """Names that the chat template reads."""
        from jinja2 import Environment, TemplateSyntaxError, meta

        # transformers' own tag, which marks what the assistant said; plain jinja does not know it.
        source = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", self._source or "")
        try:
            parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
        except TemplateSyntaxError as error:
            raise TemplateError(f"the chat template of {self.model} is no jinja: {error}") from error
        return frozenset(meta.find_undeclared_variables(parsed))

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts of the tokens that are no part of what is said."""
        added = self.tokenizer.added_tokens_decoder.values()
        marked = (token.content for token in added if token.special)
        return tuple(dict.fromkeys([*self.tokenizer.all_special_tokens, *marked]))

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.convert_tokens_to_ids(list(self.special_tokens)))

    @cached_property
    def _end_ids(self) -> frozenset[int]:
        """Tokens that end a turn: the tokenizer's, and those that generation stops at."""
        ends = [self.tokenizer.eos_token_id]
        path = self.model / "generation_config.json"
        if path.is_file():
            stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            ends += stops if isinstance(stops, list) else [stops]
        return frozenset(end for end in ends if isinstance(end, int))

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, *, generation_prompt: bool = True) -> str:
        """Text of a conversation; with `generation_prompt`, up to where the assistant's turn begins.

        Override it to render in another way: what it raises is told to the caller. The messages are copies, a system
        prompt is among them, and the arguments of tool calls are dicts.

        Raises:
            PromptError: the model has no chat template, or one without tools, and there are tools.
        """
        if not self.use_chat_template:
            if len(messages) != 1 or messages[0]["role"] != "user" or tools or not generation_prompt:
                raise PromptError("without chat template, the messages must be one user message, and no tools.")
            content = messages[0].get("content")
            if not isinstance(content, str):
                raise PromptError(f"without chat template, the message's content must be text, got {content!r}.")
            return content
        if self._source is None:
            raise PromptError("the model has no chat template. Hand in input_ids instead of messages.")
        if tools and "tools" not in self._variables:
            raise PromptError("the model's chat template does not read tools. Leave them out.")
        if any(message.get("tool_calls") for message in messages):
            messages = [self._call_form.of(message) for message in messages]
        return self._apply(messages, tools, generation_prompt)

    def _apply(self, messages: list[dict[str, Any]], tools: list[Any] | None, generation_prompt: bool) -> str:
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        text: str = self.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=generation_prompt, tokenize=False, **thinking
        )
        return text

    @cached_property
    def _call_form(self) -> CallForm:
        return find_call_form(lambda messages: self._apply(messages, None, False))

    def message_parser(self) -> MessageParser:
        """How a sample's text becomes a message. It travels with the samples and is used in the caller's process."""
        return MessageParser(special_tokens=self.special_tokens, tool_parser=self.tool_parser, reasoning=REASONING)

    def encode(
        self, messages: Any, tools: list[Any] | None, where: str, generation_prompt: bool = True
    ) -> NDArray[np.int32]:
        """Token ids of a conversation, up to where the assistant's turn begins. Shape [P].

        Raises:
            PromptError: the messages are none, or the chat template refuses them, or does not read their tool calls.
        """
        copied = conversation(messages, where)
        self._refuse_unread_calls(copied, where)
        return self._tokenize(self._rendered(copied, tools, where, generation_prompt), where)

    def encode_after(
        self,
        ids: NDArray[np.int32],
        messages: Any,
        covered: int,
        tools: list[Any] | None,
        where: str,
        generation_prompt: bool = True,
    ) -> NDArray[np.int32]:
        """Token ids that follow `ids`, which hold the first `covered` messages, the last of them sampled. Shape [S].

        The end of the sampled turn, the messages after it and the beginning of the next turn: what the chat template
        puts behind the sampled message. That message itself is never rendered, so no token of it changes.

        Raises:
            PromptError: the chat template refuses the messages, or does not write the sampled one once, as it is.
        """
        marked = conversation(messages, where)
        self._refuse_unread_calls(marked, where, covered)
        marked[covered - 1] = {"role": "assistant", "content": SAMPLED_TURN}
        parts = self._rendered(marked, tools, where, generation_prompt).split(SAMPLED_TURN)
        if len(parts) != 2:
            raise PromptError(
                f"{where}: the chat template writes {where}.messages[{covered - 1}] {len(parts) - 1} times, so that "
                'no text follows its tokens. Hand in {"messages": …} alone to have them encoded anew.'
            )
        return self._without_end(int(ids[-1]), self._tokenize(parts[1], where))

    def _refuse_unread_calls(self, messages: list[dict[str, Any]], where: str, first: int = 0) -> None:
        """Refuses tool calls of messages from `first` on that the chat template would leave out."""
        if not self._source or self._renders_itself or "tool_calls" in self._source:
            return
        for j, message in enumerate(messages[first:], first):
            if message.get("tool_calls"):
                raise PromptError(
                    f"{where}.messages[{j}].tool_calls: the model's chat template does not read them. "
                    "Write them into the message's content."
                )

    def _without_end(self, last: int, suffix: NDArray[np.int32]) -> NDArray[np.int32]:
        """`suffix` without the end of turn that it begins with, if the token `last` has ended the turn already."""
        ends = self._special_ids | self._end_ids
        first = next((i for i, token in enumerate(suffix.tolist()) if token in ends), None)
        if first is None or self.decode(suffix[:first]).strip():
            return suffix
        end = int(suffix[first])
        return suffix[first + 1 :] if last == end or {last, end} <= self._end_ids else suffix

    def _rendered(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, where: str, generation_prompt: bool
    ) -> str:
        if self.system is not None and all(message["role"] != "system" for message in messages):
            messages = [{"role": "system", "content": self.system}, *messages]
        try:
            return self.render(messages, copy.deepcopy(tools), generation_prompt=generation_prompt)
        except PromptError as error:
            raise PromptError(f"{where}: {error}") from error
        except Exception as error:  # jinja's errors and Python's own, out of a template that is the model's
            raise PromptError(
                f"{where}: the chat template refuses the messages: {type(error).__name__}: {error}"
            ) from error

    def _tokenize(self, text: str, where: str) -> NDArray[np.int32]:
        try:
            # A chat template writes its special tokens itself.
            ids = self.tokenizer.encode(text, add_special_tokens=not self.use_chat_template)
        except Exception as error:  # half a surrogate pair, for one, in the tokenizer's own types of error
            raise PromptError(f"{where} is no text that can be tokenised: {type(error).__name__}: {error}") from None
        return np.asarray(ids, np.int32)

    def opening(self, ids: NDArray[np.int32]) -> str:
        """The tag, and the space after it, by which a prompt's end opens the reasoning of its sample. Or nothing."""
        reasoning = self.message_parser().reasoning
        if reasoning is None:
            return ""
        # Enough for a tag and its space, whatever the tokens are.
        tail = ids[-32:]
        last = reasoning[0].rstrip()[-1:]
        if last and not self._may_end_with(last, tail):
            return ""
        match = re.search(re.escape(reasoning[0]) + r"\s*\Z", self.decode(tail))
        return match.group() if match else ""

    def _may_end_with(self, character: str, ids: NDArray[np.int32]) -> bool:
        """Whether the text of tokens may end so, but for space: told by the last token alone that has any other text,
        for to decode them all takes half of the time that a prompt of ids does."""
        for text in map(self._text_of, reversed(ids.tolist())):
            if text := text.rstrip():
                return text[-1] in (character, REPLACEMENT)
        return False

    @cached_property
    def _text_of(self) -> Callable[[int], str]:
        """Text of a token by itself; REPLACEMENT is in it where it is a part of a character."""
        tokenizer = self.tokenizer  # and not self, which would keep this template alive
        return lru_cache(maxsize=4096)(lambda token: _text(tokenizer, [token]))

    def decode(self, ids: NDArray[np.int32]) -> str:
        """Text of tokens, special tokens kept."""
        return _text(self.tokenizer, ids.tolist())


def _tokenizer(model: Path, trust_remote_code: bool) -> Any:
    require_extra("a tokenizer", "server", "transformers")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # of a damaged file, tokenizers raises Exception itself
        raise ModelNotFoundError(
            f"no tokenizer can be loaded from {model}: {error}. Copy or download its files again."
        ) from error


def _text(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _rebuilt(kind: type[Template], state: dict[str, Any]) -> Template:
    template = kind.__new__(kind)
    vars(template).update(state)
    template.tokenizer = _tokenizer(template.model, template.trust_remote_code)
    return template


def _check_type(name: str, value: object, kind: type) -> None:
    if value is not None and type(value) is not kind:
        raise TemplateError(f"{name} must be {kind.__name__} or None, got {value!r}.")
