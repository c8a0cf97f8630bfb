"""Converts messages to token ids by the model's own chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.messages import ChatMessage, MessageParser
from twinkle_serve.data_format.prompts import TRUNCATION_STRATEGIES, TruncationStrategy
from twinkle_serve.data_format.tool_calls import ToolParser, recognise_tool_parser, tool_parser
from twinkle_serve.errors import ModelNotFoundError, PromptError, TemplateError, unknown_name
from twinkle_serve.extras import require_extra
from twinkle_serve.template.conversation import CallForm, find_call_form
from twinkle_serve.template.rendering import Renderer
from twinkle_serve.template.training import TrainingTemplate, hub_model, model_directory, or_trajectory
from twinkle_serve.validation import whole_number
from twinkle_serve.vllm_parsers import VLLM, VLLMParsers, check_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONING = ("<think>", "</think>")
"""Tags of reasoning before an answer, as Qwen's, DeepSeek's and later models write them."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Written by tokenizers for bytes that are not a complete character."""
NOT_PICKLED = ("tokenizer", "text_of", "renderer")


class Template(TrainingTemplate):
    """The chat template and tokenizer of one model. Inputs are never changed.

    Override `render` to render messages differently, `message_parser` to parse samples differently. Messages that the
    chat template would leave out are refused; an override of `render` decides itself what it writes.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        model_id: str | Path | None = None,
        system: str | None = None,
        max_length: int | None = None,
        truncation_strategy: TruncationStrategy = "raise",
        enable_thinking: bool | None = None,
        tool_parser: str | ToolParser | None = "auto",
        reasoning_parser: str | None = "auto",
        use_chat_template: bool = True,
        continue_final_message: bool = False,
        trust_remote_code: bool = False,
        default_system: str | None = None,
    ) -> None:
        """
        Args:
            model: directory of the model, or its id: demo, ms://org/name, hf://org/name, or org/name of ModelScope.
            model_id: the same under Twinkle's name.
            system: system prompt for conversations without one.
            max_length: maximum length of a prompt, tokens. None: unlimited.
            truncation_strategy: treatment of a longer prompt. raise: PromptError. left, right: cut on that side.
                delete: leave it out of the call.
            enable_thinking: passed to the chat template. None: the chat template's default.
            tool_parser: format of the model's tool calls, a name in TOOL_PARSERS, `vllm:NAME` for a parser of vLLM, or
                a parser. auto: detected from its chat template. None: it writes none.
            reasoning_parser: format of its reasoning. auto: in the tags of REASONING. `vllm:NAME`: a parser of vLLM.
                None: it writes none.
            use_chat_template: False for base models: the prompt is the text of a single user message.
            continue_final_message: continue the assistant's message that ends a conversation; False: PromptError. Calls
                can say otherwise.
            trust_remote_code: run code that comes with the tokenizer.
            default_system: `system` under Twinkle's name.

        Raises:
            ModelNotFoundError: there is no such model, or it has no tokenizer.
            TemplateError: an invalid argument, or one that the model's chat template does not read.
        """
        self.model = model_directory(model, model_id)
        self.trust_remote_code = trust_remote_code
        self.tokenizer = _tokenizer(self.model, trust_remote_code)
        self.system = default_system if system is None else system
        self.max_length = max_length
        self.truncation_strategy: TruncationStrategy = truncation_strategy
        self.enable_thinking = enable_thinking
        self.use_chat_template = use_chat_template
        self.continue_final_message = continue_final_message
        self.tool_parser: str | ToolParser | None = tool_parser
        self.reasoning_parser = reasoning_parser
        self.hub_model: tuple[str, str | None] | None = hub_model(model, model_id)
        """Id and revision of the model on a hub."""
        self._check()

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles a template without its tokenizer, which is loaded again from the model's directory."""
        state = {name: value for name, value in vars(self).items() if name not in NOT_PICKLED}
        return _rebuild, (type(self), state)

    def _check(self) -> None:
        _check_type("system", self.system, str)
        _check_type("max_length", self.max_length, int)
        _check_type("enable_thinking", self.enable_thinking, bool)
        if not isinstance(self.continue_final_message, bool):
            raise TemplateError(f"continue_final_message must be true or false, got {self.continue_final_message!r}.")
        if self.max_length is not None:
            whole_number("max_length", self.max_length, 1, error=TemplateError)
        if self.truncation_strategy not in TRUNCATION_STRATEGIES:
            unknown = unknown_name("truncation_strategy", self.truncation_strategy, TRUNCATION_STRATEGIES)
            raise TemplateError(f"{unknown}. A prompt is never split.")
        if self.max_length is None and self.truncation_strategy != "raise":
            raise TemplateError(f"truncation_strategy={self.truncation_strategy!r} needs max_length, which is not set.")
        is_set = self.enable_thinking is not None and not self.renders_itself
        if is_set and "enable_thinking" not in self._variables:
            raise TemplateError(
                f"enable_thinking={self.enable_thinking}: the chat template of {self.model} does not read it. "
                f"Leave it out. It reads: {', '.join(sorted(self._variables)) or 'nothing, there is none'}."
            )
        if self.tool_parser == "auto":
            self.tool_parser = recognise_tool_parser(self._source or "")
        elif isinstance(self.tool_parser, str):
            if self.tool_parser.startswith(VLLM):
                check_name("tool", self.tool_parser)
            else:
                tool_parser(self.tool_parser)
        elif not isinstance(self.tool_parser, ToolParser | None):
            raise TemplateError(f"tool_parser must be a name, a ToolParser or None, got {self.tool_parser!r}.")
        self._check_reasoning_parser()

    def _check_reasoning_parser(self) -> None:
        name = self.reasoning_parser
        if name is None or name == "auto":
            return
        if not isinstance(name, str) or not name.startswith(VLLM):
            raise TemplateError(f"reasoning_parser must be auto, a parser of vLLM as vllm:NAME, or None, got {name!r}.")
        check_name("reasoning", name)

    @property
    def renders_itself(self) -> bool:
        """Whether `render` is overridden."""
        return type(self).render is not Template.render

    @cached_property
    def _source(self) -> str | None:
        """Text of the chat template; of the one for tools if the model has several."""
        if not self.use_chat_template or self.tokenizer.chat_template is None:
            return None
        source: str = self.tokenizer.get_chat_template(tools=[{}])
        return source

    @cached_property
    def _variables(self) -> frozenset[str]:
        """Names that the chat template reads."""
        from jinja2 import Environment, TemplateSyntaxError, meta

        # A tag of transformers around the assistant's text, which plain jinja does not know.
        source = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", self._source or "")
        try:
            parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
        except TemplateSyntaxError as error:
            raise TemplateError(f"the chat template of {self.model} is not valid jinja: {error}") from error
        return frozenset(meta.find_undeclared_variables(parsed))

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts of the special tokens, which are not part of a message's content."""
        added = self.tokenizer.added_tokens_decoder.values()
        marked = (token.content for token in added if token.special)
        return tuple(dict.fromkeys([*self.tokenizer.all_special_tokens, *marked]))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.convert_tokens_to_ids(list(self.special_tokens)))

    @cached_property
    def max_id(self) -> int:
        """Highest token id: of the tokenizer, or of the model, whose vocabulary may be padded."""
        sizes: list[int] = [len(self.tokenizer), *(token + 1 for token in self.tokenizer.added_tokens_decoder)]
        path = self.model / "config.json"
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            sizes.append(int((config.get("text_config") or config).get("vocab_size") or 0))
        return max(sizes) - 1

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a turn: the tokenizer's end of sequence and the stop tokens of generation_config.json."""
        ends = [self.tokenizer.eos_token_id]
        path = self.model / "generation_config.json"
        if path.is_file():
            stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            ends += stops if isinstance(stops, list) else [stops]
        return frozenset(end for end in ends if isinstance(end, int))

    def render(self, messages: list[ChatMessage], tools: list[object] | None, *, generation_prompt: bool = True) -> str:
        """Renders a conversation to text.

        Override it to render differently; exceptions become PromptErrors of the call.

        Args:
            messages: copies of the messages, with the system prompt; contents are text, arguments of tool calls dicts.
            tools: tools of the conversation.
            generation_prompt: whether to end at the beginning of the assistant's turn, or after the last message.

        Raises:
            PromptError: the model has no chat template, or there are tools and its chat template does not read them.
        """
        if not self.use_chat_template:
            if len(messages) != 1 or messages[0]["role"] != "user" or tools or not generation_prompt:
                raise PromptError("without chat template, the messages must be one user message, and no tools.")
            if "tool_calls" in messages[0]:
                raise PromptError("without chat template, tool_calls cannot be written. Leave them out.")
            return str(messages[0]["content"])
        if self._source is None:
            raise PromptError("the model has no chat template. Pass input_ids instead of messages.")
        if tools and "tools" not in self._variables:
            raise PromptError("the model's chat template does not read tools. Leave them out.")
        if any(message.get("tool_calls") for message in messages):
            messages = [self._call_form.of(message) for message in messages]
        return self._apply(messages, tools, generation_prompt)

    def _apply(self, messages: list[ChatMessage], tools: list[object] | None, generation_prompt: bool) -> str:
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        text: str = self.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=generation_prompt, tokenize=False, **thinking
        )
        return text

    @cached_property
    def _call_form(self) -> CallForm:
        return find_call_form(lambda messages: self._apply(messages, None, False))

    def message_parser(self) -> MessageParser:
        """Returns the parser of sampled text. It is sent along with the samples and used in the caller's process."""
        calls, thinking = self.tool_parser, self.reasoning_parser
        by_vllm = [_of_vllm(calls), _of_vllm(thinking)]
        return MessageParser(
            special_tokens=self.special_tokens,
            tool_parser=None if by_vllm[0] else calls,
            reasoning=REASONING if thinking == "auto" else None,
            other=self._vllm_parsers(*by_vllm) if any(by_vllm) else None,
        )

    def _vllm_parsers(self, tool: str | None, reasoning: str | None) -> VLLMParsers:
        return VLLMParsers(
            model=str(self.model),
            hub_model=self.hub_model,
            tool_parser=tool,
            reasoning_parser=reasoning,
            end_tokens=tuple(_text(self.tokenizer, [token]) for token in sorted(self.end_ids)),
            enable_thinking=self.enable_thinking,
            trust_remote_code=self.trust_remote_code,
        )

    @or_trajectory
    def encode(
        self,
        messages: object,
        tools: object,
        where: str,
        generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
    ) -> NDArray[np.int32]:
        """Renders and tokenises a conversation.

        Args:
            messages: messages of the conversation.
            tools: tools of the conversation.
            where: name of the input in error messages.
            generation_prompt: whether to end at the beginning of the assistant's turn, or after the last message.
            continue_final_message: end with the text of the last message instead, so that a sample continues it.

        Returns:
            Token ids, shape [P].

        Raises:
            PromptError: invalid messages, or the chat template refuses them or leaves a part of them out.
        """
        text = self.renderer.text(
            messages, tools, where, generation_prompt, continue_final_message=continue_final_message
        )
        return self.tokenize(text, where)

    @cached_property
    def renderer(self) -> Renderer:
        """Renders inputs with this template."""
        return Renderer(self)

    def tokenize(self, text: str, where: str, *, special_tokens: bool | None = None) -> NDArray[np.int32]:
        """Tokenises text that `render` returned, or a part of it.

        Args:
            special_tokens: whether the tokenizer adds those that begin and end a text; None: unless a chat template
                has written them.

        Raises:
            PromptError: the tokenizer refuses it.
        """
        if special_tokens is None:
            special_tokens = not self.use_chat_template
            if not text:
                return np.empty(0, np.int32)
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=special_tokens)
        except Exception as error:  # in the tokenizer's own types
            if half := re.search("[\ud800-\udfff]", text):
                raise PromptError(
                    f"{where} contains {half.group()!r}, half of a surrogate pair, which is no character. Leave it out."
                ) from None
            raise PromptError(f"{where} cannot be tokenised: {type(error).__name__}: {error}") from None
        return np.asarray(ids, np.int32)

    def opening(self, ids: NDArray[np.int32]) -> str:
        """The tag with following space at the end of a prompt that opens the reasoning of its sample, or ""."""
        reasoning = self.message_parser().reasoning
        if reasoning is None:
            return ""
        # Enough for a tag and its space, however it is tokenised.
        tail = ids[-32:]
        last = reasoning[0].rstrip()[-1:]
        if last and not self._may_end_with(last, tail):
            return ""
        match = re.search(re.escape(reasoning[0]) + r"\s*\Z", self.decode(tail))
        return match.group() if match else ""

    def _may_end_with(self, character: str, ids: NDArray[np.int32]) -> bool:
        """Whether the text of tokens may end with a character, trailing space aside.

        Decides by the last token that is not space: decoding all would take half of the time of a prompt of ids.
        """
        for text in map(self.text_of, reversed(ids.tolist())):
            if text := text.rstrip():
                return text[-1] in (character, REPLACEMENT)
        return False

    @cached_property
    def text_of(self) -> Callable[[int], str]:
        """Decodes one token; REPLACEMENT stands for an incomplete character."""
        tokenizer = self.tokenizer  # not self, which would keep this template alive
        return lru_cache(maxsize=4096)(lambda token: _text(tokenizer, [token]))

    def decode(self, ids: Sequence[int] | NDArray[np.int32], *, skip_special_tokens: bool = False) -> str:
        """Decodes tokens, special tokens kept or left out."""
        tokens = ids.tolist() if isinstance(ids, np.ndarray) else [int(token) for token in ids]
        return _text(self.tokenizer, tokens, skip_special_tokens)


def _tokenizer(model: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    require_extra("a tokenizer", "server", "transformers")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file
        raise ModelNotFoundError(
            f"no tokenizer can be loaded from {model}: {error}. Copy or download its files again."
        ) from error


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip_special_tokens: bool = False) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return text


def _rebuild(kind: type[Template], state: dict[str, object]) -> Template:
    template = kind.__new__(kind)
    vars(template).update(state)
    template.tokenizer = _tokenizer(template.model, template.trust_remote_code)
    return template


def _check_type(name: str, value: object, kind: type) -> None:
    if value is not None and type(value) is not kind:
        raise TemplateError(f"{name} must be {kind.__name__} or None, got {value!r}.")


def _of_vllm(parser: str | ToolParser | None) -> str | None:
    """Name of a parser in vLLM's registry; None if it is not vLLM's."""
    is_vllm = isinstance(parser, str) and parser.startswith(VLLM)
    return str(parser).removeprefix(VLLM) if is_vllm else None
