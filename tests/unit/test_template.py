"""The model's chat template: the data that reaches it, and the refusal of data that it does not read."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.chat_templates import OPENED, QWEN3, llama3, model_with
from twinkle_serve import hub
from twinkle_serve.data_format.messages import MessageParser
from twinkle_serve.data_format.tool_calls import TOOL_PARSERS
from twinkle_serve.errors import ModelNotFoundError, PromptError, TemplateError
from twinkle_serve.template import TEMPLATES, Template, resolve_template
from twinkle_serve.template.prompts import encode_inputs

PASTED = """{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
    {%- for call in m.tool_calls or [] %}{{- call.function.name + ' ' + call.function.arguments }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}"""
"""Arguments are pasted as text, as DeepSeek's template does."""

SILENT = """{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.content is not none %}{{- m.content }}
    {%- else %}{{- m.tool_calls[0].function.name + ' ' + m.tool_calls[0].function.arguments }}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}"""
"""Calls are written only where there is no content, as DeepSeek's template does."""

USER = {"role": "user", "content": "hi"}
TOOLS: list[object] = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def text_of(template: Template, messages: list[dict[str, Any]], tools: Any = None) -> str:
    return template.decode(template.encode(messages, tools, "inputs[0]"))


# -- rendering -----------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [[USER], [{"role": "system", "content": "Be brief."}, USER]])
def test_template_encodes_as_transformers_does(messages: list[dict[str, Any]]) -> None:
    """Token by token, tools and system prompt included."""
    template = Template(hub.DEMO)
    expected = template.tokenizer.apply_chat_template(
        messages, tools=TOOLS, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert template.encode(messages, TOOLS, "inputs[0]").tolist() == expected


def test_template_adds_the_system_prompt_if_there_is_none() -> None:
    """A system message of the conversation is kept, wherever it is."""
    template = Template(hub.DEMO, system="Be brief.")
    assert text_of(template, [USER]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    own = text_of(template, [{"role": "system", "content": "Be long."}, USER])
    assert "Be long." in own and "Be brief." not in own


@pytest.mark.parametrize(
    ("thinking", "end"), [(None, "assistant\n"), (True, "assistant\n"), (False, "<think>\n\n</think>\n\n")]
)
def test_enable_thinking_reaches_the_chat_template(thinking: bool | None, end: str, tmp_path: Path) -> None:
    """None keeps the template's default."""
    assert text_of(Template(model_with(tmp_path, QWEN3), enable_thinking=thinking), [USER]).endswith(end)


@pytest.mark.parametrize("thinking", [True, False])
def test_enable_thinking_is_refused_if_the_chat_template_does_not_read_it(thinking: bool) -> None:
    """It would have no effect."""
    with pytest.raises(TemplateError, match=r"demo does not read it\. Leave it out\. It reads: add_"):
        Template(hub.DEMO, enable_thinking=thinking)


def test_enable_thinking_is_found_if_the_chat_template_sets_a_default_for_it(tmp_path: Path) -> None:
    """A name assigned in one branch only is still read, also inside transformers' generation tags."""
    source = (
        "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
        "{%- generation %}{{ enable_thinking }}{% endgeneration -%}{{ messages[0].content }}"
    )
    template = Template(model_with(tmp_path, source), enable_thinking=False)
    assert text_of(template, [USER]) == "Falsehi"


def test_tools_are_refused_if_the_chat_template_does_not_read_them(tmp_path: Path) -> None:
    """The model would never see them."""
    template = Template(model_with(tmp_path, OPENED))
    with pytest.raises(PromptError, match=r"inputs\[0\]: the model's chat template does not read tools"):
        encode_inputs({"messages": [USER], "tools": TOOLS}, template)
    assert encode_inputs({"messages": [USER], "tools": []}, template)


CALLS: list[Any] = [
    {"id": "x", "type": "function", "function": {"name": "add", "arguments": {"a": [1, "ä"]}}},
    {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": [1, "ä"]}'}},
    {"name": "add", "arguments": {"a": [1, "ä"]}},
    {"function": {"name": "add", "arguments": '{"a":\n[1, "\\u00e4"]}'}},
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize(
    ("source", "written"),
    [(QWEN3, '"arguments": {"a": [1, "'), (PASTED, 'add {"a": [1, "ä"]}'), (SILENT, 'add {"a": [1, "ä"]}')],
)
def test_tool_calls_reach_the_chat_template_in_the_form_it_expects(
    call: Any, content: str | None, source: str, written: str, tmp_path: Path
) -> None:
    """From a dict or JSON of the caller; never JSON within JSON, never a Python repr."""
    messages: list[Any] = [USER, {"role": "assistant", "content": content, "tool_calls": [call]}, USER]
    before = copy.deepcopy(messages)
    text = text_of(Template(model_with(tmp_path, source)), messages)
    assert written in text and '\\"' not in text
    assert messages == before


def test_tool_calls_are_refused_if_the_chat_template_does_not_read_them(tmp_path: Path) -> None:
    """The model would see an empty turn."""
    template = Template(model_with(tmp_path, OPENED))
    with pytest.raises(PromptError, match=r"inputs\[0\].messages\[1\].tool_calls: the model's chat template does not"):
        text_of(template, [USER, {"role": "assistant", "content": "", "tool_calls": CALLS[:1]}])
    assert text_of(template, [USER, {"role": "assistant", "content": "", "tool_calls": []}])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("add", "messages[0].tool_calls[0] must be {"),
        ({"function": {"arguments": {}}}, "tool_calls[0] must be {"),
        ({"name": "add", "arguments": "{"}, "its arguments are not JSON"),
        ({"name": "add", "arguments": "[1]"}, "its arguments must be a dict or the JSON of one, got [1]"),
    ],
)
def test_invalid_tool_call_is_refused(call: Any, message: str) -> None:
    """The message has its position."""
    with pytest.raises(PromptError) as caught:
        encode_inputs({"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}, Template(hub.DEMO))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({**USER, "images": ["x.png"]}, "messages[0].images: this service samples from text only"),
        ({"role": "user", "content": [{"type": "image"}]}, "messages[0].content[0] is of type 'image'"),
        ({"role": "assistant", "tool_calls": "add"}, "messages[0].tool_calls must be a list"),
    ],
)
def test_message_that_is_not_text_is_refused(message: Any, error: str) -> None:
    """A chat template would render it as something else, or drop it."""
    with pytest.raises(PromptError) as caught:
        encode_inputs({"messages": [message]}, Template(hub.DEMO))
    assert error in str(caught.value)


def test_parts_of_a_message_are_joined(tmp_path: Path) -> None:
    """Many chat templates ignore content that is not a string; half a surrogate pair is not text."""
    strings_alone = (
        "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}"
    )
    template = Template(model_with(tmp_path, strings_alone))
    parts = [{"type": "text", "text": "1+"}, "1="]
    messages = [{"role": "user", "content": parts}]
    assert text_of(template, messages) == "user:1+1="
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "1+"}, "1="]}]
    for part, error in (
        (3, "with a text, got 3"),
        ({"type": "text"}, "with a text, got {"),
        ({"type": "audio"}, "'audio'"),
    ):
        with pytest.raises(PromptError, match=error):
            text_of(template, [{"role": "user", "content": [part]}])
    with pytest.raises(PromptError, match=r"inputs\[0\] contains .*, half of a surrogate pair"):
        text_of(template, [{"role": "user", "content": "\ud83d"}])
    with pytest.raises(PromptError, match=r"content of a message with role 'user' must be text .* got None"):
        text_of(Template(tmp_path, use_chat_template=False), [{"role": "user", "content": None}])


def test_template_without_generation_prompt_ends_with_the_last_message() -> None:
    """For conversations that are only scored."""
    (prompt,) = encode_inputs({"messages": [USER]}, Template(hub.DEMO), False)
    assert Template(hub.DEMO).decode(prompt.ids) == "<|im_start|>user\nhi<|im_end|>\n"


def test_template_of_a_base_model_uses_the_text_of_one_message(tmp_path: Path) -> None:
    """With only the tokenizer's own special tokens around it, as in training."""
    template = Template(hub.DEMO, use_chat_template=False)
    assert text_of(template, [USER]) == "hi"
    assert text_of(Template(llama3(tmp_path), use_chat_template=False), [USER]) == "<|begin_of_text|>hi"
    for messages in ([USER, USER], [{"role": "system", "content": "hi"}]):
        with pytest.raises(PromptError, match="must be one user message"):
            text_of(template, messages)


def test_model_without_chat_template_accepts_only_ids(tmp_path: Path) -> None:
    """The message says so."""
    template = Template(model_with(tmp_path, None, ("<x>",)))
    with pytest.raises(PromptError, match=r"inputs\[0\]: the model has no chat template. Pass input_ids"):
        encode_inputs({"messages": [USER]}, template)
    assert encode_inputs({"input_ids": [1]}, template)[0].ids.tolist() == [1]
    with pytest.raises(TemplateError, match="It reads: nothing, there is none"):
        Template(tmp_path, enable_thinking=True)


def test_special_tokens_are_all_that_the_tokenizer_marks(tmp_path: Path) -> None:
    """Not only those with a role: Llama's headers have none."""
    assert {"<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>"} <= set(Template(llama3(tmp_path)).special_tokens)
    assert set(Template(hub.DEMO).special_tokens) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}


# -- by name, class or instance ------------------------------------------------------------------


class Shouting(Template):
    def __init__(self, model: Path, *, loud: bool = False, **arguments: Any) -> None:
        super().__init__(model, **arguments)
        self.loud = loud

    def render(self, messages: Any, tools: Any, *, generation_prompt: bool = True) -> str:
        messages[-1]["content"] = messages[-1]["content"].upper() if self.loud else "-"
        messages[-1].get("notes", []).append("loud")
        return super().render(messages, tools, generation_prompt=generation_prompt)

    def message_parser(self) -> MessageParser:
        return MessageParser()


class Needy(Template):
    def __init__(self, model: Path, *, need: int) -> None:
        super().__init__(model, max_length=need)


def test_template_resolves_by_name_class_and_instance() -> None:
    """A caller's class has its own arguments and those of Template."""
    for name, made in TEMPLATES.items():
        template = resolve_template(name, hub.DEMO, default_system="Be brief.", max_length=9)
        assert (type(template), template.system, template.max_length) == (made, "Be brief.", 9)
    shouting = resolve_template(Shouting, hub.DEMO, loud=True, system="s")
    messages: list[Any] = [{**USER, "notes": []}]
    assert "HI<|im_end|>" in text_of(shouting, messages) and shouting.system == "s"
    assert messages == [{**USER, "notes": []}], "an override may change what it gets, which are copies"
    assert shouting.message_parser() == MessageParser()
    assert resolve_template(shouting, hub.DEMO) is shouting


@pytest.mark.parametrize(
    ("template", "arguments", "message"),
    [
        ("Templat", {}, "unknown template 'Templat', did you mean 'Template'?"),
        ("Qwen3VLTemplate", {}, "Qwen3VLTemplate is for images and videos"),
        ("DeepseekV4Template", {}, "renders DeepSeek V4's messages with its own code"),
        (dict, {}, "must be a name, a subclass of Template or an instance"),
        (7, {}, "must be a name, a subclass of Template or an instance, got 7"),
        ("Template", {"max_lenght": 3}, "unknown argument of Template 'max_lenght', did you mean 'max_length'?"),
        ("Template", {"model_id": "x"}, "unknown argument of Template 'model_id'"),
        (Needy, {}, "argument: 'need'. Give its arguments with its name."),
        ("Template", {"tool_parser": 7}, "tool_parser must be a name, a ToolParser or None, got 7"),
        (Shouting, {"lout": 3}, "unknown argument of Shouting 'lout', did you mean 'loud'?"),
        ("Template", {"system": "a", "default_system": "b"}, "system is given twice"),
        ("Template", {"truncation_strategy": "split"}, "unknown truncation_strategy 'split'"),
        ("Template", {"truncation_strategy": "left"}, "truncation_strategy='left' needs max_length"),
        ("Template", {"max_length": 0}, "max_length must be at least 1, got 0"),
        ("Template", {"max_length": True}, "max_length must be int or None, got True"),
        ("Template", {"enable_thinking": "no"}, "enable_thinking must be bool or None, got 'no'"),
        ("Template", {"system": ["s"]}, "system must be str or None"),
        ("Template", {"tool_parser": "herms"}, "unknown tool parser 'herms', did you mean 'hermes'?"),
    ],
)
def test_unknown_or_invalid_template_is_refused(template: Any, arguments: dict[str, Any], message: str) -> None:
    """The message has its name and the choices; no argument is ignored."""
    with pytest.raises(TemplateError) as caught:
        resolve_template(template, hub.DEMO, **arguments)
    assert message in str(caught.value)


def test_instance_takes_no_arguments() -> None:
    """They would have to change it."""
    with pytest.raises(TemplateError, match="max_length cannot be set on an existing template"):
        resolve_template(Template(hub.DEMO), hub.DEMO, max_length=3)


def test_template_needs_a_tokenizer(tmp_path: Path) -> None:
    """The message has the directory where it is missing or incomplete."""
    with pytest.raises(ModelNotFoundError, match="no tokenizer can be loaded from"):
        Template(tmp_path)
    model_with(tmp_path, QWEN3)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelNotFoundError, match=r"no tokenizer can be loaded from .* download its files again"):
        Template(tmp_path)


@pytest.mark.parametrize(
    ("source", "parser"),
    [
        (QWEN3, "hermes"),
        ("<function=", "qwen3_coder"),
        ("[TOOL_CALLS]", "mistral"),
        ("<｜tool▁call▁begin｜>", "deepseek"),
        ("<|python_tag|>", "llama3_json"),
        (OPENED, "hermes"),
    ],
)
def test_tool_parser_is_detected_from_the_chat_template(source: str, parser: str, tmp_path: Path) -> None:
    """Unless it is given."""
    folder = model_with(tmp_path, source)
    assert Template(folder).message_parser().tool_parser == parser
    for named in ("mistral", TOOL_PARSERS["mistral"], None):
        assert Template(folder, tool_parser=named).message_parser().tool_parser == named


def test_template_and_its_parser_survive_pickling() -> None:
    """An instance is sent to the service, its parser back to the caller."""
    template = Template(hub.DEMO, system="s")
    again = pickle.loads(pickle.dumps(template))
    assert text_of(again, [USER]) == text_of(template, [USER])
    assert pickle.loads(pickle.dumps(template.message_parser())) == template.message_parser()


# -- max_length ----------------------------------------------------------------------------------


def cut(length: int, strategy: Any, inputs: Any) -> list[tuple[int, list[int]]]:
    template = Template(hub.DEMO, max_length=length, truncation_strategy=strategy)
    return [(prompt.index, prompt.ids.tolist()) for prompt in encode_inputs(inputs, template)]


def test_prompt_longer_than_max_length_is_cut_left_out_or_refused() -> None:
    """Depending on the strategy; one that just fits is unchanged."""
    inputs = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7]}, {"input_ids": [8]}]
    whole = [(i, item["input_ids"]) for i, item in enumerate(inputs)]
    assert cut(4, "raise", inputs) == cut(4, "left", inputs) == cut(4, "delete", inputs) == whole
    assert cut(3, "left", inputs) == [(0, [1, 2, 3]), (1, [5, 6, 7]), (2, [8])]
    assert cut(3, "right", inputs) == [(0, [1, 2, 3]), (1, [4, 5, 6]), (2, [8])]
    assert cut(3, "delete", inputs) == [(0, [1, 2, 3]), (2, [8])]
    with pytest.raises(PromptError, match=r"inputs\[1\] has 4 tokens, max_length is 3"):
        cut(3, "raise", inputs)


def test_call_is_refused_if_every_prompt_is_left_out() -> None:
    """Nothing would be sampled."""
    with pytest.raises(PromptError, match="each of the 2 inputs is longer than max_length=1"):
        cut(1, "delete", [{"input_ids": [1, 2]}, {"input_ids": [1, 2]}])


def test_max_length_counts_what_the_chat_template_adds() -> None:
    """The prompt is measured, not the messages."""
    length = len(Template(hub.DEMO).encode([USER], None, ""))
    assert len(cut(length, "raise", {"messages": [USER]})[0][1]) == length
    with pytest.raises(PromptError, match=f"has {length} tokens, max_length is {length - 1}"):
        cut(length - 1, "raise", {"messages": [USER]})


def test_labels_are_cut_with_their_tokens() -> None:
    """On either side."""
    item = {"input_ids": [1, 2, 3, 4], "labels": [2, -100, 4, -100]}
    for strategy, labels in (("left", [-100, 4]), ("right", [-100, 2])):
        template = Template(hub.DEMO, max_length=2, truncation_strategy=strategy)  # type: ignore[arg-type]
        (prompt,) = encode_inputs(item, template)
        assert prompt.turn.labels is not None
        assert prompt.turn.labels.tolist() == labels


def test_data_format_loads_neither_torch_nor_transformers() -> None:
    """Nor do templates, before one is made."""
    code = (
        "import sys, twinkle_serve.data_format, twinkle_serve.template.prompts;"
        "print([m for m in ('torch', 'transformers', 'jinja2') if m in sys.modules])"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "[]"


def test_prompt_ids_are_int32(tmp_path: Path) -> None:
    """As engines expect."""
    assert Template(model_with(tmp_path, OPENED)).encode([USER], None, "").dtype == np.int32
