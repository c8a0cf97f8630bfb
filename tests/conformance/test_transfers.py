"""vLLM's own weight transfer under our pause, from a trainer in this process to the worker of a real engine.

Its backend is one on CPU, with the lifecycle, the handshake and the messages of vLLM's nccl.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.harness import LOGPROB_TOLERANCE, EngineHarness
from tests.support.tcp_trainer import TCPTrainer
from tests.support.transfers import client_of, flipped
from tests.support.weights import Reference, changed_weights
from twinkle_serve import hub
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format.response import SampleResponse
from twinkle_serve.data_format.weights import CHECKPOINT_VERSION, INITIAL_LABEL, WeightsVersion
from twinkle_serve.errors import WeightsError
from twinkle_serve.routing.router import Router
from twinkle_serve.weights import LocalStore, WeightStore

pytestmark = pytest.mark.vllm

QUESTIONS = [{"messages": [{"role": "user", "content": f"{a}+{a + 3}="}]} for a in range(30, 38)]
LONG = {"max_tokens": 200, "ignore_eos": True, "seed": 1}


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@dataclass
class Trained:
    """A router over the real engine, and its trainer."""

    router: Router
    store: LocalStore
    harness: EngineHarness
    trainer: TCPTrainer
    checksums: dict[str, str] = field(default_factory=dict)
    """Of the engine after each transfer, by label."""

    async def update(self, label: str, weights: dict[str, Any], sent: dict[str, Any] | None = None) -> str:
        """See `TCPTrainer.update`."""
        return await asyncio.to_thread(self.trainer.update, label, weights, sent)


@pytest.fixture
async def trained(vllm_engine: EngineHarness, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Trained]:
    server = vllm_engine.server
    store = LocalStore(WeightStore("demo"))
    args = ServiceArgs.model_validate({"model_id": "demo", "engine": "vllm"})
    router = Router(args, hub.DEMO, {vllm_engine.info.name: server}, store)
    made = Trained(router, store, vllm_engine, TCPTrainer(client_of(router)))
    finish = server.finish_transfer

    async def noted(upload: int, version: WeightsVersion, digests: Mapping[str, str]) -> str:
        made.checksums[version.label] = await finish(upload, version, digests)
        return made.checksums[version.label]

    monkeypatch.setattr(server, "_store", store)
    monkeypatch.setattr(server, "finish_transfer", noted)
    await router.start()
    yield made
    router.close()
    await server.pause("keep")
    await server.load_weights(CHECKPOINT_VERSION)
    await server.resume()


def check(response: SampleResponse, reference: Reference, versions: dict[str, Any]) -> None:
    """Each token has the logprob that the version it names gives it."""
    for sequence in response.sequences:
        prompt = response.prompts[sequence.prompt_index].tolist()
        for span in sequence.weight_versions:
            scored = reference.logprobs(versions[span.version], prompt + sequence.tokens)[len(prompt) - 1 :]
            difference = np.abs(scored - sequence.logprob_array)[span.start : span.end]
            assert difference.max() < LOGPROB_TOLERANCE, f"{span} is not of its version"


async def test_running_samples_go_on_with_weights_from_the_trainer(trained: Trained, reference: Reference) -> None:
    """Each token names the version that sampled it; the engine has exactly the weights that the store has."""
    one, two = changed_weights(1), changed_weights(2)
    running = asyncio.ensure_future(trained.router.sample(QUESTIONS, LONG, num_samples=2))
    assert await trained.update("one", one) == "one"
    assert await trained.update("two", two) == "two"
    assert len(trained.trainer.connections) == 1, "as vLLM's trainers connect"
    after = await trained.router.sample(QUESTIONS, {"max_tokens": 4, "ignore_eos": True, "seed": 1})
    assert {span.version for sequence in after.sequences for span in sequence.weight_versions} == {"two"}
    for response in (await running, after):
        check(response, reference, {INITIAL_LABEL: None, "one": one, "two": two})
    await same_as_from_the_store(trained)


async def same_as_from_the_store(trained: Trained) -> None:
    """The engine computes with the same tensors when it loads its version from the store."""
    server, current = trained.harness.server, await trained.store.current_weights("main")
    await server.pause("keep")
    assert await server.load_weights(current) == trained.checksums[current.label]
    await server.resume()


async def test_trainer_that_fails_in_the_middle(trained: Trained, reference: Reference) -> None:
    """The engine, which waits for the rest and has some of the weights, goes back, and takes the next ones."""
    weights = changed_weights(3)
    await trained.update("before", weights)

    def fails(index: int) -> None:
        if index == 20:
            raise RuntimeError("out of memory")

    trained.trainer.at = fails
    with pytest.raises(WeightsError, match=r"could not send: RuntimeError: out of memory\. 'before' is current"):
        await trained.update("failed", changed_weights(4))
    response = await trained.router.sample(QUESTIONS, {"max_tokens": 4, "ignore_eos": True})
    check(response, reference, {"before": weights})
    trained.trainer.at = lambda index: None
    later = changed_weights(5)
    assert await trained.update("later", later) == "later"
    check(await trained.router.sample(QUESTIONS, {"max_tokens": 4}), reference, {"later": later})
    assert len(trained.trainer.connections) == 2, "a connection that failed is not used again"
    await same_as_from_the_store(trained)


async def test_weights_that_differ_from_the_store(trained: Trained, reference: Reference) -> None:
    """By one bit, which the engine notices once it has loaded them."""
    weights = changed_weights(6)
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(WeightsError, match=rf"1 of the 46 weights .* in the store: '{name}' differs"):
        await trained.update("other", weights, {**weights, name: flipped(weights[name])})
    response = await trained.router.sample(QUESTIONS, {"max_tokens": 4})
    check(response, reference, {INITIAL_LABEL: None})
    assert await trained.update("same", weights) == "same"
    check(await trained.router.sample(QUESTIONS, {"max_tokens": 4}), reference, {"same": weights})


async def test_weights_that_vllm_refuses(trained: Trained, reference: Reference) -> None:
    """Of a shape that the model does not have: the error is vLLM's."""
    weights = changed_weights(7)
    name = "model.norm.weight"
    with pytest.raises(WeightsError, match=r"vLLM refuses weights: .*'initial' is current"):
        await trained.update("odd", weights, {**weights, name: torch.ones(5)})
    check(await trained.router.sample(QUESTIONS, {"max_tokens": 4}), reference, {INITIAL_LABEL: None})
