"""Parameters of a call, on every sampler: one for each prompt, seeds by content, and through every way in."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import numpy as np
import pytest

from tests.support.samplers import GREEDY, QUESTIONS, tokens
from twinkle_serve import SampleResponse, SamplingParams
from twinkle_serve.data_format.sampling_params import DEFAULTS
from twinkle_serve.errors import RequestError, SamplingParamsError
from twinkle_serve.sampler import RunningSampler


def test_prompts_have_parameters_of_their_own(sampler: RunningSampler) -> None:
    """Each is sampled as in a call of its own: limits, counts, seeds, logprobs, penalties."""
    each: list[Any] = [
        SamplingParams(max_tokens=3, ignore_eos=True, seed=5, num_samples=2, logprobs=None),
        {"max_tokens": 9, "ignore_eos": True, "temperature": 0, "logprobs": 3},
        {"max_tokens": 6, "ignore_eos": True, "seed": 9, "n": 3, "top_k": 4, "logprob_token_ids": [20, 21]},
    ]
    response = sampler.sample(QUESTIONS, each)
    assert [len(part.sequences) for part in response] == [2, 1, 3]
    assert [[len(row) for row in tokens(part)] for part in response] == [[3, 3], [9], [6, 6, 6]]
    assert response[0].sequences[0].logprobs is None and response[0].sequences[0].logprob_array is None
    assert {len(row) for row in response[1].sequences[0].logprobs or []} <= {3, 4}
    assert all({20, 21} <= dict(row).keys() for row in response[2].sequences[2].logprobs or [])
    alone = sampler.sample(QUESTIONS[1], each[1])
    assert tokens(alone) == tokens(response[1])
    assert tokens(sampler.sample(QUESTIONS, each)) == tokens(response)
    assert tokens(sampler.sample(QUESTIONS[:1], each[0])) == tokens(response[0]), "the seed is that of its position"


def test_one_bad_parameter_among_many_is_named(sampler: RunningSampler) -> None:
    """Before anything is sampled; a list of another length says both numbers."""
    with pytest.raises(SamplingParamsError, match="a list of 2, and the call has 3 inputs"):
        sampler.sample(QUESTIONS, [GREEDY, GREEDY])
    with pytest.raises(SamplingParamsError, match="a list of 0, and the call has 3 inputs"):
        sampler.sample(QUESTIONS, [])
    with pytest.raises(SamplingParamsError, match=r"sampling_params\[1\] must be SamplingParams or a dict, got int"):
        sampler.sample(QUESTIONS, [GREEDY, 3, GREEDY])  # type: ignore[list-item]
    with pytest.raises(SamplingParamsError, match="top_p"):
        sampler.sample(QUESTIONS, [GREEDY, {"top_p": 2}, GREEDY])
    with pytest.raises(SamplingParamsError, match="logprobs_mode must be the same"):
        sampler.sample(QUESTIONS[:2], [{"logprobs_mode": "raw_logprobs"}, {"logprobs_mode": "processed_logprobs"}])
    with pytest.raises(SamplingParamsError, match="max_tokens is 0 for some inputs"):
        sampler.sample(QUESTIONS[:2], [{"max_tokens": 0}, {"max_tokens": 1}])
    with pytest.raises(SamplingParamsError, match="stop_token_ids holds token id 5000"):
        sampler.sample(QUESTIONS[:2], [GREEDY, {"stop_token_ids": [5000]}])
    assert tokens(sampler.sample(QUESTIONS[0], GREEDY))


def test_seed_by_content_is_the_prompts_own(sampler: RunningSampler) -> None:
    """Alone, first or last in a batch; repeated prompts differ from each other, and keep their number."""
    params = {"seed": 3, "seed_by": "content", "max_tokens": 8, "ignore_eos": True, "temperature": 1.5}
    alone = tokens(sampler.sample(QUESTIONS[0], params, num_samples=2))
    batch = sampler.sample([QUESTIONS[1], QUESTIONS[0], QUESTIONS[0], QUESTIONS[2]], params, num_samples=2)
    assert tokens(batch[1]) == alone
    assert tokens(batch[2]) != alone, "the second occurrence"
    again = sampler.sample([QUESTIONS[0], QUESTIONS[2], QUESTIONS[0]], params, num_samples=2)
    assert (tokens(again[0]), tokens(again[2]), tokens(again[1])) == (alone, tokens(batch[2]), tokens(batch[3]))
    by_position = sampler.sample(QUESTIONS[0], params | {"seed_by": "position"}, num_samples=2)
    assert tokens(by_position) != alone


def test_parameters_mean_the_same_through_every_way_in(sampler: RunningSampler) -> None:
    """A call, an iterator, a stream, and their asynchronous forms."""
    params = {
        "seed": 11,
        "max_tokens": 10,
        "min_tokens": 4,
        "temperature": 2.5,
        "presence_penalty": 0.5,
        "allowed_token_ids": [18, 19, 20, 21, 2],
        "stop": ["11"],
        "include_stop_str_in_output": True,
        "skip_special_tokens": True,
    }
    expected = sampler.sample(QUESTIONS[0], params).sequences[0]
    (part,) = sampler.sample_iter(QUESTIONS[:1], [params])
    assert (part.sequences[0].tokens, part.sequences[0].decoded) == (expected.tokens, expected.decoded)
    deltas = list(sampler.sample_stream(QUESTIONS[0], params))
    assert "".join(text for text, _ in deltas) == expected.decoded and deltas[-1][1] == expected.stop_reason

    async def run() -> tuple[list[int], list[int], str]:
        response = await sampler.sample_async(QUESTIONS[0], params)
        parts = [part async for part in sampler.sample_iter_async(QUESTIONS[0], params)]
        text = "".join([delta async for delta, _ in sampler.sample_stream_async(QUESTIONS[0], params)])
        return response.sequences[0].tokens, parts[0].sequences[0].tokens, text

    assert asyncio.run(run()) == (expected.tokens, expected.tokens, expected.decoded)
    assert set(expected.tokens) <= {18, 19, 20, 21, 2} and "<|im_end|>" not in expected.decoded


def test_text_without_special_tokens_leaves_the_message_whole(sampler: RunningSampler) -> None:
    """The parser reads the whole text, with special tokens; `decoded` follows the parameter."""
    params = {"logit_bias": {2: 100}, "max_tokens": 2, "temperature": 0}
    plain = sampler.sample(QUESTIONS[0], params | {"skip_special_tokens": True}).sequences[0]
    whole = sampler.sample(QUESTIONS[0], params).sequences[0]
    assert (plain.decoded, plain.whole_text) == ("", whole.decoded) and whole.decoded
    assert plain.new_input_feature["messages"] == whole.new_input_feature["messages"]


def test_sampling_masks_arrive(sampler: RunningSampler) -> None:
    """One a position, for each sample of the prompts that asked for it."""
    params = [
        {"max_tokens": 4, "ignore_eos": True, "top_k": 3, "return_sampling_mask": True, "num_samples": 2},
        {"max_tokens": 4, "ignore_eos": True, "top_k": 3},
    ]
    response = sampler.sample(QUESTIONS[:2], params)
    for sequence in response[0].sequences:
        assert sequence.sampling_mask is not None
        assert [sequence.sampling_mask.counts.tolist(), len(sequence.sampling_mask)] == [[3] * 4, 4]
        assert all(token in sequence.sampling_mask.at(i) for i, token in enumerate(sequence.tokens))
    assert response[1].sequences[0].sampling_mask is None


def test_response_says_which_logprobs_it_has(sampler: RunningSampler) -> None:
    """And a call may choose."""
    raw = sampler.sample(QUESTIONS[0], {"max_tokens": 2})
    processed = sampler.sample(QUESTIONS[0], {"max_tokens": 2, "logprobs_mode": "processed_logprobs"})
    assert (raw.logprobs_mode, processed.logprobs_mode) == ("raw_logprobs", "processed_logprobs")
    assert not raw.logprobs_are_masked and not processed.logprobs_are_masked


def test_structured_outputs_are_kept_or_refused(sampler: RunningSampler, request: pytest.FixtureRequest) -> None:
    """By vLLM; the others say which engine has grammars."""
    params: dict[str, Any] = {"structured_outputs": {"choice": ["12", "345"]}, "max_tokens": 8, "temperature": 2.0}
    if "vllm" not in request.node.name:
        with pytest.raises(SamplingParamsError, match=r"structured_outputs is not available.*Use engine: vllm"):
            sampler.sample(QUESTIONS, params)
        return
    response = sampler.sample(QUESTIONS, params | {"skip_special_tokens": True}, num_samples=4)
    assert {sequence.decoded for sequence in response.sequences} == {"12", "345"}
    assert not response.logprobs_are_masked
    masked = sampler.sample(QUESTIONS, params | {"logprobs_mode": "processed_logprobs"})
    assert masked.logprobs_are_masked
    (text,) = {"".join(text for text, _ in sampler.sample_stream(QUESTIONS[0], params | {"seed": 1}))}
    assert re.match("12|345", text)
    for bad in ({"regex": "("}, {"grammar": "root ::= "}, {"json": {"type": "wrong"}}):
        with pytest.raises(SamplingParamsError, match=f"structured_outputs.{next(iter(bad))}"):
            sampler.sample(QUESTIONS, {"structured_outputs": bad})
    assert tokens(sampler.sample(QUESTIONS[0], GREEDY))


def test_logprobs_beyond_the_vocabulary_are_refused(sampler: RunningSampler) -> None:
    """Each alone within its limit: together they would end the engine."""
    with pytest.raises(SamplingParamsError, match="logprobs=250 and 100 logprob_token_ids are more than"):
        sampler.sample(QUESTIONS[0], {"logprobs": 250, "logprob_token_ids": list(range(100))})
    for name in ("logprobs", "prompt_logprobs"):
        with pytest.raises(SamplingParamsError, match=f"{name}=321, the engine returns at most"):
            sampler.sample(QUESTIONS[0], {name: 321})
    assert tokens(sampler.sample(QUESTIONS[0], GREEDY))


def test_samples_without_logprobs_are_not_verified(sampler: RunningSampler) -> None:
    """Nor those whose distribution a score does not give."""
    mixed = sampler.sample(QUESTIONS[:2], [{"max_tokens": 2, "logprobs": None}, {"max_tokens": 2}])
    with pytest.raises(RequestError, match=r"samples \[0\] of the response have no logprobs"):
        sampler.verify(mixed, against=sampler)
    processed = sampler.sample(QUESTIONS[0], {"max_tokens": 2, "logprobs_mode": "processed_logprobs"})
    with pytest.raises(RequestError, match="Sample with logprobs_mode='raw_logprobs'"):
        sampler.verify(processed, against=sampler)
    raw = sampler.sample(QUESTIONS[0], {"max_tokens": 2})
    with pytest.raises(RequestError, match="processed_logprobs and raw_logprobs"):
        SampleResponse([*raw.sequences, *processed.sequences]).to_training_batch(tensors="numpy")


def test_parameters_that_cannot_be_copied_are_a_typed_error(sampler: RunningSampler) -> None:
    """Or that are numpy's: text is taken, an array is not a number."""
    with pytest.raises(SamplingParamsError, match="generator cannot be copied"):
        sampler.sample(QUESTIONS, (each for each in [GREEDY] * 3))  # type: ignore[arg-type]
    array: Any = np.array([2, 3])
    with pytest.raises(SamplingParamsError, match="num_samples must be a whole number"):
        sampler.sample(QUESTIONS, GREEDY, num_samples=array)
    with pytest.raises(SamplingParamsError, match="logprobs must be a whole number"):
        sampler.sample(QUESTIONS, GREEDY, logprobs=array)
    stops = list(np.array(["zz", "yy"]))
    assert tokens(sampler.sample(QUESTIONS[0], GREEDY | {"stop": stops, "bad_words": stops}))


@pytest.mark.parametrize("streamed", [False, True])
def test_stop_strings_are_found_among_special_tokens(sampler: RunningSampler, streamed: bool) -> None:
    """In the text with them, whatever is left out of it; both ways of reading give the same."""
    params: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True, "temperature": 0, "skip_special_tokens": True}
    for bias, stop, expected in (
        ({19: 100, 2: 50}, "1<|im_", ""),
        ({2: 100}, "<|im_end|><|im_end|>", ""),
        ({19: 100}, "11", ""),
        ({19: 100}, "<|im_end|>", "111111"),
    ):
        options = params | {"logit_bias": bias, "stop": [stop]}
        if stop.startswith("1<"):
            options |= {"bad_words": ["11"]}  # 1, then the end of a turn
        if streamed:
            text = "".join(text for text, _ in sampler.sample_stream(QUESTIONS[0], options))
        else:
            text = sampler.sample(QUESTIONS[0], options).sequences[0].decoded
        assert text == expected, stop


WRONG: dict[str, list[Any]] = {
    "min_tokens": [-1, 1.5, "3"],
    "min_p": [-0.1, 1.1, float("nan"), "a"],
    "presence_penalty": [2.1, -2.1, float("inf"), None],
    "frequency_penalty": [3, float("nan"), "x"],
    "logit_bias": [{}, {1: 101}, {"a": 1}, {-1: 1}, {1: float("nan")}, [1], {5000: 1}],
    "allowed_token_ids": [[], [1, 1], [-1], "12", [1.5], [5000]],
    "bad_words": [[], [""], ["a", 1], "word", [" "]],
    "stop_token_ids": [[-1], "a", [None], [5000]],
    "include_stop_str_in_output": [1, "yes", None],
    "skip_special_tokens": [0, None],
    "structured_outputs": [{}, {"jsn": {}}, {"regex": ""}, {"choice": []}, {"regex": "a", "choice": ["a"]}, "json", 5],
    "thinking_token_budget": [-1, 1.5, "x"],
    "seed_by": ["index", None, 3],
    "priority": [1.5, "high", 2**40, None],
    "logprob_token_ids": [[], [1, 1], [-1], list(range(129)), [5000], 7],
    "prompt_logprobs_start": [-1, 3, None],
    "logprobs_mode": ["raw", "raw_logits", 1],
    "return_sampling_mask": [True, "yes", None],
    "n": [0, "2", 1.5],
}
"""Values that no engine honours, for each parameter; some are valid alone and contradict the defaults."""


@pytest.mark.parametrize("name", WRONG)
def test_invalid_value_of_a_parameter_is_named(sampler: RunningSampler, name: str) -> None:
    """Before anything is sampled, and the next call works."""
    for value in WRONG[name]:
        with pytest.raises(SamplingParamsError, match=name):
            sampler.sample(QUESTIONS, {"max_tokens": 2, name: value})
    assert set(WRONG) - {"n"} <= DEFAULTS.keys()
