"""Chat templates in the manner of several models, and the demo model's tokenizer with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from twinkle_serve import Template, hub

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


GPT_OSS = """{%- set ns = namespace(name=none) %}
{%- for m in messages %}
    {%- if m.tool_calls %}
        {%- set call = m.tool_calls[0].function %}
        {%- set ns.name = call.name %}
        {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
        {{- (call.arguments | tojson) + '<|call|>' }}
    {%- elif m.role == 'assistant' %}
        {%- set ns.name = none %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
    {%- elif m.role == 'tool' %}
        {%- if ns.name is none %}{{ raise_exception('a result without a call') }}{% endif %}
        {{- '<|start|>functions.' + ns.name + ' to=assistant<|message|>' + (m.content | tojson) + '<|end|>' }}
    {%- else %}
        {{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}"""
"""A result has the name of the call before it, and is refused without one."""
GPT_OSS_TOKENS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>")

GEMMA4 = """{%- set ns = namespace(result=false) %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- if not ns.result %}{{- '<|turn>model\n' }}{% endif %}
        {{- m.content }}
        {%- for call in m.tool_calls or [] %}
            {{- '<|tool_call>call:' + call.function.name + '{' }}
            {%- for key, value in call.function.arguments | items %}
                {{- key + ':' + ('<|"|>' + value + '<|"|>' if value is string else value | string) }}
            {%- endfor %}
            {{- '}<tool_call|>' }}
        {%- endfor %}
        {%- set ns.result = false %}
        {%- for result in messages[loop.index:] %}
            {%- if result.role != 'tool' %}{% break %}{% endif %}
            {%- if m.tool_calls %}
                {{- '<|tool_response>response:' + m.tool_calls[0].function.name }}
                {{- '{value:<|"|>' + result.content + '<|"|>}<tool_response|>' }}
                {%- set ns.result = true %}
            {%- endif %}
        {%- endfor %}
        {%- if not ns.result %}{{- '<turn|>\n' }}{% endif %}
    {%- elif m.role != 'tool' %}
        {%- set ns.result = false %}
        {{- '<|turn>' + m.role + '\n' + m.content + '<turn|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.result %}{{- '<|turn>model\n' }}{% endif %}"""
"""Results are part of the turn that called, and are written with the call only."""
GEMMA4_TOKENS = ("<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')


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


def kinds_of_templates(folder: Path) -> dict[str, Template]:
    """Templates of the demo model and, in folders of their own, of other kinds of chat templates."""
    made = {"demo": Template(hub.DEMO)}
    for name, source in (("llama3", None), ("qwen3", QWEN3), ("opened", OPENED)):
        (own := folder / name).mkdir()
        made[name] = Template(llama3(own) if source is None else model_with(own, source))
    return made
