"""Calls to a gateway by the unmodified packages of its clients, with assertions."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai

KEY = "no key is needed"
QUESTION = "What is 12+34?"
WEATHER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def anthropic_client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0, timeout=120)


def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)


def use_messages(url: str, model: str = "sampler") -> None:
    """Messages whole and streamed, counted tokens, models and errors, by `anthropic`."""
    with anthropic_client(url) as client:
        ask: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8}
        seeded = {**ask, "extra_body": {"seed": 5, "ignore_eos": True}}
        whole = client.messages.create(**seeded)
        assert whole.type == "message" and whole.role == "assistant"
        assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 8
        counted = client.messages.count_tokens(model=model, messages=ask["messages"])
        assert counted.input_tokens == whole.usage.input_tokens
        with client.messages.stream(**seeded) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_message()
        assert [block.model_dump() for block in streamed.content] == [block.model_dump() for block in whole.content]
        assert (streamed.stop_reason, streamed.usage.output_tokens) == ("max_tokens", 8)
        assert streamed.usage.input_tokens == whole.usage.input_tokens
        assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
        assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(whole.content)
        models = list(client.models.list())
        assert client.models.retrieve(models[0].id).id == models[0].id
        assert model in [each.id for each in models]
        _fails(anthropic.NotFoundError, lambda: client.messages.create(**{**ask, "model": "unknown/model"}))
        _fails(anthropic.BadRequestError, lambda: client.messages.create(**ask, extra_body={"unknown": 1}))


def use_messages_with_tools(url: str, model: str = "sampler") -> None:
    """A forced call and its result, by `anthropic`. Needs an engine with grammars."""
    with anthropic_client(url) as client:
        messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
        ask: dict[str, Any] = {
            "model": model,
            "max_tokens": 64,
            "tools": [{"name": "weather", "description": "Weather of a city", "input_schema": WEATHER_SCHEMA}],
            "extra_headers": {"x-session-id": "tools-by-anthropic"},
        }
        forced: dict[str, Any] = {"tool_choice": {"type": "tool", "name": "weather"}}
        answer = client.messages.create(messages=messages, **ask, **forced)
        call = answer.content[0]
        assert answer.stop_reason == "tool_use" and call.type == "tool_use"
        assert call.name == "weather" and call.input["city"] in ("Paris", "Rome")
        with client.messages.stream(messages=messages, **ask, **forced) as stream:
            streamed = stream.get_final_message().content[0]
        assert streamed.type == "tool_use" and streamed.input["city"] in ("Paris", "Rome")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        messages += [answer.to_param(), {"role": "user", "content": [result]}]
        following = client.messages.create(messages=messages, **ask)
        assert following.usage.input_tokens > answer.usage.input_tokens + answer.usage.output_tokens


def use_responses(url: str, model: str = "sampler") -> None:
    """Responses whole and streamed, stored, continued and deleted, by `openai`."""
    with openai_client(url) as client:
        ask: dict[str, Any] = {"model": model, "input": QUESTION, "max_output_tokens": 8}
        seeded = {**ask, "extra_body": {"seed": 5, "ignore_eos": True}}
        whole = client.responses.create(**seeded, instructions="Answer.", metadata={"task": "sums"})
        assert whole.status == "incomplete" and whole.incomplete_details is not None
        assert whole.incomplete_details.reason == "max_output_tokens"
        assert whole.usage is not None and whole.usage.output_tokens == 8
        stored = client.responses.retrieve(whole.id)
        assert _known(stored) == _known(whole)
        following = client.responses.create(
            **{**seeded, "input": "And twice that?"}, instructions="Answer.", previous_response_id=whole.id
        )
        assert following.usage is not None and following.previous_response_id == whole.id
        assert following.usage.input_tokens > whole.usage.input_tokens + 8
        client.responses.delete(whole.id)
        _fails(openai.APIStatusError, lambda: client.responses.retrieve(whole.id))
        _stream_a_response(client, seeded)
        _fails(openai.NotFoundError, lambda: client.responses.create(**{**ask, "model": "unknown/model"}))
        _fails(openai.BadRequestError, lambda: client.responses.create(**ask, reasoning={"effort": "high"}))


def _stream_a_response(client: openai.OpenAI, seeded: dict[str, Any]) -> None:
    whole = client.responses.create(**seeded, store=False)
    events = list(client.responses.create(**seeded, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last.type == "response.incomplete" and last.response.output_text == whole.output_text
    assert {event.response.id for event in (events[0], events[1]) if hasattr(event, "response")} == {last.response.id}
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert _known(client.responses.retrieve(last.response.id)) == _known(last.response)
    with client.responses.stream(**{**seeded, "extra_body": seeded["extra_body"]}) as stream:
        for _ in stream:
            pass  # the package checks that events fit together


def use_responses_with_tools(url: str, model: str = "sampler") -> None:
    """A forced call and its result, by `openai`. Needs an engine with grammars."""
    with openai_client(url) as client:
        tool = {"type": "function", "name": "weather", "description": "Weather of a city", "parameters": WEATHER_SCHEMA}
        ask: dict[str, Any] = {"model": model, "max_output_tokens": 64, "tools": [tool]}
        forced: dict[str, Any] = {"tool_choice": {"type": "function", "name": "weather"}}
        answer = client.responses.create(input="What is the weather in Paris?", **ask, **forced)
        call = answer.output[0]
        assert call.type == "function_call" and json.loads(call.arguments)["city"] in ("Paris", "Rome")
        with client.responses.stream(input="What is the weather in Rome?", **ask, **forced) as stream:
            for _ in stream:
                pass
            streamed = stream.get_final_response().output[0]
        assert streamed.type == "function_call" and json.loads(streamed.arguments)["city"] in ("Paris", "Rome")
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        following = client.responses.create(input=[result], previous_response_id=answer.id, **ask)
        assert answer.usage is not None and following.usage is not None
        assert following.usage.input_tokens > answer.usage.input_tokens + answer.usage.output_tokens


def _known(response: Any) -> dict[str, Any]:
    """The fields of a response that do not change once it is stored."""
    values: dict[str, Any] = response.model_dump()
    return {key: value for key, value in values.items() if value is not None and key != "completed_at"}


def _fails(kind: type[Exception], call: Any) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")
