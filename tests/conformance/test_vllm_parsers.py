"""vLLM's parsers of tool calls and reasoning behind MessageParser, each with a text in its format."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import pytest

from tests.support.message_parts import cut, joined, push_all
from tests.support.vllm_formats import ARGUMENTS, CALLS, REASONING, TOOLS, make_tokenizer
from twinkle_serve import hub
from twinkle_serve.data_format.message_stream import ContentDelta
from twinkle_serve.data_format.messages import MessageParser
from twinkle_serve.errors import TemplateError
from twinkle_serve.template import Template
from twinkle_serve.vllm_parsers import VLLMParsers
from twinkle_serve.vllm_parsers.loading import make_parser
from twinkle_serve.vllm_parsers.names import registered
from twinkle_serve.vllm_parsers.streams import LIVE_ARGUMENTS, STARTS, SWITCHED_OFF

pytestmark = pytest.mark.vllm

NOT_HERE = {
    # The package cohere_melody, a response template in the tokenizer, or gpt-oss's vocabulary is missing.
    "tool": {"cohere_command3", "cohere_command4", "hf", "openai"},
    "reasoning": {"cohere_command3", "cohere_command4", "hf", "openai_gptoss", "olmo3"},
}
NO_TEXT = {"k2_horizon", "kimi_k3", "muse_glimmer"}
"""Tool parsers without a text in CALLS."""
DROP_WHAT_FOLLOWS = {
    "gemma4", "glm45", "glm47", "granite", "ling3", "mimo", "minimax_m2", "plamo3", "qwen3_coder", "qwen3_xml",
    "seed_oss", "step3p5",
}  # fmt: skip
"""vLLM's parser of complete texts drops the text after a call, its parser of parts and this package keep it."""
DROP_WHAT_PRECEDES = {"llama3_json", "llama4_json", "minicpm5", "phi4_mini_json"}
"""vLLM's parser of complete texts drops the text before a call; here it has been released by then."""
NOTHING_BEFORE = {"llama4_pythonic", "pythonic", "xlam"}
"""Formats whose calls are the whole text."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tokenizer(hub.DEMO, tmp_path_factory.mktemp("tokenizer")))


def theirs(parsers: VLLMParsers, text: str) -> tuple[str, str, list[str]]:
    """What vLLM's own parser of complete texts returns: reasoning, content, names of the calls."""
    parser, request = make_parser(parsers, TOOLS)
    reasoning, content, calls = parser.parse(text, request, enable_auto_tools=True)
    return reasoning or "", content or "", [call.name for call in calls or []]


def ours(parsers: VLLMParsers, text: str) -> tuple[str, str, list[str]]:
    """The same from this package. Checks that deltas of random parts add up to it."""
    parser = MessageParser(other=parsers)
    whole = parser.parse(text, TOOLS)
    for seed in range(3):
        assert joined(push_all(parser.stream(TOOLS), cut(text, seed))) == whole, (parsers, text, seed)
    return whole.reasoning, whole.content, [call.name for call in whole.calls]


def test_every_registered_parser_is_known_here() -> None:
    """Every parser in vLLM's registry has a text here, or a reason why it has none."""
    assert set(CALLS) == registered("tool") - NOT_HERE["tool"] - NO_TEXT
    assert {*STARTS, *LIVE_ARGUMENTS} <= registered("tool") and registered("reasoning") >= SWITCHED_OFF


@pytest.mark.parametrize("name", sorted(CALLS))
def test_tool_calls_are_as_vllm_parses_them(name: str, model: str) -> None:
    """In every format, in parts and at once; the exceptions are those named above."""
    call, parsers = CALLS[name], VLLMParsers(model=model, tool_parser=name)
    (parsed,) = MessageParser(other=parsers).parse(call, TOOLS).calls
    assert isinstance(parsed.arguments, dict)
    assert {key: str(value).strip().replace("<", "") for key, value in parsed.arguments.items()} == {
        "n": "1",
        "s": "a b",
    }
    for text in ("Hello <b> [1] {2}\n", call):
        assert ours(parsers, text) == theirs(parsers, text)
    after = ours(parsers, f"{call}\nx")[1].strip()
    assert after == ("x" if name in DROP_WHAT_FOLLOWS else theirs(parsers, f"{call}\nx")[1].strip())
    before = ours(parsers, f"Hi.\n{call}")
    if name in DROP_WHAT_PRECEDES:
        assert before == ("", "Hi.", ["f"])
    elif name not in NOTHING_BEFORE:
        assert before == theirs(parsers, f"Hi.\n{call}")
    ours(parsers, call[: len(call) * 2 // 3])


@pytest.mark.parametrize("name", sorted(registered("reasoning") - NOT_HERE["reasoning"]))
def test_reasoning_is_as_vllm_parses_it(name: str, model: str) -> None:
    """In every format, in parts and at once, with its beginning or without, truncated or not."""
    start, end = REASONING.get(name, ("<think>", "</think>"))
    parsers = VLLMParsers(model=model, reasoning_parser=name)
    for text in ("Hello", f"{start}\nHm <b.\n{end}\n\nFour", f"Hm.{end}Four", f"{start}Hm.", f"{start}a{end}b{end}c"):
        assert ours(parsers, text) == theirs(parsers, text)


@pytest.mark.parametrize(
    ("tool", "reasoning"),
    [
        ("qwen3_coder", "qwen3"),
        ("hermes", "deepseek_r1"),
        ("hermes", "qwen3"),
        ("kimi_k2", "kimi_k2"),
        ("deepseek_v4", "deepseek_v4"),
        ("inkling", "inkling"),
        ("mistral", "mistral"),
        ("granite", "granite"),
        ("hermes", "minicpmv"),
        ("glm45", "glm45"),
    ],
)
def test_reasoning_and_calls_together(tool: str, reasoning: str, model: str) -> None:
    """Both of vLLM, or one of vLLM and one of this package."""
    start, end = REASONING.get(reasoning, ("<think>", "</think>"))
    parsers = VLLMParsers(model=model, tool_parser=tool, reasoning_parser=reasoning)
    for text in (f"{start}\nHm.\n{end}{CALLS[tool]}", f"{start}Hm.{end}Four", f"{start}Hm."):
        assert ours(parsers, text) == theirs(parsers, text)


def test_parsers_of_vllm_and_of_this_package_can_be_combined(model: str) -> None:
    """The reasoning of one and the calls of the other."""
    text = f"<think>\nHm.\n</think>\n\n{CALLS['hermes']}<|im_end|>"
    for parser in (
        MessageParser(
            special_tokens=("<|im_end|>",),
            reasoning=("<think>", "</think>"),
            other=VLLMParsers(model=model, tool_parser="hermes"),
        ),
        MessageParser(
            special_tokens=("<|im_end|>",),
            tool_parser="hermes",
            other=VLLMParsers(model=model, reasoning_parser="qwen3"),
        ),
    ):
        whole = parser.parse(text, TOOLS)
        assert whole.reasoning.strip() == "Hm." and whole.content == "" and whole.calls[0].arguments == ARGUMENTS
        for seed in range(5):
            assert joined(push_all(parser.stream(TOOLS), cut(text, seed))) == whole


def test_template_with_vllms_parsers_reads_its_own_calls(model: str) -> None:
    """The parser travels with a response; tokens that end a turn are no part of a message."""
    template = Template(Path(model), tool_parser="vllm:hermes", reasoning_parser="vllm:deepseek_r1")
    parser = pickle.loads(pickle.dumps(template.message_parser()))
    end = template.decode(sorted(template.end_ids)[:1])
    message = parser.message(f"Hm.</think>{CALLS['hermes']}{end}", TOOLS, number=1)
    assert message == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Hm.",
        "tool_calls": [{"id": "call00100", "type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}],
    }


def test_parser_that_does_not_fit_the_tokenizer_is_refused() -> None:
    """Some look their markup up in the vocabulary."""
    with pytest.raises(TemplateError, match=r"vllm:deepseek_v3 cannot be used with the tokenizer of .*tokens"):
        MessageParser(other=VLLMParsers(model=str(hub.DEMO), tool_parser="deepseek_v3")).load()
    with pytest.raises(TemplateError, match=r"need the tokenizer in /nowhere, which is no directory of this machine"):
        MessageParser(other=VLLMParsers(model="/nowhere", tool_parser="hermes")).load()


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "glm45"])
def test_text_is_released_as_it_comes_in_linear_time(name: str, model: str) -> None:
    """Before a call; a long call takes no longer than its length demands."""
    stream = MessageParser(other=VLLMParsers(model=model, tool_parser=name)).stream(TOOLS)
    assert stream.push("Well") == [ContentDelta("Well")]

    def seconds(count: int) -> float:
        parts = cut(CALLS[name].replace("a <b", "a <b " * count), 3)
        parser = MessageParser(other=VLLMParsers(model=model, tool_parser=name)).stream(TOOLS)
        start = time.process_time()
        assert joined(push_all(parser, parts)).calls
        return time.process_time() - start

    assert seconds(2000) < 10 * seconds(500) + 0.5
