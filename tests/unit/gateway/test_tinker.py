"""Tinker's SDK against a gateway in this process: what a request means, and what is refused."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tinker
from tinker.types import RequestErrorCategory, TensorData

from tests.support.eventually import wait_until
from tests.support.gateway_app import GatewayUnderTest, gateway_app
from tests.support.lora import save_adapter
from tests.support.tinker_client import KEY, params, tinker_client, tokens
from twinkle_serve import SamplingParams
from twinkle_serve.errors import ConfigError, QueueFullError
from twinkle_serve.gateway.config import GatewayArgs
from twinkle_serve.gateway.keys import Caller
from twinkle_serve.routing.admission import Admission

PROMPT = (20, 21, 22, 23, 24)


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayUnderTest]:
    with gateway_app(samplers={"sampler": "app", "other": "app"}, base_models={"org/model": "sampler"}) as made:
        yield made


@pytest.fixture(scope="module")
def url(gateway: GatewayUnderTest) -> Iterator[str]:
    with gateway.served() as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[tinker.ServiceClient]:
    with tinker_client(url) as client:
        yield client


@pytest.fixture(scope="module")
def sampling(client: tinker.ServiceClient) -> tinker.SamplingClient:
    return client.create_sampling_client(base_model="org/model").result()


def own(gateway: GatewayUnderTest, prompt: tuple[int, ...] = PROMPT, **given: Any) -> Any:
    """The response to the same prompt from Python."""
    return gateway.sampler.sample({"input_ids": list(prompt)}, SamplingParams(**given))


def refused(sampling: tinker.SamplingClient, match: str, prompt: tinker.ModelInput | None = None, **given: Any) -> None:
    """Asserts that a request is refused, finally, as its caller's fault."""
    sampling_params = params(max_tokens=2, **given.pop("params", {}))
    with pytest.raises(tinker.RequestFailedError, match=match) as raised:
        sampling.sample(prompt or tokens(*PROMPT), given.pop("num_samples", 1), sampling_params, **given).result()
    assert raised.value.category == RequestErrorCategory.User


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        pytest.param({"max_tokens": 6, "seed": 11}, {"max_tokens": 6, "seed": 11}, id="seed"),
        pytest.param({"max_tokens": 4, "temperature": 0.0}, {"max_tokens": 4, "temperature": 0.0}, id="greedy"),
        pytest.param(
            {"max_tokens": 9, "seed": 2, "temperature": 0.7, "top_k": 3, "top_p": 0.8},
            {"max_tokens": 9, "seed": 2, "temperature": 0.7, "top_k": 3, "top_p": 0.8},
            id="top_k, top_p",
        ),
        pytest.param(
            {"seed": 4, "max_tokens": 64, "stop": list(range(40))},
            {"seed": 4, "max_tokens": 64, "stop": list(range(40))},
            id="stop token ids",
        ),
        pytest.param({"seed": 5, "max_tokens": 64, "stop": "e"}, {"seed": 5, "max_tokens": 64, "stop": "e"}, id="stop"),
        pytest.param(
            {"seed": 6, "max_tokens": 700, "stop": []}, {"seed": 6, "max_tokens": 700, "ignore_eos": True}, id="no stop"
        ),
    ],
)
def test_a_parameter_means_what_it_means_from_python(
    gateway: GatewayUnderTest, sampling: tinker.SamplingClient, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    """Tokens, logprobs and reasons of the samples are the same."""
    read: Any = sampling.sample(tokens(*PROMPT), 3, params(**theirs)).result()
    expected = own(gateway, num_samples=3, **ours).sequences
    assert [sequence.tokens for sequence in read.sequences] == [sequence.tokens for sequence in expected]
    assert [sequence.stop_reason for sequence in read.sequences] == [each.stop_reason for each in expected]
    for sequence, each in zip(read.sequences, expected, strict=True):
        np.testing.assert_array_equal(sequence.logprobs_np, each.logprob_array)
    assert len({sequence.sequence_id for sequence in read.sequences}) == 3


def test_without_a_limit_a_sample_fills_the_context(sampling: tinker.SamplingClient) -> None:
    """`max_tokens` may be left out."""
    (sequence,) = sampling.sample(tokens(*PROMPT), 1, params(stop=[])).result().sequences
    assert len(sequence.tokens) == 1024 - len(PROMPT) and sequence.stop_reason == "length"


def test_logprobs_are_those_of_python(gateway: GatewayUnderTest, sampling: tinker.SamplingClient) -> None:
    """Of the prompt, all or its end; of the likeliest tokens in prompt and sample."""
    expected = own(gateway, max_tokens=3, seed=1, logprobs=4, prompt_logprobs=2)
    read: Any = sampling.sample(
        tokens(*PROMPT),
        1,
        params(max_tokens=3, seed=1),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=4,
    ).result()
    assert read.prompt_logprobs == expected.prompt_logprobs
    assert read.topk_prompt_logprobs == expected.topk_prompt_logprobs
    likeliest: Any = read.sequences[0].topk_logprobs_np
    np.testing.assert_array_equal(likeliest.token_ids, expected.columns.logprob_tokens[:, 1:])
    np.testing.assert_array_equal(likeliest.logprobs, expected.columns.logprobs[:, 1:])
    assert sampling.compute_logprobs(tokens(*PROMPT)).result() == expected.prompt_logprobs
    assert sampling.compute_logprobs(tokens(*PROMPT), 2).result() == [None, None, None, *expected.prompt_logprobs[3:]]


def test_named_tokens_are_scored_at_their_positions(gateway: GatewayUnderTest, sampling: tinker.SamplingClient) -> None:
    """Dense and sparse; the prompt's own tokens have the logprobs that they have anyway."""
    ids = [[PROMPT[row + 1], 7] for row in range(4)]
    ids[1] = [-1, -1]
    dense = TensorData(data=[token for row in ids for token in row], dtype="int64", shape=[4, 2])
    sparse = TensorData(
        data=[PROMPT[2], 9],
        dtype="int64",
        shape=[4, 2],
        sparse_crow_indices=[0, 0, 1, 1, 2],
        sparse_col_indices=[1, 0],
    )
    scores = own(gateway, max_tokens=1, prompt_logprobs=0).prompt_logprobs

    def scored(tensor: TensorData) -> Any:
        request = sampling.sample(tokens(*PROMPT), 2, params(max_tokens=1, seed=3), target_prompt_logprobs=tensor)
        read: Any = request.result()
        assert [len(sequence.tokens) for sequence in read.sequences] == [1, 1]
        return read.target_prompt_logprobs.to_numpy()

    values = scored(dense)
    np.testing.assert_allclose(values[[0, 2, 3], 0], [scores[1], scores[3], scores[4]], atol=1e-6)
    assert values[1].tolist() == [0, 0]
    listed = scored(sparse)
    np.testing.assert_allclose(listed[1, 1], scores[2], atol=1e-6)
    assert listed[3, 0] < 0 and np.count_nonzero(listed) == 2


def test_alternatives_are_drawn_at_every_position(gateway: GatewayUnderTest, sampling: tinker.SamplingClient) -> None:
    """With their logprobs; a seed makes them the same again."""
    asked: dict[str, Any] = {
        "num_samples": 1,
        "sampling_params": params(max_tokens=1, seed=9),
        "prompt_alt_tokens_k": 6,
    }
    drawn: Any = sampling.sample(tokens(*PROMPT), **asked).result().prompt_alt_tokens
    assert drawn.tokens.shape == drawn.logprobs.shape == [4, 6]
    again: Any = sampling.sample(tokens(*PROMPT), **asked).result().prompt_alt_tokens
    assert drawn.tokens.tolist() == again.tokens.tolist()
    assert len(np.unique(drawn.tokens.to_numpy())) > 1
    target = TensorData(data=drawn.tokens.to_numpy().ravel().tolist(), dtype="int64", shape=[4, 6])
    read: Any = sampling.sample(tokens(*PROMPT), 1, params(max_tokens=1), target_prompt_logprobs=target).result()
    np.testing.assert_allclose(read.target_prompt_logprobs.to_numpy(), drawn.logprobs.to_numpy(), atol=1e-6)


def test_what_cannot_be_honoured_is_refused(sampling: tinker.SamplingClient) -> None:
    """By the future, as the caller's fault, with a reason; nothing is ignored."""
    image = tinker.ModelInput(chunks=[tinker.types.ImageChunk(data=b"x", format="png")])
    refused(sampling, r"prompt.chunks\[0\] is of type 'image'; samplers here take tokens alone", image)
    refused(sampling, "temperature must be 0", params={"temperature": -1.0})
    refused(sampling, "top_p must be", params={"top_p": 0.0})
    refused(sampling, "seed must be", params={"seed": -1})
    refused(sampling, "logprobs=1000, the engine returns at most 20", topk_sample_logprobs=1000)
    refused(sampling, "topk_prompt_logprobs must be 0 or more, got -1", topk_prompt_logprobs=-1)
    refused(sampling, "holds token id 9999", tokens(1, 9999))
    refused(sampling, "is empty", tinker.ModelInput.empty())
    refused(sampling, "limits.samples is 1024", num_samples=10**12)
    refused(sampling, "num_samples must be", num_samples=0)
    refused(
        sampling,
        "prompt_logprobs_last_n must be from 1 to 4",
        include_prompt_logprobs=True,
        prompt_logprobs_last_n=5,
    )
    refused(
        sampling,
        r"shape \[3, 1\]; a prompt of 5 tokens takes \[4, K\]",
        target_prompt_logprobs=TensorData(data=[1, 2, 3], dtype="int64", shape=[3, 1]),
    )
    refused(
        sampling,
        "names no token",
        target_prompt_logprobs=TensorData(data=[-1] * 4, dtype="int64", shape=[4, 1]),
    )


def test_stability_information_is_refused(client: tinker.ServiceClient) -> None:
    """It is for training, which is not here."""
    recording = client.create_sampling_client(base_model="org/model", record_stability_info=True).result()
    refused(recording, "record_stability_info is not supported")


def test_a_model_path_means_the_version_of_its_making(
    gateway: GatewayUnderTest, client: tinker.ServiceClient, tmp_path: Any
) -> None:
    """The client learns path and base model; a version that is not kept any more is an error, never another one."""
    gateway.sampler.add_adapter_to_model("lora", str(save_adapter(tmp_path / "one", seed=1)))
    first = client.create_sampling_client(model_path="tinker://sampler/lora").result()
    assert first.get_base_model() == "org/model"
    assert first._get_sampler_submit().result().model_path == "tinker://sampler/lora@1"
    read: Any = first.sample(tokens(*PROMPT), 1, params(max_tokens=8, seed=1)).result()
    expected = gateway.sampler.sample({"input_ids": list(PROMPT)}, {"max_tokens": 8, "seed": 1}, "lora@1").sequences[0]
    assert read.sequences[0].tokens == expected.tokens
    gateway.sampler.add_adapter_to_model("lora", str(save_adapter(tmp_path / "two", seed=2)))
    refused(first, "lora@1")
    second = client.create_sampling_client(model_path="tinker://sampler/lora").result()
    assert second._get_sampler_submit().result().model_path == "tinker://sampler/lora@2"
    exact = client.create_sampling_client(model_path="tinker://sampler/lora@2").result()
    assert exact.sample(tokens(*PROMPT), 1, params(max_tokens=1)).result().sequences
    info: Any = tinker.RestClient(base_url=gateway_url_of(client), api_key=KEY)
    assert info.get_weights_info_by_tinker_path("tinker://sampler/lora").result().base_model == "org/model"


def gateway_url_of(client: tinker.ServiceClient) -> str:
    return str(client.holder._base_url)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"base_model": "org/modell"}, "unknown base model 'org/modell', did you mean 'org/model'"),
        ({"model_path": "tinker://sampler/nothing"}, "unknown adapter 'nothing'"),
        ({"model_path": "tinker://nowhere/lora"}, "unknown model path"),
    ],
)
def test_an_unknown_model_is_not_found(client: tinker.ServiceClient, named: dict[str, Any], message: str) -> None:
    """At once, by name, with those that there are."""
    with pytest.raises(tinker.NotFoundError, match=message):
        client.create_sampling_client(**named).result()


def test_a_client_asks_what_there_is(url: str) -> None:
    """Model names by which samplers answer, their context, and that nothing is trained here."""
    models = tinker.RestClient(base_url=url, api_key=KEY).get_server_capabilities().result().supported_models
    assert [(each.model_name, each.max_context_length, each.trainable, each.sampleable) for each in models] == [
        ("org/model", 1024, False, True),
        ("other", 1024, False, True),
    ]


def test_copies_of_a_client_sample_too(gateway: GatewayUnderTest, sampling: tinker.SamplingClient) -> None:
    """Unpickled, or made from a handle: each with results of its own."""
    copies = [
        pickle.loads(pickle.dumps(sampling)),
        tinker.SamplingClient.from_sampler_handle(sampling.get_sampler_handle(), api_key=KEY),
    ]
    prompts = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    samplers = [sampling, *copies]
    asked = [
        each.sample(tokens(*prompt), 1, params(max_tokens=4, seed=1))
        for each, prompt in zip(samplers, prompts, strict=True)
    ]
    for prompt, future in zip(prompts, asked, strict=True):
        expected = own(gateway, prompt, max_tokens=4, seed=1).sequences[0].tokens
        assert future.result().sequences[0].tokens == expected


def test_large_answers_are_announced(
    url: str, sampling: tinker.SamplingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client hears the size, and asks again when it has room."""
    monkeypatch.setattr("twinkle_serve.gateway.tinker.futures.INLINE_BYTES", 10)
    read: Any = sampling.sample(tokens(*PROMPT), 2, params(max_tokens=5)).result()
    assert len(read.sequences) == 2


def test_base_models_are_of_samplers_that_exist() -> None:
    """An error of the config names those that there are."""
    with pytest.raises(ConfigError, match="base_models: unknown sampler 'samplr', did you mean 'sampler'"):
        GatewayArgs.model_validate({"base_models": {"org/model": "samplr"}})


def waited_for(sampling: tinker.SamplingClient) -> set[str]:
    """Ids of requests for whose end a polling client waits."""
    poller = sampling._futures_poller
    return set() if poller is None else set(poller._events)


class TestSlowly:
    """On an engine that takes its time."""

    @pytest.fixture(scope="class")
    def slow(self) -> Iterator[GatewayUnderTest]:
        with gateway_app(engine_args={"token_latency_s": 0.02}, tinker_poller=True) as made:
            yield made

    @pytest.fixture(scope="class")
    def slow_url(self, slow: GatewayUnderTest) -> Iterator[str]:
        with slow.served() as url:
            yield url

    def test_a_client_waits_for_all_its_samples_by_one_request(self, slow: GatewayUnderTest, slow_url: str) -> None:
        """Where the config says so; failures arrive as well, and so do samples of copies."""
        with tinker_client(slow_url) as client:
            sampling = client.create_sampling_client(base_model="sampler").result()
            assert sampling.holder.get_client_config().sample_use_retrieve_futures
            copy = pickle.loads(pickle.dumps(sampling))
            asked = [
                each.sample(tokens(i + 1, 2, 3), 1, params(max_tokens=1 + i % 7, seed=i))
                for i in range(20)
                for each in (sampling, copy)
            ]
            with pytest.raises(tinker.RequestFailedError, match="top_p"):
                sampling.sample(tokens(1), 1, params(top_p=7.0)).result()
            results = [each.result().sequences[0].tokens for each in asked]
            assert results[::2] == results[1::2]
            assert [len(each) for each in results[::2]] <= [1 + i % 7 for i in range(20)]
        wait_until(slow.is_idle, "nothing is left")

    def test_a_future_that_is_given_up_frees_the_engine(self, slow: GatewayUnderTest, slow_url: str) -> None:
        """The client says so; others go on."""
        with tinker_client(slow_url) as client:
            sampling = client.create_sampling_client(base_model="sampler").result()
            bystander = sampling.sample(tokens(1, 2), 1, params(max_tokens=10, stop=[]))
            given_up = sampling.sample(tokens(3, 4), 1, params(max_tokens=900, stop=[]))
            # The client can give up what it knows the request's id of.
            wait_until(lambda: len(waited_for(sampling)) == 2, "the client waits for both")
            given_up.future().cancel()
            assert len(bystander.result().sequences[0].tokens) == 10
            wait_until(slow.is_idle, "the engine is free", timeout_s=5)

    def test_a_finished_session_takes_its_calls_along(self, slow: GatewayUnderTest, slow_url: str) -> None:
        """And no later ones."""
        with tinker_client(slow_url) as client:
            sampling = client.create_sampling_client(base_model="sampler").result()
            copy = pickle.loads(pickle.dumps(sampling))
            sampling.sample(tokens(3, 4), 1, params(max_tokens=900, stop=[]))
            wait_until(lambda: slow.sampler.status()["requests"] == 1, "it runs")
        wait_until(slow.is_idle, "the engine is free", timeout_s=5)
        with pytest.raises(tinker.APIStatusError, match="was ended") as raised:
            copy.sample(tokens(1), 1, params(max_tokens=1)).result()
        assert raised.value.status_code == 410


async def test_a_repeated_request_has_one_result(gateway: GatewayUnderTest) -> None:
    """Without a seed, so that a second sample would show."""
    async with gateway.http() as http:
        session = (await http.post("/api/v1/create_session", json={"tags": []})).json()["session_id"]
        made = await http.post(
            "/api/v1/create_sampling_session",
            json={"session_id": session, "sampling_session_seq_id": 0, "base_model": "org/model"},
        )
        body = {
            "sampling_session_id": made.json()["sampling_session_id"],
            "seq_id": 10**18,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
            "sampling_params": {"max_tokens": 20, "stop": []},
        }

        async def sampled() -> bytes:
            request = (await http.post("/api/v1/asample", json=body)).json()
            answer = await http.post("/api/v1/retrieve_future", json={"request_id": request["request_id"]})
            assert answer.headers["content-type"] == "application/x-protobuf"
            return answer.content

        assert len({*await asyncio.gather(*(sampled() for _ in range(5))), await sampled()}) == 1
        body["seq_id"] = 7
        assert await sampled()
        unknown = await http.post("/api/v1/retrieve_future", json={"request_id": f"{body['sampling_session_id']}.8"})
        assert unknown.status_code == 410


def test_a_full_queue_makes_a_client_send_the_same_request_later(
    gateway: GatewayUnderTest, sampling: tinker.SamplingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the answer of 429 says; its caller notices nothing but the time."""
    refusals: list[Any] = []

    def refuse_once(admission: Admission, track: Any, active: Any = None) -> None:
        if not refusals:
            refusals.append(active)
            raise QueueFullError("full", 2.0)

    monkeypatch.setattr(Admission, "_require_room", refuse_once)
    read: Any = sampling.sample(tokens(*PROMPT), 1, params(max_tokens=3, seed=1)).result()
    assert read.sequences[0].tokens == own(gateway, max_tokens=3, seed=1).sequences[0].tokens and refusals


def test_keys_are_checked() -> None:
    """The SDK sends its key; an unknown one is refused, finally."""
    with (
        gateway_app(keys={KEY: Caller("trainer", "sample")}) as made,
        made.served() as guarded,
    ):
        with tinker_client(guarded) as client:
            sampling = client.create_sampling_client(base_model="sampler").result()
            assert sampling.sample(tokens(1, 2), 1, params(max_tokens=1)).result().sequences
        with pytest.raises(tinker.AuthenticationError, match="unknown key"):
            tinker.ServiceClient(base_url=guarded, api_key="tml-some-other-key").create_sampling_client(
                base_model="sampler"
            )
