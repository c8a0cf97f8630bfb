"""Adapters of a sampler in this process, on the fake engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.support.eventually import wait_until
from tests.support.local_sampler import QUESTION, make
from tests.support.lora import random_adapter
from twinkle_serve.adapters import PREFIX
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.weights import MAIN_TRACK
from twinkle_serve.errors import (
    AdapterError,
)
from twinkle_serve.packing import buckets
from twinkle_serve.sampler import RunningSampler


def test_adapter_of_one_call_fails_no_neighbour(sampler: RunningSampler, adapters: list[Path]) -> None:
    """Base model and two adapters in one batch; one of them cannot be loaded when it is needed."""
    sampler.add_adapter_to_model("good", adapters[0])
    sampler.add_adapter_to_model("bad", adapters[1])
    backend: Any = sampler._client
    server = backend._service._server

    async def refuse(version: Any, files: Any) -> None:
        if version.name == "bad":
            raise AdapterError("no room for it")
        await type(server).load_adapter(server, version, files)

    server.load_adapter = refuse
    engine = backend._router._engines.active["local"]
    for loading in list(engine.adapters):  # as if the engine were new
        del engine.adapters[loading]

    async def run() -> list[Any]:
        names = ["", "bad", "good"] * 3
        calls = [sampler.sample_async(QUESTION, {"max_tokens": 3}, name) for name in names]
        answers: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
        return answers

    results = asyncio.run(run())
    assert [type(result).__name__ for result in results] == ["SampleResponse", "AdapterError", "SampleResponse"] * 3


def test_adapter_versions_are_freed(adapters: list[Path]) -> None:
    """After a new version, after removal, after a call by path, and when the last call that used it ends."""
    sampler, backend = make(token_latency_s=0.02)
    server: Any = backend._service._server

    def held() -> set[str]:
        return {version.label for version in server._adapters.values()}

    def settled(expected: set[str]) -> None:
        wait_until(lambda: held() == expected, f"the engine has {expected}")

    sampler.add_adapter_to_model("policy", adapters[0])
    sampler.add_adapter_to_model("policy", adapters[1])
    settled({"policy@2"})
    stream = sampler.sample_stream(QUESTION, {"max_tokens": 60, "ignore_eos": True}, "policy")
    read = [next(stream)]
    sampler.add_adapter_to_model("policy", adapters[0])
    assert held() == {"policy@2", "policy@3"} and server._uses, "the stream is on the version that it began with"
    read.extend(stream)
    assert read[-1] == (read[-1][0], "length")
    settled({"policy@3"})
    path = str(adapters[1])
    sampler.sample(QUESTION, {"max_tokens": 2}, adapter_path=path)
    sampler.remove_adapter(path)
    sampler.remove_adapter("policy")
    settled(set())
    assert sampler.sample(QUESTION, {"max_tokens": 2}, adapter_path=path).sequences[0].adapter == f"{path}@2"
    assert not server._engine._adapters.keys() - server._adapters.keys()
    sampler.shutdown()


def test_paths_do_not_pass_for_versions_of_others(
    sampler: RunningSampler, adapters: list[Path], tmp_path: Path
) -> None:
    """A directory named like the label of another one is itself."""
    import shutil

    plain, tricky = tmp_path / "ck", tmp_path / "ck@1"
    shutil.copytree(adapters[0], plain)
    shutil.copytree(adapters[1], tricky)
    params = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    by_path = [sampler.sample(QUESTION, params, adapter_path=str(path)) for path in (plain, tricky, plain)]
    labels = [response.sequences[0].adapter for response in by_path]
    assert labels == [f"{plain}@1", f"{tricky}@1", f"{plain}@1"]
    tokens = [response.sequences[0].tokens for response in by_path]
    assert tokens[0] == tokens[2] != tokens[1]


def test_base_tensors_of_an_adapter_are_compared_with_the_weights_that_it_is_added_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the last update, not the checkpoint's; tied names too. The adapter stays through later updates."""
    sampler, backend = make()
    server = backend._service._server
    assert server is not None
    model = random_adapter(modules=("q_proj",))
    config, old = model.peft_config["default"], {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sampler.add_adapter_to_model("first", config, state_dict=old)

    def scaled(factor: int) -> dict[str, Any]:
        return {name: tensor if "lora_" in name else tensor * factor for name, tensor in old.items()}

    def own(factor: int) -> dict[str, Any]:
        names = {name: name.removeprefix(PREFIX).replace(".base_layer.", ".") for name in old if "lora_" not in name}
        return {names[name]: tensor for name, tensor in scaled(factor).items() if name in names}

    sampler.update_weights(own(2), "doubled", bucket_bytes=2**18)
    with pytest.raises(AdapterError, match="with values that the model's weights 'doubled' do not have"):
        sampler.add_adapter_to_model("second", config, state_dict=old)
    in_bfloat16 = {name: tensor if "lora_" in name else tensor.bfloat16() for name, tensor in scaled(2).items()}
    for tensors in (scaled(2), in_bfloat16):
        label = sampler.add_adapter_to_model("second", config, state_dict=tensors)
    norm = f"{PREFIX}model.norm.weight"
    with pytest.raises(AdapterError, match=r"'model.norm.weight' with values that the model's weights 'doubled' do"):
        sampler.add_adapter_to_model("second", config, state_dict={**scaled(2), norm: old[norm]})
    sampler.update_weights(own(3), "tripled")
    versions = list(server._adapters.values())
    assert {version.weights for version in versions} == {0, 1}

    async def reload() -> None:
        """As an engine that starts anew."""
        await server.keep_adapters([])
        for version in versions:
            await server.load_adapter(version)

    backend.loop.call(reload())
    assert sampler.sample(QUESTION, {"max_tokens": 2}, label).sequences[0].adapter == label
    load = server.load_adapter

    async def update_first(version: AdapterVersion, files: AdapterFiles) -> None:
        upload = await server._store.begin_weights("meanwhile", await server.model_spec())
        for index, part in enumerate(buckets(own(4).items())):
            await server._store.append_weights(upload, index, part)
        await server._store.commit_weights(await server._store.seal_weights(upload), MAIN_TRACK)
        await load(version, files)

    monkeypatch.setattr(server, "load_adapter", update_first)
    with pytest.raises(AdapterError, match=r"weights were updated to 'meanwhile' meanwhile\. Add it again"):
        sampler.add_adapter_to_model("third", config, state_dict=scaled(3))
    sampler.shutdown()
