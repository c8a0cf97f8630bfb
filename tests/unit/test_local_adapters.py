"""Adapters of a sampler in this process, on the fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.eventually import wait_until
from tests.support.local_sampler import QUESTION, make
from tests.support.lora import save_adapter
from twinkle_serve.errors import (
    AdapterError,
)
from twinkle_serve.sampler import RunningSampler


@pytest.fixture
def sampler() -> Iterator[RunningSampler]:
    made, _ = make()
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return [save_adapter(directory / str(i), seed=i) for i in range(2)]


def test_adapter_of_one_call_fails_no_neighbour(sampler: RunningSampler, adapters: list[Path]) -> None:
    """Base model and two adapters in one batch; one of them cannot be loaded when it is needed."""
    sampler.add_adapter_to_model("good", adapters[0])
    sampler.add_adapter_to_model("bad", adapters[1])
    backend: Any = sampler._client
    server = backend._service._server

    async def refuse(version: Any) -> None:
        if version.name == "bad":
            raise AdapterError("no room for it")
        await type(server).load_adapter(server, version)

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
    """By a new version, by removal, by path, and after a call that was using it: the engine keeps what is meant."""
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
