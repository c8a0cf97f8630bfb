"""Tinker's SDK against gateways on a real Ray cluster: deaths of routers and gateway processes, and vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import tinker

from tests.support.deploy import deployed
from tests.support.eventually import wait_until
from tests.support.gateway import gateway_url
from tests.support.processes import replica_process, with_title
from tests.support.service import is_idle
from tests.support.tinker_client import params, tinker_client, tokens
from twinkle_serve import SamplingParams
from twinkle_serve.sampler import RunningSampler

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
LONG: dict[str, Any] = {"max_tokens": 300, "stop": []}
"""Six seconds on the slow service."""


@pytest.fixture(scope="module")
def slow(cluster: None) -> Iterator[RunningSampler]:
    engine_args = {"max_model_len": 3000, "max_num_seqs": 64, "token_latency_s": 0.02}
    with deployed("tinker-slow", engine="fake", engine_args=engine_args) as sampler:
        yield sampler


@pytest.fixture(scope="module")
def url(slow: RunningSampler) -> Iterator[str]:
    """Two gateway processes."""
    with gateway_url(samplers={"sampler": "tinker-slow"}, num_replicas=2) as url:
        yield url


@pytest.fixture
def sampling(url: str) -> Iterator[tinker.SamplingClient]:
    with tinker_client(url) as client:
        yield client.create_sampling_client(base_model="sampler").result()


def gateway_processes() -> list[psutil.Process]:
    return with_title("ServeReplica:gateway:gateway")


def expected(slow: RunningSampler, prompt: tuple[int, ...], **given: Any) -> list[list[int]]:
    response = slow.sample({"input_ids": list(prompt)}, SamplingParams(**given))
    return [sequence.tokens for sequence in response.sequences]


@pytest.mark.nightly
def test_any_gateway_process_answers_for_all(slow: RunningSampler, sampling: tinker.SamplingClient) -> None:
    """A request begins at one and is collected at another."""
    asked = [sampling.sample(tokens(i, 2, 3), 2, params(max_tokens=4, seed=i)) for i in range(40)]
    for i, future in enumerate(asked):
        read = [sequence.tokens for sequence in future.result(timeout=60).sequences]
        assert read == expected(slow, (i, 2, 3), max_tokens=4, seed=i, num_samples=2)


@pytest.mark.nightly
def test_samples_survive_the_death_of_gateway_processes(
    slow: RunningSampler, url: str, sampling: tinker.SamplingClient
) -> None:
    """Both, one after the other, while the samples run; nothing is sampled twice."""
    asked = [sampling.sample(tokens(i, 5), 1, params(seed=i, **LONG)) for i in range(4)]
    wait_until(lambda: slow.status()["requests"] == 4, "all run")
    killed = gateway_processes()
    assert len(killed) == 2
    for process in killed:
        process.kill()
    assert slow.status()["requests"] == 4, "they go on"
    for i, future in enumerate(asked):
        (sequence,) = future.result(timeout=120).sequences
        assert [sequence.tokens] == expected(slow, (i, 5), max_tokens=300, ignore_eos=True, seed=i)
        assert "." + str(sampling._request_id_counter - 4 + i) in sequence.sequence_id, "not sampled anew"
    wait_until(lambda: is_idle(slow), "nothing is left")


@pytest.mark.nightly
def test_samples_are_sampled_anew_when_the_router_dies(slow: RunningSampler, sampling: tinker.SamplingClient) -> None:
    """With the same seeds; the client's caller notices nothing but the time."""
    asked = [sampling.sample(tokens(i, 6), 1, params(seed=i, **LONG)) for i in range(4)]
    wait_until(lambda: slow.status()["requests"] == 4, "all run")
    replica_process("tinker-slow", "router").kill()
    for i, future in enumerate(asked):
        (sequence,) = future.result(timeout=120).sequences
        assert [sequence.tokens] == expected(slow, (i, 6), max_tokens=300, ignore_eos=True, seed=i)
    wait_until(lambda: is_idle(slow), "nothing is left")


@pytest.mark.nightly
class TestPoller:
    """Clients that wait for all their samples by one request."""

    @pytest.fixture(scope="class")
    def polling(self, slow: RunningSampler, url: str) -> Iterator[str]:
        with gateway_url(samplers={"sampler": "tinker-slow"}, num_replicas=2, tinker_poller=True) as url:
            yield url

    def test_a_client_learns_that_the_router_died(self, slow: RunningSampler, polling: str) -> None:
        """Its samples are sampled anew, as those of other clients are."""
        with tinker_client(polling) as client:
            sampling = client.create_sampling_client(base_model="sampler").result()
            short = sampling.sample(tokens(1, 2), 1, params(max_tokens=2))
            assert short.result(timeout=60).sequences
            asked = [sampling.sample(tokens(i, 8), 1, params(seed=i, **LONG)) for i in range(4)]
            wait_until(lambda: slow.status()["requests"] == 4, "all run")
            replica_process("tinker-slow", "router").kill()
            for i, future in enumerate(asked):
                (sequence,) = future.result(timeout=120).sequences
                assert [sequence.tokens] == expected(slow, (i, 8), max_tokens=300, ignore_eos=True, seed=i)


@pytest.mark.vllm
class TestOnVLLM:
    """The real engine."""

    @pytest.fixture(scope="class")
    def client(self, vllm_service: RunningSampler) -> Iterator[tinker.ServiceClient]:
        application = vllm_service._client._name  # type: ignore[attr-defined]
        with (
            gateway_url(samplers={"sampler": application}, base_models={"demo/adder": "sampler"}) as url,
            tinker_client(url) as client,
        ):
            yield client

    @pytest.fixture(scope="class")
    def sampling(self, client: tinker.ServiceClient) -> tinker.SamplingClient:
        return client.create_sampling_client(base_model="demo/adder").result()

    def test_samples_and_logprobs_are_those_of_python(
        self, vllm_service: RunningSampler, sampling: tinker.SamplingClient
    ) -> None:
        """Seeds, likeliest tokens, logprobs of the prompt and of its end."""
        (prompt,) = vllm_service.encode([{"messages": [{"role": "user", "content": "12+34="}]}])
        given = {"max_tokens": 8, "seed": 7, "temperature": 0.9}
        read: Any = sampling.sample(
            tokens(*prompt), 3, params(**given), include_prompt_logprobs=True, topk_sample_logprobs=2
        ).result()
        python = vllm_service.sample({"input_ids": prompt}, {**given, "num_samples": 3, "prompt_logprobs": 0})
        assert [each.tokens for each in read.sequences] == [each.tokens for each in python.sequences]
        np.testing.assert_allclose(read.prompt_logprobs_np, python.columns.scores[0].logprobs, atol=1e-3)
        for sequence, each in zip(read.sequences, python.sequences, strict=True):
            np.testing.assert_allclose(sequence.logprobs_np, np.asarray(each.logprob_array), atol=1e-3)
            assert [len(position) for position in sequence.topk_logprobs] == [2] * len(sequence.tokens)
        whole: Any = sampling.compute_logprobs(tokens(*prompt)).result()
        last: Any = sampling.compute_logprobs(tokens(*prompt), 3).result()
        assert whole[0] is None
        np.testing.assert_allclose(whole[-3:], last[-3:], atol=1e-3)

    def test_nothing_stops_a_sample_with_an_empty_list(self, sampling: tinker.SamplingClient) -> None:
        """Not even the end-of-sequence token, which ends it otherwise."""
        ended = sampling.sample(tokens(1, 2, 3), 4, params(max_tokens=64, seed=1)).result()
        assert any(sequence.stop_reason == "stop" for sequence in ended.sequences)
        endless = sampling.sample(tokens(1, 2, 3), 4, params(max_tokens=64, seed=1, stop=[])).result()
        assert all(len(sequence.tokens) == 64 for sequence in endless.sequences)

    def test_named_tokens_have_the_logprobs_of_the_prompts_scores(self, sampling: tinker.SamplingClient) -> None:
        """Where they name the prompt's own tokens."""
        prompt = (12, 9, 4, 30, 7)
        target = tinker.TensorData(data=list(prompt[1:]), dtype="int64", shape=[4, 1])
        read: Any = sampling.sample(
            tokens(*prompt), 1, params(max_tokens=1), include_prompt_logprobs=True, target_prompt_logprobs=target
        ).result()
        scored = read.target_prompt_logprobs
        np.testing.assert_allclose(scored.to_numpy()[:, 0], read.prompt_logprobs_np[1:], atol=1e-3)

    async def test_many_samples_at_once(self, sampling: tinker.SamplingClient) -> None:
        """Awaited, as recipes do."""
        asked = [sampling.sample(tokens(i % 60 + 1, 2), 2, params(max_tokens=6)) for i in range(64)]
        for read in await asyncio.gather(*asked):
            assert len(read.sequences) == 2
