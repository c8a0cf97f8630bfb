"""Names of vLLM's parsers, `vllm:NAME` in the config. Imports nothing of vLLM."""

from __future__ import annotations

import ast
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeAlias

from twinkle_serve.errors import TemplateError, unknown_name

VLLM = "vllm:"
"""Begins the name of a parser of vLLM."""
ParserKind: TypeAlias = Literal["tool", "reasoning"]
_REGISTRIES: dict[ParserKind, str] = {"tool": "tool_parsers", "reasoning": "reasoning"}
"""Packages of vLLM that list its parsers."""
_BY_TOKENS = {"openai", "openai_gptoss"}
"""Parsers of gpt-oss, which read token ids by a vocabulary of their own."""
NOT_INSTALLED = (
    "the template's parsers are vLLM's, and vLLM is not installed in this process. Install it with pip install "
    "'twinkle-serve[cpu]' or 'twinkle-serve[cuda]', read the messages through the HTTP gateway, which has it, or set "
    "tool_parser and reasoning_parser of the template to parsers without the prefix vllm:."
)


def check_name(kind: ParserKind, name: str) -> str:
    """Checks the name of a parser of vLLM without importing it. Returns it without the prefix.

    Raises:
        TemplateError: vLLM is not installed, or has no such parser, or it cannot be used here.
    """
    known = registered(kind)
    bare = name.removeprefix(VLLM)
    if bare not in known:
        listed = [VLLM + other for other in known - _BY_TOKENS]
        raise TemplateError(f"{unknown_name(f'{kind} parser', name, listed)}.")
    if bare in _BY_TOKENS:
        raise TemplateError(
            f"{kind} parser {name!r} reads gpt-oss's token ids by a vocabulary of its own, and is not supported. "
            "Choose a parser that reads text."
        )
    return bare


@lru_cache(maxsize=2)
def registered(kind: ParserKind) -> frozenset[str]:
    """Names of vLLM's parsers, read from its source: importing its registry takes 10 s.

    Raises:
        TemplateError: vLLM is not installed.
    """
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise TemplateError(NOT_INSTALLED)
    source = Path(spec.origin).parent / _REGISTRIES[kind] / "__init__.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("_TO_REGISTER"):
            return frozenset(ast.literal_eval(node.value))
    raise TemplateError(f"{source} of the installed vLLM does not list its parsers. Install the version pinned here.")
