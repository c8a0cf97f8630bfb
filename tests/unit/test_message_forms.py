"""Messages in other forms: rows of columnar files, other sequences, scalars of Arrow."""

from __future__ import annotations

import copy
import json
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.chat_templates import QWEN3
from tests.support.columnar import columnar
from tests.support.messages import CALL, USER, said, template_of, text_of
from tests.support.turns import feature_of, prompt_of
from twinkle_serve import hub
from twinkle_serve.errors import PromptError
from twinkle_serve.template import Template


@pytest.fixture(scope="module")
def demo() -> Template:
    return Template(hub.DEMO)


NAMED = {"a": {"type": "integer", "default": 0}, "b": {"type": "string", "enum": ["x", None]}}
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": NAMED}}},
    {
        "type": "function",
        "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}, "strict": True},
    },
]
CALL_OF_STOP = {"id": "y", "function": {"name": "stop", "arguments": {}}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "s"},
    USER,
    {"role": "assistant", "content": "So:", "tool_calls": [CALL, CALL_OF_STOP]},
    {"role": "tool", "content": "2", "tool_call_id": "x", "name": "add"},
]


def test_row_of_a_columnar_file_is_rendered_as_what_was_written(tmp_path: Path) -> None:
    """Arrays, and nulls in the keys of other rows, change nothing: in messages, calls and tools."""
    template = template_of(tmp_path, QWEN3)
    before = columnar(row := {"messages": CONVERSATION, "tools": TOOLS})
    assert before["messages"][0]["tool_calls"] is None and before["messages"][2]["tool_calls"][1]["type"] is None
    assert before["messages"][2]["tool_calls"][1]["function"]["arguments"] == {"a": None}
    assert before["tools"][1]["function"]["parameters"]["properties"] == {"a": None, "b": None}
    assert prompt_of(before, template).ids.tolist() == prompt_of(row, template).ids.tolist()
    feature = feature_of(prompt_of(before, template), template, "3<|im_end|>")
    assert feature["messages"][-1] == {"role": "assistant", "content": "3"}


EMPTY: list[Any] = [None, "", [], (), {}, np.array([]), np.array([], object)]
NULLS: list[Any] = [float("nan"), np.float32("nan"), [None], np.array([None, None]), {"bytes": None, "path": None}]


@pytest.mark.parametrize("absent", [*EMPTY, *NULLS])
def test_none_and_empty_values_are_absent(absent: Any, demo: Template) -> None:
    """In trajectories, features, messages and calls; nothing else of the input changes."""
    keys = ["tools", "images", "videos", "audios", "prompt", "input_ids", "labels", "attention_mask", "reward"]
    row = {"messages": [{**USER, "tool_calls": absent, "images": absent}], **dict.fromkeys(keys, absent)}
    assert text_of(demo, [USER]) == demo.decode(prompt_of(row, demo).ids)
    ids = prompt_of(row, demo).ids
    keys = ["tools", "labels", "attention_mask", "position_ids", "token_type_ids", "messages", "encoded", "audios"]
    feature = feature_of(prompt_of({**dict.fromkeys(keys, absent), "input_ids": ids}, demo), demo, "2")
    assert feature["input_ids"][:-1] == ids.tolist() and len(feature["position_ids"]) == len(ids) + 1
    assert "token_type_ids" not in feature and "encoded" not in feature


def test_nulls_with_a_meaning_stay(tmp_path: Path) -> None:
    """A null default that the schema allows, items of lists, and null arguments unless a tool does not allow them."""
    template = template_of(tmp_path, QWEN3)
    optional = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
    parameters = {"type": "object", "properties": {"a": optional, "default": {"const": None}, "c": {"enum": [1, None]}}}
    tools: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": parameters}}]
    assert json.dumps(parameters) in text_of(template, [USER], tools)
    call = {"name": "add", "arguments": {"a": None, "c": 1, "d": None}}
    called = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, USER]
    assert '"arguments": {"a": null, "c": 1, "d": null}' in text_of(template, called)
    assert '"arguments": {"a": null, "c": 1}' in text_of(template, called, tools)
    defs = {"Maybe": {"type": "string", "nullable": True}, "Name": {"type": "string"}}
    referred = {"a": {"$ref": "#/$defs/Maybe"}, "c": {"enum": [1]}, "d": {"$ref": "#/$defs/Name"}}
    inner = {"$defs": {**defs, "All": {"properties": referred}}, "$ref": "#/$defs/All"}
    for schema in ({"properties": referred, "$defs": defs}, inner):
        tool: Any = {"type": "function", "function": {"name": "add", "parameters": schema}}
        assert '"arguments": {"a": null, "c": 1}' in text_of(template, called, [tool])
    call["arguments"] = json.dumps(call["arguments"])
    assert '"arguments": {"a": null, "c": 1, "d": null}' in text_of(template, called, tools)


@pytest.mark.parametrize("arguments", [None, "", " ", "null", {}, "{}"])
def test_call_without_arguments_has_none(arguments: Any, demo: Template) -> None:
    """However a caller writes it."""
    call = {"id": None, "function": {"name": "f", "arguments": arguments}, "name": None, "arguments": None}
    message = {"role": "assistant", "content": None, "tool_calls": np.array([call])}
    assert '{"name": "f", "arguments": {}}' in text_of(demo, [USER, message, USER])


@pytest.mark.parametrize("messages", [tuple, deque, np.array, lambda m: np.array(m, object)])
def test_any_sequence_is_a_list_of_messages(messages: Any, demo: Template) -> None:
    """And stays as it is."""
    given = messages([USER, said("assistant"), USER])
    before = copy.deepcopy(given)
    assert text_of(demo, given) == text_of(demo, [USER, said("assistant"), USER])
    assert list(before) == list(given)


class Arrow:
    """A scalar of Arrow, by the one method that is used of it."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def as_py(self) -> Any:
        return self._value


def test_scalars_of_arrow_are_their_values(demo: Template) -> None:
    """A table's row has them where nothing converts it."""
    row = {"messages": Arrow([USER]), "tools": Arrow(None), "images": Arrow([])}
    assert demo.decode(prompt_of(row, demo).ids) == text_of(demo, [USER])
    feature = feature_of(prompt_of(row, demo), demo, "2")
    assert feature["messages"] == [USER, said("assistant", "2")]


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ({"type": "function"}, "must be a list"),
        ("[]", "must be a list"),
        ([3], r"tools\[0\] must be a dict, got 3"),
        ([{}, None], r"tools\[1\]"),
    ],
)
def test_tools_that_are_no_dicts_are_refused(tools: Any, error: str, demo: Template) -> None:
    """With their position."""
    with pytest.raises(PromptError, match=error):
        text_of(demo, [USER], tools)


def test_messages_and_tools_that_contain_themselves_are_refused(demo: Template) -> None:
    """They have no end; other keys of a feature may."""
    endless: dict[str, Any] = {}
    endless["more"] = endless
    for item in ({"messages": [{**USER, "notes": endless}]}, {"messages": [USER], "tools": [endless]}):
        with pytest.raises(PromptError, match=r"inputs\[0\].(messages|tools)\[0\] is nested too deeply"):
            prompt_of(item, demo)
    assert prompt_of({"input_ids": [5], "notes": endless, "user_data": endless}, demo)
