"""Samples whose engine ends go on from what the router had received of them: two engines in this process."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.support.eventually import eventually
from tests.support.failing_service import PROMPTS, Service, exact
from tests.support.responses import columns
from twinkle_serve.data_format.samples import PartialSample
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines.group_runner import PartialUpdate
from twinkle_serve.engines.resumed import join_resumed
from twinkle_serve.errors import EngineDeadError
from twinkle_serve.routing.groups import RoutedGroup
from twinkle_serve.routing.resume import PartialSamples, can_resume, rejoin

LONG: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "logprobs": 2}


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    monkeypatch.setattr("twinkle_serve.timing.PROBE_PERIOD_S", 0.05)
    monkeypatch.setattr("twinkle_serve.engines.group_runner.PARTIAL_UPDATES_PERIOD_S", 0.02)
    made = Service(failover="resume")
    await made.start()
    for engine in made.engines.values():
        engine._args = engine._args.model_copy(update={"token_latency_s": 0.002})
    yield made
    await eventually(made.idle)
    assert not len(made.router._scheduler._partials), "partial samples that nobody waits for"
    await made.stop()


async def running_on(service: Service, at_least: int) -> tuple[str, dict[tuple[int, int], PartialSample]]:
    """The engine that has samples, or one of them, when so many tokens have arrived of each sample that runs; and what
    has arrived of its own, by the first token of the prompt and the sample's index."""
    pool = service.router._scheduler

    def busy() -> list[str]:  # of those in use: one that was ended may not be back
        return [name for name in service.router._engines.active if pool.sequences_of(name)]

    async def begun() -> bool:
        partials = [partial for samples in pool._partials._partials.values() for partial in samples.values()]
        return bool(busy()) and bool(partials) and all(partial.length >= at_least for partial in partials)

    await eventually(begun)
    name = busy()[0]
    arrived = {}
    for key, group in pool._dispatchers["main"]._engines[name].groups.items():
        for sample in sorted(pool._dispatchers["main"]._engines[name].left[key]):
            partial = pool._partials._partials[group.id][sample]
            arrived[int(group.prompt_ids[0]), sample] = PartialSample.concat(partial.parts)
    return name, arrived


async def broken_off(service: Service) -> dict[tuple[int, int], PartialSample]:
    """Ends an engine in the middle of its samples. Returns what had arrived of them."""
    name, arrived = await running_on(service, 10)
    service.engines[name].end(EngineDeadError("killed"))
    return arrived


def tokens_sampled(service: Service) -> int:
    return sum(engine._progress for engine in service.engines.values())


async def test_sample_goes_on_from_what_had_arrived_when_its_engine_ends(service: Service) -> None:
    """The same tokens, logprobs and all, and then others; each sample once, and no token before the break twice."""
    before = tokens_sampled(service)
    call = asyncio.ensure_future(service.router.sample(PROMPTS[:3], LONG, num_samples=2))
    arrived = await broken_off(service)
    response = await call
    assert exact(response, 3, 2)
    columns, k = response.columns, LONG["logprobs"]
    assert arrived and columns.logprobs is not None and columns.logprob_tokens is not None
    assert columns.lengths.tolist() == [60] * 6 and columns.logprobs.shape == (360, 1 + k)
    assert (columns.logprob_tokens[:, 0] == columns.tokens).all()
    for row, seq in enumerate(response.sequences):
        begun = arrived.get((24 + row // 2, row % 2))
        assert seq.weight_versions == [("initial", 0, 60)]
        if begun is not None:
            first, at = len(begun), columns.starts[row]
            assert seq.tokens[:first] == begun.tokens.tolist()
            assert (columns.logprobs[at : at + first] == begun.logprobs).all()
            assert (columns.logprob_tokens[at : at + first] == begun.logprob_tokens).all()
    # What was sampled after the last report of the engine that ended is all that is sampled twice.
    lost = tokens_sampled(service) - before - 360
    assert 0 <= lost < 60 * len(arrived) - sum(map(len, arrived.values()))
    for prompt in range(3):
        ids = np.asarray(PROMPTS[prompt]["input_ids"], np.int32)
        for seq in response[prompt].sequences:
            assert seq.decoded == service.engines["a"].decode(seq.tokens)
            scored = await service.router.sample(
                {"input_ids": np.concatenate([ids, seq.token_array])}, {"max_tokens": 0, "prompt_logprobs": 0}
            )
            assert scored.prompt_logprobs is not None
            assert scored.prompt_logprobs[len(ids) :] == np.asarray(seq.logprob_array).tolist(), (
                "logprobs re-score exactly"
            )


async def test_sample_goes_on_again_where_its_second_engine_is_drained(service: Service) -> None:
    """What both had sampled of it is there."""
    call = asyncio.ensure_future(service.router.sample(PROMPTS[:1], LONG))
    begun = (await broken_off(service))[24, 0]
    name, arrived = await running_on(service, len(begun) + 10)
    await service.router.drain_engine(name, 1e-6)
    (seq,) = (await call).sequences
    longer = arrived[24, 0]
    assert longer.tokens[: len(begun)].tolist() == begun.tokens.tolist()
    assert seq.tokens[: len(longer)] == longer.tokens.tolist() and len(seq.tokens) == 60
    await service.router.undrain_engine(name)


async def test_sample_that_may_have_ended_two_engines_is_sampled_from_its_start(service: Service) -> None:
    """Alone, as a suspect; its call has what it asked for."""
    call = asyncio.ensure_future(service.router.sample(PROMPTS[:1], LONG, num_samples=2))
    await broken_off(service)
    await broken_off(service)
    assert exact(await call, 1, 2)


@pytest.mark.parametrize("params", [{"seed": 5}, {"stop": ["never in it"]}, {"prompt_logprobs": 0}, {"temperature": 0}])
async def test_sample_that_cannot_go_on_honestly_is_sampled_from_its_start(
    service: Service, params: dict[str, Any]
) -> None:
    """Seeds, stop strings, scores of the prompt, greedy: nothing is even reported of it."""
    options = {**LONG, **params}
    reference = await service.router.sample(PROMPTS[:1], options)
    for engine in service.engines.values():
        engine.sampled.clear()
    before = tokens_sampled(service)
    call = asyncio.ensure_future(service.router.sample(PROMPTS[:1], options))

    async def well_begun() -> bool:  # what may be resumed is reported after some ten tokens here
        return tokens_sampled(service) >= before + 30

    await eventually(well_begun)
    assert not len(service.router._scheduler._partials)
    next(engine for engine in service.engines.values() if engine.sampled).end(EngineDeadError("killed"))
    response = await call
    assert exact(response, 1, 1) and len(response.sequences[0].tokens) == 60
    if "seed" in params or "temperature" in params:
        assert response.sequences[0].tokens == reference.sequences[0].tokens
    assert sum((engine.sampled for engine in service.engines.values()), Counter())[24, 0] == 2


async def test_resumed_sample_names_both_versions_of_the_weights(service: Service) -> None:
    """The tokens that were there are of those that sampled them."""
    for engine in service.engines.values():
        engine._label = "old"
    call = asyncio.ensure_future(service.router.sample(PROMPTS[:1], LONG))
    arrived = await broken_off(service)
    for engine in service.engines.values():
        engine._label = "new"
    (seq,) = (await call).sequences
    at = seq.weight_versions[0].end  # the engine may have reported more tokens while it ended
    assert seq.weight_versions == [("old", 0, at), ("new", at, 60)] and len(arrived[24, 0]) <= at < 60


async def test_restart_is_the_default_and_has_nothing_reported() -> None:
    """Nobody pays for what they did not ask for."""
    service = Service()
    await service.start()
    assert exact(await service.router.sample(PROMPTS[:2], LONG, num_samples=2), 2, 2)
    assert not len(service.router._scheduler._partials)
    await service.stop()


def group(**fields: Any) -> RoutedGroup:
    params = DecodingParams(max_tokens=4, stop_token_ids=(9,))
    return RoutedGroup(id=1, prompt_ids=np.zeros(2, np.int32), **{"params": params, **fields})


def begun(*tokens: int) -> PartialSample:
    return PartialSample(
        tokens=np.array(tokens, np.int32), logprobs=None, logprob_tokens=None, weight_versions=(("initial", 0),)
    )


def update(sample: int, *tokens: int, offset: int = 0, attempts: int = 0) -> PartialUpdate:
    return PartialUpdate(attempt=(1, 0, attempts), sample=sample, offset=offset, partial=begun(*tokens))


async def test_partial_samples_that_are_complete_stale_or_have_a_gap_are_not_resumed(service: Service) -> None:
    """Samples with nothing to go on from stay together with their neighbours."""
    partials = PartialSamples()
    partials.start(group(count=7, resume=True))
    partials.extend([update(1, 5), update(1, 6, offset=1), update(2, 5, 9), update(3, 1, 2, 3, 4)])
    partials.extend([update(4, 5, offset=1), update(5, 5, attempts=1), update(1, 7, offset=9)])
    info = service.engines["a"].info
    parts = partials.resume(group(count=7, resume=True), info)
    assert [(part.first_sample, part.count) for part in parts] == [(0, 1), (1, 1), (2, 5)]
    assert parts[1].partial is not None and parts[1].partial.tokens.tolist() == [5, 6]
    assert parts[0].partial is parts[2].partial is None
    partials.drop([1])
    assert partials.resume(group(resume=True), info)[0].partial is None


def test_suspects_are_prompts_and_not_samples() -> None:
    """Neighbours are one group again, with the worst that is known of each."""
    alone = [group(first_sample=0, partial=begun(5), lost=("a",)), group(first_sample=1, count=2, lost=("a", "b"))]
    (joined,) = rejoin(alone)
    assert (joined.first_sample, joined.count, joined.partial, joined.lost) == (0, 3, None, ("a", "b"))
    assert len(rejoin([group(first_sample=0), group(first_sample=2)])) == 2


def test_stop_tokens_and_penalties_do_not_keep_a_sample_from_going_on() -> None:
    """What an engine needs for them is in the tokens."""
    assert can_resume(group(params=DecodingParams(stop_token_ids=(3,), repetition_penalty=1.2, top_p=0.5, logprobs=3)))


def test_resumed_sample_has_both_of_its_texts_whole() -> None:
    """Without special tokens, if asked for, and with them; here 0 is special."""

    def decode(tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(f"{token} " for token in tokens if token or not skip_special_tokens)

    rest = replace(columns(1, ["x"], width=0), tokens=np.array([0, 7], np.int32), lengths=np.array([2], np.int32))
    params = DecodingParams(skip_special_tokens=True, logprobs=None)
    partial = PartialSample(tokens=np.array([5, 0]), logprobs=None, logprob_tokens=None, weight_versions=(("a", 0),))
    whole = join_resumed(partial, rest, params, decode)
    assert (whole.decoded, whole.whole_text) == (["5 7 "], ["5 0 0 7 "])
