"""Updates of running samples, on every engine and through every way of calling."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.harness import EngineHarness, Prompts
from tests.support.samplers import QUESTIONS
from tests.support.updates import Joined
from twinkle_serve.data_format.groups import Group
from twinkle_serve.data_format.sample_updates import SampleUpdate
from twinkle_serve.engines import group_runner
from twinkle_serve.engines.group_runner import PartialUpdate
from twinkle_serve.errors import RequestError
from twinkle_serve.routing.call_updates import CallUpdates, FollowedPrompt
from twinkle_serve.sampler import RunningSampler

SEEDED: dict[str, Any] = {"temperature": 1.0, "max_tokens": 60, "ignore_eos": True, "seed": 5}


@pytest.fixture(autouse=True)
def first_updates_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake engine samples everything within 2 ms."""
    monkeypatch.setattr(group_runner, "MIN_FIRST_PERIOD_S", 0.0)


async def updates_of(engine: EngineHarness, group: Group) -> tuple[list[PartialUpdate], list[SampleUpdate]]:
    """The updates that the engine reports of a group, and with those of its end, one of each sample."""
    assert group.updates is not None
    updates = CallUpdates(group.updates, {group.id: FollowedPrompt(0, reproducible=True)})
    session, reported, samples = await engine.session(), list[PartialUpdate](), 0
    await engine.server.submit(session, [group])
    async with contextlib.aclosing(engine.server.results(session)) as results:
        async for finished in results:
            assert not finished.failures
            for update in finished.partial_updates:
                updates.add(update)
            reported += finished.partial_updates
            if finished.columns is not None:
                updates.finish(finished.columns)
                samples += len(finished.columns)
            if samples == group.count:
                break
    return reported, sorted(updates.take(), key=lambda update: update.sample)


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 2},
        {"logprobs": None},
        {"stop": ["never in it", "second"]},
        {"stop": ["never in it", "second"], "skip_special_tokens": True},
        {"stop": ["second"], "include_stop_str_in_output": True},
        {"skip_special_tokens": True, "temperature": 2.0},
        {"temperature": 0, "seed": None},
        {"prompt_logprobs": 1, "logprobs": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("text", ["decoded", "whole"])
async def test_updates_joined_are_the_samples(
    engine: EngineHarness, prompts: Prompts, params: dict[str, Any], text: Any
) -> None:
    """Tokens, logprobs and text of three samples, as of the same group without updates."""
    options = {**SEEDED, **params, "count": 3}
    if "second" in options.get("stop", ()):
        free = await engine.one(prompts[1], **SEEDED)
        options["stop"] = [free.decoded[30:33] if stop == "second" else stop for stop in options["stop"]]
    whole = (await engine.sample([prompts[1]], **options)).columns
    reported = list[PartialUpdate]()
    for _ in range(5):  # on a busy machine all tokens of a short sample may arrive at once
        reported, joined = await updates_of(engine, replace(engine.group(prompts[1], **options), updates=text))
        assert len(joined) == 3
        if reported:
            break
    assert reported, "something is reported before the samples end"
    texts = whole.decoded if text == "decoded" or whole.whole_text is None else whole.whole_text
    for row, (update, start) in enumerate(zip(joined, whole.starts.tolist(), strict=True)):
        tokens = slice(start, start + int(whole.lengths[row]))
        assert update.sample == row and update.stop_reason is not None
        assert update.tokens.tolist() == whole.tokens[tokens].tolist()
        assert update.text == texts[row]
        assert (update.logprobs is None) == (whole.logprobs is None)
        if update.logprobs is not None and whole.logprobs is not None:
            np.testing.assert_allclose(update.logprobs, whole.logprobs[tokens], atol=1e-3)
        assert update.weight_versions == (("initial", 0),)
    if params.get("temperature") == 0:
        assert {update.count for update in reported} == {3}, "the samples of a greedy group are one"


async def test_token_that_ends_a_sample_comes_with_its_end(engine: EngineHarness, prompts: Prompts) -> None:
    """A running sample's tokens never include it."""
    free = await engine.one(prompts[0], **SEEDED)
    stop = free.tokens[40]
    at = free.tokens.index(stop)
    group = replace(engine.group(prompts[0], **{**SEEDED, "stop_token_ids": [stop]}), updates="decoded")
    reported, (joined,) = await updates_of(engine, group)
    assert joined.tokens.tolist() == free.tokens[: at + 1] and joined.stop_reason == "stop"
    assert sum(len(update.partial) for update in reported) <= at


async def test_updates_of_an_adapter_are_its_samples(
    engine: EngineHarness, prompts: Prompts, adapters: list[Path], name: str
) -> None:
    """With a resumed sample, whose first update follows the tokens that were there."""
    from twinkle_serve.adapters import read_adapter
    from twinkle_serve.data_format.samples import PartialSample

    version = await engine.add(name, read_adapter(adapters[0]))
    options = {**SEEDED, "temperature": 0, "seed": None, "adapter": version, "logprobs": None}
    free = await engine.one(prompts[2], **options)
    beginning = PartialSample(
        tokens=np.array(free.tokens[:10], np.int32),
        logprobs=None,
        logprob_tokens=None,
        weight_versions=(("initial", 0),),
    )
    group = replace(engine.group(prompts[2], **options), updates="decoded", partial=beginning)
    session = await engine.session()
    await engine.server.submit(session, [group])
    reported = list[PartialUpdate]()
    async with contextlib.aclosing(engine.server.results(session)) as results:
        async for finished in results:
            reported += finished.partial_updates
            if finished.columns is not None:
                assert finished.columns.tokens.tolist() == free.tokens
                break
    assert reported and reported[0].offset == 10 and reported[0].text_offset == 0
    tokens = [token for update in reported for token in update.partial.tokens.tolist()]
    assert tokens == free.tokens[10 : 10 + len(tokens)]
    assert free.decoded.startswith("".join(update.text for update in reported))


def test_call_with_updates_has_what_the_same_call_has_without(sampler: RunningSampler) -> None:
    """Prompts, samples and text, each sample's updates before the response to its prompt."""
    options: dict[str, Any] = {"max_tokens": 40, "seed": 11, "logprobs": 1, "ignore_eos": True}
    plain = sampler.sample(QUESTIONS, options, num_samples=2)
    for text in ("decoded", "whole"):
        params = {**options, "skip_special_tokens": text == "whole"}
        joined = Joined.of(sampler.sample_updates(QUESTIONS, params, num_samples=2, update_text=text))
        joined.check(whole=text == "whole")
        assert joined.begun is not None and joined.begun.logprobs_mode == plain.logprobs_mode
        assert joined.begun.prompt_indices == (0, 1, 2) and all(joined.begun.reproducible)
        for i, sequence in enumerate(plain.sequences):
            update = SampleUpdate.concat(joined.samples[i // 2, i % 2])
            assert update.tokens.tolist() == sequence.tokens
            assert update.text == sequence.decoded, "which has special tokens, and so has the whole text"


def test_call_with_updates_that_is_closed_frees_the_engine(sampler: RunningSampler) -> None:
    """Sync and async."""
    endless = {"max_tokens": 200, "ignore_eos": True}
    items = sampler.sample_updates(QUESTIONS, endless, num_samples=2)
    next(items)
    items.close()  # type: ignore[attr-defined]

    async def close_after_the_first() -> None:
        async with contextlib.aclosing(sampler.sample_updates_async(QUESTIONS, endless, num_samples=2)) as items:  # type: ignore[type-var]
            async for _ in items:
                break

    asyncio.run(close_after_the_first())
    assert len(sampler.sample(QUESTIONS[:1], {"max_tokens": 4, "ignore_eos": True}).sequences[0].tokens) == 4


def test_unknown_text_of_updates_is_refused(sampler: RunningSampler) -> None:
    """Before anything is sampled."""
    with pytest.raises(RequestError, match="update_text must be one of decoded, whole, got 'all'"):
        next(sampler.sample_updates(QUESTIONS, update_text="all"))  # type: ignore[arg-type]
