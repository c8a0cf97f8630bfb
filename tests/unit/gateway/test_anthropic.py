"""`/v1/messages`: bodies, conversations, answers and events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.gateway_app import GatewayUnderTest, gateway_app
from tests.support.http_clients import use_messages
from twinkle_serve.data_format.message_stream import (
    ContentDelta,
    MessageDelta,
    ParsedCall,
    ParsedMessage,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallBegin,
)
from twinkle_serve.gateway.anthropic.answers import MessageEvents, content_of, end_of
from twinkle_serve.gateway.anthropic.fields import NEUTRAL, CountTokensRequest, MessagesRequest
from twinkle_serve.gateway.anthropic.history import messages_of
from twinkle_serve.gateway.bodies import parse_model
from twinkle_serve.gateway.conversations import message_dict
from twinkle_serve.gateway.errors import InvalidRequestError
from twinkle_serve.gateway.prefill import PrefillRemover
from twinkle_serve.sessions.canonical import message_keys

USER = {"role": "user", "content": "Hello"}
BODY: dict[str, Any] = {"model": "sampler", "messages": [USER], "max_tokens": 6}
CALL = ParsedCall(id="call00100", name="weather", arguments={"city": "Paris"}, text='{"city": "Paris"}')
TOOL = {"name": "weather", "description": "Weather", "input_schema": {"type": "object"}}
VERSION = {"anthropic-version": "2023-06-01"}


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayUnderTest]:
    with gateway_app() as made:
        yield made


async def _post(gateway: GatewayUnderTest, body: dict[str, Any], path: str = "/v1/messages", **headers: str) -> Any:
    async with gateway.http(**headers) as http:
        return await http.post(path, json=body)


def _events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


# -- conversations -------------------------------------------------------------------------------


def test_a_conversation_is_the_same_by_either_protocol() -> None:
    """Sessions match messages in OpenAI's form, so that an agent may change protocols between turns."""
    given = [
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "the weather?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Look it up.", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "call00100", "name": "weather", "input": {"city": "Paris"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call00100", "content": "sunny"}]},
    ]
    expected = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the weather?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Look it up.",
            "tool_calls": [
                {
                    "id": "call00100",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call00100", "content": "sunny"},
    ]
    assert messages_of([{"type": "text", "text": "Be brief."}], given) == expected


@pytest.mark.parametrize(
    "message",
    [
        ParsedMessage(content="Hello.", reasoning="", calls=()),
        ParsedMessage(content="", reasoning="Hm.", calls=(CALL,)),
        ParsedMessage(content="I look.", reasoning="Hm.", calls=(CALL, CALL)),
        ParsedMessage(content="", reasoning="", calls=()),
        ParsedMessage(content="", reasoning="", calls=(ParsedCall("call00100", "weather", '{"ci', '{"ci'),)),
    ],
)
def test_a_reply_that_is_sent_back_is_the_message_that_was_sampled(message: ParsedMessage) -> None:
    """A session finds its tokens by it, even if its arguments were cut short."""
    sent_back = messages_of(None, [{"role": "assistant", "content": content_of(message)}])
    assert message_keys(sent_back) == message_keys([message_dict(message)])


def test_results_of_tools_and_texts_between_them_keep_their_order() -> None:
    """A message of the user may hold results of several calls, and text."""
    blocks = [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "1"}]},
        {"type": "tool_result", "tool_use_id": "b", "is_error": True, "content": "no such file"},
        {"type": "text", "text": "Go on."},
    ]
    assert messages_of(None, [{"role": "user", "content": blocks}]) == [
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": "Error: no such file"},
        {"role": "user", "content": "Go on."},
    ]


def test_successive_messages_of_the_assistant_are_one() -> None:
    """A client sends its own beginning of a message and the reply to it as two messages."""
    messages = [USER, {"role": "assistant", "content": "It is "}, {"role": "assistant", "content": "46."}]
    assert messages_of(None, messages)[1:] == [{"role": "assistant", "content": "It is 46."}]


@pytest.mark.parametrize(
    ("block", "path"),
    [
        ({"type": "image", "source": {"type": "url", "url": "http://a/b.png"}}, "messages.0.content.0.type"),
        ({"type": "document", "source": {}}, "messages.0.content.0.type"),
        ({"type": "text", "text": "a", "colour": "red"}, "messages.0.content.0.colour"),
        ({"type": "text"}, "messages.0.content.0.text"),
        ({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}, "messages.0.content.0.content.0"),
        ("text", "messages.0.content.0"),
    ],
)
def test_a_block_that_would_not_reach_the_model_is_refused_by_its_path(block: Any, path: str) -> None:
    """Nothing of a conversation is dropped silently."""
    with pytest.raises(InvalidRequestError) as raised:
        messages_of(None, [{"role": "user", "content": [block]}])
    assert raised.value.param is not None and raised.value.param.startswith(path)


# -- bodies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seeds", 1, "seed"),
        ("container", "c", "container='c' is not supported"),
        ("service_tier", "priority", "service_tier"),
        ("max_tokens", 0, "max_tokens"),
        ("stop_sequences", "a", "stop_sequences"),
        ("output_config", {"effort": "low"}, "effort"),
        ("thinking", {"type": "enabled"}, "budget_tokens is missing"),
        ("thinking", {"type": "enabled", "budget_tokens": 6}, "budget_tokens=6 must be below max_tokens=6"),
        ("thinking", {"type": "disabled", "budget_tokens": 3}, "needs thinking.type enabled"),
        ("tools", [{"type": "web_search_20250305", "name": "web_search"}], "web_search_20250305"),
        ("tools", [{"name": "weather"}], "tools.0: input_schema is missing"),
        ("tool_choice", {"type": "any"}, "needs tools"),
        ("tool_choice", {"type": "tool", "name": "time"}, "needs tools"),
    ],
)
async def test_a_field_that_cannot_be_honoured_is_refused(
    gateway: GatewayUnderTest, field: str, value: Any, message: str
) -> None:
    """A parameter is honoured or refused, before anything runs; the error has Anthropic's form."""
    answer = await _post(gateway, BODY | {field: value})
    assert answer.status_code == 400 and answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert message in answer.json()["error"]["message"]


async def test_fields_that_ask_for_nothing_are_accepted(gateway: GatewayUnderTest) -> None:
    """Clients send them by habit."""
    cached = {"cache_control": {"type": "ephemeral"}}
    body = BODY | {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello", **cached}]}],
        "system": [{"type": "text", "text": "Be brief.", **cached}],
        "tools": [{"type": "custom", **TOOL, **cached}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "adaptive"},
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "container": None,
        "temperature": 1,
    }
    answer = await _post(gateway, body, **VERSION, **{"anthropic-beta": "tools-2024-04-04"})
    assert answer.status_code == 200, answer.text


def test_parameters_of_the_request_are_those_of_the_call() -> None:
    """Names differ, and nothing is set that the request does not say."""
    asked = {
        "stop_sequences": ["\n"],
        "temperature": 0.5,
        "top_k": 3,
        "thinking": {"type": "enabled", "budget_tokens": 3},
        "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": {"type": "object"}}},
        "seed": 1,
    }
    assert parse_model(BODY | asked, MessagesRequest).sampling() == {
        "max_tokens": 6,
        "stop": ["\n"],
        "temperature": 0.5,
        "top_k": 3,
        "thinking_token_budget": 3,
        "structured_outputs": {"json": {"type": "object"}},
        "seed": 1,
    }
    assert parse_model(BODY, MessagesRequest).sampling() == {"max_tokens": 6}


# -- answers -------------------------------------------------------------------------------------


def test_a_stream_sends_each_part_as_a_block() -> None:
    """Deltas of one kind are one block; every block ends before the next begins."""
    writer = MessageEvents()
    parts: list[MessageDelta] = [
        ReasoningDelta("Hm"),
        ReasoningDelta("."),
        ContentDelta("I look."),
        ToolCallBegin(0, "a", "weather"),
        ToolCallArguments(0, '{"city": '),
        ToolCallArguments(0, '"Paris"}'),
        ToolCallBegin(1, "b", "time"),
        ToolCallArguments(1, "{}"),
    ]
    events = [event for part in parts for event in writer.push([part])] + writer.end(end_of("tool_calls", None), {})
    assert [(event["type"].removeprefix("content_block_"), event.get("index")) for event in events] == [
        *(("start", 0), ("delta", 0), ("delta", 0), ("stop", 0)),
        *(("start", 1), ("delta", 1), ("stop", 1)),
        *(("start", 2), ("delta", 2), ("delta", 2), ("stop", 2)),
        *(("start", 3), ("delta", 3), ("stop", 3)),
        *(("message_delta", None), ("message_stop", None)),
    ]
    assert events[4]["content_block"] == {"type": "text", "text": ""}
    assert events[7]["content_block"] == {"type": "tool_use", "id": "a", "name": "weather", "input": {}}
    assert events[9]["delta"] == {"type": "input_json_delta", "partial_json": '"Paris"}'}
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


@pytest.mark.parametrize(
    ("prefill", "text", "rest"),
    [("It is ", "It is 46.", "46."), ("It is ", "46.", "46."), ("", "46.", "46."), ("\nIt is", " It is 46", " 46")],
)
def test_a_reply_has_only_what_continues_the_clients_own_beginning(prefill: str, text: str, rest: str) -> None:
    """In parts of any size, as a whole."""
    whole = PrefillRemover(prefill)
    assert whole.push(text, last=True) == rest
    parts = PrefillRemover(prefill)
    assert "".join(parts.push(each) for each in text) + parts.push("", last=True) == rest


async def test_usage_counts_each_token(gateway: GatewayUnderTest) -> None:
    """Of the prompt as the template makes it, and of the sample."""
    answer = (await _post(gateway, BODY | {"ignore_eos": True, "return_token_ids": True})).json()
    assert answer["usage"]["input_tokens"] == len(answer["prompt_token_ids"])
    assert answer["usage"]["output_tokens"] == len(answer["token_ids"]) == 6
    counted = await _post(gateway, {"messages": [USER]}, "/v1/messages/count_tokens")
    assert counted.json() == {"input_tokens": len(answer["prompt_token_ids"])}
    expected = gateway.sampler.encode([{"messages": [USER]}])[0]
    assert answer["prompt_token_ids"] == list(expected)


async def test_the_stop_sequence_that_ended_a_reply_is_named(gateway: GatewayUnderTest) -> None:
    """Whole and streamed."""
    asked = BODY | {"seed": 3, "ignore_eos": True, "max_tokens": 40}
    text = (await _post(gateway, asked)).json()["content"][0]["text"]
    stops = ["never sampled", text[4:6]]
    answer = (await _post(gateway, asked | {"stop_sequences": stops})).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stops[1])
    events = _events((await _post(gateway, asked | {"stop_sequences": stops, "stream": True})).text)
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": stops[1]}


async def test_a_conversation_that_ends_with_the_assistant_is_continued(gateway: GatewayUnderTest) -> None:
    """The reply leaves the given text out, and its tokens follow those of that text."""
    body = BODY | {"messages": [USER, {"role": "assistant", "content": "12"}], "ignore_eos": True, "seed": 1}
    answer = (await _post(gateway, body | {"return_token_ids": True})).json()
    expected = gateway.sampler.encode([{"messages": body["messages"]}], continue_final_message=True)[0]
    assert answer["prompt_token_ids"] == list(expected)
    sample = gateway.sampler.decode(answer["token_ids"], skip_special_tokens=True)
    assert answer["content"] == [{"type": "text", "text": sample}]


@pytest.mark.parametrize(
    ("content", "asked"),
    [
        ([{"type": "tool_use", "id": "a", "name": "b", "input": {}}], {}),
        ("12", {"tools": [TOOL], "tool_choice": {"type": "any"}}),
    ],
)
async def test_only_text_can_be_continued(gateway: GatewayUnderTest, content: Any, asked: dict[str, Any]) -> None:
    """A call is followed by its result, and a forced call is a whole reply."""
    answer = await _post(gateway, BODY | asked | {"messages": [USER, {"role": "assistant", "content": content}]})
    assert answer.status_code == 400, answer.text


async def test_a_session_goes_on_with_the_tokens_of_its_earlier_turns(gateway: GatewayUnderTest) -> None:
    """By Anthropic's protocol and by OpenAI's in turn: what was sampled is never tokenised again."""
    own = {"ignore_eos": True, "return_token_ids": True, "max_tokens": 8}
    messages: list[dict[str, Any]] = [USER]
    first = (await _post(gateway, BODY | own, "/session/mixed/v1/messages")).json()
    ids = [*first["prompt_token_ids"], *first["token_ids"]]
    messages += [{"role": "assistant", "content": first["content"]}, USER]
    counted = await _post(gateway, {"messages": messages}, "/session/mixed/v1/messages/count_tokens")
    second = (await _post(gateway, BODY | own | {"messages": messages}, "/session/mixed/v1/messages")).json()
    assert second["prompt_token_ids"][: len(ids)] == ids and second["node"] == 1
    assert counted.json()["input_tokens"] == second["usage"]["input_tokens"]
    ids = [*second["prompt_token_ids"], *second["token_ids"]]
    chat = messages_of(None, [*messages, {"role": "assistant", "content": second["content"]}, USER])
    third = (await _post(gateway, own | {"messages": chat}, "/session/mixed/v1/chat/completions")).json()
    assert third["prompt_token_ids"][: len(ids)] == ids and third["choices"][0]["node"] == 2


async def test_models_are_listed_in_anthropics_form_for_its_clients(gateway: GatewayUnderTest) -> None:
    """The path is OpenAI's, too; the header decides, of errors as well."""
    async with gateway.http(**VERSION) as http:
        listed, unknown = (await http.get("/v1/models")).json(), await http.get("/v1/models/unknown")
    assert [model["id"] for model in listed["data"]] == ["sampler"] and listed["has_more"] is False
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")
    async with gateway.http() as http:
        assert (await http.get("/v1/models")).json()["object"] == "list"


def test_the_package_of_anthropic_works_unchanged(gateway: GatewayUnderTest) -> None:
    """It parses every answer, event and error."""
    with gateway.served() as url:
        use_messages(url)


@pytest.mark.vllm
def test_fields_of_vllms_server_are_fields_here_or_refused_by_name() -> None:
    """A client of its server finds the same names."""
    from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest

    for theirs, ours in (
        (AnthropicMessagesRequest, MessagesRequest),
        (AnthropicCountTokensRequest, CountTokensRequest),
    ):
        assert theirs.model_fields.keys() <= ours.model_fields.keys() | NEUTRAL.keys()
