"""Texts in the formats of vLLM's parsers, and a tokenizer whose vocabulary has their markup."""

from __future__ import annotations

from pathlib import Path

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string"}}},
        },
    }
]
ARGUMENTS = {"n": 1, "s": "a <b"}
_JSON = '{"name": "f", "arguments": {"n": 1, "s": "a <b"}}'
_ARGS = '{"n": 1, "s": "a <b"}'
_XML = "<function=f>\n<parameter=n>\n1\n</parameter>\n<parameter=s>\na <b\n</parameter>\n</function>"
_KEYS = "f\n<arg_key>n</arg_key>\n<arg_value>1</arg_value>\n<arg_key>s</arg_key>\n<arg_value>a <b</arg_value>\n"


def _dsml(calls: str, space: str = "") -> str:
    tag = "｜DSML｜" + space
    return (
        f'<{tag}{calls}>\n<{tag}invoke name="f">\n<{tag}parameter name="n" string="false">1</{tag}parameter>\n'
        f'<{tag}parameter name="s" string="true">a <b</{tag}parameter>\n</{tag}invoke>\n</{tag}{calls}>'
    )


def _hunyuan(suffix: str = "") -> str:
    def tag(name: str, text: str) -> str:
        return f"<{name}{suffix}>{text}</{name}{suffix}>"

    pairs = tag("arg_key", "n") + tag("arg_value", "1") + tag("arg_key", "s") + tag("arg_value", "a <b")
    return tag("tool_calls", tag("tool_call", f"f<tool_sep{suffix}>{pairs}"))


_M3 = "]<]minimax[>["
CALLS: dict[str, str] = {
    "apertus": '<|tools_prefix|>[{"f": {"n": 1, "s": "a <b"}}]<|tools_suffix|>',
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
    + _ARGS
    + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>"
    + _ARGS
    + "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v32": _dsml("function_calls"),
    "deepseek_v4": _dsml("tool_calls"),
    "deepseek_v41": _dsml("calls", " "),
    "dots": f"<dots_function_call>{_JSON}</dots_function_call>",
    "ernie45": f"<tool_call>\n{_JSON}\n</tool_call>",
    "functiongemma": "<start_function_call>call:f{n:<escape>1<escape>,s:<escape>a <b<escape>}<end_function_call>",
    "gemma4": '<|tool_call>call:f{n:1,s:<|"|>a <b<|"|>}<tool_call|>',
    "gigachat3": f"<|message_sep|>\n\nfunction call<|role_sep|>\n{_JSON}",
    "glm45": f"<tool_call>{_KEYS}</tool_call>",
    "glm47": f"<tool_call>{_KEYS}</tool_call>",
    "granite": f"<|tool_call|>[{_JSON}]",
    "granite-20b-fc": f"<function_call> {_JSON}",
    "granite4": f"<tool_call>{_JSON}</tool_call>",
    "hermes": f"<tool_call>\n{_JSON}\n</tool_call>",
    "hunyuan_a13b": f"<tool_calls>[{_JSON}]</tool_calls>",
    "hy_v3": _hunyuan(),
    "hy_v4": _hunyuan(),
    "inkling": '<|message_model|><|content_invoke_tool_json|>{"name": "f", "args": {"n": 1, "s": "a <b"}}'
    "<|end_message|>",
    "internlm": '<|action_start|><|plugin|>{"name": "f", "parameters": {"n": 1, "s": "a <b"}}<|action_end|>',
    "jamba": f"<tool_calls>[{_JSON}]</tool_calls>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
    + _ARGS
    + "<|tool_call_end|><|tool_calls_section_end|>",
    "lfm2": "<|tool_call_start|>[f(n=1, s='a <b')]<|tool_call_end|>",
    "ling3": f"<tool_call>{_KEYS}</tool_call>",
    "llama3_json": '<|python_tag|>{"name": "f", "parameters": {"n": 1, "s": "a <b"}}',
    "llama4_json": '{"name": "f", "parameters": {"n": 1, "s": "a <b"}}',
    "llama4_pythonic": "[f(n=1, s='a <b')]",
    "longcat": f"<longcat_tool_call>{_JSON}</longcat_tool_call>",
    "mimo": f"<tool_call>\n{_XML}\n</tool_call>",
    "minicpm5": '<function name="f"><param name="n">1</param><param name="s">a <b</param></function>',
    "minimax_m2": '<minimax:tool_call>\n<invoke name="f">\n<parameter name="n">1</parameter>\n'
    '<parameter name="s">a <b</parameter>\n</invoke>\n</minimax:tool_call>',
    "minimax_m3": f'{_M3}<tool_call>\n{_M3}<invoke name="f">\n{_M3}<n>1{_M3}</n>\n{_M3}<s>a <b{_M3}</s>\n'
    f"{_M3}</invoke>\n{_M3}</tool_call>",
    "mistral": f"[TOOL_CALLS]f{_ARGS}",
    "olmo3": "<function_calls>\nf(n=1, s='a <b')\n</function_calls>",
    "phi4_mini_json": f"functools[{_JSON}]",
    "plamo3": "<|plamo:begin_tool_requests:plamo|><|plamo:begin_tool_request:plamo|><|plamo:begin_tool_name:plamo|>f"
    "<|plamo:end_tool_name:plamo|><|plamo:begin_tool_arguments:plamo|><|plamo:constrain|>json<|plamo:msg|>"
    + _ARGS
    + "<|plamo:end_tool_arguments:plamo|><|plamo:end_tool_request:plamo|><|plamo:end_tool_requests:plamo|>",
    "poolside_v1": f"<tool_call>{_KEYS}</tool_call>",
    "pythonic": "[f(n=1, s='a <b')]",
    "qwen3_coder": f"<tool_call>\n{_XML}\n</tool_call>",
    "qwen3_json": f"<tool_call>\n{_JSON}\n</tool_call>",
    "qwen3_xml": f"<tool_call>\n{_XML}\n</tool_call>",
    "seed_oss": f"<seed:tool_call>\n{_XML}\n</seed:tool_call>",
    "step3": '<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="f">'
    '<steptml:parameter name="n">1</steptml:parameter><steptml:parameter name="s">a b</steptml:parameter>'
    "</steptml:invoke><｜tool_call_end｜><｜tool_calls_end｜>",
    "step3p5": f"<tool_call>\n{_XML}\n</tool_call>",
    "xlam": f"[{_JSON}]",
}
"""One call `f(n=1, s="a <b")` in the format of each tool parser; step3's values contain no `<`."""
REASONING: dict[str, tuple[str, str]] = {
    "gemma4": ("<|channel>thought\n", "<channel|>"),
    "granite": ("Here is my thought process:", "Here is my response:"),
    "hunyuan_a13b": ("<think>\n", "\n</think>\n<answer>\n"),
    "inkling": ("<|message_model|><|content_thinking|>", "<|end_message|><|message_model|><|content_text|>"),
    "kimi_k3": ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    "mistral": ("[THINK]", "[/THINK]"),
    "plamo3": ("<|plamo:begin_think:plamo|>", "<|plamo:end_think:plamo|>"),
    "seed_oss": ("<seed:think>", "</seed:think>"),
}
"""Beginning and end of the reasoning in the format of each reasoning parser; others read <think> and </think>."""
MARKUP = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<seed:think>", "</seed:think>", "[THINK]", "[/THINK]",
    "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|tool_call_start|>", "<|tool_call_end|>",
    "<tool_calls>", "</tool_calls>", "<tool_sep>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
    "<response>", "</response>", "<assistant>", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
    "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_call_argument_begin|>", "<|tool_call|>", "<mm:think>",
    "</mm:think>", "<tool_call", "<ifm|think>", "</ifm|think>", "Ġ</", "Ġ<", "think", ">",
)  # fmt: skip


def make_tokenizer(source: Path, directory: Path) -> Path:
    """Writes the tokenizer of `source` with MARKUP as tokens to `directory`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(list(MARKUP))
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text((source / "config.json").read_text())
    return directory
