"""Every sampling parameter has the same meaning on every engine."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.support.harness import LOGPROB_TOLERANCE, EngineHarness, Prompts
from twinkle_serve.data_format.response import SampledSequence
from twinkle_serve.errors import SamplingParamsError

FREE: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
DIGITS = range(18, 28)
"""Token ids of 0 to 9."""
EOS = 2


def named(sequence: SampledSequence, ids: list[int]) -> np.ndarray:
    """Logprobs of named tokens at each position. Shape [T, n]."""
    assert sequence.logprobs is not None
    return np.array([[dict(row)[token] for token in ids] for row in sequence.logprobs])


async def shift(
    engine: EngineHarness, prompt: np.ndarray, ids: list[int], **params: Any
) -> tuple[list[int], np.ndarray]:
    """What parameters do to the logits of tokens, up to a constant at each position: the sampled tokens, and processed
    less raw logprobs, shape [T, n]."""
    options = FREE | {"logprobs": 0, "logprob_token_ids": ids} | params
    raw = await engine.one(prompt, **options, logprobs_mode="raw_logprobs")
    processed = await engine.one(prompt, **options, logprobs_mode="processed_logprobs")
    assert raw.tokens == processed.tokens
    return raw.tokens, named(processed, ids) - named(raw, ids)


async def test_penalties_lower_the_logits_of_sampled_tokens(engine: EngineHarness, prompts: Prompts) -> None:
    """Presence once, frequency for each time; tokens of the prompt alone are not penalised."""
    ids = [*DIGITS, 5, 6]
    tokens, shifts = await shift(
        engine, prompts[1], ids, temperature=0, presence_penalty=0.5, frequency_penalty=0.25, max_tokens=12
    )
    for position, row in enumerate(shifts):
        counts = Counter(tokens[:position])
        expected = np.array([-(0.25 * counts[token] + 0.5 * (counts[token] > 0)) for token in ids])
        np.testing.assert_allclose(row - row[-1], expected - expected[-1], atol=LOGPROB_TOLERANCE)
    assert len(set(tokens)) < len(tokens), "no token came twice: the test shows nothing of frequency"


async def test_logit_bias_is_added(engine: EngineHarness, prompts: Prompts) -> None:
    """And may choose the token alone."""
    _, shifts = await shift(engine, prompts[0], [20, 21, 22], temperature=0, logit_bias={20: 3.5, 21: -1})
    np.testing.assert_allclose(shifts[:, 0] - shifts[:, 2], 3.5, atol=LOGPROB_TOLERANCE)
    np.testing.assert_allclose(shifts[:, 1] - shifts[:, 2], -1, atol=LOGPROB_TOLERANCE)
    chosen = await engine.one(prompts[0], temperature=0, logit_bias={25: 100}, **FREE)
    assert set(chosen.tokens) == {25}


async def test_temperature_above_2_divides_logits(engine: EngineHarness, prompts: Prompts) -> None:
    """Seen by the differences between two tokens."""
    options = FREE | {"logprob_token_ids": [20, 21], "temperature": 8.0, "seed": 5}
    raw = named(await engine.one(prompts[0], **options, logprobs_mode="raw_logprobs"), [20, 21])
    processed = named(await engine.one(prompts[0], **options, logprobs_mode="processed_logprobs"), [20, 21])
    np.testing.assert_allclose(processed @ [1, -1], raw @ [1, -1] / 8, atol=LOGPROB_TOLERANCE)


async def test_allowed_tokens_are_all_that_is_sampled(engine: EngineHarness, prompts: Prompts) -> None:
    """From several of them."""
    response = await engine.sample(prompts, count=4, temperature=2.0, allowed_token_ids=[20, 30, 40], seed=1, **FREE)
    assert {token for seq in response.sequences for token in seq.tokens} == {20, 30, 40}


async def test_bad_words_are_not_written(engine: EngineHarness, prompts: Prompts) -> None:
    """Neither one token nor a sequence of them; the rest of a sequence may be."""
    options = FREE | {"temperature": 0, "logit_bias": dict.fromkeys(DIGITS, 100)}
    greedy = await engine.one(prompts[1], **options)
    for word in (greedy.decoded[:1], greedy.decoded[:2]):
        other = await engine.one(prompts[1], bad_words=[word], **options)
        assert word not in other.decoded and other.tokens != greedy.tokens
    assert other.tokens[0] == greedy.tokens[0], "the first token alone is no bad word"


async def test_nothing_ends_a_sample_before_min_tokens(engine: EngineHarness, prompts: Prompts) -> None:
    """Neither the end of the sequence, nor a stop id, nor a stop string within them."""
    options: dict[str, Any] = {"temperature": 0, "logit_bias": dict.fromkeys(DIGITS, 100), "max_tokens": 12}
    ending = {"temperature": 0, "logit_bias": {EOS: 100}, "max_tokens": 12}
    short = await engine.one(prompts[0], **ending)
    assert (short.tokens, short.stop_reason) == ([EOS], "stop")
    longer = await engine.one(prompts[0], min_tokens=6, **ending)
    assert len(longer.tokens) == 7 and EOS not in longer.tokens[:6] and longer.tokens[6] == EOS
    by_id = await engine.one(prompts[0], min_tokens=6, stop_token_ids=[*DIGITS], **options)
    assert len(by_id.tokens) == 7 and not {*DIGITS} & {*by_id.tokens[:6]}
    digits = FREE | {"temperature": 0, "logit_bias": dict.fromkeys(DIGITS, 100)}
    text = (await engine.one(prompts[0], **digits)).decoded
    early = await engine.one(prompts[0], min_tokens=3, stop=[text[0]], **digits)
    again = text.find(text[0], 3)
    assert early.decoded == (text if again < 0 else text[:again]), "one of the first tokens cuts nothing"


async def test_stop_strings_and_stop_ids_hold_together(engine: EngineHarness, prompts: Prompts) -> None:
    """Whichever comes first."""
    free = await engine.one(prompts[1], temperature=0, **FREE)
    first, third = free.tokens[0], free.decoded[2]
    options = FREE | {"temperature": 0}
    assert (await engine.one(prompts[1], stop=[third], stop_token_ids=[first], **options)).tokens == [first]
    by_text = await engine.one(prompts[1], stop=[free.decoded[:1]], stop_token_ids=[EOS], **options)
    assert (by_text.tokens, by_text.decoded, by_text.stop_reason) == ([first], "", "stop")


@pytest.mark.parametrize("streamed", [False, True])
async def test_stop_string_is_kept_if_asked_for(engine: EngineHarness, prompts: Prompts, streamed: bool) -> None:
    """At the end of the text."""
    free = await engine.one(prompts[1], temperature=0, **FREE)
    stop = free.decoded[1:3]
    options = FREE | {"temperature": 0, "stop": [stop], "include_stop_str_in_output": True}
    if streamed:
        text = "".join(delta.text for delta in await engine.stream(prompts[1], **options))
    else:
        text = (await engine.one(prompts[1], **options)).decoded
    assert text == free.decoded[: free.decoded.index(stop) + 2]


@pytest.mark.parametrize("streamed", [False, True])
async def test_special_tokens_are_left_out_if_asked_for(
    engine: EngineHarness, prompts: Prompts, streamed: bool
) -> None:
    """Of the text; the tokens stay."""
    whole = await engine.one(prompts[0], logit_bias={EOS: 100}, max_tokens=3, ignore_eos=True)
    assert whole.tokens == [EOS] * 3 and whole.decoded
    options = {"logit_bias": {EOS: 100}, "max_tokens": 3, "ignore_eos": True, "skip_special_tokens": True}
    if streamed:
        assert not "".join(delta.text for delta in await engine.stream(prompts[0], **options))
    else:
        plain = await engine.one(prompts[0], **options)
        assert (plain.tokens, plain.decoded) == (whole.tokens, "")


async def test_named_tokens_logprobs_are_returned(engine: EngineHarness, prompts: Prompts) -> None:
    """Beside the likeliest; a request of the same batch that names none has its own likeliest ones."""
    ids = [20, 21, 300]
    groups = [
        engine.group(prompts[0], temperature=0, logprobs=2, logprob_token_ids=ids, **FREE),
        engine.group(prompts[0], temperature=0, logprobs=5, **FREE),
        engine.group(prompts[0], temperature=0, logprobs=0, **FREE),
    ]
    with_names, beside, plain = [await task for task in [engine.start(group) for group in groups]]
    assert with_names.logprob_tokens is not None and with_names.logprobs is not None
    assert beside.logprob_tokens is not None and beside.logprobs is not None and plain.logprobs is not None
    assert with_names.logprob_tokens.shape[1] == 1 + 2 + 3
    assert (with_names.logprob_tokens[:, 3:] == ids).all()
    np.testing.assert_array_equal(with_names.logprob_tokens[:, :3], beside.logprob_tokens[:, :3])
    np.testing.assert_allclose(with_names.logprobs[:, :3], beside.logprobs[:, :3], atol=LOGPROB_TOLERANCE)
    np.testing.assert_allclose(plain.logprobs[:, 0], beside.logprobs[:, 0], atol=LOGPROB_TOLERANCE)
    likeliest = await engine.one(
        prompts[0], temperature=0, logprobs=0, logprob_token_ids=with_names.tokens.tolist()[:1], **FREE
    )
    assert likeliest.logprobs is not None
    assert likeliest.logprobs[0][0][0] == likeliest.tokens[0] and len(likeliest.logprobs[0]) == 1, "named once"


async def test_each_request_has_its_own_logprobs_mode(engine: EngineHarness, prompts: Prompts) -> None:
    """In one batch: the model's own, or those that were sampled from."""
    options = FREE | {"temperature": 0.5, "seed": 3, "top_k": 4}
    groups = [engine.group(prompts[0], **options, logprobs_mode=mode) for mode in (None, "processed_logprobs")]
    raw, processed = [await task for task in [engine.start(group) for group in groups]]
    assert raw.tokens.tolist() == processed.tokens.tolist()
    assert raw.logprobs is not None and processed.logprobs is not None
    assert (processed.logprobs != raw.logprobs).any()
    mask = await engine.sample([prompts[0]], **options, logprobs=4, logprobs_mode="processed_logprobs")
    assert mask.columns.logprobs is not None
    np.testing.assert_allclose(np.exp(mask.columns.logprobs[:, 1:]).sum(1), 1, atol=1e-3)


@pytest.mark.parametrize("limits", [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 5, "top_p": 0.8}])
async def test_sampling_mask_is_what_could_be_sampled(
    engine: EngineHarness, prompts: Prompts, limits: dict[str, Any]
) -> None:
    """Renormalised over it, the raw logprobs are those that were sampled from. A request beside it has none."""
    options = FREE | {"seed": 7, "logprobs": 20, "temperature": 1.0} | limits
    groups = [
        engine.group(prompts[1], **options, return_sampling_mask=True),
        engine.group(prompts[1], **options, logprobs_mode="processed_logprobs"),
    ]
    raw, processed = [await task for task in [engine.start(group) for group in groups]]
    assert raw.masks is not None and processed.masks is None
    assert raw.logprobs is not None and raw.logprob_tokens is not None and processed.logprobs is not None
    (mask,) = raw.masks
    assert mask is not None and len(mask) == len(raw.tokens)
    for position, token in enumerate(raw.tokens.tolist()):
        kept = mask.at(position).tolist()
        values = dict(zip(raw.logprob_tokens[position, 1:].tolist(), raw.logprobs[position, 1:].tolist(), strict=True))
        assert token in kept and kept == sorted(kept)
        if len(kept) <= 20:
            total = np.logaddexp.reduce([values[other] for other in kept])
            assert values[token] - total == pytest.approx(float(processed.logprobs[position, 0]), abs=2e-3)
    assert "top_k" not in limits or mask.counts.max() <= limits["top_k"]


async def test_min_p_leaves_out_unlikely_tokens(engine: EngineHarness, prompts: Prompts) -> None:
    """Those below the share of the likeliest one."""
    response = await engine.sample(
        prompts[:2], count=24, min_p=0.2, temperature=1.0, logprobs=1, seed=3, max_tokens=2, ignore_eos=True
    )
    logprobs = response.columns.logprobs
    assert logprobs is not None
    assert (logprobs[:, 0] >= logprobs[:, 1] + np.log(0.2) - LOGPROB_TOLERANCE).all()
    only = await engine.sample(prompts[:2], min_p=1.0, temperature=2.0, max_tokens=4, ignore_eos=True)
    greedy = await engine.sample(prompts[:2], temperature=0, max_tokens=4, ignore_eos=True)
    assert [seq.tokens for seq in only.sequences] == [seq.tokens for seq in greedy.sequences]


async def test_prompt_logprobs_are_returned_from_a_position_on(engine: EngineHarness, prompts: Prompts) -> None:
    """The same as those of the whole prompt."""
    whole = await engine.sample([prompts[0]], max_tokens=1, prompt_logprobs=2)
    part = await engine.sample([prompts[0]], max_tokens=1, prompt_logprobs=2, prompt_logprobs_start=4)
    assert whole.prompt_logprobs is not None and part.prompt_logprobs is not None
    assert part.prompt_logprobs[:4] == [None] * 4
    np.testing.assert_allclose(
        np.array(part.prompt_logprobs[4:], float), np.array(whole.prompt_logprobs[4:], float), atol=LOGPROB_TOLERANCE
    )
    assert part.topk_prompt_logprobs is not None and part.topk_prompt_logprobs[:4] == [None] * 4
    assert len(part.topk_prompt_logprobs) == len(prompts[0]) and len(part.topk_prompt_logprobs[4] or []) == 2
    assert len(next(iter(part.columns.scores.values())).logprobs) == len(prompts[0]) - 4


@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"min_p": 0.02, "min_tokens": 3},
        {"logit_bias": {20: 2.0}, "bad_words": ["1"]},
        {"allowed_token_ids": [18, 19, 20, 21, 2], "temperature": 3.0},
    ],
)
async def test_a_seed_gives_the_same_samples_with_any_parameter(
    engine: EngineHarness, prompts: Prompts, params: dict[str, Any]
) -> None:
    """Alone and beside others, as samples of one group and apart."""
    options = FREE | {"seed": 40} | params
    together = await engine.sample(prompts[:3], count=3, **options)
    alone = await engine.sample([prompts[1]], count=3, **options)
    assert [seq.tokens for seq in alone.sequences] == [seq.tokens for seq in together[1].sequences]
    last = await engine.sample([prompts[1]], first_sample=2, **(options | {"seed": 42}))
    assert last.sequences[0].tokens == alone.sequences[2].tokens


async def test_thinking_is_ended_at_its_budget(engine: EngineHarness, prompts: Prompts) -> None:
    """The tokens of the end are forced then; before, and without thinking, nothing is."""
    if "thinking_token_budget" in engine.info.lacks:
        pytest.skip("this engine does not think")
    start, end = [33, 34, 35], [36, 37]
    thinking = np.concatenate([prompts[0], start])
    free = await engine.one(thinking, temperature=0, logit_bias={36: -100}, **FREE)
    ended = await engine.one(thinking, temperature=0, logit_bias={36: -100}, thinking_token_budget=3, **FREE)
    assert ended.tokens[:3] == free.tokens[:3] and ended.tokens[3:5] == end
    at_once = await engine.one(thinking, temperature=0, thinking_token_budget=0, **FREE)
    assert at_once.tokens[:2] == end
    without = await engine.one(prompts[0], temperature=0, thinking_token_budget=0, **FREE)
    assert without.tokens == (await engine.one(prompts[0], temperature=0, **FREE)).tokens


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"choice": ["12", "345"]}, "12|345"),
        ({"regex": "[0-3]{4}"}, "[0-3]{4}"),
        ({"grammar": 'root ::= "1" | "2" root'}, "2*1"),
        ({"json": {"enum": [7, 88]}}, "7|88"),
    ],
)
async def test_samples_match_their_structure(
    vllm_engine: EngineHarness, prompts: Prompts, wanted: dict[str, Any], pattern: str
) -> None:
    """Every sample of a group; raw logprobs are the model's own, and processed ones those under the mask."""
    options: dict[str, Any] = {"max_tokens": 40, "seed": 4, "structured_outputs": wanted, "temperature": 2.0}
    response = await vllm_engine.sample(prompts[:2], count=3, **options, skip_special_tokens=True)
    import re

    assert all(re.fullmatch(pattern, seq.decoded.strip()) for seq in response.sequences if seq.stop_reason == "stop")
    assert any(seq.stop_reason == "stop" for seq in response.sequences)
    sequence = response.sequences[0]
    scored = await vllm_engine.sample(
        [np.concatenate([prompts[0], sequence.token_array])], max_tokens=0, prompt_logprobs=0
    )
    assert sequence.logprob_array is not None and scored.prompt_logprobs is not None
    own = np.array(scored.prompt_logprobs[len(prompts[0]) :], float)
    np.testing.assert_allclose(sequence.logprob_array, own, atol=LOGPROB_TOLERANCE)


async def test_structure_is_refused_where_there_are_no_grammars(
    torch_engine: EngineHarness, fake_engine: EngineHarness
) -> None:
    """With the engine to use instead."""
    for engine in (torch_engine, fake_engine):
        assert "Use engine: vllm" in engine.info.lacks["structured_outputs"]
        with pytest.raises(SamplingParamsError, match="Use engine: vllm"):
            group = engine.group(np.arange(20, 24), structured_outputs={"choice": ["1"]})
            assert group.params.structured_outputs is not None
            await engine.engine.check_structured(group.params.structured_outputs)
