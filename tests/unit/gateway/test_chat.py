"""`/v1/chat/completions`: messages in, messages out, by the sampler's own template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from tests.support.gateway_app import GatewayUnderTest, gateway_app
from twinkle_serve.data_format.message_stream import ContentDelta, ToolCallArguments, ToolCallBegin
from twinkle_serve.gateway.conversations import ForcedCall, message_dict, messages_of
from twinkle_serve.gateway.conversations import _ForcedStream as ForcedStream
from twinkle_serve.gateway.errors import InvalidRequestError

QUESTION = [{"role": "user", "content": "12+34="}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        "strict": True,
    },
}


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayUnderTest]:
    with gateway_app() as made:
        yield made


@pytest.fixture(scope="module")
def client(gateway: GatewayUnderTest) -> Iterator[openai.OpenAI]:
    with gateway.served() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as made:
        yield made


def session_of(client: openai.OpenAI, name: str) -> openai.OpenAI:
    root = str(client.base_url).removesuffix("v1/")
    return openai.OpenAI(base_url=f"{root}session/{name}/v1", api_key="-", max_retries=0)


def test_samples_are_those_of_the_handle(gateway: GatewayUnderTest, client: openai.OpenAI) -> None:
    """Prompt ids, tokens, logprobs and the parsed message."""
    expected = gateway.sampler.sample(
        [{"messages": QUESTION}], {"max_tokens": 8, "seed": 5, "logprobs": 2}, num_samples=2
    )
    answer = client.chat.completions.create(
        model="sampler",
        messages=QUESTION,  # type: ignore[arg-type]
        n=2,
        max_completion_tokens=8,
        seed=5,
        logprobs=True,
        top_logprobs=2,
        extra_body={"return_token_ids": True},
    )
    assert answer.model_extra is not None and answer.usage is not None
    assert answer.model_extra["prompt_token_ids"] == expected.prompts[0].tolist()
    for choice, sequence in zip(answer.choices, expected.sequences, strict=True):
        assert choice.model_extra is not None and choice.logprobs is not None and choice.logprobs.content is not None
        assert choice.model_extra["token_ids"] == sequence.tokens
        assert choice.message.content == sequence.new_input_feature["messages"][-1]["content"]
        assert choice.finish_reason == sequence.stop_reason
        values = [token.logprob for token in choice.logprobs.content]
        np.testing.assert_allclose(values, [position[0][1] for position in sequence.logprobs or ()], rtol=1e-6)
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
        best = [max(p for _, p in position) for position in sequence.logprobs or ()]
        np.testing.assert_allclose([t.top_logprobs[0].logprob for t in choice.logprobs.content], best, rtol=1e-6)
    assert answer.usage.total_tokens == len(expected.prompts[0]) + len(expected.columns.tokens)


def test_stream_joined_is_the_answer(client: openai.OpenAI) -> None:
    """Of every choice, with logprobs and token ids; one end each; usage last."""
    arguments: dict[str, Any] = {
        "model": "sampler",
        "messages": QUESTION,
        "n": 3,
        "max_tokens": 10,
        "seed": 7,
        "logprobs": True,
        "extra_body": {"return_token_ids": True},
    }
    whole = client.chat.completions.create(**arguments)
    texts: dict[int, list[str]] = {i: [] for i in range(3)}
    tokens: dict[int, list[int]] = {i: [] for i in range(3)}
    values: dict[int, list[float | None]] = {i: [] for i in range(3)}
    ends: dict[int, list[str]] = {i: [] for i in range(3)}
    roles, usage = [], None
    for chunk in client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            roles += [choice.delta.role] if choice.delta.role else []
            texts[choice.index].append(choice.delta.content or "")
            tokens[choice.index] += (choice.model_extra or {}).get("token_ids", [])
            values[choice.index] += [t.logprob for t in (choice.logprobs.content or ())] if choice.logprobs else []
            ends[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    for choice in whole.choices:
        assert choice.model_extra is not None and choice.logprobs is not None
        assert "".join(texts[choice.index]) == choice.message.content
        assert tokens[choice.index] == choice.model_extra["token_ids"]
        assert values[choice.index] == [token.logprob for token in choice.logprobs.content or ()]
        assert ends[choice.index] == [choice.finish_reason]
    assert roles == ["assistant"] * 3
    assert usage == whole.usage


@pytest.mark.parametrize("stream", [False, True])
def test_turns_of_a_session_are_exact(gateway: GatewayUnderTest, client: openai.OpenAI, stream: bool) -> None:
    """Each prompt begins with the tokens that were sampled, whatever text they have; the trajectory has them all."""
    session = session_of(client, f"exact-{stream}")
    messages: list[Any] = [*QUESTION]
    known: list[int] = []
    for turn in range(4):
        arguments: dict[str, Any] = {
            "model": "sampler",
            "messages": messages,
            "max_tokens": 6,
            "seed": turn,
            "extra_body": {"return_token_ids": True},
        }
        if stream:
            text, ids, prompt = "", list[int](), list[int]()
            for chunk in session.chat.completions.create(**arguments, stream=True):
                prompt = (chunk.model_extra or {}).get("prompt_token_ids", prompt)
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    ids += (choice.model_extra or {}).get("token_ids", [])
            reply: Any = {"role": "assistant", "content": text}
        else:
            answer = session.chat.completions.create(**arguments)
            assert answer.model_extra is not None and answer.choices[0].model_extra is not None
            prompt, ids = answer.model_extra["prompt_token_ids"], answer.choices[0].model_extra["token_ids"]
            reply = answer.choices[0].message.model_dump()
        assert prompt[: len(known)] == known
        known = [*prompt, *ids]
        messages += [reply, {"role": "user", "content": f"{turn}+1="}]


async def test_trajectory_and_features_over_http(gateway: GatewayUnderTest) -> None:
    """The tree, its paths as training inputs, and the end of the session: 410 afterwards."""
    async with gateway.http() as http:
        path = "/session/told/v1/chat/completions"
        body = {"messages": QUESTION, "max_tokens": 5, "seed": 1, "n": 2}
        first = (await http.post(path, json=body)).json()
        reply = first["choices"][1]["message"]
        again = {"messages": [*QUESTION, reply, {"role": "user", "content": "1+1="}], "max_tokens": 5}
        assert (
            await http.post("/v1/chat/completions", json=again, headers={"x-session-id": "told"})
        ).status_code == 200
        tree = (await http.get("/session/told/trajectory")).json()
        assert [(node["id"], node["parent"]) for node in tree["nodes"]] == [(0, None), (1, None), (2, 1)]
        assert all(len(node["logprobs"]) == node["usage"]["completion_tokens"] for node in tree["nodes"])
        features = (await http.get("/session/told/trajectory?format=features")).json()["features"]
        assert [feature["user_data"]["node"] for feature in features] == [0, 2]
        assert len(features[1]["labels"]) == len(features[1]["input_ids"]) == len(features[1]["logprobs"])
        one = (await http.get("/session/told/trajectory?format=features&nodes=1")).json()["features"]
        assert [feature["user_data"]["node"] for feature in one] == [1]
        for query in ("?format=tre", "?node=1", "?nodes=1", "?format=features&nodes=x", "?format=features&nodes=9"):
            assert (await http.get(f"/session/told/trajectory{query}")).status_code == 400, query
        assert (await http.get("/session/unknown/trajectory")).status_code == 404
        assert (await http.get("/sessions")).json()["sessions"][0]["id"]
        assert (await http.delete("/session/told")).json() == {"session": "told", "ended": True}
        assert (await http.delete("/session/told")).json() == {"session": "told", "ended": False}
        for gone in (await http.post(path, json=body), await http.get("/session/told/trajectory")):
            assert gone.status_code == 410
        both = await http.post(path, json=body, headers={"x-session-id": "other"})
        assert both.status_code == 400 and "several sessions" in both.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "foo": 1}]}, "messages.0.foo is not supported"),
        ({"messages": [{"content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "text"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "46"}]}, "continue_final_message"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "contradict"),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice names 'sub'"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"functions": [{"name": "f"}]}, "functions="),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"modalities": ["audio"]}, "modalities="),
        ({"add_generation_prompt": False}, "exactly one of"),
    ],
)
async def test_invalid_requests_are_refused_by_name(
    gateway: GatewayUnderTest, body: dict[str, Any], message: str
) -> None:
    async with gateway.http() as http:
        answer = await http.post("/v1/chat/completions", json={"messages": QUESTION, **body})
    assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text


async def test_a_message_that_ends_the_conversation_is_continued_if_asked_for(gateway: GatewayUnderTest) -> None:
    body = {
        "messages": [*QUESTION, {"role": "assistant", "content": "4"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "max_tokens": 2,
        "return_token_ids": True,
    }
    async with gateway.http() as http:
        answer = (await http.post("/v1/chat/completions", json=body)).json()
    expected = gateway.sampler.encode([{"messages": body["messages"]}], continue_final_message=True)[0]
    assert answer["prompt_token_ids"] == expected


def test_messages_that_clients_send_back_are_read() -> None:
    """With the keys that SDKs add; `developer` is `system`."""
    sent_back = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
    }
    system, reply = messages_of([{"role": "developer", "content": "x"}, sent_back])
    assert system == {"role": "system", "content": "x"}
    assert set(reply) == {"role", "content", "tool_calls"}
    with pytest.raises(InvalidRequestError, match="refusal"):
        messages_of([{"role": "assistant", "content": "", "refusal": "no"}])


def test_a_named_call_is_forced_and_streamed() -> None:
    """The sample is the JSON of its arguments, which arrive as they are sampled."""
    forced = ForcedCall([ADD["function"]], "add")  # type: ignore[list-item]
    assert forced.structured_outputs()["json"]["required"] == ["a"]
    stream = ForcedStream(forced, 1)
    deltas = [*stream.push('{"a"'), *stream.push(": 1}"), *stream.push("", last=True)]
    assert deltas == [ToolCallBegin(0, "call00100", "add"), ToolCallArguments(0, '{"a"'), ToolCallArguments(0, ": 1}")]
    message = message_dict(stream.parsed())
    assert message["content"] is None
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}


def test_required_calls_are_a_list() -> None:
    """Of any of the tools; text that was cut short stays text."""
    forced = ForcedCall([ADD["function"], {"name": "stop", "parameters": None}])  # type: ignore[list-item]
    schema = forced.structured_outputs()["json"]
    assert [item["properties"]["name"]["const"] for item in schema["items"]["anyOf"]] == ["add", "stop"]
    one = ForcedCall(forced.tools, once=True).structured_outputs()["json"]
    assert (schema["minItems"], one["maxItems"], "maxItems" in schema) == (1, 1, False)
    text = json.dumps([{"name": "stop", "parameters": {}}, {"name": "add", "parameters": {"a": 1}}])
    message = forced.parse(text, 0)
    assert [(call.name, call.arguments) for call in message.calls] == [("stop", {}), ("add", {"a": 1})]
    stream = ForcedStream(forced, 0)
    assert stream.push(text[:9]) == []
    assert len(stream.push(text[9:], last=True)) == 4
    cut = ForcedStream(forced, 0)
    assert cut.push(text[:9], last=True) == [ContentDelta(text[:9])]
