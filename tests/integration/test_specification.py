"""The snippets of the sampler's specification run as they stand, under the name `twinkle`, on real engines."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_type_hints

import pytest

from tests.support.specification import (
    INTERFACE,
    REMOTE,
    SUBSTITUTES,
    TORCH_SAMPLER,
    VLLM_SAMPLER,
    as_twinkle,
    run,
)


@pytest.fixture(scope="module", autouse=True)
def twinkle() -> Iterator[None]:
    """The name `twinkle`, for these tests."""
    with as_twinkle():
        yield


def test_substitutes_are_literals_of_the_specification() -> None:
    """Each stands in a snippet, so that none is left over."""
    for literal in SUBSTITUTES:
        assert any(literal in snippet for snippet in (VLLM_SAMPLER, TORCH_SAMPLER, REMOTE)), literal


def keywords_of(method: Callable[..., Any]) -> set[str]:
    """Names that a method takes by keyword, those of `**options: Unpack[...]` included."""
    names: set[str] = set()
    for name, parameter in inspect.signature(method).parameters.items():
        if "Unpack" in str(parameter.annotation):
            (options,) = get_args(get_type_hints(method)[name])
            names |= get_type_hints(options).keys()
        elif parameter.kind is not parameter.VAR_KEYWORD:
            names.add(name)
    return names


def test_specification_of_the_interface_is_met() -> None:
    """Ours has the abstract methods of the specified class and takes every call that it takes."""
    from abc import ABC, abstractmethod

    from twinkle.sampler import Sampler, TorchSampler, vLLMSampler

    specified = run(INTERFACE, ABC=ABC, abstractmethod=abstractmethod)["Sampler"]
    assert inspect.isabstract(Sampler) and Sampler.__abstractmethods__ == specified.__abstractmethods__
    for ours in (Sampler, vLLMSampler, TorchSampler):
        assert issubclass(ours, Sampler)
        for method in ("sample", "add_adapter_to_model", "set_template"):
            parameters = inspect.signature(getattr(specified, method)).parameters.values()
            by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
            have = inspect.signature(getattr(ours, method)).parameters
            assert list(have)[: len(by_place)] == by_place, "calls by place mean the same"
            assert keywords_of(getattr(ours, method)) >= keywords_of(getattr(specified, method)), (ours, method)


def test_specification_of_the_torch_sampler_runs() -> None:
    """In this process."""
    from twinkle.data_format import SamplingParams

    names = run(TORCH_SAMPLER, params=SamplingParams(max_tokens=8))
    assert [seq.engine for seq in names["response"].sequences] == ["local"] * 3
    names["sampler"].shutdown()


@pytest.mark.ray
@pytest.mark.vllm
def test_specification_of_the_vllm_sampler_runs(specified: dict[str, Any]) -> None:
    """As a service beside others, on two vLLM engines, with the adapter."""
    response = specified["response"]
    assert len(response.sequences) == 12 and len(response) == 3
    assert {seq.adapter for seq in response.sequences} == {"my_lora@1"}
    assert {seq.engine for seq in response.sequences} == {"engine-dp0", "engine-dp1"}


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.nightly
def test_specification_of_remote_samplers_runs(cluster: None) -> None:
    """In a group of its own, whose device the engine has."""
    from twinkle import shutdown
    from twinkle.data_format import SamplingParams
    from twinkle.remote import group_devices

    names = run(REMOTE, params=SamplingParams(max_tokens=8))
    assert len(names["response"].sequences) == 3
    cores = sorted(os.sched_getaffinity(0))
    (engine,) = names["sampler"].status()["engines"].values()
    (device,) = group_devices("sampler").devices
    assert engine["cpus"] == [cores[int(device.id) % len(cores)]]
    names["sampler"].shutdown()
    shutdown()
