"""Callers that sample while a trainer publishes versions and engines die, and the check of their samples."""

from __future__ import annotations

import itertools
import random
import re
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.support.eventually import wait_until
from tests.support.lora import random_adapter
from tests.support.processes import core_processes, replica_process
from tests.support.weights import changed_weights, differences
from twinkle_serve import SampledSequence, hub
from twinkle_serve.checkpoint import named_tensors
from twinkle_serve.errors import StoreError
from twinkle_serve.sampler import RunningSampler

PERIOD_S = 0.2
STORE_KILLS = 3
IN_FLIGHT = 32
BACK_S = 240
ADAPTERS = ("red", "blue")
ENGINE_ARGS = {
    "dtype": "float32",
    "max_model_len": 128,
    "kv_cache_memory_bytes": 2**27,
    "enable_lora": True,
    "max_loras": 4,
    "max_lora_rank": 8,
}
AGREES, DIFFERS = 1e-3, 5e-3
"""Largest |Δlogprob|, nats, of a span under the versions that it names; least of the largest under others."""


@dataclass
class Published:
    """Every version of the run, as its trainer made it: tensors by label."""

    config: Any
    template: dict[str, Any]
    base: dict[str, dict[str, Any]]
    adapters: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})

    @classmethod
    def begun(cls, label: str) -> Published:
        """Of a service that serves the demo model's own weights under this label."""
        from peft import get_peft_model_state_dict

        adapter = random_adapter(rank=8)
        config = adapter.peft_config["default"]
        return cls(config, get_peft_model_state_dict(adapter), {label: dict(named_tensors(hub.DEMO))})

    def new_adapter(self, seed: int) -> dict[str, Any]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(value.shape, generator=generator) / value.shape[1] ** 0.5
            for name, value in self.template.items()
        }

    def merged(self, base: str, adapter: str) -> dict[str, Any]:
        """The model's weights with an adapter's added, by the formula of LoRA."""
        weights = dict(self.base[base])
        tensors = self.adapters[adapter]
        for name, up in tensors.items():
            if ".lora_B." in name:
                module = name.removeprefix("base_model.model.").split(".lora_B.")[0]
                down = tensors[name.replace(".lora_B.", ".lora_A.")]
                weights[f"{module}.weight"] = (
                    weights[f"{module}.weight"] + (self.config.lora_alpha / self.config.r) * up @ down
                )
        return weights


class Trainer(threading.Thread):
    """Publishes a version of one adapter, of the other, and of the model itself, in turn, every PERIOD_S."""

    def __init__(self, sampler: RunningSampler, published: Published) -> None:
        super().__init__(daemon=True)
        self._sampler, self._published = sampler, published
        self._end = threading.Event()
        self.versions = 0
        self.lost = 0
        """Updates that the store was killed before it wrote."""
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            for number in itertools.count(1):
                started = time.monotonic()
                self._publish(number)
                self.versions = number
                if self._end.wait(max(0.0, PERIOD_S - (time.monotonic() - started))):
                    return
        except BaseException as error:
            self.failure = error

    def _publish(self, number: int) -> None:
        if number % 3 == 0:
            label, weights = f"step-{number}", changed_weights(number)
            self._published.base[label] = weights
            try:
                self._sampler.update_weights(weights, label, durable=number % 2 == 0)
            except StoreError as error:
                assert re.search("was not written|given up|no longer has", str(error)), error
                self.lost += 1
        else:
            name, tensors = ADAPTERS[number % 3 - 1], self._published.new_adapter(number)
            label = self._sampler.add_adapter_to_model(name, self._published.config, state_dict=tensors)
            self._published.adapters[label] = tensors

    def stop(self) -> None:
        self._end.set()
        self.join()
        if self.failure is not None:
            raise self.failure


class Load:
    """IN_FLIGHT callers, each with a request at all times, by turns of the two adapters and the model itself."""

    def __init__(self, sampler: RunningSampler) -> None:
        self._sampler = sampler
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(IN_FLIGHT)
        self.sequences: list[SampledSequence] = []
        self._calls = [self._pool.submit(self._run, number) for number in range(IN_FLIGHT)]

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        while not self._end.is_set():
            question = {"messages": [{"role": "user", "content": f"{rng.randint(0, 999)}+{rng.randint(0, 999)}="}]}
            params = {"max_tokens": rng.choice((4, 16, 64)), "ignore_eos": True}
            response = self._sampler.sample(question, params, (*ADAPTERS, "")[number % 3], num_samples=2, timeout_s=120)
            assert len(response.sequences) == 2
            self.sequences += response.sequences

    def stop(self) -> None:
        """Ends the callers; raises what one of them got."""
        self._end.set()
        for call in self._calls:
            call.result()
        self._pool.shutdown()


class Scorer:
    """transformers in float32, whose weights are set by hand for each version."""

    def __init__(self, published: Published) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(hub.DEMO, dtype=torch.float32).eval()
        self._published = published

    def differences(self, sequences: list[SampledSequence], base: str, adapter: str) -> list[np.ndarray[Any, Any]]:
        """|Δlogprob| of each token of each sequence under these versions."""
        self._model.load_state_dict(self._published.merged(base, adapter), strict=False)
        return differences(self._model, sequences)


def check(sequences: list[SampledSequence], published: Published) -> tuple[int, int]:
    """Every span has the logprobs of the versions that it names. Returns how many were checked against others too, and
    how many sequences are of more than one version of the model."""
    scorer = Scorer(published)
    spans: dict[tuple[str, str], list[tuple[SampledSequence, Any]]] = defaultdict(list)
    for sequence in sequences:
        assert [span.start for span in sequence.weight_versions[1:]] == [s.end for s in sequence.weight_versions[:-1]]
        assert sequence.weight_versions[-1].end == len(sequence.tokens) and sequence.weight_versions[0].start == 0
        for span in sequence.weight_versions:
            spans[span.version, sequence.adapter].append((sequence, span))
    bases, adapters = list(published.base), list(published.adapters)
    others = 0
    rng = random.Random(0)
    for (base, adapter), found in spans.items():
        for (_, span), difference in zip(
            found, scorer.differences([sequence for sequence, _ in found], base, adapter), strict=True
        ):
            part = difference[span.start : span.end]
            assert part.max(initial=0.0) < AGREES, f"{span} with {adapter or 'no adapter'}: {part}"
        long = [(sequence, span) for sequence, span in found if span.end - span.start >= 8][:4]
        if not long or rng.random() > 0.3:
            continue
        # The versions next to the one that is named are those that it could be mistaken for.
        at = bases.index(base)
        wrong = [(bases[i], adapter) for i in (at - 1, at + 1) if 0 <= i < len(bases)]
        names = [label for label in adapters if label.split("@")[0] == adapter.split("@")[0]]
        wrong += [(base, names[i]) for i in (names.index(adapter) - 1, names.index(adapter) + 1) if 0 <= i < len(names)]
        for other in wrong:
            for (_, span), difference in zip(
                long, scorer.differences([sequence for sequence, _ in long], *other), strict=True
            ):
                assert difference[span.start : span.end].max() > DIFFERS, f"{span} with {adapter} is of {other} too"
                others += 1
    return others, sum(len(sequence.weight_versions) > 1 for sequence in sequences)


def kill_core_of(application: str, deployment: str) -> None:
    """vLLM's own process under an engine."""
    (core,) = core_processes(replica_process(application, deployment))
    core.kill()


def samples_under_fire(sampler: RunningSampler, application: str) -> tuple[list[SampledSequence], Published, int]:
    """Sequences of all callers while weights change and engines die, the published versions, and their number."""
    published = Published.begun(sampler.status()["weights"])
    trainer = Trainer(sampler, published)
    trainer.start()
    wait_until(lambda: trainer.versions >= len(ADAPTERS), "every name means something", 60)
    load = Load(sampler)

    def state(engine: str) -> str:
        return str(sampler.status()["engines"][engine]["state"])

    def more_samples() -> None:
        before = len(load.sequences)
        wait_until(lambda: len(load.sequences) > before + 200, "samples come", 60)

    def await_versions(number: int) -> None:
        before = trainer.versions
        wait_until(lambda: trainer.versions >= before + number, "updates go on", 180)

    try:
        more_samples()
        kill_core_of(application, "engine-dp0")
        wait_until(lambda: state("engine-dp0") != "ready", "engine-dp0 is seen to be gone", 60)
        wait_until(lambda: state("engine-dp0") == "ready", "engine-dp0 is back", BACK_S)
        more_samples()
        replica_process(application, "engine-dp1").kill()
        wait_until(lambda: state("engine-dp1") != "ready", "engine-dp1 is seen to be gone", 60)
        more_samples()
        for _ in range(STORE_KILLS):
            replica_process(application, "store").kill()
            await_versions(5)
        more_samples()
    finally:
        trainer.stop()
        load.stop()
    wait_until(lambda: state("engine-dp1") == "ready", "engine-dp1 is back", BACK_S)
    last = sampler.sample([{"input_ids": [20, 21, 22]}] * 16, {"max_tokens": 16, "ignore_eos": True}, num_samples=4)
    assert set(last.columns.engine) == {"engine-dp0", "engine-dp1"}
    assert {span.version for s in last.sequences for span in s.weight_versions} == {sampler.status()["weights"]}
    replica_process(application, "router")  # there is one still
    return [*load.sequences, *last.sequences], published, trainer.versions
