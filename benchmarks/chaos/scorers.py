"""Models that score samples of a run under any of its versions, independently of the service.

Samples of vLLM are scored by transformers in float32. Samples of the fake engine are scored by a fake engine in this
process: its model is a toy, so this checks labels and nothing about numerics.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.chaos.publisher import AdapterMaker
from benchmarks.common.models import Tensors
from tests.support.weights import changed_weights, differences
from twinkle_serve import SampledSequence, hub
from twinkle_serve.adapters import pack_adapter
from twinkle_serve.checkpoint import named_tensors
from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.data_format.groups import Group
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.data_format.weights import INITIAL_LABEL, Bucket
from twinkle_serve.engines.fake import FakeEngine
from twinkle_serve.packing import buckets


class Scorer(Protocol):
    """Computes logprobs under one version of the model's weights and at most one of an adapter."""

    name: str

    def load(self, weights: int | None, adapter: int | None) -> None:
        """Loads the weights and the adapter of these seeds; None for the model's own files and for no adapter."""

    def differences(self, sequences: Sequence[SampledSequence]) -> list[NDArray[np.float32]]:
        """|Δlogprob| of each token of each sequence, nats. All sequences have logprobs."""


class TransformersScorer:
    """The demo model in transformers, with the adapter merged by LoRA's formula."""

    name = "transformers"

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(hub.DEMO, dtype=torch.float32).eval()
        self._adapters = AdapterMaker()

    def load(self, weights: int | None, adapter: int | None) -> None:
        state = dict(named_tensors(hub.DEMO)) if weights is None else changed_weights(weights)
        if adapter is not None:
            config, tensors = self._adapters.config, self._adapters.made(adapter)
            for name, up in tensors.items():
                if ".lora_B." in name:
                    module = name.removeprefix("base_model.model.").split(".lora_B.")[0]
                    down = tensors[name.replace(".lora_B.", ".lora_A.")]
                    key = f"{module}.weight"
                    state[key] = state[key] + (config.lora_alpha / config.r) * up @ down
        self._model.load_state_dict(state, strict=False)

    def differences(self, sequences: Sequence[SampledSequence]) -> list[NDArray[np.float32]]:
        return differences(self._model, sequences)


class FakeScorer:
    """A fake engine that scores each sample as a prompt."""

    name = "the fake engine"

    def __init__(self) -> None:
        self._engine = FakeEngine("scorer", str(hub.DEMO), {})
        self._adapters = AdapterMaker()
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._engine.start())
        self._adapter: AdapterVersion | None = None

    def load(self, weights: int | None, adapter: int | None) -> None:
        self._loop.run_until_complete(self._load(weights, adapter))

    async def _load(self, weights: int | None, adapter: int | None) -> None:
        label = INITIAL_LABEL if weights is None else f"seed-{weights}"
        await self._engine.load_weights(label, each_bucket({} if weights is None else changed_weights(weights)))
        if self._adapter is not None:
            await self._engine.drop_adapter(self._adapter)
        self._adapter = None
        if adapter is not None:
            self._adapter = AdapterVersion(name="scored", version=1, id=1, rank=self._adapters.config.r)
            files = pack_adapter(self._adapters.config, self._adapters.made(adapter))
            await self._engine.load_adapter(self._adapter, files)

    def differences(self, sequences: Sequence[SampledSequence]) -> list[NDArray[np.float32]]:
        return [self._loop.run_until_complete(self._difference(sequence)) for sequence in sequences]

    async def _difference(self, sequence: SampledSequence) -> NDArray[np.float32]:
        prompt = sequence.response.prompts[int(sequence.response.columns.group[sequence.row])]
        ids = np.concatenate([prompt, sequence.tokens]).astype(np.int32)
        params = DecodingParams(max_tokens=1, prompt_logprobs=0)
        group = Group(id=0, prompt_ids=ids, params=params, adapter=self._adapter)
        scores = (await self._engine.sample_group(group)).scores[group.id]
        assert sequence.logprob_array is not None
        difference: NDArray[np.float32] = np.abs(scores.logprobs[len(prompt) :] - sequence.logprob_array)
        return difference


async def each_bucket(weights: Tensors) -> AsyncIterator[Bucket]:
    """The weights as an engine takes them."""
    for bucket in buckets(weights.items()):
        yield bucket
