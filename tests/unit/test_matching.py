"""Features that are sent again: every message is in the prompt, or the feature is refused."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.chat_templates import OPENED, QWEN3, llama3, model_with
from tests.support.columnar import columnar
from tests.support.turns import Made, after, feature_of, prompt_of
from twinkle_serve import hub
from twinkle_serve.errors import PromptError
from twinkle_serve.template import Template
from twinkle_serve.template.prompts import encode_inputs

USER = {"role": "user", "content": "1+1="}
TOOLS = [{"type": "function", "function": {"name": "add", "description": None, "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
RESULT = {"role": "tool", "content": "2"}
ALONE = 'Pass {"messages": …} only to encode them again, or leave messages out'


@pytest.fixture(scope="module")
def demo() -> Template:
    return Template(hub.DEMO)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return Template(model_with(tmp_path_factory.mktemp("qwen3"), QWEN3))


def sampled(template: Template, text: str = "2<|im_end|>", **keys: Any) -> dict[str, Any]:
    return feature_of(prompt_of({"messages": [USER], **keys}, template), template, text)


def without(feature: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in feature.items() if key not in keys}


def text_of(item: Any, template: Template) -> str:
    return template.decode(prompt_of(item, template).ids)


# -- without `encoded` ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["2<|im_end|>", "2", "1\n2"])
@pytest.mark.parametrize("lost", [lambda f: without(f, "encoded"), lambda f: {**f, "encoded": None}])
def test_message_appended_to_a_feature_without_encoded_is_in_the_prompt(text: str, lost: Any, demo: Template) -> None:
    """The prompt is the same as with `encoded`, and begins with the ids of the feature."""
    feature = sampled(demo, text)
    expected = prompt_of(after(feature, USER), demo).ids.tolist()
    assert prompt_of(after(lost(feature), USER), demo).ids.tolist() == expected
    assert expected[: len(feature["input_ids"])] == feature["input_ids"]


def test_unchanged_feature_without_encoded_resumes_its_message(demo: Template) -> None:
    """The result is one assistant's message with the text of both samples, which can be resumed again."""
    feature = without(sampled(demo, "12"), "encoded")
    for text, content in (("3", "123"), ("4", "1234"), ("<|im_end|>", "1234")):
        prompt = prompt_of(feature, demo)
        assert prompt.ids.tolist() == feature["input_ids"]
        feature = feature_of(prompt, demo, text)
        assert feature["messages"] == [USER, {"role": "assistant", "content": content}]
    assert text_of(after(feature, USER), demo).count("1234<|im_end|>") == 1


def test_ids_of_messages_alone_are_their_prompt(demo: Template) -> None:
    """Ids that contain all messages stay as they are; missing messages are appended."""
    ids = prompt_of({"messages": [USER]}, demo).ids
    assert prompt_of({"input_ids": ids, "messages": [USER]}, demo).ids.tolist() == ids.tolist()
    assert prompt_of({"input_ids": ids[:-3], "messages": [USER]}, demo).ids.tolist() == ids.tolist()
    (scored,) = encode_inputs({"input_ids": ids[:-3], "messages": [USER]}, demo, False)
    assert demo.decode(scored.ids) == "<|im_start|>user\n1+1=<|im_end|>\n"


def test_ids_that_are_not_those_of_the_messages_are_refused(demo: Template, qwen3: Template) -> None:
    """The error names the first message that is not covered, and says what to send instead."""
    feature = without(sampled(demo), "encoded")
    said = feature["messages"][1]
    for changed in (
        {"input_ids": [5, 6], "messages": [USER, USER]},
        {**feature, "messages": [{**USER, "content": "1+2="}, said, USER]},
        {**feature, "messages": [USER, {**said, "content": "3"}, USER]},
        {**feature, "messages": [USER, USER, said, USER]},
        {**feature, "messages": [said, USER]},
        extended(feature, demo, "3", USER),
    ):
        with pytest.raises(PromptError, match=r"inputs\[0\]: input_ids are not the tokens of its messages") as caught:
            prompt_of(changed, demo)
        assert ALONE in str(caught.value)
    with pytest.raises(PromptError, match=r"the first that they do not hold .* is messages\[1\]"):
        prompt_of({**feature, "messages": [USER, {**said, "content": "3"}, USER]}, demo)
    thought = without(sampled(qwen3, "<think>\nHm.\n</think>\n\n2<|im_end|>"), "encoded")
    with pytest.raises(PromptError, match="not the tokens of its messages"):  # earlier thoughts are not written
        prompt_of(after(thought, USER), qwen3)


def test_tokens_that_only_decode_to_the_text_of_the_messages_are_refused(demo: Template) -> None:
    """A token without text, or an end of turn that is spelled out, is another prompt."""
    ids = prompt_of({"messages": [USER]}, demo).ids.tolist()
    nothing = next(i for i in range(312, 320) if demo.decode(np.array([i])) == "")
    spelled = [demo.tokenizer.convert_tokens_to_ids(character) for character in "<|im_end|>"]
    end = demo.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for other in ([nothing], [*ids, nothing], [i for t in ids for i in (spelled if t == end else [t])]):
        assert demo.decode(np.array(other)) in ("", demo.decode(np.array(ids)))
        with pytest.raises(PromptError, match="not the tokens of its messages"):
            prompt_of({"input_ids": other, "messages": [USER]}, demo)
    feature = without(sampled(demo), "attention_mask", "position_ids", "labels")
    with pytest.raises(PromptError, match=r"messages\[2\] is not covered"):
        prompt_of({**without(after(feature, USER), "length"), "input_ids": [*feature["input_ids"], nothing]}, demo)


def test_ids_of_a_base_models_text_are_its_prompt(tmp_path: Path) -> None:
    """They include the token that the tokenizer prepends, which no rendered text contains."""
    template = Template(llama3(tmp_path), use_chat_template=False)
    ids = prompt_of({"messages": [USER]}, template).ids
    assert len(template.tokenizer.encode("", add_special_tokens=True)) == 1
    assert prompt_of({"messages": [USER], "input_ids": ids}, template).ids.tolist() == ids.tolist()


def test_conversation_that_was_scored_opens_a_turn_when_it_is_sampled(demo: Template) -> None:
    """Its ids contain all messages and do not open the assistant's turn. Ids that open it stay as they are."""
    (scored,) = encode_inputs({"messages": [USER]}, demo, False)
    feature = feature_of(Made(scored.ids, turn=scored.turn, item={"messages": [USER]}), demo, "")
    assert feature["encoded"] and text_of(feature, demo) == text_of({"messages": [USER]}, demo)
    whole = feature_of(prompt_of({"messages": [USER]}, demo), demo, "")
    assert prompt_of(whole, demo).ids.tolist() == whole["input_ids"]
    said = {"messages": [USER, {"role": "assistant", "content": "2"}]}
    (scored,) = encode_inputs(said, demo, False)
    feature = feature_of(Made(scored.ids, turn=scored.turn, item=said), demo, "")
    with pytest.raises(PromptError, match="ends with an assistant's message"):
        prompt_of(feature, demo)
    assert encode_inputs(feature, demo, False)[0].ids.tolist() == feature["input_ids"]


# -- ids that differ from those that were returned ------------------------------------------------


def test_feature_whose_end_of_turn_was_removed_gets_it_back(demo: Template, qwen3: Template) -> None:
    """If its text proves which messages it contains; otherwise it is refused."""
    feature = sampled(demo)
    stripped = {
        **without(feature, "labels", "attention_mask", "position_ids", "length"),
        "input_ids": feature["input_ids"][:-1],
    }
    assert text_of(after(stripped, USER), demo) == text_of(after(feature, USER), demo)
    feature = sampled(qwen3, "<think>\nHm.\n</think>\n\n2<|im_end|>")
    stripped = {
        **without(feature, "labels", "attention_mask", "position_ids", "length"),
        "input_ids": feature["input_ids"][:-1],
    }
    with pytest.raises(PromptError, match=r"they are not the \d+ tokens that new_input_feature returned"):
        prompt_of(after(stripped, USER), qwen3)


def extended(feature: dict[str, Any], template: Template, text: str, *messages: Any) -> dict[str, Any]:
    """A feature with text appended to its ids, and messages to its messages."""
    added = template.tokenizer.encode(text, add_special_tokens=False)
    kept = without(feature, "attention_mask", "position_ids", "length")
    ids, labels = [*feature["input_ids"], *added], [*feature["labels"], *[-100] * len(added)]
    return {**after(kept, *messages), "input_ids": ids, "labels": labels}


RENDERED = "\n<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("cut", [0, 1, 12, 40, len(RENDERED) - 22, len(RENDERED) - 1, len(RENDERED)])
def test_tokens_of_appended_messages_may_come_with_them(cut: int, qwen3: Template) -> None:
    """Twinkle's rollouts append all tokens of a message. If only the first are appended, the rest is added."""
    feature = sampled(qwen3, f"<think>\nHm.\n</think>\n\n{CALL}<|im_end|>", tools=TOOLS)
    expected = qwen3.decode(np.array(feature["input_ids"])) + RENDERED
    assert text_of(extended(feature, qwen3, RENDERED[:cut], RESULT), qwen3) == expected
    without_break = text_of(extended(feature, qwen3, RENDERED[1 : max(cut, 2)], RESULT), qwen3)
    assert without_break == expected.replace(
        "<|im_end|>\n<|im_start|>user\n<tool_r", "<|im_end|><|im_start|>user\n<tool_r"
    )
    message = feature_of(prompt_of(extended(feature, qwen3, RENDERED, RESULT), qwen3), qwen3, "3")["messages"]
    assert [m["role"] for m in message] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("text", ["2", "\n<|im_start|>user\n<tool_response>\n3", RENDERED + "3", "<|im_end|>"])
def test_appended_tokens_that_are_not_those_of_the_appended_messages_are_refused(text: str, qwen3: Template) -> None:
    """Even if no message was appended: they would change the sampled message."""
    feature = sampled(qwen3, f"<think>\nHm.\n</think>\n\n{CALL}<|im_end|>", tools=TOOLS)
    with pytest.raises(PromptError, match=r"messages\[2\] is not covered: the \d+ tokens that were appended"):
        prompt_of(extended(feature, qwen3, text, RESULT), qwen3)
    with pytest.raises(PromptError, match="tokens more than its messages cover, and no message was appended"):
        prompt_of(extended(feature, qwen3, text), qwen3)


def test_replaced_ids_are_refused(qwen3: Template) -> None:
    """Even if their number is the same."""
    feature = sampled(qwen3, "<think>\nHm.\n</think>\n\n2<|im_end|>")
    for index in (0, 5, -1):
        ids = list(feature["input_ids"])
        ids[index] += 1
        for messages in ((), (USER,)):
            with pytest.raises(PromptError, match="input_ids are not the tokens of its messages"):
                prompt_of({**after(feature, *messages), "input_ids": ids}, qwen3)


def test_other_tools_than_those_in_the_ids_are_refused(qwen3: Template) -> None:
    """The ids contain the earlier tools, so the model would see those."""
    feature = sampled(qwen3, f"{CALL}<|im_end|>", tools=TOOLS)
    other = copy.deepcopy(TOOLS)
    other[0]["function"]["name"] = "sub"  # type: ignore[index]
    for tools in (None, [], other, TOOLS * 2):
        with pytest.raises(PromptError, match=r"inputs\[0\].tools do not match its input_ids"):
            prompt_of(after({**feature, "tools": tools}, RESULT), qwen3)
    assert prompt_of(after(feature, RESULT), qwen3)


# -- round trips ---------------------------------------------------------------------------------


def as_floats(value: Any) -> Any:
    """Whole numbers as pandas reads them from a column that has nulls too."""
    if isinstance(value, dict):
        return {key: as_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_floats(item) for item in value]
    return float(value) if type(value) is int else value


ROUND_TRIPS: dict[str, Callable[[Any], Any]] = {
    "json": lambda feature: json.loads(json.dumps(feature)),
    "pickle": lambda feature: pickle.loads(pickle.dumps(feature)),
    "columnar": columnar,
    "pandas": lambda feature: {**columnar(feature), "messages": as_floats(feature["messages"])},
    "floats": lambda feature: {**feature, "encoded": columnar({**feature["encoded"], "ids": float(feature["length"])})},
    "nulls": lambda feature: {**feature, "encoded": {**feature["encoded"], "written": None}, "images": None},
}


@pytest.mark.parametrize("trip", ROUND_TRIPS)
@pytest.mark.parametrize("thought", ["", "<think>\nHm.\n</think>\n\n"])
def test_feature_is_continued_after_a_round_trip(trip: str, thought: str, qwen3: Template) -> None:
    """Through JSON, pickle or a columnar file, which adds nulls and changes lists to arrays."""
    feature = sampled(qwen3, f"{thought}{CALL}<|im_end|>", tools=TOOLS, user_data={"id": 3})
    again = ROUND_TRIPS[trip](feature)
    assert prompt_of(again, qwen3).ids.tolist() == feature["input_ids"]
    following = ROUND_TRIPS[trip](after(feature, RESULT))
    expected = prompt_of(after(feature, RESULT), qwen3).ids.tolist()
    assert prompt_of(following, qwen3).ids.tolist() == expected
    turn = feature_of(prompt_of(following, qwen3), qwen3, "3<|im_end|>")
    assert prompt_of(after(turn, USER), qwen3).ids.tolist()[: len(expected)] == expected


def test_feature_is_refused_if_a_round_trip_changed_its_messages(qwen3: Template) -> None:
    """The ids contain the sampled message, not the edited one."""
    feature = json.loads(json.dumps(sampled(qwen3, f"{CALL}<|im_end|>", tools=TOOLS)))
    feature["messages"][1]["tool_calls"][0]["function"]["arguments"]["b"] = [3]
    with pytest.raises(PromptError, match=r"messages\[1\] does not match its input_ids"):
        prompt_of(after(feature, RESULT), qwen3)


def test_new_messages_that_the_template_writes_before_the_sample_are_refused(tmp_path: Path) -> None:
    """If a template moves system messages to the beginning, there is no text to append for a new one."""
    source = "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}" + OPENED.replace(
        "for m in messages", "for m in messages if m.role != 'system'"
    )
    template = Template(model_with(tmp_path, source))
    feature = sampled(template)
    for lost in ({}, {"encoded": None}):
        with pytest.raises(PromptError, match=r"messages\[2\]: .* role 'system' out|not the tokens of its messages"):
            prompt_of({**after(feature, {"role": "system", "content": "Be brief."}, USER), **lost}, template)
