"""Input features of trajectories, as Twinkle's Template makes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.chat_templates import OPENED, QWEN3, llama3, model_with
from twinkle_serve import hub
from twinkle_serve.data_format import pack_value, user_data_get
from twinkle_serve.data_format.prompts import TruncationStrategy
from twinkle_serve.data_format.response import IGNORED_LABEL
from twinkle_serve.errors import ModelNotFoundError, PromptError, TemplateError
from twinkle_serve.template import Template, resolve_template

TURNS = [
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+3="},
    {"role": "assistant", "content": "5"},
]


def learnt(template: Template, feature: dict[str, Any]) -> str:
    """Text of the tokens that have a label, rolled back to their own positions."""
    ids, labels = feature["input_ids"], feature["labels"]
    assert labels[-1] == IGNORED_LABEL, "nothing follows the last token"
    mine = [int(label) for label in labels[:-1]]
    assert all(label in (IGNORED_LABEL, token) for label, token in zip(mine, ids[1:].tolist(), strict=True))
    return template.decode([label for label in mine if label != IGNORED_LABEL])


def test_template_is_found_by_the_name_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """demo, an id of a hub, or a directory; as `model_id` too. A hub's id is never taken for a path."""
    asked: list[str] = []

    def resolve(model: str, *, weights: bool) -> Path:
        asked.append(model)
        assert not weights
        return hub.DEMO

    assert Template("demo").model == Template(model_id="demo").model == Template(hub.DEMO).model == hub.DEMO
    monkeypatch.setattr(hub, "resolve", resolve)
    for name in ("ms://Qwen/Qwen3-8B", "hf://org/name", "org/name"):
        assert Template(name).model == hub.DEMO
    assert Template(str(hub.DEMO), default_system="Add.").system == "Add."
    assert asked == ["ms://Qwen/Qwen3-8B", "hf://org/name", "org/name"]


def test_template_of_an_unknown_model_says_so(tmp_path: Path) -> None:
    """A name, a path, or none."""
    with pytest.raises(ModelNotFoundError, match="unknown hub 'xy'"):
        Template("xy://org/name")
    with pytest.raises(ModelNotFoundError, match="no directory at"):
        Template(str(tmp_path / "nothing"))
    wrong: list[dict[str, Any]] = [{}, {"model": "demo", "model_id": "demo"}]
    for arguments in wrong:
        with pytest.raises(TypeError, match="either model or model_id"):
            Template(**arguments)


def test_trajectory_becomes_a_feature_to_sample_from() -> None:
    """Its ids are the prompt of the trajectory; no position has a label; other keys are there; nothing is shared."""
    template = Template("demo")
    trajectory = {"messages": TURNS[:3], "user_data": [("id", "1")], "tools": None}
    before = copy.deepcopy(trajectory)
    feature = template.encode(trajectory, add_generation_prompt=True)
    assert feature["input_ids"].tolist() == template.encode(TURNS[:3], None, "x").tolist()
    assert template.encode(trajectory, True)["length"] == feature["length"] == len(feature["input_ids"])
    assert set(feature["labels"].tolist()) == {IGNORED_LABEL} and set(feature["attention_mask"].tolist()) == {1}
    assert feature["position_ids"].tolist() == list(range(feature["length"]))
    assert feature["user_data"] == [("id", "1")] and feature["messages"] == TURNS[:3]
    feature["messages"][0]["content"] = "changed"
    assert trajectory == before
    assert isinstance(feature["input_ids"], np.ndarray) and isinstance(feature["labels"], np.ndarray)


@pytest.mark.parametrize("which", ["demo", "qwen3", "opened", "llama3"])
def test_labels_are_the_assistants_turns(which: str, tmp_path: Path) -> None:
    """With the end of each turn, whatever the chat template writes only in the last one."""
    source = {"qwen3": QWEN3, "opened": OPENED}.get(which)
    model = hub.DEMO if which == "demo" else llama3(tmp_path) if which == "llama3" else model_with(tmp_path, source)
    template = Template(model)
    feature = template.encode({"messages": TURNS})
    text = learnt(template, feature)
    if which == "llama3":
        assert text == "2<|eot_id|>5<|eot_id|>"
    elif which == "qwen3":
        assert text == "2<|im_end|>\n<think>\n\n</think>\n\n5<|im_end|>\n"
    else:
        assert text == "2<|im_end|>\n5<|im_end|>\n"
    whole = template.tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert template.decode(feature["input_ids"]) == whole


@pytest.mark.parametrize("which", ["demo", "qwen3", "opened", "llama3"])
@pytest.mark.parametrize("system", [None, "Add."])
def test_trajectory_may_begin_with_the_assistant(which: str, system: str | None, tmp_path: Path) -> None:
    """Its labels begin after the text that opens the assistant's turn, with a system prompt or without."""
    source = {"qwen3": QWEN3, "opened": OPENED}.get(which)
    model = hub.DEMO if which == "demo" else llama3(tmp_path) if which == "llama3" else model_with(tmp_path, source)
    template = Template(model, system=system)
    said = [TURNS[3], *TURNS[:2]]
    end = "<|eot_id|>" if which == "llama3" else "<|im_end|>\n"
    text = learnt(template, template.encode({"messages": said}))
    assert text.replace("<think>\n\n</think>\n\n", "").replace("<|im_end|>2", f"{end}2") == f"5{end}2{end}"
    assert (
        learnt(template, template.encode({"messages": said[:1]})).removeprefix("<think>\n\n</think>\n\n") == f"5{end}"
    )


def test_first_turn_that_cannot_be_told_apart_is_refused() -> None:
    """The message contains the text that opens a turn. It can be encoded without labels of its own."""
    said = {"role": "assistant", "content": "a<|im_start|>assistant\nb"}
    with pytest.raises(PromptError, match=r"messages\[0\] cannot be labelled: .* is not found once\. Begin with"):
        Template("demo").encode({"messages": [said, *TURNS]})
    template = Template("demo")
    feature = template.encode({"messages": [said, *TURNS[:2]], "user_data": [("key_rounds", "[2]")]})
    assert learnt(template, feature) == "2<|im_end|>\n"


def test_labels_are_of_the_key_rounds_alone() -> None:
    """Of the messages that `key_rounds` in user_data lists."""
    template = Template("demo")
    feature = template.encode({"messages": TURNS, "user_data": [("key_rounds", pack_value([3]))]})
    assert learnt(template, feature) == "5<|im_end|>\n"


@pytest.mark.parametrize("user_data", [(("key_rounds", "[3]"),), np.array([["key_rounds", "[3]"]])], ids=type)
def test_key_rounds_are_read_from_pairs_of_any_kind(user_data: Any) -> None:
    """Rows of columnar files have arrays."""
    template = Template("demo")
    assert learnt(template, template.encode({"messages": TURNS, "user_data": user_data})) == "5<|im_end|>\n"


@pytest.mark.parametrize("rounds", [3, "x", ["3"], [9], [-1], {"a": 1}], ids=repr)
def test_key_rounds_that_name_no_messages_are_refused(rounds: Any) -> None:
    """Nothing would be learnt, and nobody would know."""
    with pytest.raises(PromptError, match="key_rounds"):
        Template("demo").encode({"messages": TURNS, "user_data": [("key_rounds", pack_value(rounds))]})


def test_trajectory_is_encoded_whatever_library_its_values_are_from() -> None:
    """By upstream's keyword too; arrays of messages and of tools, empty ones too."""
    template = Template("demo")
    tool: Any = {"type": "function", "function": {"name": "add", "parameters": {}}}
    for tools in ([], [tool]):
        expected = template.encode({"messages": TURNS, "tools": tools})["input_ids"].tolist()
        arrays = {"messages": np.array(TURNS), "tools": np.array(tools, dtype=object)}
        assert template.encode(arrays)["input_ids"].tolist() == expected
        assert template.encode(trajectory={"messages": TURNS, "tools": tools})["input_ids"].tolist() == expected


@pytest.mark.parametrize(
    ("trajectory", "message"),
    [
        ("text", "must be a dict with messages, got 'text'"),
        (None, "must be a dict with messages, got None"),
        ({"messages": 5}, "messages must be a list"),
        ({"messages": TURNS, "images": ["x.png"]}, "images: this service samples from text only"),
    ],
)
def test_trajectory_that_cannot_be_encoded_is_refused(trajectory: Any, message: str) -> None:
    """As it is when it is sampled."""
    for generation_prompt in (False, True):
        with pytest.raises(PromptError, match=message):
            Template("demo").batch_encode([trajectory], generation_prompt)
    with pytest.raises(PromptError, match="takes a list of trajectories, got str"):
        Template("demo").batch_encode("text")  # type: ignore[arg-type]


def test_second_turn_of_the_assistant_is_not_opened() -> None:
    """As in a call that samples: the last message is continued if the template says so, else it is an error."""
    with pytest.raises(PromptError, match=r"ends with an assistant's message\. Set continue_final_message=True"):
        Template("demo").encode({"messages": TURNS}, add_generation_prompt=True)
    template = Template("demo", continue_final_message=True)
    feature = template.encode({"messages": TURNS}, add_generation_prompt=True)
    assert template.decode(feature["input_ids"]).endswith("<|im_start|>assistant\n5")


def test_columns_of_a_feature_stay_as_long_as_its_ids() -> None:
    """Labels of another length are refused, types of tokens are cut with the tokens."""
    for labels in ([5], [5, 6, 7, 8]):
        with pytest.raises(PromptError, match=r"labels has shape \(\d,\), input_ids \(3,\)"):
            Template("demo")._invoke_post_pipeline([{"input_ids": [5, 6, 7], "labels": labels}])
    cutting = Template("demo", max_length=2, truncation_strategy="left")
    (feature,) = cutting._invoke_post_pipeline([{"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 1]}])
    assert list(feature["token_type_ids"]) == [0, 1] and len(feature["input_ids"]) == 2
    rows = {"input_ids": [5, 6, 7], "mm_token_type_ids": [[0, 0, 1]], "position_ids": [[0, 1, 2]] * 3}
    (feature,) = cutting._invoke_post_pipeline([rows])
    assert feature["mm_token_type_ids"].tolist() == [[0, 1]] and feature["position_ids"].tolist() == [[0, 1]] * 3
    with pytest.raises(PromptError, match=r"token_type_ids has shape \(2,\), input_ids \(3,\)"):
        Template("demo")._invoke_post_pipeline([{"input_ids": [5, 6, 7], "token_type_ids": [0, 0]}])
    with pytest.raises(PromptError, match=r"old_logps has a dimension of 3 numbers"):
        cutting._invoke_post_pipeline([{"input_ids": [5, 6, 7], "old_logps": np.zeros(3)}])
    tokens: Any = [5.5]
    with pytest.raises(PromptError, match=r"new_tokens must be a whole number, got 5\.5"):
        Template("demo").concat_input_feature({"input_ids": [1]}, tokens)


def test_turn_that_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    """Rather than labelled elsewhere."""
    reversed_order = "{%- for m in messages | reverse %}{{- '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
    template = Template(model_with(tmp_path, reversed_order))
    with pytest.raises(PromptError, match=r"messages\[1\] cannot be labelled"):
        template.encode({"messages": TURNS[:2]})
    with pytest.raises(PromptError, match=r"messages must be a list of at least one message"):
        template.encode({"messages": []})


def test_long_trajectories_are_cut_left_out_or_refused() -> None:
    """As prompts are; `encode` returns one feature, so it raises where `batch_encode` leaves one out."""
    long = {"messages": [{"role": "user", "content": "1+1=" * 20}, TURNS[1]]}
    short = {"messages": TURNS[:2]}
    length = Template("demo").encode(short)["length"]
    with pytest.raises(PromptError, match=f"tokens, max_length is {length}"):
        Template("demo", max_length=length).encode(long)
    sides: list[TruncationStrategy] = ["left", "right"]
    for side in sides:
        template = Template("demo", max_length=length, truncation_strategy=side)
        whole, cut = Template("demo").encode(long), template.encode(long)
        kept = slice(-length, None) if side == "left" else slice(0, length)
        assert cut["input_ids"].tolist() == whole["input_ids"][kept].tolist() and cut["length"] == length
        assert len(cut["labels"]) == len(cut["position_ids"]) == length and cut["labels"][-1] == IGNORED_LABEL
    deleting = Template("demo", max_length=length, truncation_strategy="delete")
    assert [feature["length"] for feature in deleting.batch_encode([long, short, long])] == [length]
    with pytest.raises(PromptError, match=f"longer than max_length={length}"):
        deleting.encode(long)
    columns: Any = {"messages": [TURNS]}
    with pytest.raises(PromptError, match="takes a list of trajectories"):
        deleting.batch_encode(columns)


def test_sampled_tokens_are_appended_as_the_sampler_does() -> None:
    """With the assistant's message, its tool calls and labels of the new tokens alone."""
    template = Template("demo")
    prompt = template.encode({"messages": TURNS[:1]}, add_generation_prompt=True)
    tokens = template.tokenizer.encode("2<|im_end|>")
    feature = template.concat_input_feature(prompt, tokens)
    assert feature["input_ids"] == [*prompt["input_ids"].tolist(), *tokens]
    assert [label for label in feature["labels"] if label != IGNORED_LABEL] == tokens
    assert feature["messages"] == [*TURNS[:1], {"role": "assistant", "content": "2"}]
    assert "messages" in prompt and len(prompt["messages"]) == 1, "the prompt is not changed"
    called = template.concat_input_feature(prompt, template.tokenizer.encode(CALL))
    assert called["messages"][-1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


CALL = 'So: <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def test_tool_calls_are_parsed_and_cleaned() -> None:
    """In OpenAI's form; text without calls has none."""
    template = Template("demo")
    assert template.parse_tool_call(CALL) == [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    assert template.clean_tool_call(CALL) == "So:"
    assert template.parse_tool_call("2+3=5") == template.parse_tool_call("") == []
    assert template.clean_tool_call("2+3=5") == "2+3=5"


def test_template_decodes_lists_and_arrays() -> None:
    """With special tokens or without."""
    template = Template("demo")
    ids = template.tokenizer.encode("5<|im_end|>")
    assert template.decode(ids) == template.decode(np.asarray(ids)) == "5<|im_end|>"
    assert template.decode(ids, skip_special_tokens=True) == "5"
    assert template.batch_decode([ids, ids[:1]]) == ["5<|im_end|>", template.decode(ids[:1])]


def test_appended_tokens_are_finished_as_rollouts_expect() -> None:
    """Labels given in the order of tokens are rolled; columns that follow from the ids are made anew."""
    template = Template("demo")
    feature = {"input_ids": [5, 6, 7], "labels": [IGNORED_LABEL, 6, 7], "length": 1, "reward": 2}
    (finished,) = template._invoke_post_pipeline([feature])
    assert finished["labels"].tolist() == [6, 7, IGNORED_LABEL] and finished["length"] == 3
    assert finished["position_ids"].tolist() == [0, 1, 2] and finished["reward"] == 2
    (bare,) = template._invoke_post_pipeline([{"input_ids": [5]}])
    assert bare["labels"].tolist() == [IGNORED_LABEL]


def test_user_data_is_read_as_data_sets_write_it() -> None:
    """Pairs of a key and JSON; a value that is not JSON as it is."""
    items = [("n", pack_value([1, "é"])), ["text", "not json"], ("object", {"a": 1}), ("n", "2")]
    assert items[0][1] == '[1, "é"]'
    assert user_data_get(items, "n") == [1, "é"] and user_data_get(items, "text") == "not json"
    assert user_data_get(items, "object") == {"a": 1} and user_data_get(items, "none", 7) == 7
    assert user_data_get({"n": 1}, "n") is user_data_get(None, "n") is None
    assert pack_value(Path("x")) == '"x"'


def test_template_of_a_name_takes_twinkles_arguments() -> None:
    """But no second model."""
    assert resolve_template("Template", hub.DEMO, default_system="x").system == "x"
    with pytest.raises(TemplateError, match="unknown argument of Template 'model_id'"):
        resolve_template("Template", hub.DEMO, model_id="demo")
