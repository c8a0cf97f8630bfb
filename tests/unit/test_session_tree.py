"""The tree of a session: a conversation continues with its own tokens, or is a branch that says why."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chat_templates import kinds_of_templates
from tests.support.sessions import args, begin, play, play_raw, sampled
from tests.support.turns import after, feature_of, prompt_of, tokens_of
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.errors import ServiceError, SessionError
from twinkle_serve.routing.dispatch import Dispatcher
from twinkle_serve.routing.groups import RoutedGroup
from twinkle_serve.routing.policies import Balanced
from twinkle_serve.sessions import SessionStore, features, trajectory
from twinkle_serve.template import Template

END = "<|im_end|>"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


def user(text: str = "1+1=") -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Template]:
    """One per kind of chat template."""
    return kinds_of_templates(tmp_path_factory.mktemp("templates"))


@pytest.fixture
def demo(templates: dict[str, Template]) -> Template:
    return templates["demo"]


@pytest.fixture
def store() -> SessionStore:
    return SessionStore(args())


def nodes_of(store: SessionStore, session: str = "s") -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = trajectory(store.read(session))["nodes"]
    return nodes


def ids_of(nodes: list[dict[str, Any]], number: int) -> list[int]:
    """All token ids up to a node, joined from the trajectory."""
    node = nodes[number]
    before = [] if node["parent"] is None else ids_of(nodes, node["parent"])
    return [*before, *node["token_ids"]]


# -- continuation --------------------------------------------------------------------------------


def test_turn_continues_with_the_tokens_that_were_sampled(store: SessionStore, demo: Template) -> None:
    """Tokens of its text would be others."""
    (first,) = play(store, demo, [user()], f"12{END}")
    messages = [user(), said("12"), user("2+2=")]
    turn = begin(store, "s", messages)
    assert turn.found.node == first and turn.found.matched == 2
    response = sampled(turn, demo, f"4{END}")
    assert response.prompts[0][: len(turn.found.ids)].tolist() == turn.found.ids.tolist()
    assert turn.found.ids.tolist()[-3:] == tokens_of(demo, f"12{END}")
    (second,) = store.append("s", turn.record(response))
    nodes = nodes_of(store)
    assert nodes[second]["parent"] == first and nodes[second]["branch"] == ""
    assert ids_of(nodes, second) == [*response.prompts[0].tolist(), *response.sequences[0].tokens]
    assert nodes[second]["messages"] == [user("2+2="), said("4")]


def test_session_that_has_no_turn_has_nothing(store: SessionStore) -> None:
    """The input is the conversation as it was sent."""
    turn = begin(store, "s", [user()], TOOLS)
    assert turn.found.node is None and turn.input == {"messages": [user()], "tools": TOOLS}


def test_client_may_write_its_messages_otherwise(store: SessionStore, templates: dict[str, Template]) -> None:
    """Arguments as JSON, other ids of calls, no reasoning, text in parts: the session's own messages are sent on, and
    results refer to its ids."""
    template = templates["qwen3"]
    (first,) = play(store, template, [user()], f"<think>\nHm.\n</think>\n\nSo:\n{CALL}{END}", tools=TOOLS)
    function = {"name": "add", "arguments": '{"b":2,"a":1}'}
    call = {"id": "call_9", "type": "function", "function": function}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "1+1="}]},
        {"role": "assistant", "content": "So:", "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "call_9", "content": "3"},
    ]
    turn = begin(store, "s", messages, TOOLS)
    assert turn.found.node == first
    (own,) = nodes_of(store)[first]["messages"][1]["tool_calls"]
    assert own["id"] != "call_9" and turn.input["messages"][2]["tool_call_id"] == own["id"]
    response = sampled(turn, template, f"3{END}")
    assert response.prompts[0][: len(turn.found.ids)].tolist() == turn.found.ids.tolist()
    (second,) = store.append("s", turn.record(response))
    assert nodes_of(store)[second]["branch"] == ""


def test_reasoning_must_be_the_same_if_it_is_sent_back(store: SessionStore, templates: dict[str, Template]) -> None:
    """Under either of its names."""
    template = templates["qwen3"]
    (first,) = play(store, template, [user()], f"<think>\nHm.\n</think>\n\n2{END}")
    for reasoning, node in (({}, first), ({"reasoning": "Hm."}, first), ({"reasoning_content": "Ha."}, None)):
        turn = begin(store, "s", [user(), said("2", **reasoning), user()])
        assert turn.found.node == node
        assert turn.found.branch == ("" if node is not None else "edited")


def test_message_is_found_as_the_client_was_given_it(store: SessionStore, templates: dict[str, Template]) -> None:
    """By another parser than the template's; and as the template's parser makes it."""
    template = templates["qwen3"]
    text = f"<think>\nHm.\n</think>\n\n2{END}"
    shown = said("<think>Hm.</think>2")
    (first,) = play(store, template, [user()], text, shown=[shown])
    for message in (shown, said("2"), said("2", reasoning="Hm.")):
        assert begin(store, "s", [user(), message, user()]).found.node == first
    assert begin(store, "s", [user(), said("<think>Hm."), user()]).found.node is None
    (node,) = nodes_of(store)
    assert node["shown"] == shown and node["messages"][1]["reasoning_content"] == "Hm."
    (second,) = play(store, template, [user(), shown, user()], text, shown=[shown])
    turn = begin(store, "s", [user(), said("2"), user(), shown, user()])
    assert turn.found.node == second, "each turn in its own form"


def test_one_of_several_samples_is_continued(store: SessionStore, demo: Template) -> None:
    """Samples of a call are siblings, and share the prompt."""
    nodes = play(store, demo, [user()], f"1{END}", f"2{END}", f"3{END}")
    assert nodes == [0, 1, 2]
    (second,) = play(store, demo, [user(), said("2"), user()], f"4{END}")
    tree = nodes_of(store)
    assert tree[second]["parent"] == 1
    assert [node["sample"] for node in tree] == [0, 1, 2, 0] and len({node["turn"] for node in tree[:3]}) == 1


def test_of_equal_samples_the_latest_turn_and_its_first_sample_is_continued(
    store: SessionStore, demo: Template
) -> None:
    """Unless a later turn shows which one it was."""
    play(store, demo, [user()], f"2{END}", f"2{END}")
    assert begin(store, "s", [user(), said("2"), user()]).found.node == 0
    (third,) = play(store, demo, [user(), said("2"), user()], f"3{END}")
    fourth, _ = play(store, demo, [user()], f"2{END}", f"2{END}")
    assert begin(store, "s", [user(), said("2"), user("other")]).found.node == fourth
    assert begin(store, "s", [user(), said("2"), user(), said("3"), user()]).found.node == third


def test_turns_go_to_the_engine_that_has_the_turn_before(store: SessionStore, demo: Template) -> None:
    """The policy sees their ids alone. As for every conversation, the new part must not be the longer one."""
    dispatcher = Dispatcher(Balanced(random.Random(0)))
    for name in "ab":
        dispatcher.add_engine(name, 8)
    messages: list[Any] = [user("1" * 400)]
    homes: set[str] = set()
    for number in range(6):
        turn = begin(store, "s", messages)
        response = sampled(turn, demo, "2" * 40 + END)
        group = RoutedGroup(id=number, prompt_ids=response.prompts[0], params=DecodingParams(max_tokens=64))
        dispatcher.enqueue([group])
        (home,) = dispatcher.assign()
        dispatcher.finish(home, [(number, 0)])  # the other one has been idle for longer
        homes.add(home)
        store.append("s", turn.record(response))
        messages = [*messages, said("2" * 40), user("3" * 40)]
    assert len(homes) == 1


# -- branches ------------------------------------------------------------------------------------


def test_branches_say_why_they_are(store: SessionStore, demo: Template) -> None:
    """A trajectory shows what the client did."""

    def branch(messages: Any, text: str = f"2{END}", tools: Any = None) -> tuple[Any, str]:
        (number,) = play(store, demo, messages, text, tools=tools)
        node = nodes_of(store)[number]
        return node["parent"], node["branch"]

    assert branch([user()]) == (None, "")
    assert branch([user()], f"3{END}") == (None, "retry")
    assert branch([user(), said("2"), user("a")], f"4{END}") == (0, "")
    assert branch([user(), said("2"), user("b")]) == (0, "fork")
    assert branch([user(), said("2"), user("b")]) == (0, "retry")
    assert branch([user(), said("2 "), user("a")]) == (None, "edited")
    assert branch([user(), said("2"), user("a"), said("5"), user("c")]) == (0, "edited")
    assert branch([user(), said("2"), user("a"), said("5"), user("c"), said("2"), user()]) == (6, "")
    assert branch([user("other")]) == (None, "root")
    assert branch([{"role": "system", "content": "s"}, user(), said("2"), user("a")]) == (None, "root")
    assert branch([user()], tools=TOOLS) == (None, "tools")


def test_variant_is_another_root(store: SessionStore, demo: Template) -> None:
    """Options of the chat template change the tokens of the same messages."""
    play(store, demo, [user()], f"2{END}")
    found = begin(store, "s", [user(), said("2"), user()], variant="thinking").found
    assert found.node is None and found.branch == "tools"


def test_nothing_can_follow_a_sample_without_tokens(store: SessionStore, demo: Template) -> None:
    """The conversation continues after the last message that has some."""
    play(store, demo, [user()], f"2{END}")
    messages = [user(), said("2"), user("a")]
    play(store, demo, messages, "", shown=[said("")])
    turn = begin(store, "s", [*messages, said(""), user("b")])
    assert (turn.found.node, turn.found.matched, turn.found.branch) == (0, 2, "empty")
    (number,) = store.append("s", turn.record(sampled(turn, demo, f"3{END}")))
    assert nodes_of(store)[number]["parent"] == 0


def test_two_turns_that_begin_together_are_two_branches(store: SessionStore, demo: Template) -> None:
    """Gateways know nothing of each other."""
    play(store, demo, [user()], f"2{END}")
    turns = [begin(store, "s", [user(), said("2"), user(text)]) for text in ("a", "b", "a")]
    assert {turn.found.branch for turn in turns} == {""}
    for turn in turns:
        store.append("s", turn.record(sampled(turn, demo, f"3{END}")))
    assert [(node["parent"], node["branch"]) for node in nodes_of(store)[1:]] == [(0, ""), (0, "fork"), (0, "retry")]


# -- messages that are continued -----------------------------------------------------------------


def test_unfinished_message_is_continued(store: SessionStore, templates: dict[str, Template]) -> None:
    """It replaces the unfinished one, and the conversation goes on from either."""
    template = templates["qwen3"]
    play(store, template, [user()], "<think>\nHm.\n</think>\n\n12")
    turn = begin(store, "s", [user(), said("12")])
    assert turn.continues_message
    response = sampled(turn, template, f"34{END}")
    assert response.prompts[0].tolist() == turn.found.ids.tolist()
    (second,) = store.append("s", turn.record(response))
    node = nodes_of(store)[second]
    assert node["replaces_message"] and node["messages"] == [said("1234", reasoning_content="Hm.")]
    assert begin(store, "s", [user(), said("1234"), user()]).found.node == second
    assert begin(store, "s", [user(), said("12"), user()]).found.node == 0
    (feature,) = features(store.read("s"))
    assert feature["messages"] == [user(), said("1234", reasoning_content="Hm.")]


def test_message_that_the_client_began_is_continued(store: SessionStore, templates: dict[str, Template]) -> None:
    """The sampled message begins with its text."""
    template = Template(templates["demo"].model, continue_final_message=True)
    (first,) = play(store, template, [user(), said("ab")], f"cd{END}")
    node = nodes_of(store)[first]
    assert node["messages"] == [user(), said("abcd")] and node["replaces_message"]
    turn = begin(store, "s", [user(), said("abcd"), user()])
    assert turn.found.node == first
    response = sampled(turn, template, f"2{END}")
    assert response.prompts[0][: len(turn.found.ids)].tolist() == turn.found.ids.tolist()


# -- raw prompts ---------------------------------------------------------------------------------


def test_raw_ids_continue_the_longest_sequence_that_they_begin_with(store: SessionStore, demo: Template) -> None:
    """Of this session's raw prompts."""
    (first,) = play_raw(store, demo, [5, 6], "ab")
    ids = [5, 6, *tokens_of(demo, "ab")]
    (second,) = play_raw(store, demo, [*ids, 7], "c")
    (other,) = play_raw(store, demo, [*ids[:-1], 7], "c")
    play(store, demo, [user()], f"2{END}")
    tree = nodes_of(store)
    assert [(tree[number]["parent"], tree[number]["branch"]) for number in (first, second, other)] == [
        (None, ""),
        (first, ""),
        (None, "root"),
    ]
    assert tree[second]["token_ids"] == [7, *tokens_of(demo, "c")] and tree[second]["kind"] == "raw"
    assert features(store.read("s"))[0]["input_ids"] == [*ids, 7, *tokens_of(demo, "c")]


def test_raw_text_continues_the_longest_text_that_it_begins_with(store: SessionStore, demo: Template) -> None:
    """Special tokens are in it; the rest alone is tokenised."""
    (first,) = play_raw(store, demo, "1+1=", f"2{END}")
    (second,) = play_raw(store, demo, f"1+1=2{END}\n3", "4")
    (third,) = play_raw(store, demo, f"1+1=2{END}\n34", "5")
    (other,) = play_raw(store, demo, "1+1=2\n", "5")
    tree = nodes_of(store)
    assert [tree[number]["parent"] for number in (first, second, third, other)] == [None, first, second, None]
    assert tree[second]["text"] == ["\n3", "4"] and tree[third]["text"] == ["", "5"]
    assert ids_of(tree, third) == tokens_of(demo, f"1+1=2{END}\n345")


# -- refused turns -------------------------------------------------------------------------------


def test_prompt_that_does_not_begin_with_the_tokens_of_its_node_is_a_bug(store: SessionStore, demo: Template) -> None:
    """It is never kept."""
    play(store, demo, [user()], f"2{END}")
    turn = begin(store, "s", [user(), said("2"), user()])
    record = turn.record(sampled(turn, demo, f"3{END}"))
    other = record.prompt.copy()
    other[0] += 1
    for wrong in (
        replace(record, prompt=other),
        replace(record, prompt=record.prompt[1:]),
        replace(record, parent=None),
    ):
        with pytest.raises(ServiceError, match=r"a bug in sessions: turn .* was sampled from a prompt of"):
            store.append("s", wrong)
    with pytest.raises(SessionError, match="node 7 does not exist, the session has 1 nodes"):
        store.append("s", replace(record, parent=7))
    assert len(nodes_of(store)) == 1


def test_prompt_that_was_cut_is_refused(store: SessionStore, demo: Template) -> None:
    """A turn of a session has all tokens before it."""
    play(store, demo, [user()], f"2{END}")
    turn = begin(store, "s", [user(), said("2"), user()])
    length = len(turn.found.ids)
    for strategy in ("left", "right"):
        short = Template(demo.model, max_length=length - 1, truncation_strategy=strategy)
        with pytest.raises(SessionError, match="it was cut, and cannot be a turn of a session"):
            turn.record(sampled(turn, short, f"3{END}"))


# -- random conversations ------------------------------------------------------------------------

words = st.lists(st.sampled_from(["1", "2", " ", "\n", "é", "<"]), max_size=3).map("".join)
replies = st.tuples(words, st.sampled_from(["", END]))


@pytest.mark.parametrize("name", ["demo", "qwen3", "opened"])
@settings(max_examples=30)
@given(script=st.lists(st.tuples(replies, words, st.booleans()), min_size=1, max_size=4))
def test_session_and_handle_make_the_same_feature(name: str, templates: dict[str, Template], script: list[Any]) -> None:
    """Every turn of a conversation, and the same after the store has read it again."""
    store, template = SessionStore(args()), templates[name]
    messages: list[Any] = [user()]
    item: dict[str, Any] = {"messages": messages}
    for (text, end), following, tool in script:
        turn = begin(store, "s", messages)
        by_handle = feature_of(prompt_of(item, template), template, text + end)
        store.append("s", turn.record(sampled(turn, template, text + end)))
        (made,) = (f for f in features(store.read("s")) if f["input_ids"] == by_handle["input_ids"])
        assert made.pop("user_data") == {"session": "s", "node": len(nodes_of(store)) - 1}
        assert made == by_handle
        json.dumps(trajectory(store.read("s")), allow_nan=False)
        if len(by_handle["messages"]) == len(messages):
            return  # a sample without tokens: nothing follows it
        new = {"role": "tool" if tool else "user", "content": following}
        messages = [*copy.deepcopy(by_handle["messages"]), new]
        item = after(dict(by_handle), new)


@settings(max_examples=60)
@given(
    script=st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from("ab"), st.lists(st.sampled_from("xy"), min_size=1, max_size=2)),
        max_size=8,
    ),
    asked=st.lists(st.sampled_from("abxy"), max_size=5),
)
def test_longest_known_part_of_a_conversation_is_found(
    templates: dict[str, Template], script: list[Any], asked: list[str]
) -> None:
    """Compared with a search through all nodes."""
    store, template = SessionStore(args()), templates["demo"]
    known: list[list[Any]] = []
    for start, text, samples in script:
        before = known[start % len(known)] if known and start else []
        turn = begin(store, "s", [*before, user(text)])
        store.append("s", turn.record(sampled(turn, template, *(sample + END for sample in samples))))
        known += [[*before, user(text), said(sample)] for sample in samples]
    messages = [user(text) if text in "ab" else said(text) for text in asked] + [user("a")]
    fitting = [path for path in known if messages[: len(path)] == path]
    found = begin(store, "s", messages).found
    assert found.matched == max(map(len, fitting), default=0)
    if found.node is not None:
        assert known[found.node] == messages[: found.matched]
        assert ids_of(nodes_of(store), found.node) == found.ids.tolist()
        assert np.array_equal(features(store.read("s"), [found.node])[0]["input_ids"], found.ids)
