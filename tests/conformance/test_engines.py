"""Guarantees of every engine."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.support.harness import LOGPROB_TOLERANCE, EngineHarness, Prompts
from twinkle_serve.data_format import SamplingParams
from twinkle_serve.engines.group_runner import Finished, GroupRunner
from twinkle_serve.engines.param_checks import check_fits


async def test_engine_returns_count_samples_of_each_prompt_in_order(engine: EngineHarness, prompts: Prompts) -> None:
    """n samples of each prompt, numbered from first_sample."""
    response = await engine.sample(prompts, count=3, first_sample=5, max_tokens=4)
    assert response.columns.group.tolist() == [i for i in range(len(prompts)) for _ in range(3)]
    assert response.columns.sample.tolist() == [5, 6, 7] * len(prompts)
    assert all(1 <= len(seq.tokens) <= 4 for seq in response.sequences)
    assert {seq.engine for seq in response.sequences} == {engine.info.name}


async def test_engine_keeps_max_tokens(engine: EngineHarness, prompts: Prompts) -> None:
    """Exactly max_tokens if eos is ignored, with stop reason length."""
    for max_tokens in (1, 7):
        response = await engine.sample(prompts, max_tokens=max_tokens, ignore_eos=True)
        assert [len(seq.tokens) for seq in response.sequences] == [max_tokens] * len(prompts)
        assert {seq.stop_reason for seq in response.sequences} == {"length"}


async def test_engine_stops_at_the_end_of_the_context(engine: EngineHarness, prompts: Prompts) -> None:
    """Without max_tokens a sample ends where the context ends."""
    room = 3
    prompt = np.resize(prompts[0], engine.info.max_model_len - room)
    seq = await engine.one(prompt, ignore_eos=True)
    assert len(seq.tokens) == room
    assert seq.stop_reason == "length"


async def test_engine_scores_the_longest_prompt_that_it_allows(engine: EngineHarness, prompts: Prompts) -> None:
    """The whole context, or one token less."""
    length = engine.info.max_model_len - (not engine.info.scores_full_context)
    prompt = np.resize(prompts[0], length)
    check_fits(engine.info, prompt, SamplingParams(max_tokens=0))
    scored = await engine.sample([prompt], max_tokens=0, prompt_logprobs=0)
    assert scored.prompt_logprobs is not None and len(scored.prompt_logprobs) == length


async def test_engine_cuts_at_the_stop_string_that_is_complete_first(engine: EngineHarness, prompts: Prompts) -> None:
    """A longer one begins earlier and a shorter one ends earlier: the shorter one cuts."""
    free = await engine.one(prompts[1], temperature=0, max_tokens=8, ignore_eos=True)
    text = free.decoded
    seq = await engine.one(prompts[1], temperature=0, max_tokens=8, ignore_eos=True, stop=[text[:4], text[1:3]])
    assert seq.decoded == text[: text.index(text[1:3])]


async def test_engine_greedy_is_the_likeliest_token_every_time(engine: EngineHarness, prompts: Prompts) -> None:
    """Temperature 0: the same tokens each time, each the top-1, whatever the seed."""
    first = await engine.sample(prompts, count=2, temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
    again = await engine.sample(prompts, count=2, temperature=0, max_tokens=6, logprobs=1, ignore_eos=True, seed=7)
    assert all(part.sequences[0].tokens == part.sequences[1].tokens for part in first)
    assert [seq.tokens for seq in first.sequences] == [seq.tokens for seq in again.sequences]
    tokens = first.columns.logprob_tokens
    assert tokens is not None
    assert (tokens[:, 0] == tokens[:, 1]).all()


async def test_engine_top_k_1_is_greedy(engine: EngineHarness, prompts: Prompts) -> None:
    """At any temperature, top_k=1 leaves only the likeliest token."""
    greedy = await engine.sample(prompts, temperature=0, max_tokens=5, ignore_eos=True)
    top = await engine.sample(prompts, temperature=2.0, top_k=1, max_tokens=5, ignore_eos=True, seed=3)
    assert [seq.tokens for seq in top.sequences] == [seq.tokens for seq in greedy.sequences]


async def test_engine_top_k_samples_from_the_k_likeliest_only(engine: EngineHarness, prompts: Prompts) -> None:
    """And from several of them."""
    response = await engine.sample(
        prompts[:2], count=32, temperature=2.0, top_k=3, max_tokens=4, logprobs=3, ignore_eos=True, seed=11
    )
    tokens = response.columns.logprob_tokens
    assert tokens is not None
    assert all(row[0] in row[1:] for row in tokens)
    assert len({tuple(seq.tokens) for seq in response.sequences}) > 2


async def test_engine_tiny_top_p_is_greedy(engine: EngineHarness, prompts: Prompts) -> None:
    """A nucleus smaller than any token's probability has only the likeliest token."""
    greedy = await engine.sample(prompts, temperature=0, max_tokens=5, ignore_eos=True)
    nucleus = await engine.sample(prompts, temperature=1.0, top_p=1e-6, max_tokens=5, ignore_eos=True, seed=3)
    assert [seq.tokens for seq in nucleus.sequences] == [seq.tokens for seq in greedy.sequences]


async def test_engine_top_p_keeps_to_the_nucleus(engine: EngineHarness, prompts: Prompts) -> None:
    """No sampled token lies outside the smallest set that reaches top_p."""
    top_p, k = 0.5, 20
    response = await engine.sample(
        prompts[:1], count=48, top_p=top_p, max_tokens=1, logprobs=k, ignore_eos=True, seed=5
    )
    logprobs, tokens = response.columns.logprobs, response.columns.logprob_tokens
    assert logprobs is not None and tokens is not None
    likely = np.exp(logprobs[0, 1:].astype(np.float64))
    nucleus = set(tokens[0, 1:][np.cumsum(likely) - likely < top_p + 1e-6].tolist())
    assert set(tokens[:, 0].tolist()) <= nucleus


async def test_engine_samples_follow_the_logprobs(engine: EngineHarness, prompts: Prompts) -> None:
    """The frequency of the likeliest first token is its probability, within four standard errors."""
    n = 60
    response = await engine.sample(prompts[:1], count=n, temperature=1.0, max_tokens=1, logprobs=1, seed=100)
    logprobs, tokens = response.columns.logprobs, response.columns.logprob_tokens
    assert logprobs is not None and tokens is not None
    p = float(np.exp(logprobs[0, 1]))
    frequency = float((tokens[:, 0] == tokens[0, 1]).mean())
    assert abs(frequency - p) <= 4 * (p * (1 - p) / n) ** 0.5 + 1 / n


async def test_engine_repetition_penalty_covers_the_prompt_and_the_sample(
    engine: EngineHarness, prompts: Prompts
) -> None:
    """A penalty near 0 inflates the logits of seen tokens, so that greedy picks only tokens of prompt and sample."""
    plain = await engine.one(prompts[1], temperature=0, max_tokens=12, ignore_eos=True)
    assert set(plain.tokens) - set(prompts[1].tolist()), "nothing new without a penalty: the test shows nothing"
    seq = await engine.one(prompts[1], temperature=0, repetition_penalty=0.01, max_tokens=12, ignore_eos=True)
    assert set(seq.tokens) <= set(prompts[1].tolist())


async def test_engine_same_seed_gives_same_samples_in_any_batch(engine: EngineHarness, prompts: Prompts) -> None:
    """Alone, in a group, and beside other prompts."""
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 8, "ignore_eos": True}
    together = await engine.sample(prompts, count=4, seed=1000, **options)
    for i, prompt in enumerate(prompts):
        expected = [seq.tokens for seq in together[i].sequences]
        group = await engine.sample([prompt], count=4, seed=1000, **options)
        assert [seq.tokens for seq in group.sequences] == expected
        part = await engine.sample([prompt], count=2, first_sample=2, seed=1002, **options)
        assert [seq.tokens for seq in part.sequences] == expected[2:]
        assert [seq.seed for seq in part.sequences] == [1002, 1003]


async def test_engine_different_seeds_give_different_samples(engine: EngineHarness) -> None:
    """Each sample of a group has its own random stream, seeded or not."""
    nonsense = np.arange(40, 60)  # the demo model is certain about sums, but not about this
    for seed in (None, 5):
        response = await engine.sample([nonsense], count=8, temperature=2.0, max_tokens=24, ignore_eos=True, seed=seed)
        assert len({tuple(seq.tokens) for seq in response.sequences}) == 8
        assert [seq.seed for seq in response.sequences] == [None if seed is None else seed + j for j in range(8)]


async def test_engine_ends_at_a_stop_token_id(engine: EngineHarness, prompts: Prompts) -> None:
    """The stop token is the last token of the sample, and stays in the text."""
    free = await engine.one(prompts[0], temperature=0, max_tokens=8, ignore_eos=True)
    stop = free.tokens[2]
    first = free.tokens.index(stop)
    seq = await engine.one(prompts[0], temperature=0, max_tokens=8, ignore_eos=True, stop=[stop])
    assert seq.tokens == free.tokens[: first + 1]
    assert seq.stop_reason == "stop"


async def test_engine_ends_at_a_stop_string(engine: EngineHarness, prompts: Prompts) -> None:
    """The text is cut before the stop string; the tokens are those sampled. Any of several strings stops."""
    free = await engine.one(prompts[1], temperature=0, max_tokens=8, ignore_eos=True)
    stop = free.decoded[1:3]
    cut = free.decoded.index(stop)
    for strings in (stop, ["never this", stop]):
        seq = await engine.one(prompts[1], temperature=0, max_tokens=8, ignore_eos=True, stop=strings)
        assert seq.decoded == free.decoded[:cut]
        assert seq.tokens == free.tokens[: len(seq.tokens)]
        assert len(seq.tokens) < 8
        assert seq.stop_reason == "stop"


async def test_engine_stop_string_is_not_any_of_its_tokens(engine: EngineHarness, prompts: Prompts) -> None:
    """A string that does not occur stops nothing, even if each of its characters occurs."""
    free = await engine.one(prompts[1], temperature=0, max_tokens=8, ignore_eos=True)
    backwards = free.decoded[:3][::-1] + free.decoded[:3]
    seq = await engine.one(prompts[1], temperature=0, max_tokens=8, ignore_eos=True, stop=backwards)
    assert seq.tokens == free.tokens
    assert seq.decoded == free.decoded


async def test_engine_decodes_special_tokens(engine: EngineHarness, prompts: Prompts) -> None:
    """decoded keeps special tokens, including the end of sequence, with and without stop strings."""
    response = await engine.sample(prompts, count=12, temperature=1.0, max_tokens=200, seed=2)
    stopped = [seq for seq in response.sequences if seq.stop_reason == "stop"]
    assert stopped
    assert all(seq.decoded.endswith("<|im_end|>") for seq in stopped)
    same = await engine.sample(prompts, count=12, temperature=1.0, max_tokens=200, seed=2, stop="never this")
    assert [seq.decoded for seq in same.sequences] == [seq.decoded for seq in response.sequences]


async def test_engine_logprobs_put_the_sampled_token_first(engine: EngineHarness, prompts: Prompts) -> None:
    """Then the top k, best first, no token twice; k=0 gives only the sampled token, None no logprobs."""
    response = await engine.sample(prompts, temperature=2.0, max_tokens=5, logprobs=4, seed=8)
    for seq in response.sequences:
        assert seq.logprobs is not None
        assert [position[0][0] for position in seq.logprobs] == seq.tokens
        for position in seq.logprobs:
            assert len({token for token, _ in position}) == len(position) in (4, 5)
            rest = [logprob for _, logprob in position[1:]]
            assert rest == sorted(rest, reverse=True)
    own = await engine.sample(prompts, temperature=2.0, max_tokens=5, seed=8)
    assert [len(position) for seq in own.sequences for position in seq.logprobs or []] == [1] * len(own.columns.tokens)
    assert np.allclose(own.columns.logprobs[:, 0], response.columns.logprobs[:, 0], atol=1e-5)  # type: ignore[index]
    none = await engine.one(prompts[0], max_tokens=5, logprobs=None)
    assert none.logprobs is None and none.logprob_array is None


async def test_engine_logprobs_do_not_depend_on_temperature(engine: EngineHarness, prompts: Prompts) -> None:
    """raw_logprobs are those of the model's own distribution."""
    assert engine.info.logprobs_mode == "raw_logprobs"
    cold = await engine.sample(prompts, top_k=1, temperature=0.5, max_tokens=4, ignore_eos=True)
    hot = await engine.sample(prompts, top_k=1, temperature=2.0, max_tokens=4, ignore_eos=True)
    assert np.allclose(cold.columns.logprobs, hot.columns.logprobs, atol=1e-5)  # type: ignore[arg-type]


async def test_engine_prompt_logprobs_rescore_a_sample(engine: EngineHarness, prompts: Prompts) -> None:
    """Scoring prompt + sample gives the sample's logprobs: max_tokens=0 samples nothing."""
    samples = await engine.sample(prompts, temperature=1.0, max_tokens=6, ignore_eos=True, seed=4)
    for i, seq in enumerate(samples.sequences):
        whole = np.concatenate([prompts[i], seq.token_array])
        scored = await engine.sample([whole], max_tokens=0, prompt_logprobs=0)
        assert scored.sequences[0].tokens == [] and scored.sequences[0].decoded == ""
        assert scored.sequences[0].logprobs == []
        assert scored.prompt_logprobs is not None and scored.prompt_logprobs[0] is None
        assert len(scored.prompt_logprobs) == len(whole)
        assert scored.topk_prompt_logprobs is None
        rescored = np.array(scored.prompt_logprobs[len(prompts[i]) :], np.float32)
        assert np.abs(rescored - seq.logprob_array).max() < LOGPROB_TOLERANCE  # type: ignore[operator]


async def test_engine_prompt_logprobs_give_the_k_likeliest(engine: EngineHarness, prompts: Prompts) -> None:
    """Best first, at every position but the first, beside a normal sample."""
    response = await engine.sample(prompts[:2], max_tokens=3, prompt_logprobs=2, ignore_eos=True)
    for part in response:
        assert part.topk_prompt_logprobs is not None and part.prompt_logprobs is not None
        assert part.topk_prompt_logprobs[0] is None
        for own, top in zip(part.prompt_logprobs[1:], part.topk_prompt_logprobs[1:], strict=True):
            assert own is not None and top is not None and len(top) == 2
            assert top[0][1] >= top[1][1] and top[0][1] >= own - 1e-5
        assert len(part.sequences[0].tokens) == 3


async def test_engine_continues_after_an_abort(engine: EngineHarness, prompts: Prompts) -> None:
    """Cancelling a group ends it; another one in the same batch finishes, and so does the next request."""
    expected = await engine.one(prompts[1], temperature=0, max_tokens=100, ignore_eos=True)
    long = engine.start(engine.group(prompts[0], count=4, ignore_eos=True))
    bystander = engine.start(engine.group(prompts[1], temperature=0, max_tokens=100, ignore_eos=True))
    await asyncio.sleep(0)
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long
    assert (await bystander).tokens.tolist() == expected.tokens
    assert (await engine.one(prompts[1], temperature=0, max_tokens=100, ignore_eos=True)).tokens == expected.tokens
    await engine.engine.check_health()


async def test_group_runner_returns_every_group_once(engine: EngineHarness, prompts: Prompts) -> None:
    """Groups with different parameters share a chunk; an aborted one is in no item."""
    groups = [engine.group(p, count=2, max_tokens=3, logprobs=k) for p in prompts for k in (None, 0, 2)]
    aborted = engine.group(prompts[0], ignore_eos=True)
    runner = GroupRunner(engine.engine.sample_group)
    runner.submit([*groups, aborted])
    items: list[Finished] = []
    async for item in runner.results():
        if not items:
            runner.abort([aborted.attempt])
        items.append(item)
    assert all(not item.failures for item in items)
    rows = Counter(int(group) for item in items if item.columns for group in item.columns.group)
    if engine.info.kind == "vllm":  # other engines may finish it before the first item
        assert aborted.id not in rows
    rows.pop(aborted.id, None)
    assert rows == Counter({group.id: 2 for group in groups})


@pytest.mark.vllm
async def test_vllm_and_torch_agree_on_the_demo_model(
    vllm_engine: EngineHarness, torch_engine: EngineHarness, prompts: Prompts
) -> None:
    """In float32: the same greedy tokens, and logprobs and prompt logprobs that differ by less than 1e-3."""
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "prompt_logprobs": 0}
    one = await vllm_engine.sample(prompts, **options)
    other = await torch_engine.sample(prompts, **options)
    assert [seq.tokens for seq in one.sequences] == [seq.tokens for seq in other.sequences]
    difference = np.abs(one.columns.logprobs - other.columns.logprobs).max()  # type: ignore[operator]
    assert difference < LOGPROB_TOLERANCE
    for i in range(len(prompts)):
        scores = [np.array(response[i].prompt_logprobs[1:]) for response in (one, other)]  # type: ignore[index]
        assert np.abs(scores[0] - scores[1]).max() < LOGPROB_TOLERANCE


@pytest.mark.vllm
async def test_vllm_argument_names_are_those_of_the_class(vllm_engine: EngineHarness) -> None:
    """The names read from vLLM's source are its dataclass's fields."""
    import dataclasses

    from vllm.engine.arg_utils import AsyncEngineArgs

    from twinkle_serve.engines.vllm import argument_names

    assert argument_names() == {field.name for field in dataclasses.fields(AsyncEngineArgs)}


async def test_sample_that_times_out_keeps_its_tokens(engine: EngineHarness, prompts: Prompts) -> None:
    """Its tokens are the beginning of the whole sample, with their logprobs; one beside it runs to its end."""
    options: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    before = engine.engine.progress()
    whole = await engine.one(prompts[0], **options)
    assert engine.engine.progress() != before
    cut, beside = await asyncio.gather(
        engine.sample([prompts[0]], **options, sample_timeout_s=0.001), engine.sample([prompts[1]], **options)
    )
    sequence = cut.sequences[0]
    assert sequence.stop_reason == "abort" and 0 < len(sequence.tokens) < len(whole.tokens)
    assert sequence.tokens == whole.tokens[: len(sequence.tokens)]
    assert len(sequence.logprobs or []) == len(sequence.tokens)
    assert len(beside.sequences[0].tokens) > len(sequence.tokens)


async def test_a_score_is_progress(engine: EngineHarness, prompts: Prompts) -> None:
    """Otherwise an engine that only scores would seem hung."""
    before = engine.engine.progress()
    await engine.sample([prompts[0]], max_tokens=0, logprobs=None, prompt_logprobs=0)
    assert engine.engine.progress() != before
