"""`/v1/responses`: bodies, items, events, and responses that are stored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.support.gateway_app import GatewayUnderTest, gateway_app
from tests.support.http_clients import use_responses
from twinkle_serve.data_format.message_stream import ParsedCall, ParsedMessage
from twinkle_serve.errors import EngineDeadError
from twinkle_serve.gateway.bodies import parse_model
from twinkle_serve.gateway.conversations import deltas_of, message_dict
from twinkle_serve.gateway.errors import InvalidRequestError, NotFoundError
from twinkle_serve.gateway.openai.responses.fields import NEUTRAL, ResponsesRequest
from twinkle_serve.gateway.openai.responses.ids import ResponseId
from twinkle_serve.gateway.openai.responses.items import messages_of
from twinkle_serve.gateway.openai.responses.output import OutputWriter
from twinkle_serve.sessions.canonical import message_keys

BODY: dict[str, Any] = {"model": "sampler", "input": "Hello", "max_output_tokens": 6}
OWN = {"ignore_eos": True, "return_token_ids": True}
ID = ResponseId("0" * 32, "sampler", "s")
CALLS = (
    ParsedCall("call00100", "weather", {"city": "Paris"}, '{"city": "Paris"}'),
    ParsedCall("call00101", "time", {}, "{}"),
)
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayUnderTest]:
    with gateway_app() as made:
        yield made


async def _post(gateway: GatewayUnderTest, body: dict[str, Any], path: str = "/v1/responses", **headers: str) -> Any:
    async with gateway.http(**headers) as http:
        return await http.post(path, json=body)


async def _get(gateway: GatewayUnderTest, response_id: str, prefix: str = "", query: str = "") -> Any:
    async with gateway.http() as http:
        return await http.get(f"{prefix}/v1/responses/{response_id}{query}")


def _events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def _written(message: ParsedMessage) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The items of a message, and the events that made them."""
    writer = OutputWriter(ID)
    events = [event for delta in deltas_of(message) for event in writer.push([delta])] + writer.end("completed")
    return writer.items, events


# -- items ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        ParsedMessage(content="Hello.", reasoning="", calls=()),
        ParsedMessage(content="I look.", reasoning="Hm.", calls=CALLS),
        ParsedMessage(content="", reasoning="Hm.", calls=CALLS[:1]),
        ParsedMessage(content="", reasoning="", calls=()),
        ParsedMessage(content="", reasoning="", calls=(ParsedCall("call00100", "weather", '{"ci', '{"ci'),)),
    ],
)
def test_output_that_is_sent_back_is_the_message_that_was_sampled(message: ParsedMessage) -> None:
    """A session finds its tokens by it; fields that a client adds as null say nothing."""
    items = [{**item, "phase": None, "async_": None} for item in _written(message)[0]]
    sent_back = messages_of([{"role": "user", "content": "Hello"}, *items])
    assert message_keys(sent_back[1:]) == message_keys([message_dict(message)])


def test_items_are_the_messages_of_chat_completions() -> None:
    """Text may come in parts; a developer is the system; a result is a tool's message."""
    items = [
        {"role": "developer", "content": "Be brief."},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "What is "}, {"type": "input_text", "text": "it?"}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "a", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call", "call_id": "b", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "1"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "2"}]},
        {"role": "assistant", "content": "One."},
        {"role": "assistant", "content": "Two."},
    ]
    messages = messages_of(items)
    assert [message["role"] for message in messages] == [
        *("system", "user", "assistant", "tool", "tool", "assistant", "assistant")
    ]
    assert [call["id"] for call in messages[2]["tool_calls"]] == ["a", "b"]
    assert [message["content"] for message in messages] == ["Be brief.", "What is it?", None, "1", "2", "One.", "Two."]


@pytest.mark.parametrize(
    ("item", "path"),
    [
        ({"type": "item_reference", "id": "a"}, "input.0.type"),
        ({"type": "web_search_call", "id": "a"}, "input.0.type"),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}, "input.0.content.0.type"),
        ({"type": "reasoning", "summary": [], "encrypted_content": "a"}, "input.0.encrypted_content"),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "input.0.call_id"),
        ({"role": "user", "content": "a", "colour": "red"}, "input.0.colour"),
        ("text", "input.0"),
    ],
)
def test_an_item_that_would_not_reach_the_model_is_refused_by_its_path(item: Any, path: str) -> None:
    """Nothing of a conversation is dropped silently."""
    with pytest.raises(InvalidRequestError) as raised:
        messages_of([item])
    assert raised.value.param == path


# -- events --------------------------------------------------------------------------------------


def test_events_follow_the_protocols_order() -> None:
    """Each item begins, grows and ends; the package's types read every event."""
    items, events = _written(ParsedMessage(content="I look.", reasoning="Hm.", calls=CALLS))
    text = ("output_item.added", "content_part.added", "delta", "done", "content_part.done", "output_item.done")
    names = [event["type"].removeprefix("response.") for event in events]
    assert names == [
        *(name if "_" in name else f"reasoning_text.{name}" for name in text),
        *(name if "_" in name else f"output_text.{name}" for name in text),
        *(f"function_call_arguments.{n}" if n in ("delta", "done") else n for n in (text[0], *text[2:4], text[5])),
        *(f"function_call_arguments.{n}" if n in ("delta", "done") else n for n in (text[0], *text[2:4], text[5])),
    ]
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call", "function_call"]
    assert len({item["id"] for item in items}) == 4 and {item["status"] for item in items} == {"completed"}
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == items
    for number, event in enumerate(events):
        parsed = EVENT.validate_python(event | {"sequence_number": number})
        assert parsed.type == event["type"]


def test_events_are_not_changed_by_those_that_follow() -> None:
    """An item that has begun is sent without the text that comes later."""
    _, events = _written(ParsedMessage(content="Hello.", reasoning="", calls=()))
    assert events[0]["item"]["content"] == [] and events[0]["item"]["status"] == "in_progress"
    assert events[1]["part"]["text"] == ""


async def test_a_stream_ends_with_the_response_that_is_stored(gateway: GatewayUnderTest) -> None:
    """Events are numbered; text and logprobs joined are those of the response."""
    asked = BODY | {"seed": 2, "ignore_eos": True, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    answer = await _post(gateway, asked | {"stream": True})
    events = _events(answer.text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert all(f"event: {event['type']}\n" in answer.text for event in events)
    last = events[-1]["response"]
    assert [event["response"]["id"] for event in events[:2]] == [last["id"]] * 2
    part = last["output"][0]["content"][0]
    assert part["text"] == "".join(event["delta"] for event in events if event["type"].endswith("text.delta"))
    assert len(part["logprobs"]) == 6 and {len(each["top_logprobs"]) for each in part["logprobs"]} == {2}
    whole = (await _post(gateway, asked)).json()
    assert whole["output"][0]["content"] == last["output"][0]["content"]
    assert (await _get(gateway, last["id"])).json()["output"][0]["content"][0]["text"] == part["text"]


async def test_a_stream_that_breaks_ends_with_a_failed_response(
    gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients of this protocol look for that event."""
    real = gateway.client.run_updates

    async def breaking(request: Any) -> Any:
        async for item in real(request):
            yield item
            raise EngineDeadError("the engine is dead.")

    monkeypatch.setattr(type(gateway.client), "run_updates", lambda self, request: breaking(request))
    events = _events((await _post(gateway, BODY | {"stream": True})).text)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert events[-1]["response"]["status"] == "failed"
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "the engine is dead."}


# -- bodies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temprature", 1, "temperature"),
        ("background", True, "background=True is not supported"),
        ("conversation", "conv_1", "conversation='conv_1' is not supported"),
        ("truncation", "auto", "truncation"),
        ("reasoning", {"effort": "low"}, "reasoning.effort='low' is not supported"),
        ("reasoning", {"depth": 1}, "reasoning.depth"),
        ("top_logprobs", 2, "top_logprobs needs include"),
        ("include", ["file_search_call.results"], "include"),
        ("tools", [{"type": "web_search"}], "web_search"),
        ("tools", [{"type": "function"}], "tools.0: name is missing"),
        ("tool_choice", "required", "needs tools"),
        ("text", {"format": {"type": "grammar"}}, "text.format.type='grammar' is not supported"),
        ("text", {"format": {"type": "json_schema", "name": "a"}}, "schema"),
        ("text", {"verbosity": "low"}, "verbosity"),
        ("input", [], "input is empty"),
        ("previous_response_id", "resp_1", "no response 'resp_1'"),
    ],
)
async def test_a_field_that_cannot_be_honoured_is_refused(
    gateway: GatewayUnderTest, field: str, value: Any, message: str
) -> None:
    """A parameter is honoured or refused, before anything runs."""
    answer = await _post(gateway, BODY | {field: value})
    assert answer.status_code == (404 if field == "previous_response_id" else 400)
    assert message in answer.json()["error"]["message"]


def test_parameters_of_the_request_are_those_of_the_call() -> None:
    """Names differ, and nothing is set that the request does not say."""
    asked = {
        "temperature": 0.5,
        "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True}},
        "logit_bias": {"3": 1},
        "include": ["message.output_text.logprobs"],
        "reasoning": {"summary": "auto", "effort": None},
        "store": False,
        "truncation": "disabled",
        "background": False,
        "user": "u",
    }
    assert parse_model(BODY | asked, ResponsesRequest).sampling() == {
        "max_tokens": 6,
        "temperature": 0.5,
        "structured_outputs": {"json": {"type": "object"}},
        "logit_bias": {3: 1.0},
        "logprobs": 0,
    }
    assert parse_model(BODY, ResponsesRequest).sampling() == {"max_tokens": 6, "logprobs": None}


def test_tools_are_those_of_chat_completions() -> None:
    """A session's conversations have the same tools by either endpoint."""
    body = parse_model(BODY | {"tools": [TOOL | {"strict": True}], "tool_choice": "required"}, ResponsesRequest)
    functions = body.functions()
    assert functions == [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    assert body.forced(functions) is not None


# -- stored responses ----------------------------------------------------------------------------


async def test_a_response_that_continues_another_begins_with_its_tokens(gateway: GatewayUnderTest) -> None:
    """What was sampled is never tokenised again, and the client sends only what is new."""
    first = (await _post(gateway, BODY | OWN | {"instructions": "Be brief."})).json()
    ids = [*first["prompt_token_ids"], *first["token_ids"]]
    following = BODY | OWN | {"instructions": "Be brief.", "previous_response_id": first["id"], "input": "Go on."}
    second = (await _post(gateway, following)).json()
    assert second["prompt_token_ids"][: len(ids)] == ids
    assert second["session_id"] == first["session_id"] and second["node"] == 1
    ids = [*second["prompt_token_ids"], *second["token_ids"]]
    third = (await _post(gateway, following | {"previous_response_id": second["id"]})).json()
    assert third["prompt_token_ids"][: len(ids)] == ids
    again = (await _post(gateway, following)).json()
    assert again["prompt_token_ids"] == second["prompt_token_ids"] and again["id"] != second["id"]


async def test_instructions_apply_to_one_response_only(gateway: GatewayUnderTest) -> None:
    """As in the protocol: the next response has its own, or none."""
    first = (await _post(gateway, BODY | OWN | {"instructions": "Be brief."})).json()
    second = (await _post(gateway, BODY | OWN | {"previous_response_id": first["id"], "input": "Go on."})).json()
    reply = messages_of(first["output"])
    messages = [{"role": "user", "content": "Hello"}, *reply, {"role": "user", "content": "Go on."}]
    assert second["prompt_token_ids"] == list(gateway.sampler.encode([{"messages": messages}])[0])


async def test_a_stored_response_is_the_one_that_was_answered(gateway: GatewayUnderTest) -> None:
    """It is read from its session, so that another replica of the gateway has it too."""
    asked = BODY | {"instructions": "Be brief.", "tools": [TOOL], "temperature": 0.5, "metadata": {"a": "b"}, "seed": 1}
    answer = (await _post(gateway, asked)).json()
    stored = (await _get(gateway, answer["id"])).json()
    for key in stored.keys() - {"completed_at", "tools"}:
        assert stored[key] == answer[key], key
    assert Response.model_validate(stored).tools[0].type == "function"
    assert stored.keys() >= answer.keys()
    assert (await _get(gateway, answer["id"], query="?stream=true")).status_code == 400


async def test_deleting_a_response_ends_its_conversation(gateway: GatewayUnderTest) -> None:
    """The session that the gateway made for it ends; that of a client does not."""
    answer = (await _post(gateway, BODY)).json()
    async with gateway.http() as http:
        deleted = await http.delete(f"/v1/responses/{answer['id']}")
        assert deleted.json() == {"id": answer["id"], "object": "response", "deleted": True}
        assert (await http.get(f"/v1/responses/{answer['id']}")).status_code == 410
        following = await http.post("/v1/responses", json=BODY | {"previous_response_id": answer["id"]})
        assert following.status_code == 410
        own = (await http.post("/session/mine/v1/responses", json=BODY)).json()
        assert (await http.delete(f"/v1/responses/{own['id']}")).status_code == 409
        assert (await http.get(f"/session/mine/v1/responses/{own['id']}")).status_code == 200
        assert (await http.get(f"/session/other/v1/responses/{own['id']}")).status_code == 404


async def test_a_response_is_not_stored_if_the_request_says_so(gateway: GatewayUnderTest) -> None:
    """No session is made for it."""
    answer = (await _post(gateway, BODY | {"store": False})).json()
    assert answer["session_id"] is None and "node" not in answer
    assert (await _get(gateway, answer["id"])).status_code == 404


async def test_a_previous_response_names_its_session(gateway: GatewayUnderTest) -> None:
    """A request that names another one contradicts itself."""
    answer = (await _post(gateway, BODY, "/session/one/v1/responses")).json()
    assert answer["session_id"] == "one"
    following = BODY | {"previous_response_id": answer["id"]}
    assert (await _post(gateway, following)).json()["session_id"] == "one"
    assert (await _post(gateway, following, **{"x-session-id": "two"})).status_code == 400


@pytest.mark.parametrize("session", ["s", "a session/with @ and ü", "x" * 256])
def test_an_id_says_where_the_response_is(session: str) -> None:
    """Any id of a session can be part of it, and it can be part of any URL."""
    place = ResponseId.new("sampler", session)
    assert ResponseId.parse(str(place)) == place
    assert str(place).replace("_", "").replace("-", "").isalnum()


@pytest.mark.parametrize("text", ["", "resp_1", "resp_" + "0" * 32, "resp_" + "0" * 32 + "_w", "a/../b"])
def test_an_id_that_is_not_of_a_stored_response_is_unknown(text: str) -> None:
    """It is not found, whatever it is."""
    with pytest.raises(NotFoundError):
        ResponseId.parse(text)


def test_the_package_of_openai_works_unchanged(gateway: GatewayUnderTest) -> None:
    """It parses every answer, event and error."""
    with gateway.served() as url:
        use_responses(url)


@pytest.mark.vllm
def test_fields_of_vllms_server_are_fields_here_or_refused_by_name() -> None:
    """A client of its server finds the same names."""
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest as Theirs

    known: Sequence[str] = [*ResponsesRequest.model_fields, *NEUTRAL]
    assert not Theirs.model_fields.keys() - set(known)
