"""Sampling parameters: honoured or refused, never adjusted."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from twinkle_serve import SamplingParams
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.data_format.sampling_params import CHECKS, DEFAULTS, DecodingParams
from twinkle_serve.errors import ConfigError, SamplingParamsError


def test_params_default_to_plain_sampling() -> None:
    """One sample at temperature 1 from the whole distribution, with its logprobs."""
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == (1.0, -1, 1.0, 1.0)
    assert (params.max_tokens, params.seed, params.num_samples, params.logprobs) == (None, None, 1, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -0.1),
        ("temperature", 100.5),
        ("temperature", 0.001),
        ("temperature", "hot"),
        ("temperature", 10**400),
        ("temperature", True),
        ("temperature", None),
        ("top_p", 0.0),
        ("top_p", 1e-46),
        ("top_p", 1e-320),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", -2),
        ("top_k", 2**31),
        ("top_k", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 1e39),
        ("repetition_penalty", float("inf")),
        ("max_tokens", -1),
        ("max_tokens", 1.0),
        ("max_tokens", "8"),
        ("num_samples", 0),
        ("num_samples", True),
        ("seed", -1),
        ("seed", 2**62),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
        ("stop", ""),
        ("stop", ["ok", ""]),
        ("stop", ["a", 1]),
        ("stop", "\ud800"),
        ("stop", [-1]),
        ("stop", [1.5]),
        ("stop", 7),
        ("ignore_eos", 1),
    ],
)
def test_params_refuse_values_that_no_engine_could_honour(name: str, value: Any) -> None:
    """The error names the parameter and the value."""
    with pytest.raises(SamplingParamsError, match=name) as caught:
        SamplingParams(**{name: value})
    shown = value if isinstance(value, (int, float)) and not isinstance(value, bool) else repr(value)
    assert str(shown) in str(caught.value) or isinstance(value, list)


def test_params_take_numpy_numbers() -> None:
    """Integers and floats, stored as Python's types."""
    numbers: Any = {"max_tokens": np.int64(3), "temperature": np.float32(0.5), "stop": [np.int32(7)]}
    params = SamplingParams(**numbers)
    assert params == SamplingParams(max_tokens=3, temperature=0.5, stop=[7])
    assert type(params.max_tokens) is int and type(params.temperature) is float


def test_params_of_a_dict_take_the_alias_and_refuse_unknown_keys() -> None:
    """max_new_tokens is an alias of max_tokens; a misspelt key is an error with a suggestion."""
    assert SamplingParams.of({"max_new_tokens": 5, "temperature": 0}) == SamplingParams(max_tokens=5, temperature=0)
    with pytest.raises(SamplingParamsError, match="'temprature', did you mean 'temperature'"):
        SamplingParams.of({"temprature": 1})
    with pytest.raises(SamplingParamsError, match="twice"):
        SamplingParams.of({"max_new_tokens": 5, "max_tokens": 5})
    with pytest.raises(SamplingParamsError, match="got list"):
        SamplingParams.of([1])  # type: ignore[arg-type]


def test_params_of_a_call_take_num_samples_once() -> None:
    """From the call or from the parameters; two different values are an error."""
    assert SamplingParams.of(None, 4).num_samples == 4
    assert SamplingParams.of({"num_samples": 4}).num_samples == 4
    assert SamplingParams.of({"num_samples": 4}, 4).num_samples == 4
    with pytest.raises(SamplingParamsError, match=r"num_samples=2 .* num_samples=4"):
        SamplingParams.of({"num_samples": 4}, 2)
    with pytest.raises(SamplingParamsError, match="num_samples must be at least 1, got 0"):
        SamplingParams.of(None, 0)


def test_params_tell_stop_strings_from_token_ids() -> None:
    """A single string is one stop string, not one per character."""
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop_strings == ("ab", "c")
    assert SamplingParams(stop=[5, 6], stop_token_ids=[6, 7]).all_stop_token_ids == (5, 6, 7)
    assert SamplingParams(stop=[5, 6]).stop_strings == ()
    assert SamplingParams().stop is None and SamplingParams(stop=["ab"]).stop == ["ab"], "as they were given"
    assert DecodingParams.of(SamplingParams(stop=["ab"], stop_token_ids=[4])).stop_strings == ("ab",)
    assert DecodingParams.of(SamplingParams(stop=["ab"], stop_token_ids=[4])).stop_token_ids == (4,), "both at once"
    assert DecodingParams.of(SamplingParams()).stop_strings == ()


def test_params_do_not_share_the_callers_list() -> None:
    """Changing the list afterwards has no effect."""
    stop = ["a"]
    params = SamplingParams(stop=stop)
    stop.append("b")
    assert params.stop_strings == ("a",)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("presence_penality", "presence_penalty"),
        ("max_completion_tokens", "max_tokens"),
        ("stop_tokens_ids", "stop_token_ids"),
        ("top_logprobs", "logprobs"),
        ("guided_regex", "structured_outputs={'regex': …}"),
        ("num_return_sequences", "num_samples"),
        ("do_sample", "temperature=0 for greedy"),
    ],
)
@pytest.mark.parametrize("make", [SamplingParams.of, lambda params: SamplingParams(**params)])
def test_unknown_parameter_names_the_likely_one(make: Any, given: str, hint: str) -> None:
    """Also names of other servers; in a dict and as a keyword alike."""
    with pytest.raises(SamplingParamsError, match=f"unknown sampling parameter '{given}', did you mean") as caught:
        make({given: 1})
    assert f"did you mean {hint}?" in str(caught.value) or f"did you mean '{hint}'?" in str(caught.value)


def test_n_is_num_samples_in_every_place() -> None:
    """As a keyword, in a dict and to read; twice is an error."""
    assert SamplingParams(n=4) == SamplingParams(num_samples=4) == SamplingParams.of({"n": 4})
    assert SamplingParams(num_samples=3).n == 3  # type: ignore[attr-defined]  # an argument's name, to mypy
    assert replace(SamplingParams(n=4), temperature=0.5).num_samples == 4
    assert replace(SamplingParams(n=4), num_samples=2).num_samples == 2
    assert replace(SamplingParams(seed=1), n=4) == SamplingParams(seed=1, num_samples=4)
    both: list[dict[str, Any]] = [{"n": 4, "num_samples": 4}, {"num_samples": 4, "n": 4}]
    for twice in both:
        with pytest.raises(SamplingParamsError, match="num_samples is given twice"):
            SamplingParams(**twice)
    assert pickle.loads(pickle.dumps(SamplingParams(n=4, logit_bias={1: 2}))) == SamplingParams(n=4, logit_bias={1: 2})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is above max_tokens=4"),
        ({"logprobs": None, "logprob_token_ids": [1]}, "logprobs=None asks for no logprobs"),
        ({"prompt_logprobs_start": 2}, "prompt_logprobs_start=2 needs prompt_logprobs"),
        ({"return_sampling_mask": True}, "return_sampling_mask needs top_k, top_p, min_p or allowed_token_ids"),
        (
            {"return_sampling_mask": True, "top_k": 2, "temperature": 0},
            "return_sampling_mask needs a temperature above",
        ),
        ({"structured_outputs": {"regex": "a"}, "bad_words": ["a"]}, "bad_words contradicts structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 1}, "min_tokens contradicts structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos contradicts structured_outputs"),
        (
            {"structured_outputs": {"regex": "a"}, "stop_token_ids": [4]},
            "stop_token_ids contradicts structured_outputs",
        ),
        ({"structured_outputs": {"regex": "a"}, "stop": [4]}, "stop contradicts structured_outputs"),
        (
            {"structured_outputs": {"regex": "a"}, "thinking_token_budget": 0},
            "thinking_token_budget contradicts structured_outputs",
        ),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(params: dict[str, Any], message: str) -> None:
    """Both are named."""
    with pytest.raises(SamplingParamsError) as caught:
        SamplingParams(**params)
    assert message in str(caught.value)


def test_every_parameter_has_a_check() -> None:
    """And every default passes its own, or means that the parameter is left out."""
    assert CHECKS.keys() == DEFAULTS.keys()
    for name, default in DEFAULTS.items():
        assert default is None or CHECKS[name](name, default) == default


def test_defaults_of_a_service_fill_what_a_call_leaves_out() -> None:
    """A dict's missing keys, and all of a call without parameters; nothing of a SamplingParams object."""
    defaults: dict[str, Any] = {"max_tokens": 7, "n": 3, "temperature": 0.5}

    def params(given: Any, **options: Any) -> SamplingParams:
        (each,) = SampleRequest(inputs=[{}], sampling_params=given, **options).params_of_inputs(defaults)
        return each

    assert params(None) == SamplingParams(**defaults)
    assert params({"temperature": 1, "num_samples": 2}) == SamplingParams(max_tokens=7, num_samples=2)
    assert params(SamplingParams(seed=1)) == SamplingParams(seed=1)
    assert params([{"seed": 1}]) == SamplingParams(**defaults, seed=1)
    assert params(None, num_samples=2) == SamplingParams(max_tokens=7, temperature=0.5, num_samples=2)
    with pytest.raises(ConfigError, match=r"sampling_params: .*top_p"):
        ServiceArgs(model_id="demo", sampling_params={"top_p": 3})
