"""`/v1/completions` gives the samples that a handle gives, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from tests.support.gateway_app import GatewayUnderTest, gateway_app
from tests.support.lora import save_adapter

PROMPT = "12+34="
IDS = [19, 20, 13, 21, 22, 31]


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayUnderTest]:
    with gateway_app() as made:
        yield made


@pytest.fixture(scope="module")
def client(gateway: GatewayUnderTest) -> Iterator[openai.OpenAI]:
    with gateway.served() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as made:
        yield made


async def post(gateway: GatewayUnderTest, **body: Any) -> tuple[int, dict[str, Any]]:
    async with gateway.http() as http:
        answer = await http.post("/v1/completions", json={"model": "sampler", "prompt": PROMPT, **body})
    return answer.status_code, answer.json()


def test_samples_are_those_of_the_handle(gateway: GatewayUnderTest, client: openai.OpenAI) -> None:
    """Tokens, texts, logprobs, seeds and weights, prompt-major; usage counts each prompt once."""
    params = {"max_tokens": 7, "seed": 5, "temperature": 0.8, "top_p": 0.9, "skip_special_tokens": True}
    expected = gateway.sampler.sample([{"input_ids": IDS}, {"input_ids": IDS[:3]}], params, num_samples=2)
    answer = client.completions.create(
        model="sampler",
        prompt=[IDS, IDS[:3]],
        n=2,
        max_tokens=7,
        seed=5,
        temperature=0.8,
        top_p=0.9,
        logprobs=0,
        extra_body={"return_token_ids": True},
    )
    assert len(answer.choices) == len(expected.sequences) == 4
    for i, (choice, sequence) in enumerate(zip(answer.choices, expected.sequences, strict=True)):
        extra = choice.model_extra
        assert extra is not None and choice.logprobs is not None
        assert (choice.index, choice.text, choice.finish_reason) == (i, sequence.decoded, sequence.stop_reason)
        assert (extra["token_ids"], extra["seed"]) == (sequence.tokens, sequence.seed)
        assert extra["prompt_token_ids"] == (IDS if i < 2 else IDS[:3])
        assert extra["weight_versions"] == [{"version": "initial", "start": 0, "end": len(sequence.tokens)}]
        np.testing.assert_allclose(
            choice.logprobs.token_logprobs or (), [position[0][1] for position in sequence.logprobs or ()], rtol=1e-6
        )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(IDS) + 3
    assert answer.usage.completion_tokens == sum(len(sequence.tokens) for sequence in expected.sequences)


def test_text_is_tokenised_as_the_tokenizer_does(gateway: GatewayUnderTest, client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="sampler", prompt=PROMPT, max_tokens=1, extra_body={"return_token_ids": True}
    )
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["prompt_token_ids"] == IDS
    assert gateway.sampler.encode([{"text": PROMPT}])[0] == IDS


def test_stream_joined_is_the_answer(client: openai.OpenAI) -> None:
    """Of every choice: text, tokens, logprobs and the reason of its end, once; then the usage."""
    arguments: dict[str, Any] = {
        "model": "sampler",
        "prompt": [IDS, IDS[:3]],
        "n": 2,
        "max_tokens": 9,
        "seed": 3,
        "logprobs": 1,
    }
    extra = {"return_token_ids": True}
    whole = client.completions.create(**arguments, extra_body=extra)
    texts: dict[int, list[str]] = {i: [] for i in range(4)}
    tokens: dict[int, list[int]] = {i: [] for i in range(4)}
    values: dict[int, list[float | None]] = {i: [] for i in range(4)}
    ends: dict[int, list[str]] = {i: [] for i in range(4)}
    usage = None
    for chunk in client.completions.create(
        **arguments, extra_body=extra, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.model_extra is not None
            texts[choice.index].append(choice.text)
            tokens[choice.index] += choice.model_extra["token_ids"]
            values[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
            ends[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    for choice in whole.choices:
        assert choice.model_extra is not None and choice.logprobs is not None
        assert "".join(texts[choice.index]) == choice.text
        assert tokens[choice.index] == choice.model_extra["token_ids"]
        assert values[choice.index] == choice.logprobs.token_logprobs
        assert ends[choice.index] == [choice.finish_reason]
    assert usage == whole.usage


def test_echo_scores_the_prompt(gateway: GatewayUnderTest, client: openai.OpenAI) -> None:
    """As evaluation tools ask for it: no logprob for the first token, then those of a scored prompt."""
    scored = gateway.sampler.sample([{"input_ids": IDS}], {"max_tokens": 0, "prompt_logprobs": 1})
    for max_tokens in (0, 2):
        answer = client.completions.create(
            model="sampler", prompt=IDS, max_tokens=max_tokens, echo=True, logprobs=1, seed=1
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.text_offset is not None
        assert logprobs.top_logprobs is not None and logprobs.top_logprobs[0] is None
        assert len(logprobs.token_logprobs) == len(IDS) + max_tokens
        assert logprobs.token_logprobs[0] is None
        np.testing.assert_allclose(logprobs.token_logprobs[1 : len(IDS)], scored.prompt_logprobs[1:], rtol=1e-6)
        assert answer.choices[0].text.startswith(PROMPT)
        assert logprobs.text_offset[: len(IDS)] == list(range(len(IDS)))


def test_adapters_and_versions_are_models(gateway: GatewayUnderTest, client: openai.OpenAI, tmp_path: Any) -> None:
    """By name, by version, and behind the name of the sampler; the answer names the version."""
    gateway.sampler.add_adapter_to_model("mine", str(save_adapter(tmp_path / "lora")))
    assert [model.id for model in client.models.list()] == ["sampler", "mine", "mine@1"]
    assert client.models.retrieve("mine@1").id == "mine@1"
    for name in ("mine", "mine@1", "sampler/mine"):
        answer = client.completions.create(model=name, prompt=IDS, max_tokens=2)
        assert answer.model == "mine@1"
        assert answer.choices[0].model_extra is not None and answer.choices[0].model_extra["adapter"] == "mine@1"
    for name in ("other", "mine@2", "sampler/other"):
        with pytest.raises(openai.NotFoundError) as unknown:
            client.completions.create(model=name, prompt=IDS)
        assert unknown.value.code == "model_not_found"
    gateway.sampler.remove_adapter("mine")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"max_tokns": 3}, "max_tokns", "did you mean 'max_tokens'"),
        ({"suffix": "x"}, "suffix", "suffix='x' is not supported"),
        ({"best_of": 2}, "best_of", "best_of=2 is not supported"),
        ({"use_beam_search": True}, "use_beam_search", "not supported"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": "2"}, "n", "valid integer"),
        ({"n": 2000}, "n", "limits.samples is 1024"),
        ({"prompt": []}, "prompt", "prompt is empty"),
        ({"prompt": {"a": 1}}, None, "prompt"),
        ({"prompt": [[]]}, None, "is empty"),
        ({"temperature": -1}, None, "temperature"),
        ({"max_tokens": 0}, "max_tokens", "samples nothing"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"stream": True, "echo": True, "logprobs": 1}, "stream", "cannot be streamed"),
        ({"stream_options": {"include_obfuscations": True}}, "stream_options.include_obfuscations", "unknown field"),
        ({"session_id": "a b", "prompt": ["a", "b"]}, "prompt", "one prompt"),
    ],
)
async def test_invalid_requests_are_refused_by_name(
    gateway: GatewayUnderTest, body: dict[str, Any], param: str | None, message: str
) -> None:
    """Before anything is sampled, in OpenAI's form; the next request works."""
    before = len(gateway.client.requests)
    status, answer = await post(gateway, **body)
    assert (status, set(answer)) == (400, {"error"}), answer
    assert message in answer["error"]["message"]
    assert param is None or answer["error"]["param"] == param
    assert len(gateway.client.requests) - before <= 1
    status, _ = await post(gateway, max_tokens=1)
    assert status == 200


async def test_fields_that_ask_for_nothing_are_taken(gateway: GatewayUnderTest) -> None:
    """Clients send them with their default, or null."""
    neutral: dict[str, Any] = {
        "suffix": None,
        "best_of": 1,
        "use_beam_search": False,
        "logit_bias": {},
        "stop": [],
        "user": "me",
    }
    status, _ = await post(gateway, max_tokens=1, **neutral)
    assert status == 200


async def test_deadline_of_the_header(gateway: GatewayUnderTest) -> None:
    async with gateway.http() as http:
        late = await http.post(
            "/v1/completions", json={"prompt": IDS, "max_tokens": 1000}, headers={"x-timeout-s": "0.000001"}
        )
        invalid = await http.post("/v1/completions", json={"prompt": IDS}, headers={"x-timeout-s": "soon"})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    assert invalid.status_code == 400


@pytest.mark.parametrize("kind", ["ids", "text"])
def test_session_of_raw_prompts_is_exact(gateway: GatewayUnderTest, client: openai.OpenAI, kind: str) -> None:
    """Prompts that begin with what was sampled continue its tokens, whatever text these have."""
    root = str(client.base_url).removesuffix("v1/")
    session = openai.OpenAI(base_url=f"{root}session/{kind}/v1", api_key="-")
    prompt: Any = IDS if kind == "ids" else PROMPT
    known: list[int] = []
    for turn in range(3):
        answer = session.completions.create(
            model="sampler", prompt=prompt, max_tokens=4, seed=turn, extra_body={"return_token_ids": True}
        )
        extra = answer.choices[0].model_extra
        assert extra is not None and extra["node"] == turn
        assert extra["prompt_token_ids"][: len(known)] == known
        known = [*extra["prompt_token_ids"], *extra["token_ids"]]
        text = gateway.sampler.decode(extra["token_ids"])
        prompt = [*known, 19] if kind == "ids" else f"{prompt}{text}1"
