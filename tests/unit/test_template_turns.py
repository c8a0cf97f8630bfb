"""Conversations of several turns: sampled tokens never change."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chat_templates import (
    LLAMA3,
    kinds_of_templates,
    model_with,
)
from tests.support.turns import USER, after, feature_of, prompt_of, suffix_of
from twinkle_serve import hub
from twinkle_serve.errors import PromptError
from twinkle_serve.template import Template

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
RESULT = {"role": "tool", "content": "2"}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Template]:
    """One per kind of chat template."""
    folder = tmp_path_factory.mktemp("templates")
    made = kinds_of_templates(folder)
    return {**made, "quiet": Template(folder / "qwen3", enable_thinking=False)}


# -- text between turns --------------------------------------------------------------------------


NEXT = "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("name", "text", "suffix"),
    [
        ("demo", "2<|im_end|>", "\n" + NEXT),
        ("demo", "2", "<|im_end|>\n" + NEXT),
        ("demo", "2\n", "<|im_end|>\n" + NEXT),
        ("demo", "2<|endoftext|>", "<|im_end|>\n" + NEXT),
        ("qwen3", "<think>\nHm.\n</think>\n\n2<|im_end|>", "\n" + NEXT),
        ("qwen3", "<think>\nHm", "<|im_end|>\n" + NEXT),
        ("quiet", "2<|im_end|>", "\n" + NEXT + "<think>\n\n</think>\n\n"),
        ("opened", "Hm.</think>2<|im_end|>", "\n" + NEXT + "<think>\n"),
        (
            "llama3",
            "2<|eot_id|>",
            "<|start_header_id|>user<|end_header_id|>\n\n1+1=<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_continuation_ends_the_sampled_turn_once(
    name: str, text: str, suffix: str, templates: dict[str, Template]
) -> None:
    """Whether or not the sample was truncated; then comes the chat template's text before the next turn."""
    assert suffix_of(templates[name], text, USER) == suffix


def test_continuation_accepts_tool_calls_as_the_caller_wrote_them(templates: dict[str, Template]) -> None:
    """With arguments as JSON, for example; they are unchanged."""
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    before = copy.deepcopy(said)
    assert CALL in suffix_of(templates["qwen3"], "2<|im_end|>", USER, said, RESULT)
    assert said == before


def test_continuation_accepts_every_end_token_of_the_model(tmp_path: Path) -> None:
    """A turn that ended with another of the stop tokens is not ended again."""
    folder = model_with(tmp_path, (hub.DEMO / "chat_template.jinja").read_text())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert suffix_of(Template(folder), "2<|endoftext|>", USER) == "\n" + NEXT


def test_continuation_ignores_space_before_the_end(tmp_path: Path) -> None:
    """As Llama 2's template writes it."""
    source = "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' + eos_token }}{% endfor %}"
    assert suffix_of(Template(model_with(tmp_path, source)), "2<|im_end|>", USER) == "user: 1+1= <|im_end|>"


def test_continuation_keeps_tools_and_appends_their_results(templates: dict[str, Template]) -> None:
    """The sampled call is not rendered again; its result and later messages are."""
    for name in ("demo", "qwen3"):
        suffix = suffix_of(templates[name], CALL + "<|im_end|>", RESULT, tools=TOOLS)
        response = "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        assert suffix == "\n" + response + "<|im_start|>assistant\n"


@pytest.mark.parametrize("added", [{"role": "tool", "content": {"sum": 2}}, {"role": "critic", "content": "bad"}])
def test_messages_after_a_sampled_call_are_in_the_prompt(added: Any, templates: dict[str, Template]) -> None:
    """Results that are dicts and messages of any role that the chat template writes follow it."""
    text = added["content"] if added["role"] == "critic" else '{"sum": 2}'
    assert f"\n{text}" in suffix_of(templates["qwen3"], f"{CALL}<|im_end|>", added, tools=TOOLS)


def test_continuation_renders_messages_that_the_caller_wrote_as_the_assistant(templates: dict[str, Template]) -> None:
    """They were not sampled."""
    said = {"role": "assistant", "content": "3"}
    expected = "\n<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n" + NEXT
    assert suffix_of(templates["demo"], "2<|im_end|>", USER, said, USER) == expected


def test_continuation_ignores_sampled_calls_unknown_to_the_chat_template(templates: dict[str, Template]) -> None:
    """They are in the tokens already."""
    template = templates["opened"]
    feature = feature_of(prompt_of({"messages": [USER]}, template), template, f"</think>{CALL}<|im_end|>")
    assert feature["messages"][1]["tool_calls"]
    feature = feature_of(prompt_of(after(feature, USER), template), template, "</think>2<|im_end|>")
    assert prompt_of(after(feature, USER), template).ids.tolist()[: feature["length"]] == feature["input_ids"]


# -- the message ---------------------------------------------------------------------------------


def test_message_has_reasoning_and_calls_and_other_keys(templates: dict[str, Template]) -> None:
    """Other keys of the input are unchanged."""
    item = {"messages": [USER], "tools": TOOLS, "user_data": {"id": [1]}}
    feature = feature_of(
        prompt_of(item, templates["qwen3"]), templates["qwen3"], f"<think>\nHm.\n</think>\n\nSo:\n{CALL}<|im_end|>"
    )
    call = {"id": "call00100", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert feature["messages"] == [
        USER,
        {"role": "assistant", "content": "So:", "reasoning_content": "Hm.", "tool_calls": [call]},
    ]
    assert feature["tools"] == TOOLS and feature["user_data"] == {"id": [1]}


@pytest.mark.parametrize(
    ("text", "reasoning", "content"), [("Hm.\n</think>\n\n2<|im_end|>", "Hm.", "2"), ("Hm", "Hm", "")]
)
def test_reasoning_that_the_prompt_opens_is_found(
    text: str, reasoning: str, content: str, templates: dict[str, Template]
) -> None:
    """In messages and in ids."""
    template = templates["opened"]
    prompt = prompt_of({"messages": [USER]}, template)
    by_ids = prompt_of({"messages": [USER], "input_ids": prompt.ids}, template)
    expected = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    assert feature_of(prompt, template, text)["messages"][-1] == expected
    assert feature_of(by_ids, template, text)["messages"][-1] == expected


def test_empty_reasoning_in_the_prompt_does_not_open_any(templates: dict[str, Template]) -> None:
    """enable_thinking=False closes the tag that it opens."""
    prompt = prompt_of({"messages": [USER]}, templates["quiet"])
    assert prompt.turn.opening == ""
    assert feature_of(prompt, templates["quiet"], "2")["messages"][-1] == {"role": "assistant", "content": "2"}


@pytest.mark.parametrize(
    ("tag", "text", "opening"),
    [
        ("<think>", "so <think>", "<think>"),
        ("<think>", "so <think> \n\n", "<think> \n\n"),
        ("<think>", "<think> so", ""),
        ("<think>", "1 > 0 >", ""),
        ("<think>\n", "so <think>\n\n", "<think>\n\n"),
        ("\N{THOUGHT BALLOON}", "so \N{THOUGHT BALLOON} ", "\N{THOUGHT BALLOON} "),  # of several tokens
    ],
)
def test_tag_at_the_end_of_a_prompt_opens_reasoning(
    tag: str, text: str, opening: str, templates: dict[str, Template], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the space after it, for any tag."""
    for template in templates.values():
        parser = replace(template.message_parser(), reasoning=(tag, "</think>"))
        monkeypatch.setattr(template, "message_parser", lambda parser=parser: parser)
        ids = np.array(template.tokenizer.encode(text, add_special_tokens=False), np.int32)
        assert template.decode(ids) == text
        assert template.opening(ids) == opening


def test_sample_without_tokens_adds_no_message(templates: dict[str, Template]) -> None:
    """Without a message, later ones cannot follow it."""
    feature = feature_of(prompt_of({"messages": [USER]}, templates["demo"]), templates["demo"], "")
    assert feature["messages"] == [USER]
    assert prompt_of(feature, templates["demo"]).ids.tolist() == feature["input_ids"]
    with pytest.raises(PromptError, match="do not end with a sampled message"):
        prompt_of(after(feature, USER), templates["demo"])


# -- partial rollouts ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "qwen3", "opened"])
def test_truncated_sample_is_continued_from_its_tokens(name: str, templates: dict[str, Template]) -> None:
    """It gives one message, as if sampled at once; then the conversation continues."""
    template = templates[name]
    opening = "" if name == "opened" else "<think>"
    parts = [f"{opening}H", "", "m.</thi", "nk>2", "3<|im_end|>"]
    feature = whole = feature_of(prompt_of({"messages": [USER]}, template), template, "".join(parts))
    start = len(prompt_of({"messages": [USER]}, template).ids)
    item: dict[str, Any] = {"messages": [USER]}
    for part in parts:
        prompt = prompt_of(item, template)
        assert not item.get("input_ids") or prompt.ids.tolist() == item["input_ids"]
        item = feature = feature_of(prompt, template, part)
        assert len(feature["messages"]) == 2 and feature["encoded"]["assistant_start"] == start
    assert feature == whole
    assert feature["messages"][-1] == {"role": "assistant", "content": "23", "reasoning_content": "Hm."}
    assert feature["labels"][start - 1 :] == [*feature["input_ids"][start:], -100]


# -- refused continuations -----------------------------------------------------------------------


def test_changed_earlier_message_is_refused(templates: dict[str, Template]) -> None:
    """It no longer matches its tokens; added keys are accepted."""
    template = templates["demo"]
    feature = feature_of(prompt_of({"messages": [USER]}, template), template, "2<|im_end|>")
    said = feature["messages"][1]
    for messages, message in (
        ([USER], r"inputs\[0\] has 1 messages, its input_ids cover 2"),
        ([{**USER, "content": "1+2="}, said, USER], r"inputs\[0\].messages\[0\] does not match its input_ids"),
        ([USER, {**said, "content": "3"}], r"inputs\[0\].messages\[1\] does not match its input_ids"),
        ([USER, USER, said], r"messages\[1\] does not match"),
        ("hello", r"messages must be a list of at least one message, got 'hello'"),
    ):
        with pytest.raises(PromptError, match=message):
            prompt_of({**feature, "messages": messages}, template)
    assert prompt_of({**feature, "messages": [USER, {**said, "reward": 1.0}, USER]}, template)


def test_changed_tool_calls_and_reasoning_are_refused(templates: dict[str, Template]) -> None:
    """They no longer match the tokens."""
    template = templates["qwen3"]
    first = prompt_of({"messages": [USER], "tools": TOOLS}, template)
    feature = feature_of(first, template, f"<think>\nHm.\n</think>\n\n{CALL}<|im_end|>")
    said = feature["messages"][1]
    assert said["reasoning_content"] == "Hm." and said["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    other = copy.deepcopy(said)
    other["tool_calls"][0]["function"]["arguments"] = {"a": 2}
    for changed in (other, {**said, "reasoning_content": "Ha."}):
        with pytest.raises(PromptError, match=r"messages\[1\] does not match its input_ids"):
            prompt_of({**feature, "messages": [USER, changed, RESULT]}, template)
    assert prompt_of(after(feature, RESULT), template)


def test_messages_of_none_are_ignored(templates: dict[str, Template]) -> None:
    """A feature whose messages are None is used by its ids."""
    template = templates["demo"]
    prompt = prompt_of({"input_ids": [5, 6], "messages": None}, template)
    assert "messages" not in {k for k, v in feature_of(prompt, template, "2").items() if v is not None}


def test_prompt_cut_on_the_right_opens_only_the_reasoning_that_it_keeps(templates: dict[str, Template]) -> None:
    """A tag that is cut off opens nothing; an unfinished message is continued from its remaining tokens."""
    whole = Template(templates["opened"].model)
    length = len(prompt_of({"messages": [USER]}, whole).ids)
    cut = Template(whole.model, max_length=length - 2, truncation_strategy="right")
    feature = feature_of(prompt_of({"messages": [USER]}, cut), cut, "ab")
    assert feature["messages"][-1] == {"role": "assistant", "content": "ab"}
    demo = templates["demo"]
    begun = feature_of(prompt_of({"messages": [USER]}, demo), demo, "1234")
    most = len(begun["input_ids"]) - 2
    shorter = Template(hub.DEMO, max_length=most, truncation_strategy="right")
    resumed = feature_of(prompt_of(begun, shorter), shorter, "9")
    assert demo.decode(np.array(resumed["input_ids"][-3:])) == "129"
    assert resumed["messages"][-1]["content"] == "129"


@pytest.mark.parametrize(
    "encoded",
    [3, {"ids": 1}, {"ids": 1, "messages": [], "assistant_start": 0}, {"ids": 1, "messages": 4, "assistant_start": 1}],
)
def test_invalid_encoded_is_refused(encoded: Any, templates: dict[str, Template]) -> None:
    """It is not meant to be written by hand."""
    with pytest.raises(PromptError, match="encoded was not written by new_input_feature"):
        prompt_of({"messages": [USER], "input_ids": [5], "encoded": encoded}, templates["demo"])


@pytest.mark.parametrize(
    "source", ["{{ messages[0].content }}", "{% for m in messages %}{{ m.content * 2 }}{% endfor %}"]
)
def test_chat_template_that_does_not_write_the_sampled_turn_once_is_refused(source: str, tmp_path: Path) -> None:
    """The text that follows it is unknown."""
    template = Template(model_with(tmp_path, source))
    feature = feature_of(prompt_of({"messages": [USER]}, template), template, "2")
    with pytest.raises(PromptError, match=r"writes inputs\[0\].messages\[1\] . times"):
        prompt_of(after(feature, USER), template)


def test_template_of_a_base_model_has_one_turn() -> None:
    """Without a chat template the beginning of the next turn is undefined."""
    template = Template(hub.DEMO, use_chat_template=False)
    feature = feature_of(prompt_of({"messages": [USER]}, template), template, "2")
    assert prompt_of(feature, template).ids.tolist() == feature["input_ids"]
    with pytest.raises(PromptError, match="must be one user message"):
        prompt_of(after(feature, USER), template)


# -- labels --------------------------------------------------------------------------------------


def test_labels_of_earlier_turns_are_kept(templates: dict[str, Template]) -> None:
    """In every turn, sampled tokens are labels and prompt tokens are not; rolled left by one."""
    template = templates["demo"]
    feature = feature_of(prompt_of({"messages": [USER]}, template), template, "2<|im_end|>")
    first = (len(feature["input_ids"]) - 2, len(feature["input_ids"]))
    feature = feature_of(prompt_of(after(feature, USER), template), template, "34<|im_end|>")
    ids = feature["input_ids"]
    learnt = {*range(*first), *range(len(ids) - 3, len(ids))}
    unrolled = [token if i in learnt else -100 for i, token in enumerate(ids)]
    assert feature["labels"] == [*unrolled[1:], -100]
    assert feature["attention_mask"] == [1] * len(ids) and feature["position_ids"] == [*range(len(ids))]
    assert feature["length"] == len(ids)


@pytest.mark.parametrize("labels", [[1], [1.0, 2.0], [[1, 2]], "ab"])
def test_invalid_labels_are_refused(labels: Any, templates: dict[str, Template]) -> None:
    """One integer per token is required."""
    with pytest.raises(PromptError, match=r"inputs\[0\].labels has shape"):
        prompt_of({"input_ids": [5, 6], "labels": labels}, templates["demo"])


def test_max_length_counts_earlier_turns() -> None:
    """Cutting the beginning of a conversation cuts its labels too."""
    template = Template(hub.DEMO)
    feature = feature_of(prompt_of({"messages": [USER]}, template), template, "2<|im_end|>")
    whole = prompt_of(after(feature, USER), template)
    length = len(whole.ids)
    with pytest.raises(PromptError, match=f"has {length} tokens, max_length is {length - 1}"):
        prompt_of(after(feature, USER), Template(hub.DEMO, max_length=length - 1))
    left = prompt_of(after(feature, USER), Template(hub.DEMO, max_length=length - 1, truncation_strategy="left"))
    assert left.ids.tolist() == whole.ids.tolist()[1:]
    assert left.turn.labels is not None and whole.turn.labels is not None
    assert left.turn.labels.tolist() == whole.turn.labels.tolist()[1:]


# -- random conversations ------------------------------------------------------------------------

words = st.lists(st.sampled_from(["1", "2", " ", "\n", "+", "user", "é", "<"]), max_size=4).map("".join)
replies = st.tuples(words, st.sampled_from(["", "end"]))
following = st.one_of(
    words.map(lambda text: [{"role": "user", "content": text}]),
    words.map(lambda text: [{"role": "tool", "content": text}]),
    words.map(lambda text: [{"role": "assistant", "content": text}, {"role": "user", "content": text}]),
)


def ends(name: str) -> str:
    return "<|eot_id|>" if name == "llama3" else "<|im_end|>"


@pytest.mark.parametrize("name", ["demo", "qwen3", "quiet", "opened", "llama3"])
@given(script=st.lists(st.tuples(replies, following), min_size=1, max_size=4), system=st.booleans())
def test_every_turn_is_a_prefix_of_the_next(
    name: str, templates: dict[str, Template], script: list[Any], system: bool
) -> None:
    """Inputs are never changed, and a feature shares no list with the one it came from."""
    template = templates[name]
    item: dict[str, Any] = {"messages": [{"role": "system", "content": "s"}] * system + [USER], "user_data": {"n": [1]}}
    partial_output: list[int] = []
    for (text, end), messages in script:
        before = copy.deepcopy(item)
        prompt = prompt_of(item, template)
        assert prompt.ids.tolist()[: len(partial_output)] == partial_output
        if name == "demo":
            rendered = template.render(item["messages"], None)
            assert template.decode(prompt.ids) == rendered
        feature = feature_of(prompt, template, text + (ends(name) if end else ""))
        assert feature["input_ids"][: len(prompt.ids)] == prompt.ids.tolist()
        partial_output = feature["input_ids"]
        assert item == before
        spoiled = copy.deepcopy(feature)
        feature["user_data"]["n"].append(2)
        feature["messages"][0]["content"] += "!"
        feature["messages"].append(USER)
        assert item == before
        if not text and not end:
            return
        item = after(spoiled, *messages)


def test_llama3_template_begins_with_its_token_once(templates: dict[str, Template]) -> None:
    """The tokenizer does not prepend another to the chat template's."""
    text = templates["llama3"].decode(prompt_of({"messages": [USER]}, templates["llama3"]).ids)
    assert LLAMA3.startswith("{{- bos_token") and text.startswith("<|begin_of_text|><|start_header_id|>user")
