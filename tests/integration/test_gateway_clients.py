"""The packages `openai` and `anthropic`, unchanged, against a gateway on real vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from tests.support import http_clients
from tests.support.deploy import deployed
from tests.support.gateway import gateway_url
from tests.support.lora import save_adapter
from twinkle_serve import connect, gateway_session
from twinkle_serve.sampler import RunningSampler

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.usefixtures("cluster")]

QUESTION: list[Any] = [{"role": "user", "content": "12+34="}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["answer"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "submit", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def url(vllm_service: RunningSampler) -> Iterator[str]:
    application = vllm_service._client._name  # type: ignore[attr-defined]
    with gateway_url(samplers={"sampler": application}) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with http_clients.openai_client(url) as client:
        yield client


def test_completions_and_chat_are_those_of_python(vllm_service: RunningSampler, client: openai.OpenAI) -> None:
    """Greedy and seeded: tokens, texts, logprobs; whole and streamed."""
    for params in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 4}):
        arguments: dict[str, Any] = {"model": "sampler", "max_tokens": 8, "n": 2, **params}
        extra = {"return_token_ids": True}
        python = vllm_service.sample({"messages": QUESTION}, {**params, "max_tokens": 8}, num_samples=2)
        chat = client.chat.completions.create(messages=QUESTION, logprobs=True, **arguments, extra_body=extra)
        ids = python.prompts[0].tolist()
        raw = client.completions.create(prompt=ids, logprobs=0, **arguments, extra_body=extra)
        for i, sequence in enumerate(python.sequences):
            expected = [position[0][1] for position in sequence.logprobs or ()]
            in_chat, in_raw = chat.choices[i], raw.choices[i]
            assert in_chat.logprobs is not None and in_raw.logprobs is not None
            assert (in_chat.model_extra or {})["token_ids"] == sequence.tokens
            assert (in_raw.model_extra or {})["token_ids"] == sequence.tokens
            values = [token.logprob for token in in_chat.logprobs.content or ()]
            np.testing.assert_allclose(values, expected, atol=1e-4)
            np.testing.assert_allclose(in_raw.logprobs.token_logprobs or (), expected, atol=1e-4)
        texts = ["", ""]
        for chunk in client.chat.completions.create(messages=QUESTION, stream=True, **arguments):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == [choice.message.content for choice in chat.choices]


def test_structured_outputs(client: openai.OpenAI) -> None:
    """JSON by its schema."""
    named = {"name": "answer", "schema": {"enum": [12, 46]}, "strict": True}
    schema: Any = {"type": "json_schema", "json_schema": named}
    answer = client.chat.completions.create(model="sampler", messages=QUESTION, response_format=schema, max_tokens=8)
    assert json.loads(answer.choices[0].message.content or "") in (12, 46)


def test_sessions_are_exact_and_their_samples_score_as_sampled(vllm_service: RunningSampler, url: str) -> None:
    """Three turns and a branch. Trajectory and training inputs are the same over HTTP and by handle, and the model, in
    another pass, gives each sampled token its logprob."""
    with gateway_session(url) as session:
        agent = openai.OpenAI(base_url=session.base_url, api_key="-", max_retries=0)
        messages, known = [*QUESTION], list[int]()
        for turn in range(3):
            reply = agent.chat.completions.create(
                model="sampler", messages=messages, max_tokens=6, seed=turn, extra_body={"return_token_ids": True}
            )
            prompt = (reply.model_extra or {})["prompt_token_ids"]
            assert prompt[: len(known)] == known
            known = [*prompt, *(reply.choices[0].model_extra or {})["token_ids"]]
            messages += [reply.choices[0].message, {"role": "user", "content": f"{turn}+1="}]
        agent.chat.completions.create(model="sampler", messages=messages[:3], max_tokens=4, n=2)
        tree, features = session.trajectory(), session.features()
        assert [node["parent"] for node in tree["nodes"]] == [None, 0, 1, 0, 0]
        by_handle = connect(vllm_service._client._name).session(session.id)  # type: ignore[attr-defined]
        assert by_handle.trajectory()["nodes"] == tree["nodes"]
        assert [dict(feature) for feature in by_handle.features()] == [dict(feature) for feature in features]
        for feature in features:
            ids, labels = np.asarray(feature["input_ids"]), np.asarray(feature["labels"])
            scored = vllm_service.sample({"input_ids": ids}, {"max_tokens": 0, "prompt_logprobs": 0})
            at = np.flatnonzero(labels != -100)
            values = np.asarray(scored.prompt_logprobs, float)[at + 1]

            np.testing.assert_allclose(np.asarray(feature["logprobs"])[at], values, atol=1e-3)


def test_a_session_goes_on_by_the_other_protocol(url: str) -> None:
    """A turn by `openai`, the next by `anthropic`: the same tokens."""
    with gateway_session(url) as session:
        agent = openai.OpenAI(base_url=session.base_url, api_key="-", max_retries=0)
        first = agent.chat.completions.create(model="sampler", messages=QUESTION, max_tokens=6, seed=1)
        with http_clients.anthropic_client(session.anthropic_base_url) as other:
            text = first.choices[0].message.content or ""
            history: Any = [*QUESTION, {"role": "assistant", "content": text}, {"role": "user", "content": "1+1="}]
            other.messages.create(model="sampler", messages=history, max_tokens=6)
        nodes = session.trajectory()["nodes"]
        assert [(node["parent"], node["branch"]) for node in nodes] == [(None, ""), (0, "")]


def test_adapters_are_models(vllm_service: RunningSampler, client: openai.OpenAI, tmp_path: Any) -> None:
    """And each answer names the version that sampled it."""
    vllm_service.add_adapter_to_model("http_lora", str(save_adapter(tmp_path / "lora")))
    try:
        answer = client.chat.completions.create(model="http_lora", messages=QUESTION, max_tokens=4)
        assert answer.model == "http_lora@1" and "http_lora@1" in [model.id for model in client.models.list()]
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="http_lora@9", messages=QUESTION)
    finally:
        vllm_service.remove_adapter("http_lora")


@pytest.mark.parametrize("use", [http_clients.use_messages, http_clients.use_responses])
def test_other_protocols(url: str, use: Any) -> None:
    """Messages and responses, by their packages."""
    use(url)


@pytest.mark.nightly
class TestTools:
    """On a service whose context holds descriptions of tools."""

    @pytest.fixture(scope="class")
    def url(self, cluster: None) -> Iterator[str]:
        # The demo model would fill calls with line breaks up to max_tokens.
        compact = {"backend": "xgrammar", "disable_any_whitespace": True}
        engine_args = {"max_model_len": 1024, "structured_outputs_config": compact}
        with (
            deployed("http-tools", engine="vllm", engine_args=engine_args),
            gateway_url(samplers={"sampler": "http-tools"}) as url,
        ):
            yield url

    @pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "submit"}}, "required"])
    def test_forced_calls(self, url: str, choice: Any) -> None:
        """A named call, a required one; streamed as they are sampled."""
        asked: dict[str, Any] = {"messages": QUESTION, "tools": [TOOL], "tool_choice": choice, "max_tokens": 200}
        asked["parallel_tool_calls"] = False
        with http_clients.openai_client(url) as client:
            reply = client.chat.completions.create(model="sampler", **asked).choices[0]
            assert reply.finish_reason == "tool_calls" and reply.message.tool_calls
            call: Any = reply.message.tool_calls[0]
            assert call.function.name == "submit" and 0 <= json.loads(call.function.arguments)["answer"] <= 99
            name, arguments, ends = "", "", []
            for chunk in client.chat.completions.create(model="sampler", stream=True, **asked):
                ends += [c.finish_reason for c in chunk.choices if c.finish_reason]
                for delta in (d for c in chunk.choices for d in c.delta.tool_calls or ()):
                    assert delta.function is not None
                    name += delta.function.name or ""
                    arguments += delta.function.arguments or ""
            assert (name, ends) == ("submit", ["tool_calls"]) and "answer" in json.loads(arguments)

    @pytest.mark.parametrize("use", [http_clients.use_messages_with_tools, http_clients.use_responses_with_tools])
    def test_calls_and_results_by_other_protocols(self, url: str, use: Any) -> None:
        """A forced call, and a turn with its result."""
        use(url)
