"""Adapters of every sampler: vllm, torch and fake, in this process and as a service with dp_size 2."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.support.lora import random_adapter, save_adapter
from tests.support.samplers import GREEDY, QUESTIONS, tokens
from twinkle_serve import SampleResponse
from twinkle_serve.errors import AdapterError
from twinkle_serve.sampler import RunningSampler


async def until_running(sampler: RunningSampler) -> None:
    """Waits until a call has been admitted."""
    async with asyncio.timeout(60):
        while not (await asyncio.to_thread(sampler.status))["requests"]:
            pass


def test_sampler_samples_from_the_adapter_named_in_a_call(
    sampler: RunningSampler, adapters: list[Path], name: str
) -> None:
    """By name, by path and by version; the base model beside it, in one batch or with use_base_model."""
    base = sampler.sample(QUESTIONS, GREEDY)
    assert sampler.add_adapter_to_model(name, str(adapters[0])) == f"{name}@1"
    lora = sampler.sample(QUESTIONS, GREEDY, name)
    assert {seq.adapter for seq in lora.sequences} == {f"{name}@1"} and {seq.adapter for seq in base.sequences} == {""}
    assert tokens(lora) != tokens(base)
    by_path = sampler.sample(QUESTIONS, GREEDY, adapter_path=str(adapters[0]))
    assert tokens(by_path) == tokens(lora)
    assert tokens(sampler.sample(QUESTIONS, GREEDY, f"{name}@1")) == tokens(lora)
    assert tokens(sampler.sample(QUESTIONS, GREEDY, use_base_model=True)) == tokens(base)

    async def beside() -> list[SampleResponse]:
        return await asyncio.gather(*(sampler.sample_async(QUESTIONS, GREEDY, which) for which in ("", name) * 3))

    for i, response in enumerate(asyncio.run(beside())):
        assert tokens(response) == tokens(lora if i % 2 else base)
    assert "".join(text for text, _ in sampler.sample_stream(QUESTIONS[0], GREEDY, name)) == lora.sequences[0].decoded
    assert sampler.status()["adapters"][name] == f"{name}@1"
    sampler.remove_adapter(name)
    with pytest.raises(AdapterError, match=f"unknown adapter '{name}'"):
        sampler.sample(QUESTIONS, GREEDY, name)


def test_sampler_takes_an_adapter_from_memory_as_a_new_version(
    sampler: RunningSampler, adapters: list[Path], name: str
) -> None:
    """LoraConfig and tensors under an old name: the name refers to the new version, and no cache mixes the two."""
    from peft import get_peft_model_state_dict

    sampler.add_adapter_to_model(name, adapters[0])
    old = sampler.sample(QUESTIONS, GREEDY, name)
    model = random_adapter(seed=2, scale=0.6)
    config = model.peft_config["default"]
    assert sampler.add_adapter_to_model(name, config, state_dict=get_peft_model_state_dict(model)) == f"{name}@2"
    new = sampler.sample(QUESTIONS, GREEDY, name)
    assert tokens(new) == tokens(sampler.sample(QUESTIONS, GREEDY, adapter_path=adapters[1].as_posix()))
    assert tokens(new) != tokens(old) and {seq.adapter for seq in new.sequences} == {f"{name}@2"}
    sampler.add_adapter_to_model(name, config, state_dict=model.state_dict())
    assert tokens(sampler.sample(QUESTIONS, GREEDY, name)) == tokens(new), "names as in the model's own state_dict"
    sampler.remove_adapter(name)


def test_sampler_reads_an_adapter_path_again_when_its_files_change(
    sampler: RunningSampler, adapters: list[Path], tmp_path: Path
) -> None:
    """And only then: while the files stay, the version stays."""
    import shutil

    path = tmp_path / "policy"
    shutil.copytree(adapters[0], path)
    first = sampler.sample(QUESTIONS, GREEDY, adapter_path=str(path))
    again = sampler.sample(QUESTIONS, GREEDY, adapter_path=str(path))
    for file in path.iterdir():  # of the same size, under the same times
        times = file.stat()
        file.write_bytes((adapters[1] / file.name).read_bytes())
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = sampler.sample(QUESTIONS, GREEDY, adapter_path=str(path))
    versions = [response.sequences[0].adapter.rpartition("@")[2] for response in (first, again, changed)]
    assert versions == ["1", "1", "2"]
    assert tokens(first) == tokens(again) != tokens(changed)
    assert tokens(changed) == tokens(sampler.sample(QUESTIONS, GREEDY, adapter_path=str(adapters[1])))


def test_sampler_never_answers_for_an_adapter_with_the_base_model(
    sampler: RunningSampler, adapters: list[Path], tmp_path: Path, name: str
) -> None:
    """Unknown, missing, of another model, too large, incomplete, contradictory: an error each; the next call works."""
    from peft import get_peft_model_state_dict

    sampler.add_adapter_to_model(name, adapters[0])
    big = save_adapter(tmp_path / "big", rank=32)
    other = save_adapter(tmp_path / "other", rank=8, modules=("q_proj",))
    text = (other / "adapter_model.safetensors").read_bytes().replace(b"self_attn", b"other_att")
    (other / "adapter_model.safetensors").write_bytes(text)
    with pytest.raises(AdapterError, match=f"unknown adapter '{name}x', did you mean '{name}'"):
        sampler.sample(QUESTIONS, GREEDY, f"{name}x")
    with pytest.raises(AdapterError, match="no directory"):
        sampler.sample(QUESTIONS, GREEDY, adapter_path="nowhere/at/all")
    with pytest.raises(AdapterError, match="no directory"):
        sampler.add_adapter_to_model(name, "nowhere/at/all")
    with pytest.raises(AdapterError, match=r"are not in the model, such as model\.layers\.0\.other_att\.q_proj"):
        sampler.add_adapter_to_model(name, other)
    with pytest.raises(AdapterError, match="rank 32, the engine takes 16"):
        sampler.add_adapter_to_model(name, big)
    model = random_adapter(seed=2)
    config, tensors = model.peft_config["default"], get_peft_model_state_dict(model)
    part = {tensor: value for tensor, value in tensors.items() if ".layers.0." in tensor}
    with pytest.raises(AdapterError, match="incomplete: it has no matrices for 21 of the 28 modules"):
        sampler.add_adapter_to_model(name, config, state_dict=part)
    norm = {"base_model.model.model.norm.weight": 2 * model.get_base_model().model.norm.weight}
    with pytest.raises(
        AdapterError, match=r"'model.norm.weight' with values that the model's checkpoint does not have"
    ):
        sampler.add_adapter_to_model(name, config, state_dict={**tensors, **norm})
    with pytest.raises(AdapterError, match="contradict each other"):
        sampler.sample(QUESTIONS, GREEDY, name, use_base_model=True)
    with pytest.raises(AdapterError, match="LoraConfig with a state_dict, got dict"):
        sampler.add_adapter_to_model(name, {"r": 8})
    with pytest.raises(AdapterError, match="without '@'"):
        sampler.add_adapter_to_model("a@1", adapters[0])
    assert {seq.adapter for seq in sampler.sample(QUESTIONS, GREEDY, name).sequences} == {f"{name}@1"}
    sampler.remove_adapter(name)


def test_sampler_keeps_the_adapter_version_of_an_admitted_call(
    sampler: RunningSampler, adapters: list[Path], name: str
) -> None:
    """The version is replaced and the name removed during a call, which finishes on its version, token for token."""
    params = {"max_tokens": 150, "ignore_eos": True, "seed": 9, "temperature": 1.0}
    sampler.add_adapter_to_model(name, adapters[0])
    expected = sampler.sample(QUESTIONS, params, name, num_samples=4)

    async def run() -> tuple[SampleResponse, bool]:
        running = asyncio.create_task(sampler.sample_async(QUESTIONS, params, name, num_samples=4))
        await until_running(sampler)
        assert await asyncio.to_thread(sampler.add_adapter_to_model, name, adapters[1]) == f"{name}@2"
        in_time = not running.done()
        await asyncio.to_thread(sampler.remove_adapter, name)
        return await running, in_time

    response, in_time = asyncio.run(run())
    assert in_time or "vllm" not in str(sampler.status()["engines"]), "the call ended too early to show anything"
    assert {sequence.adapter for sequence in response.sequences} == {f"{name}@1"}
    assert tokens(response) == tokens(expected)
    with pytest.raises(AdapterError, match="unknown adapter"):
        sampler.sample(QUESTIONS, params, name)
