"""update_weights and pause through every sampler: in this process, and as a service with two engines."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.lora import random_adapter
from tests.support.weights import Reference, changed_weights
from twinkle_serve import SampleResponse
from twinkle_serve.errors import (
    DeadlineError,
    LeaseExpiredError,
    RequestError,
    TwinkleServeError,
    WeightsError,
)
from twinkle_serve.memory_files import MemoryDirectory
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler import RunningSampler, bucket_sending
from twinkle_serve.sampler.client import ServiceClient

QUESTIONS = [{"messages": [{"role": "user", "content": f"{a}+{a + 3}="}]} for a in range(30, 38)]
LONG = {"max_tokens": 200, "ignore_eos": True, "seed": 1}
LABELS = (f"step-{number}" for number in itertools.count(1))


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    return changed_weights(1)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def kind(sampler: RunningSampler) -> str:
    return str(next(iter(sampler.status()["engines"].values()))["engine"])


def labels_of(response: SampleResponse) -> set[str]:
    return {span.version for sequence in response.sequences for span in sequence.weight_versions}


def check_logprobs(sampler: RunningSampler, reference: Reference, weights: Any, response: SampleResponse) -> None:
    """Checks that these weights sampled the response: with transformers, for the toy model with the sampler itself."""
    assert labels_of(response) == {sampler.status()["weights"]}
    assert sampler.verify(response, against=sampler).max_abs_difference < 1e-3
    if kind(sampler) != "fake":
        for sequence in response.sequences:
            prompt = response.prompts[sequence.prompt_index].tolist()
            scored = reference.logprobs(weights, prompt + sequence.tokens)[len(prompt) - 1 :]
            assert np.abs(scored - sequence.logprob_array).max() < 1e-3


def as_pairs(weights: dict[str, Any], path: Path) -> Any:
    return ((name, tensor) for name, tensor in weights.items())


def as_directory(weights: dict[str, Any], path: Path) -> Any:
    """Two files, as large models have."""
    from safetensors.torch import save_file

    names = list(weights)
    for number in range(2):
        save_file({name: weights[name].clone() for name in names[number::2]}, path / f"model-{number}.safetensors")
    return str(path)


def as_state_dict(weights: dict[str, Any], path: Path) -> Any:
    """With a tied output layer: one tensor under two names."""
    return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}


def as_reused_memory(weights: dict[str, Any], path: Path) -> Any:
    """Each pair in the memory of the one before, and the tied output layer last, in a bucket of its own."""
    import torch

    memory = torch.empty(max(tensor.numel() for tensor in weights.values()))
    for name, tensor in as_state_dict(weights, path).items():
        yield name, memory[: tensor.numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("form", [as_pairs, as_directory, as_state_dict, as_reused_memory])
def test_update_replaces_the_weights_of_every_engine(
    sampler: RunningSampler, weights: dict[str, Any], reference: Reference, tmp_path: Path, form: Any
) -> None:
    """From any form that a trainer has, in many buckets; both engines of a service sample from them."""
    label = next(LABELS)
    before = sampler.sample(QUESTIONS, {"temperature": 0, "max_tokens": 4})
    assert sampler.update_weights(form(weights, tmp_path), label, bucket_bytes=2**19) == label
    status = sampler.status()
    assert status["weights"] == label and not status["paused"]
    assert {engine["weights"] for engine in status["engines"].values()} == {label}
    after = sampler.sample(QUESTIONS, {"temperature": 0, "max_tokens": 4, "ignore_eos": True})
    assert set(after.columns.engine) == set(status["engines"])
    check_logprobs(sampler, reference, weights, after)
    if len(before.columns.weight_versions) and labels_of(before) != {label}:
        with pytest.raises(RequestError, match="by now"):
            sampler.verify(before, against=sampler)


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_update_under_running_samples(sampler: RunningSampler, weights: dict[str, Any], mode: Any) -> None:
    """No sample is lost, and each has the tokens and versions that the mode promises."""
    before, label = sampler.status()["weights"], next(LABELS)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(sampler.sample, QUESTIONS, LONG, num_samples=4)
        stream = sampler.sample_stream(QUESTIONS[0], {"max_tokens": 3, "ignore_eos": True})
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        sampler.update_weights(weights, label, mode=mode)
        response = call.result()
    assert len(response.sequences) == 32
    lengths, reasons = response.columns.lengths, {sequence.stop_reason for sequence in response.sequences}
    if mode == "abort":
        assert reasons <= {"abort", "length"} and (lengths > 0).all()
    else:
        assert reasons == {"length"} and set(lengths.tolist()) == {200}
    assert labels_of(response) <= {before, label}
    for sequence in response.sequences:
        assert sequence.weight_versions[-1].end == len(sequence.tokens)
        if mode != "keep":
            assert len(sequence.weight_versions) == 1


def nan(weights: dict[str, Any]) -> Any:
    bad = weights["model.norm.weight"].clone()
    bad[3] = float("nan")
    return {**weights, "model.norm.weight": bad}


def unknown(weights: dict[str, Any]) -> Any:
    return {**weights, "model.layers.99.mlp.up_proj.weight": weights["model.norm.weight"]}


def shape(weights: dict[str, Any]) -> Any:
    return {**weights, "model.norm.weight": weights["model.norm.weight"][:5]}


def missing(weights: dict[str, Any]) -> Any:
    return {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}


def twice(weights: dict[str, Any]) -> Any:
    return [*weights.items(), ("model.norm.weight", weights["model.norm.weight"])]


def tied(weights: dict[str, Any]) -> Any:
    """An output layer of another version than the embedding, in a bucket of its own."""
    return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] * 2}


def tied_shape(weights: dict[str, Any]) -> Any:
    return {"lm_head.weight": weights["model.embed_tokens.weight"][:5], **weights}


def integers(weights: dict[str, Any]) -> Any:
    return {**weights, "model.norm.weight": weights["model.norm.weight"].long()}


def huge(weights: dict[str, Any]) -> Any:
    """Finite in float64, and infinite in the engine's float32."""
    return {**weights, "model.norm.weight": weights["model.norm.weight"].double() * 1e39}


def meta(weights: dict[str, Any]) -> Any:
    return {**weights, "model.norm.weight": weights["model.norm.weight"].to("meta")}


def unmerged(weights: dict[str, Any]) -> Any:
    return random_adapter(seed=1).state_dict()


def no_pairs(weights: dict[str, Any]) -> Any:
    return list(weights)


def nothing(weights: dict[str, Any]) -> Any:
    return None


def no_tensor(weights: dict[str, Any]) -> Any:
    return {**weights, "model.norm.weight": "all of them"}


def breaks_off(weights: dict[str, Any]) -> Any:
    """A trainer whose own code fails halfway."""
    yield from itertools.islice(weights.items(), 20)
    raise RuntimeError("the trainer failed")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (nan, WeightsError, "model.norm.weight' has 1 values of 128 that are not finite"),
        (unknown, WeightsError, "the model has no weight 'model.layers.99.mlp.up_proj.weight'"),
        (shape, WeightsError, r"has the shape \(5,\), the model's has \(128,\)"),
        (missing, WeightsError, "lacks 1 of the model's 46 weights, such as model.norm.weight"),
        (twice, WeightsError, "'model.norm.weight' comes twice"),
        (tied, WeightsError, "'lm_head.weight' differs from 'model.embed_tokens.weight'"),
        (tied_shape, WeightsError, r"'lm_head.weight' has the shape \(5, 128\)"),
        (integers, WeightsError, r"'model.norm.weight' has the dtype I64 \(integer\), the model's has F32 \(float\)"),
        (huge, WeightsError, r"'model.norm.weight' has values of magnitude .* in F64; the engines hold it in F32, up"),
        (meta, WeightsError, "'model.norm.weight' is on the meta device"),
        (unmerged, WeightsError, r"not merged. Pass the model of peft with merge_lora=True"),
        (no_pairs, WeightsError, "pairs of name and tensor, got str"),
        (nothing, WeightsError, "a state_dict, pairs of name and tensor, or a path, got None"),
        (no_tensor, WeightsError, "pairs of name and tensor, got 'model.norm.weight' and str"),
        (breaks_off, RuntimeError, "the trainer failed"),
    ],
)
def test_invalid_weights_are_refused(
    sampler: RunningSampler, weights: dict[str, Any], make: Any, error: type[Exception], message: str
) -> None:
    """They have no visible effect, and the next update with the same label succeeds."""
    before, label = sampler.status()["weights"], next(LABELS)
    with pytest.raises(error, match=message):
        sampler.update_weights(make(weights), label, bucket_bytes=2**19)
    assert sampler.status()["weights"] == before and not sampler.status()["paused"]
    assert labels_of(sampler.sample(QUESTIONS, {"max_tokens": 2})) == {before}
    assert sampler.update_weights(weights, label) == label


def test_files_that_are_cut_off_are_refused(sampler: RunningSampler, weights: dict[str, Any], tmp_path: Path) -> None:
    """So is a directory without files."""
    path = Path(as_directory(weights, tmp_path)) / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="cut off or damaged"):
        sampler.update_weights(tmp_path, next(LABELS))
    with pytest.raises(WeightsError, match="no safetensors files"):
        sampler.update_weights(str(tmp_path / "nothing"), next(LABELS))


def test_bad_arguments_are_refused(sampler: RunningSampler, weights: dict[str, Any]) -> None:
    """Before anything is sent."""
    current = sampler.status()["weights"]
    for version in ("initial", current):
        with pytest.raises(WeightsError, match="exists already"):
            sampler.update_weights(weights, version)
    with pytest.raises(RequestError, match="mode must be one of keep, wait, abort, got 'now'"):
        sampler.update_weights(weights, next(LABELS), mode="now")  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="non-empty string"):
        sampler.update_weights(weights, "")
    for option in ({"timeout_s": None}, {"timeout_s": 0}, {"bucket_bytes": -1}):
        with pytest.raises(RequestError, match="must be a number above 0"):
            sampler.update_weights(weights, next(LABELS), **option)
    for lease_s in (0, -1, float("nan"), True, 1e9):
        with pytest.raises(RequestError, match="lease_s"):
            sampler.pause(lease_s=lease_s)
    with pytest.raises(RequestError, match="mode must be"):
        sampler.pause("stop")  # type: ignore[arg-type]
    assert not sampler.status()["paused"]


def test_update_that_takes_too_long_is_a_deadline_error(sampler: RunningSampler, weights: dict[str, Any]) -> None:
    """Wherever its time ends; the weights before stay, and the next update is taken."""
    before = sampler.status()["weights"]
    with pytest.raises(DeadlineError):
        sampler.update_weights(weights, next(LABELS), timeout_s=1e-6)
    assert sampler.status()["weights"] == before and not sampler.status()["paused"]
    sampler.update_weights(weights, next(LABELS))


def test_nan_is_accepted_with_allow_nonfinite(sampler: RunningSampler, weights: dict[str, Any]) -> None:
    """Useful when looking for a bug."""
    label = next(LABELS)
    if kind(sampler) == "fake":
        assert sampler.update_weights(nan(weights), label, allow_nonfinite=True) == label
    sampler.update_weights(weights, next(LABELS))


def test_second_update_at_a_time_is_refused(sampler: RunningSampler, weights: dict[str, Any]) -> None:
    """While the first one's trainer is still sending."""
    entered, go_on = threading.Event(), threading.Event()

    def slow() -> Iterator[tuple[str, Any]]:
        entered.set()
        go_on.wait(60)
        yield from weights.items()

    label = next(LABELS)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(sampler.update_weights, slow(), label)
        # The first bucket starts the generator, after the update has begun.
        assert entered.wait(60)
        with pytest.raises(WeightsError, match=f"an update to '{label}' is under way"):
            sampler.update_weights(weights, next(LABELS))
        go_on.set()
        assert first.result() == label


def test_pause_holds_samples_until_it_ends(sampler: RunningSampler) -> None:
    """A call during the pause waits, within its own deadline; the end of the block resumes."""
    with ThreadPoolExecutor(1) as pool:
        with sampler.pause():
            assert sampler.status()["paused"]
            with pytest.raises(DeadlineError):
                sampler.sample(QUESTIONS, {"max_tokens": 2}, timeout_s=0.5)
            call = pool.submit(sampler.sample, QUESTIONS, {"max_tokens": 2})
            with sampler.pause("wait"):  # nested: both have to end
                pass
            assert sampler.status()["paused"] and not call.done()
        assert not sampler.status()["paused"]
        assert len(call.result().sequences) == len(QUESTIONS)


def test_update_in_a_pause_leaves_it_paused(sampler: RunningSampler, weights: dict[str, Any]) -> None:
    """Only the caller of the pause resumes."""
    label = next(LABELS)
    with sampler.pause():
        sampler.update_weights(weights, label)
        assert sampler.status()["paused"]
    assert labels_of(sampler.sample(QUESTIONS, {"max_tokens": 2})) == {label}


def test_pause_ends_when_its_caller_is_gone(sampler: RunningSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without renewal sampling resumes; a caller that is still alive gets an error."""
    monkeypatch.setattr("twinkle_serve.sampler.pause.keep_renewed", lambda renew, period_s: asyncio.sleep(0))
    pause = sampler.pause(lease_s=0.3)
    assert len(sampler.sample(QUESTIONS, {"max_tokens": 2}, timeout_s=30).sequences) == len(QUESTIONS)
    with pytest.raises(LeaseExpiredError, match="the pause is over"):
        pause.resume()
    pause.resume()  # idempotent


def test_buckets_whose_trainer_is_gone_are_read_from_the_disk(
    sampler: RunningSampler, weights: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died when all had arrived, before the engines loaded them."""
    directories: list[MemoryDirectory] = []

    class Noted(MemoryDirectory):
        def __init__(self) -> None:
            super().__init__()
            directories.append(self)

    client, call = sampler._client, sampler._client.call

    def without_files(timeout_s: float, method: Any, *args: Any, **options: Any) -> Any:
        if method is RouterAPI.publish_weights:
            for directory in directories:
                for path in directory.path.glob("*.safetensors"):
                    path.unlink()
        return call(timeout_s, method, *args, **options)

    monkeypatch.setattr(bucket_sending, "MemoryDirectory", Noted)
    monkeypatch.setattr(client, "call", without_files)
    label = sampler.update_weights(weights, next(LABELS), bucket_bytes=2**18)
    (response,) = sampler.sample(QUESTIONS[:1], {"max_tokens": 2})
    assert response.sequences[0].weight_versions[0].version == label
    assert bool(directories) == isinstance(client, ServiceClient)


def test_cancelled_update_leaves_nothing_behind(
    sampler: RunningSampler, weights: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the trainer between two buckets."""

    def interrupted() -> Iterator[tuple[str, Any]]:
        yield from itertools.islice(weights.items(), 20)
        raise KeyboardInterrupt

    before = sampler.status()["weights"]
    with pytest.raises(KeyboardInterrupt):
        sampler.update_weights(interrupted(), next(LABELS), bucket_bytes=2**18)
    assert sampler.status()["weights"] == before
    client = sampler._client
    with client.sending() as sender, pytest.raises(TwinkleServeError, match="given up"):
        client.loop.call(client.call(60.0, RouterAPI.append_weights, 1, 0, sender.send(np.zeros(8, np.uint8))))
    sampler.update_weights(weights, next(LABELS))
