"""Results of calls that were sampled, for chat templates that write them only after a message with calls."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.chat_templates import GEMMA4, GEMMA4_TOKENS, GPT_OSS, GPT_OSS_TOKENS, model_with
from tests.support.turns import USER, suffix_of
from twinkle_serve.data_format.tool_calls import ToolCall, ToolParser
from twinkle_serve.errors import PromptError
from twinkle_serve.template import Template

RESULT = {"role": "tool", "content": "2"}


def parse_add(text: str, tools: Any) -> tuple[str, list[ToolCall]]:
    return ("", [ToolCall("add", {"a": 1})]) if "add" in text else (text, [])


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Template]:
    """Chat templates that write a tool's result only after a message with calls."""
    parser = ToolParser(parse=parse_add, markers=())
    sources = {"gpt_oss": (GPT_OSS, GPT_OSS_TOKENS), "gemma4": (GEMMA4, GEMMA4_TOKENS)}
    folders = {name: model_with(tmp_path_factory.mktemp(name), *source) for name, source in sources.items()}
    return {name: Template(folder, tool_parser=parser) for name, folder in folders.items()}


HARMONY_CALL = '<|channel|>commentary to=functions.add json<|message|>{"a":1}<|call|>'
HARMONY_RESULT = '<|start|>functions.add to=assistant<|message|>"2"<|end|>'
GEMMA_CALL, GEMMA_RESULT = "<|tool_call>call:add{a:1}<tool_call|>", 'response:add{value:<|"|>2<|"|>}<tool_response|>'
ANSWERING = [
    ("gpt_oss", HARMONY_CALL, [RESULT], HARMONY_RESULT + "<|start|>assistant"),
    ("gpt_oss", HARMONY_CALL, [RESULT, USER], HARMONY_RESULT + "<|start|>user<|message|>1+1=<|end|><|start|>assistant"),
    ("gemma4", GEMMA_CALL, [RESULT], "<|tool_response>" + GEMMA_RESULT),
    ("gemma4", f"{GEMMA_CALL}<|tool_response>", [RESULT], GEMMA_RESULT),
    ("gemma4", GEMMA_CALL, [RESULT] * 2, ("<|tool_response>" + GEMMA_RESULT) * 2),
]


@pytest.mark.parametrize(("name", "text", "messages", "suffix"), ANSWERING)
def test_result_follows_the_sampled_call_that_it_answers(
    name: str, text: str, messages: Any, suffix: str, answering: dict[str, Template]
) -> None:
    """The sample ends as the chat template ends a call, so the text after that end follows it."""
    assert suffix_of(answering[name], text, *messages, tools=None) == suffix


@pytest.mark.parametrize(
    ("name", "text"),
    [("gpt_oss", "add"), ("gpt_oss", f"{HARMONY_CALL}<|return|>"), ("gpt_oss", "2<|end|>"), ("gemma4", "add<turn|>")],
)
def test_result_that_cannot_follow_the_sample_is_refused(name: str, text: str, answering: dict[str, Template]) -> None:
    """The sample has no call, was truncated, or ended with other tokens than the chat template's."""
    with pytest.raises(PromptError, match=r'It follows a sampled message here\. Pass {"messages": …} only'):
        suffix_of(answering[name], text, RESULT)


def test_message_that_leaves_no_trace_after_a_sampled_call_is_refused(answering: dict[str, Template]) -> None:
    """A result that follows a user's message answers no call, and the chat template does not write it."""
    template = answering["gemma4"]
    assert suffix_of(template, GEMMA_CALL, RESULT)
    with pytest.raises(PromptError, match=r"messages\[3\]: the model's chat template leaves the content"):
        suffix_of(template, GEMMA_CALL, USER, RESULT)
