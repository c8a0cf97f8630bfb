"""Chat templates in the manner of several models, and the demo model's tokenizer with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from twinkle_serve import hub

QWEN3 = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}
            {{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- m.content or '' }}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
"""Thoughts of earlier turns are dropped, and an empty block says that there are to be none."""

LLAMA3 = """{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + (m.content | trim) + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

OPENED = """{%- for m in messages %}
    {%- set said = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content %}
    {{- '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""
"""The generation prompt opens the thoughts itself."""


def model_with(folder: Path, chat_template: str | None, special: tuple[str, ...] = (), **tokens: str) -> Path:
    """The demo model's tokenizer with another chat template, in a folder of its own."""
    from transformers import AutoTokenizer

    if chat_template is not None and not special:
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
            shutil.copy(hub.DEMO / name, folder)
        (folder / "chat_template.jinja").write_text(chat_template)
        return folder
    shutil.copy(hub.DEMO / "config.json", folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(hub.DEMO)
    tokenizer.add_special_tokens({"additional_special_tokens": [*special], **tokens})
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def llama3(folder: Path) -> Path:
    """With a tokenizer that prepends a token by default."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    special = ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
    model_with(folder, LLAMA3, special, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
