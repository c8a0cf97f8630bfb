"""Replacing the model's own weights in every engine: exact spans, adapters stay, refused weights leave no trace."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.harness import EngineHarness
from tests.support.lora import save_adapter
from tests.support.weights import Reference, changed_weights
from twinkle_serve import hub
from twinkle_serve.adapters import read_adapter
from twinkle_serve.data_format.response import SampledSequence
from twinkle_serve.data_format.weights import CHECKPOINT_VERSION, INITIAL_LABEL, PauseMode
from twinkle_serve.errors import TwinkleServeError

LONG = {"max_tokens": 240, "ignore_eos": True, "logprobs": 0}


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def versions() -> dict[str, Any]:
    return {INITIAL_LABEL: None, "one": changed_weights(1), "two": changed_weights(2)}


@pytest.fixture(autouse=True)
async def initial_weights_afterwards(engine: EngineHarness) -> AsyncIterator[None]:
    yield
    await engine.server.pause("keep")
    await engine.server.load_weights(CHECKPOINT_VERSION)
    await engine.server.resume()


async def logprobs_under(
    engine: EngineHarness, reference: Reference, weights: Any, label: str, ids: list[int], adapter: Path | None = None
) -> np.ndarray[Any, Any]:
    """Scores a sequence under a version: with transformers, or for the toy model by loading it into the engine."""
    if engine.info.kind != "fake":
        return reference.logprobs(weights, ids, adapter)
    assert adapter is None
    await engine.server.pause("keep")
    await (engine.server.load_weights(CHECKPOINT_VERSION) if weights is None else engine.load(label, weights))
    await engine.server.resume()
    scored = await engine.sample([np.array(ids)], max_tokens=0, prompt_logprobs=0, logprobs=None)
    return np.array(scored.prompt_logprobs[1:])  # type: ignore[index]


async def check_spans(
    engine: EngineHarness, reference: Reference, versions: dict[str, Any], sequence: SampledSequence
) -> None:
    """Checks that each span has the logprobs of the version that it names, and of no other."""
    prompt = sequence.response.prompts[sequence.prompt_index].tolist()
    spans = sequence.weight_versions
    assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
    assert spans[-1].end == len(sequence.tokens)
    for label, weights in versions.items():
        scored = await logprobs_under(engine, reference, weights, label, prompt + sequence.tokens)
        difference = np.abs(scored[len(prompt) - 1 :] - np.array([row[0][1] for row in sequence.logprobs or []]))
        for span in spans:
            part = difference[span.start : span.end]
            if span.version == label:
                assert part.max() < 1e-3, f"{span} is not of {label}"
            else:
                assert part.max() > 1e-2, f"{span} is of {label} too"


async def running(engine: EngineHarness, prompt: np.ndarray[Any, Any]) -> asyncio.Task[Any]:
    """Starts a group of long samples; returns once it has tokens, as a stream that was sent with it has."""
    task = engine.start(engine.group(prompt, count=4, seed=5, **LONG))
    stream = engine.engine.stream_tokens(engine.group(prompt, max_tokens=8, ignore_eos=True))
    async with contextlib.aclosing(stream):
        tokens = 0
        async for delta in stream:
            tokens += len(delta.tokens)
            if tokens > 2:
                break
    return task


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
async def test_every_token_has_the_logprob_of_its_weights_version(
    engine: EngineHarness,
    prompts: list[np.ndarray[Any, Any]],
    reference: Reference,
    versions: dict[str, Any],
    mode: PauseMode,
) -> None:
    """With an update under running samples, and a group that is requested during the pause."""
    task = await running(engine, prompts[0])
    await engine.server.pause(mode)
    later = engine.start(engine.group(prompts[1], count=1, max_tokens=4, ignore_eos=True, logprobs=0))
    await engine.load("one", versions["one"])
    await engine.server.resume()
    response = engine.response_of([prompts[0]], [await task])
    (after,) = engine.response_of([prompts[1]], [await later]).sequences
    for sequence in response.sequences:
        labels = [span.version for span in sequence.weight_versions]
        if mode == "keep":
            assert labels == [INITIAL_LABEL, "one"] and len(sequence.tokens) == 240
        elif mode == "wait":
            assert labels == [INITIAL_LABEL] and len(sequence.tokens) == 240
        else:
            assert labels == [INITIAL_LABEL] and sequence.stop_reason == "abort" and 0 < len(sequence.tokens) < 240
    await check_spans(engine, reference, versions, response.sequences[-1])
    assert [span.version for span in after.weight_versions] == ["one"]
    await check_spans(engine, reference, versions, after)


async def test_cached_prompt_is_recomputed(
    engine: EngineHarness, prompts: list[np.ndarray[Any, Any]], reference: Reference, versions: dict[str, Any]
) -> None:
    """No key or value of the old weights stays in a prefix cache."""
    long = np.concatenate([*prompts, *prompts])
    await engine.one(long, max_tokens=8, ignore_eos=True)
    await engine.server.pause("keep")
    await engine.load("one", versions["one"])
    await engine.load("two", versions["two"])
    await engine.server.resume()
    await check_spans(engine, reference, versions, await engine.one(long, max_tokens=8, ignore_eos=True))


async def test_adapters_stay_loaded(
    engine: EngineHarness,
    prompts: list[np.ndarray[Any, Any]],
    reference: Reference,
    versions: dict[str, Any],
    tmp_path: Path,
) -> None:
    """An adapter answers with its own weights on top of the model's new ones, beside the model itself."""
    paths = {name: save_adapter(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2))}
    added = {name: await engine.add(f"stays-{name}", read_adapter(path)) for name, path in paths.items()}
    await engine.server.pause("keep")
    await engine.load("one", versions["one"])
    await engine.server.resume()
    prompt = prompts[0]
    options = {"max_tokens": 12, "ignore_eos": True, "logprobs": 0}
    samples = await asyncio.gather(*(engine.one(prompt, adapter=adapter, **options) for adapter in added.values()))
    base = await engine.one(prompt, **options)
    for sequence, path in zip([*samples, base], [*paths.values(), None], strict=True):
        assert [span.version for span in sequence.weight_versions] == ["one"]
        if engine.info.kind != "fake":
            scored = reference.logprobs(versions["one"], prompt.tolist() + sequence.tokens, path)
            assert np.abs(scored[len(prompt) - 1 :] - [row[0][1] for row in sequence.logprobs or []]).max() < 1e-3
    if engine.info.kind == "fake":
        assert len({tuple(sequence.tokens) for sequence in [*samples, base]}) == 3
    for version in added.values():
        await engine.server.drop_adapter(version)


async def test_checksum_depends_on_the_weights_only(engine: EngineHarness, versions: dict[str, Any]) -> None:
    """Not on their buckets, nor on earlier loads."""
    await engine.server.pause("keep")
    one = await engine.load("one", versions["one"])
    two = await engine.load("two", versions["two"])
    again = await engine.load("one again", dict(reversed(versions["one"].items())), bucket_bytes=2**18)
    assert one == again != two
    await engine.server.resume()


async def test_weights_that_do_not_fit_are_refused_and_later_ones_loaded(
    engine: EngineHarness, prompts: list[np.ndarray[Any, Any]], reference: Reference, versions: dict[str, Any]
) -> None:
    """Refused halfway, with some layers replaced: the engine reports no version until another load succeeds."""
    bad = dict(versions["two"])
    name = list(bad)[-2]
    bad[name] = bad[name][:1]
    await engine.server.pause("keep")
    # Of vLLM's worker too: what went wrong there, and where.
    said = r"vLLM refuses weights 'bad': \w+Error.*\(in \S+\.py:\d+, " if engine.info.kind == "vllm" else "shape"
    with pytest.raises(TwinkleServeError, match=said):
        await engine.load("bad", bad, bucket_bytes=2**18)
    assert (await engine.server.describe("test")).weights_version is None
    await engine.load("one", versions["one"])
    assert (await engine.server.describe("test")).weights_version is not None
    await engine.server.resume()
    await check_spans(engine, reference, versions, await engine.one(prompts[0], max_tokens=8, ignore_eos=True))


async def test_samples_without_tokens_survive_an_abort(
    engine: EngineHarness, prompts: list[np.ndarray[Any, Any]], versions: dict[str, Any]
) -> None:
    """With more groups than the engine runs at once, each gets tokens, those that waited from the new weights only."""
    groups = [
        engine.group(prompts[i % 6], count=3, **{**LONG, "max_tokens": 40}) for i in range(engine.info.max_num_seqs + 8)
    ]
    first = await running(engine, prompts[0])
    tasks = [engine.start(group) for group in groups]
    await asyncio.sleep(0)
    await engine.server.pause("abort")
    await engine.load("one", versions["one"])
    await engine.server.resume()
    columns = await asyncio.gather(first, *tasks)
    labels = [{label for spans in part.weight_versions for label, _ in spans} for part in columns]
    assert labels[0] == {INITIAL_LABEL}
    assert {"one"} in labels, "every group had started: the test shows nothing"
    assert all(part.lengths.min() > 0 for part in columns)
    assert all(
        (part.lengths == 40).all() for part, sampled_by in zip(columns, labels, strict=True) if sampled_by == {"one"}
    )


async def test_cancelled_pause_has_no_effect(engine: EngineHarness, prompts: list[np.ndarray[Any, Any]]) -> None:
    """Cancelled at any moment, with samples running or none."""
    for delay_s in (0.0, 0.001, 0.01):
        for running_too in (True, False):
            task = await running(engine, prompts[0]) if running_too else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await engine.server.pause("keep")
            await engine.server.resume()
            assert len((await engine.one(prompts[1], max_tokens=2, ignore_eos=True)).tokens) == 2
            if task is not None:
                assert (await task).lengths.tolist() == [240] * 4


async def test_pause_ends_without_a_router(
    engine: EngineHarness, prompts: list[np.ndarray[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease expires when no router contacts the engine."""
    monkeypatch.setattr("twinkle_serve.timing.ENGINE_PAUSE_LEASE_S", 0.2)
    await engine.server.pause("keep")
    assert len((await engine.one(prompts[0], max_tokens=2)).tokens) > 0


def test_demo_model_has_all_its_weights() -> None:
    """The changed weights in these tests are all of the model's weights."""
    from twinkle_serve.checkpoint import weight_shapes

    assert set(changed_weights(1)) == set(weight_shapes(hub.DEMO))
