"""The weights that a model has, by its files and its config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.harness import started
from tests.support.samplers import ENGINE_ARGS
from twinkle_serve import hub
from twinkle_serve.checkpoint import find_overflow, named_tensors, read_model_spec, weight_files
from twinkle_serve.errors import EngineArgsError, EngineStartError, WeightsError

TENSORS: dict[str, torch.Tensor] = dict(named_tensors(hub.DEMO))
EMBEDDING = "model.embed_tokens.weight"
STRANGERS = ("consolidated", "adapter_model", "optimizer", "model.fp16", "model-extra")


def save(path: Path, name: str, names: list[str]) -> None:
    path.mkdir(exist_ok=True)
    save_file({key: TENSORS[key].clone() for key in names}, path / name)


def shards(path: Path, *, index: bool = True) -> None:
    names = list(TENSORS)
    for number in range(2):
        save(path, f"model-{number}.safetensors", names[number::2])
    if index:
        where = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(names)}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("sharded", [True, False])
def test_files_beside_the_models_are_not_read(tmp_path: Path, stranger: str, sharded: bool) -> None:
    """Of another format, an adapter, an optimizer or another variant: the index or the model's own name decides."""
    if sharded:
        shards(tmp_path)
    else:
        save(tmp_path, "model.safetensors", list(TENSORS))
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, tmp_path / f"{stranger}.safetensors")
    assert read_model_spec(tmp_path).weights.keys() == TENSORS.keys()
    assert dict(named_tensors(tmp_path)).keys() == TENSORS.keys()


def test_parts_without_an_index_are_read(tmp_path: Path) -> None:
    """As trainers save them; strangers beside them are not."""
    shards(tmp_path, index=False)
    save_file({"x": torch.ones(2)}, tmp_path / "optimizer.safetensors")
    assert dict(named_tensors(tmp_path)).keys() == TENSORS.keys()


@pytest.mark.parametrize("stranger", ["optimizer", "adapter_model"])
def test_files_beside_a_pickled_model_are_not_read(tmp_path: Path, stranger: str) -> None:
    """Its weights are not in safetensors files at all."""
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    save_file({"x": torch.ones(2)}, tmp_path / f"{stranger}.safetensors")
    assert not read_model_spec(tmp_path).weights
    with pytest.raises(WeightsError, match="no safetensors files"):
        dict(named_tensors(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ("{}", "cannot be read"), ('{"weight_map": {"a": "gone.safetensors"}}', "has no gone")],
)
def test_index_that_does_not_fit_is_refused(tmp_path: Path, content: str, message: str) -> None:
    """Files that it does not list are never taken in its place."""
    save(tmp_path, "model-0.safetensors", [EMBEDDING])
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match=message):
        weight_files(tmp_path)


def stale_index(path: Path) -> None:
    """All parts are there, of an earlier save."""
    shards(path)
    save(path, "model.safetensors", list(TENSORS))


def index_of_one_and_more(path: Path) -> None:
    save(path, "model.safetensors", list(TENSORS)[1:])
    save(path, "model-1.safetensors", list(TENSORS)[:1])
    where = {name: f"model{'' if i else '-1'}.safetensors" for i, name in enumerate(TENSORS)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def pickles_and_parts(path: Path) -> None:
    shards(path, index=False)
    torch.save(TENSORS, path / "pytorch_model.bin")


@pytest.mark.parametrize("files", [stale_index, index_of_one_and_more, pickles_and_parts])
def test_directory_of_which_loaders_read_different_files_is_refused(
    tmp_path: Path, files: Callable[[Path], None]
) -> None:
    """transformers prefers the one file to an index, and pickles to parts; vLLM does not."""
    files(tmp_path)
    for read in (read_model_spec, lambda path: list(named_tensors(path))):
        with pytest.raises(WeightsError, match=r"has .* and also .*: transformers would read the former, and vLLM the"):
            read(tmp_path)


def test_index_that_lists_the_one_file_is_read(tmp_path: Path) -> None:
    """Whichever loader reads it."""
    save(tmp_path, "model.safetensors", list(TENSORS))
    where = dict.fromkeys(TENSORS, "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


async def test_engine_does_not_start_on_a_directory_of_which_loaders_read_different_files(tmp_path: Path) -> None:
    """Whatever the engine: it may read the files that the checks do not."""
    shutil.copytree(hub.DEMO, tmp_path / "model")
    stale_index(tmp_path / "model")
    with pytest.raises(EngineStartError, match="transformers would read the former"):
        async with started("fake", tmp_path / "model"):
            pass


@pytest.mark.parametrize(("stored", "value"), [(torch.float32, 7e4), (torch.bfloat16, -1e6)])
async def test_engine_does_not_start_with_a_dtype_that_the_checkpoint_exceeds(
    tmp_path: Path, stored: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values would be infinite. Scalars are not weights, such as constants that masked attention once stored."""
    tensors = {name: tensor.to(stored, copy=True) for name, tensor in TENSORS.items()}
    path = model(tmp_path / "model", {**tensors, "masked_bias": torch.tensor(-1e9)})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(hub.DEMO / name, path)
    monkeypatch.setitem(ENGINE_ARGS, "torch", {"dtype": "float16", "max_model_len": 64})
    assert find_overflow(path, "F16") is find_overflow(path, "BF16") is None
    tensors["model.norm.weight"][3] = value
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    message = r"'model.norm.weight' has values of magnitude .*; the engine holds it in F16, up to 65504: .* bfloat16"
    with pytest.raises(EngineArgsError, match=message):
        async with started("torch", path):
            pass


def model(path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A model with this checkpoint and these keys of its config; None takes a key away."""
    path.mkdir()
    content = {**json.loads((hub.DEMO / "config.json").read_text()), **config}
    (path / "config.json").write_text(json.dumps({key: item for key, item in content.items() if item is not None}))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


HEAD = {"lm_head.weight": TENSORS[EMBEDDING]}
OTHER_HEAD = {"lm_head.weight": TENSORS[EMBEDDING] + 1}


@pytest.mark.parametrize(
    ("stored", "config", "tied"),
    [
        ({}, {"tie_word_embeddings": True}, True),
        ({}, {"tie_word_embeddings": None}, True),
        ({}, {"tie_word_embeddings": False}, False),
        ({}, {"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": True}}, True),
        (HEAD, {"tie_word_embeddings": True}, True),
        (HEAD, {"tie_word_embeddings": False}, False),
        (OTHER_HEAD, {"tie_word_embeddings": True}, False),
        (OTHER_HEAD, {"tie_word_embeddings": False}, False),
    ],
)
def test_config_and_checkpoint_tell_whether_the_output_layer_is_the_embedding(
    tmp_path: Path, stored: dict[str, torch.Tensor], config: dict[str, Any], tied: bool
) -> None:
    """Then its name may come or not; else it is a weight as others, or none of the model's."""
    spec = read_model_spec(model(tmp_path / "model", {**TENSORS, **stored}, **config))
    assert (spec.tied.get("lm_head.weight") == EMBEDDING) == tied
    assert ("lm_head.weight" in spec.required) == (bool(stored) and not tied)
    assert spec.weights.keys() == {**TENSORS, **stored}.keys()


def test_output_layer_is_found_under_the_names_of_larger_models(tmp_path: Path) -> None:
    """Where the language model is a part of another one."""
    tensors = {name.replace("model.", "model.language_model."): tensor for name, tensor in TENSORS.items()}
    tensors["model.visual.patch_embed.weight"] = torch.ones(2, 2)
    tensors["mtp.layers.0.embed_tokens.weight"] = TENSORS[EMBEDDING]
    spec = read_model_spec(model(tmp_path / "model", tensors))
    assert (
        spec.tied["lm_head.weight"] == spec.tied["model.lm_head.weight"] == "model.language_model.embed_tokens.weight"
    )


@pytest.mark.parametrize(
    ("name", "message"), [("a" * 300, "cannot be read: .*name too long"), ("~no-such-user/a", "cannot be read: .*home")]
)
def test_path_that_cannot_be_read_is_refused(name: str, message: str) -> None:
    """Whichever way the operating system says it."""
    with pytest.raises(WeightsError, match=message):
        dict(named_tensors(name))


def test_cut_off_files_are_refused(tmp_path: Path) -> None:
    """With a typed error, also where only their headers are read."""
    shutil.copy(hub.DEMO / "model.safetensors", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((hub.DEMO / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(WeightsError, match="cut off or damaged"):
        read_model_spec(tmp_path)
