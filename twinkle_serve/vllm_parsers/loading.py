"""Loads vLLM's parsers. Besides the engine the only module that imports vLLM, when its functions are called.

No model is loaded, and no process is started.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinkle_serve import hub
from twinkle_serve.errors import ModelNotFoundError, TemplateError, one_line
from twinkle_serve.vllm_parsers.names import NOT_INSTALLED
from twinkle_serve.vllm_parsers.parsers import VLLMParsers

if TYPE_CHECKING:
    from vllm.parser.abstract_parser import Parser

logger = logging.getLogger(__name__)


def make_parser(parsers: VLLMParsers, tools: Sequence[object]) -> tuple[Parser, Any]:
    """Makes vLLM's parser for one sample. Imports vLLM and loads the tokenizer when called for the first time.

    Returns:
        The parser, and a request with the tools, which its methods take.

    Raises:
        TemplateError: vLLM is not installed here, there is no tokenizer, or a parser cannot be used with it.
    """
    kind = _parser_class(parsers.tool_parser, parsers.reasoning_parser)
    tokenizer = _tokenizer(parsers.model, parsers.hub_model, parsers.trust_remote_code)
    thinking = {} if parsers.enable_thinking is None else {"enable_thinking": parsers.enable_thinking}
    request = _request(tools)
    try:
        return kind(tokenizer, request.tools, chat_template_kwargs=thinking), request
    except Exception as error:  # in the parser's own types
        names = " and ".join(f"vllm:{name}" for name in (parsers.tool_parser, parsers.reasoning_parser) if name)
        raise TemplateError(
            f"{names} cannot be used with the tokenizer of {parsers.model}: {one_line(error)} Choose the parsers of "
            "this model's format."
        ) from error


def is_pair(parser: Parser) -> bool:
    """Whether the parser only calls a parser of reasoning and one of tool calls, one after the other."""
    from vllm.parser.abstract_parser import DelegatingParser

    return type(parser).parse is DelegatingParser.parse


@lru_cache(maxsize=16)
def reads_special_tokens(parsers: VLLMParsers) -> bool:
    """Whether one of the parsers asks for text with special tokens."""
    parser, request = make_parser(parsers, [{"type": "function", "function": {"name": "f"}}])
    request.skip_special_tokens = True
    for part in (parser.reasoning_parser, parser.tool_parser):
        if part is not None:
            request = part.adjust_request(request)
    return not request.skip_special_tokens


@lru_cache(maxsize=16)
def _parser_class(tool: str | None, reasoning: str | None) -> Any:
    try:
        from vllm.parser.parser_manager import ParserManager
    except ImportError as error:
        raise TemplateError(NOT_INSTALLED) from error
    try:
        return ParserManager.get_parser(tool, reasoning, enable_auto_tools=True)
    except Exception as error:  # vLLM wraps what a parser's module raises
        raise TemplateError(f"vLLM cannot load its parsers {tool}, {reasoning}: {one_line(error)}") from error


@lru_cache(maxsize=8)
def _tokenizer(model: str, hub_model: tuple[str, str | None] | None, trust_remote_code: bool) -> Any:
    from vllm.tokenizers import get_tokenizer

    directory = Path(model)
    if not directory.is_dir():
        if hub_model is None:
            raise TemplateError(
                f"vLLM's parsers need the tokenizer in {model}, which is no directory of this machine. Copy the model "
                "here, or read the messages through the HTTP gateway."
            )
        try:
            directory = hub.resolve(hub_model[0], revision=hub_model[1], weights=False)
        except ModelNotFoundError as error:
            raise TemplateError(f"vLLM's parsers need the tokenizer of {hub_model[0]}: {error}") from error
    return get_tokenizer(str(directory), trust_remote_code=trust_remote_code)


def _request(tools: Sequence[object]) -> Any:
    from pydantic import ValidationError
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionToolsParam

    known = []
    for tool in tools:
        try:
            known.append(ChatCompletionToolsParam.model_validate(_tool(tool)))
        except ValidationError as error:
            logger.warning("vLLM's parsers are used without the tool %.80r: %s", tool, one_line(error))
    request = ChatCompletionRequest(model="", messages=[])
    # Not in the constructor: calls are parsed without tools, too.
    request.tools, request.tool_choice = known or None, "auto"
    return request


def _tool(tool: object) -> object:
    """A tool in OpenAI's form, its parameters parsed."""
    if not isinstance(tool, Mapping):
        return tool
    function = tool.get("function", tool)
    if not isinstance(function, Mapping):
        return tool
    function = dict(function)
    if isinstance(function.get("parameters"), str):
        try:
            function["parameters"] = json.loads(function["parameters"])
        except ValueError:
            del function["parameters"]
    return {"type": "function", "function": function}
