"""The canonical form of messages: a client finds its conversation again however it writes it down."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve.errors import PromptError
from twinkle_serve.sessions.canonical import message_keys, pack_keys, root_key, unpack_keys

USER = {"role": "user", "content": "1+1="}


def called(arguments: object, call_id: str = "x", name: str = "add") -> dict[str, Any]:
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def result(call_id: str | None = "x", text: str = "2") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([USER], [{"content": "1+1=", "role": "user"}]),
        ([USER], [{**USER, "name": None, "tool_calls": None, "refusal": None, "annotations": []}]),
        ([USER], [{"role": "user", "content": [{"type": "text", "text": "1+"}, "1="]}]),
        ([{"role": "assistant", "content": ""}], [{"role": "assistant", "content": None}]),
        ([called('{"a": 1, "b": [2]}')], [called({"b": [2], "a": 1})]),
        ([called('{"a":1.0}')], [called(' {"a" : 1}')]),
        ([called("")], [called({})]),
        ([called({}, "x"), result("x")], [called({}, "y"), result("y")]),
        ([called({}), result("x"), called({}), result("x")], [called({}), result("x"), called({}, "z"), result("z")]),
        ([called("{a", "x")], [called("{a", "y")]),
        ([called('{"a": "\\u00e9"}')], [called('{"a": "é"}')]),
    ],
)
def test_rewritten_message_has_the_same_key(first: list[Any], second: list[Any]) -> None:
    """Key order, whitespace, ids of calls, parts of text and keys without a value do not matter."""
    assert message_keys(first) == message_keys(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([USER], [{**USER, "content": "1+1= "}]),
        ([USER], [{**USER, "role": "system"}]),
        ([USER], [{**USER, "name": "a"}]),
        ([USER], [{**USER, "content": {"text": "1+1="}}]),
        ([USER], [{**USER, "content": [{"type": "image_url", "text": "1+1="}]}]),
        ([called({"a": 1})], [called({"a": 2})]),
        ([called({"a": 1})], [called({"a": True})]),
        ([called({"a": None})], [called({})]),
        ([called({})], [called({}, name="sub")]),
        ([called("{a")], [called("{b")]),
        ([called({})], [{**called({}), "content": "So:"}]),
        ([called({}, "x"), called({}, "y"), result("x")], [called({}, "x"), called({}, "y"), result("y")]),
        ([called({}), result("x")], [called({}), result(None)]),
    ],
)
def test_changed_message_has_another_key(first: list[Any], second: list[Any]) -> None:
    """Anything that a chat template may write."""
    assert message_keys(first) != message_keys(second)


def test_reasoning_has_a_key_of_its_own() -> None:
    """Under either of its names; most clients leave it out."""
    (without,) = message_keys([{"role": "assistant", "content": "2"}])
    keys = [
        message_keys([{"role": "assistant", "content": "2", **reasoning}])[0]
        for reasoning in ({"reasoning": "Hm."}, {"reasoning_content": "Hm."}, {"reasoning_content": "Ha."})
    ]
    assert {key.digest for key in [without, *keys]} == {without.digest}
    assert without.reasoning == b"" and keys[0] == keys[1] != keys[2]


def test_tools_and_variant_are_in_the_root_key() -> None:
    """Order of keys and nulls do not matter, the order of tools does."""
    one, two = {"function": {"name": "a", "strict": None}}, {"function": {"name": "b"}}
    assert root_key("messages", [one, two], "") == root_key("messages", [{"function": {"name": "a"}}, two], "")
    assert root_key("messages", None, "") == root_key("messages", [], "")
    others = [("messages", [two, one], ""), ("messages", [one, two], "v"), ("raw", None, ""), ("messages", None, "")]
    assert len({root_key(*other) for other in others}) == 4


def test_invalid_message_is_refused() -> None:
    """By its index; nesting without end too."""
    deep: dict[str, Any] = {}
    deep["a"] = deep
    for message, words in (("hello", r"messages\[1\] must be a dict"), ({"role": "tool", "content": deep}, "deeply")):
        with pytest.raises(PromptError, match=words):
            message_keys([USER, message])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
texts = st.text(st.characters(), max_size=6)  # lone surrogates too
calls = st.dictionaries(st.sampled_from(["a", "b", "c"]), json_values, max_size=3)
conversations = st.lists(
    st.one_of(
        st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "system"]), texts),
        st.builds(lambda a, text: [{**called(a, "x"), "content": text}, result("x", text)], calls, texts),
    ),
    min_size=1,
    max_size=4,
).map(lambda parts: [message for part in parts for message in (part if isinstance(part, list) else [part])])


def reserialised(message: dict[str, Any], call_id: str) -> dict[str, Any]:
    """The message as another client would write it."""
    written: dict[str, Any] = {key: copy.deepcopy(message[key]) for key in reversed(message)} | {"refusal": None}
    for call in written.get("tool_calls", ()):
        call["id"] = call_id
        arguments = dict(reversed(call["function"]["arguments"].items()))
        call["function"]["arguments"] = json.dumps(arguments, indent=2)
    if "tool_call_id" in written:
        written["tool_call_id"] = call_id
    middle = len(written["content"]) // 2
    parts = written["content"][:middle], written["content"][middle:]
    return {**written, "content": [{"type": "text", "text": part} for part in parts]}


@given(messages=conversations, at=st.integers(0, 10))
def test_every_rewritten_conversation_has_the_same_keys(messages: list[Any], at: int) -> None:
    """And a changed character is another key."""
    keys = message_keys(messages)
    assert message_keys([reserialised(message, "other") for message in messages]) == keys
    assert [key[:2] for key in unpack_keys(pack_keys(keys))] == [key[:2] for key in keys]
    at %= len(messages)
    changed = [*messages[:at], {**messages[at], "content": messages[at]["content"] + "!"}, *messages[at + 1 :]]
    assert [a == b for a, b in zip(message_keys(changed), keys, strict=True)] == [j != at for j in range(len(keys))]
