"""Parsers of vLLM by name: checked where a template is made, loaded where a message is read."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest

from twinkle_serve import hub
from twinkle_serve.data_format.messages import MessageParser
from twinkle_serve.errors import TemplateError
from twinkle_serve.template import Template
from twinkle_serve.vllm_parsers import VLLMParsers, names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tool_parser": "vllm:herms"}, r"unknown tool parser 'vllm:herms', did you mean 'vllm:hermes'\?.*vllm:xlam"),
        ({"reasoning_parser": "vllm:qwen"}, r"unknown reasoning parser 'vllm:qwen', did you mean 'vllm:qwen3'\?"),
        ({"reasoning_parser": "qwen3"}, "reasoning_parser must be auto, a parser of vLLM as vllm:NAME, or None"),
        ({"reasoning_parser": 3}, "reasoning_parser must be auto, a parser of vLLM as vllm:NAME, or None, got 3"),
        ({"tool_parser": "vllm:openai"}, "reads gpt-oss's token ids by a vocabulary of its own, and is not supported"),
    ],
)
def test_unknown_parser_is_refused_when_the_template_is_made(arguments: dict[str, Any], message: str) -> None:
    """The message has the close names."""
    with pytest.raises(TemplateError, match=message):
        Template(hub.DEMO, **arguments)


def test_template_says_which_part_vllm_parses() -> None:
    """The other one stays with this package; the parser is small when it travels."""
    both = Template(hub.DEMO, tool_parser="vllm:hermes", reasoning_parser="vllm:qwen3", enable_thinking=None)
    parser = both.message_parser()
    assert parser.tool_parser is None and parser.reasoning is None
    assert isinstance(parser.other, VLLMParsers)
    assert (parser.other.tool_parser, parser.other.reasoning_parser) == ("hermes", "qwen3")
    assert pickle.loads(pickle.dumps(parser)) == parser and len(pickle.dumps(parser)) < 2000
    calls = Template(hub.DEMO, tool_parser="vllm:hermes").message_parser()
    assert calls.reasoning == ("<think>", "</think>")
    reasoning = Template(hub.DEMO, reasoning_parser="vllm:qwen3").message_parser()
    assert reasoning.tool_parser == "hermes" and reasoning.reasoning is None
    assert Template(hub.DEMO, reasoning_parser=None).message_parser() == MessageParser(
        special_tokens=both.special_tokens, tool_parser="hermes"
    )


def test_process_without_vllm_gets_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """By handle, a caller's process may have no vLLM; neither may the process where a template is made."""
    parser = MessageParser(other=VLLMParsers(model=str(hub.DEMO), tool_parser="hermes"))
    monkeypatch.setitem(sys.modules, "vllm.parser.parser_manager", None)
    for use in (parser.load, parser.stream, lambda: parser.message("a")):
        with pytest.raises(TemplateError, match=r"vLLM is not installed in this process\. .*through the HTTP gateway"):
            use()
    monkeypatch.setattr(names, "find_spec", lambda name: None)
    names.registered.cache_clear()
    with pytest.raises(TemplateError, match="vLLM is not installed in this process"):
        Template(hub.DEMO, tool_parser="vllm:hermes")


CODE = """
import sys
from twinkle_serve import hub
from twinkle_serve.template import Template
parser = Template(hub.DEMO, tool_parser="vllm:hermes", reasoning_parser="vllm:qwen3").message_parser()
print([name for name in ("vllm", "torch") if name in sys.modules])
"""


def test_names_are_checked_without_importing_vllm() -> None:
    """It would cost the router 10 s and half a gigabyte."""
    code = "from deployments.light_imports import import_transformers_without_torch as light\nlight()\n" + CODE
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
