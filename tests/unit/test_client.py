"""The client works without the extras: a trainer installs it beside its own torch and transformers."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from twinkle_serve import hub
from twinkle_serve.adapter_description import describe_adapter
from twinkle_serve.adapters import pack_adapter
from twinkle_serve.checkpoint import bucket_shapes, named_tensors
from twinkle_serve.errors import ConfigError, WeightsError
from twinkle_serve.extras import require_extra
from twinkle_serve.packing import buckets

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def extra_modules() -> list[str]:
    """Modules of the extras, less yaml, which Ray needs."""
    extras = PROJECT["optional-dependencies"]
    names = {re.split("[>=<[]", name)[0].replace("-", "_") for kind in ("server", "cuda") for name in extras[kind]}
    return sorted(names - {"twinkle_serve", "pyyaml"})


WITHOUT_EXTRAS = """
import sys
from importlib.machinery import PathFinder

EXTRAS = set(%r)

class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in EXTRAS else super().find_spec(name, path, target)

sys.meta_path = [WithoutExtras if finder is PathFinder else finder for finder in sys.meta_path]
"""
"""Python code that hides every module of the extras, as if none were installed."""


def run_without_extras(code: str) -> str:
    """Runs code in a new process and returns its output."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS % extra_modules() + code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def lora_config() -> Any:
    """The part of peft's LoraConfig that all its versions share."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": {"q_proj"}, "bias": "none"}
    return SimpleNamespace(peft_type="LORA", to_dict=lambda: config)


def lora_arrays() -> dict[str, np.ndarray[Any, Any]]:
    """LoRA weights of one module, as numpy arrays."""
    module = "model.layers.0.self_attn.q_proj"
    return {
        f"{module}.lora_A.weight": np.ones((2, 8), np.float32),
        f"{module}.lora_B.weight": np.ones((8, 2), np.float32),
    }


def test_hidden_modules_are_those_of_the_extras() -> None:
    """Read from pyproject.toml, so new requirements of a service are hidden too."""
    assert {"torch", "transformers", "peft", "modelscope", "huggingface_hub", "vllm"} <= {*extra_modules()}


def test_client_imports_without_extras() -> None:
    """All public names, and every module that runs in the caller's process."""
    code = """
import twinkle_serve
for name in twinkle_serve.__all__:
    getattr(twinkle_serve, name)
import twinkle_serve.sampler.connect, twinkle_serve.sampler.client, twinkle_serve.sampler.verification
from twinkle_serve.errors import *
from twinkle_serve.template import Qwen3Template
print(sorted(EXTRAS & set(sys.modules)))
"""
    assert run_without_extras(code) == "[]"


def test_client_builds_requests_without_extras() -> None:
    """Sampling parameters, packed inputs and templates, weights and adapters of numpy, and messages with tool calls."""
    code = """
import numpy as np
from types import SimpleNamespace
from ray import cloudpickle
from twinkle_serve import SamplingParams, Template
from twinkle_serve.adapters import pack_adapter
from twinkle_serve.checkpoint import named_tensors
from twinkle_serve.packing import buckets
from twinkle_serve.data_format.inputs import PackedInputs
from twinkle_serve.data_format.messages import MessageParser
from twinkle_serve.template.packing import pack_template

class OwnTemplate(Template):
    pass

SamplingParams(max_tokens=4, stop=["."])
PackedInputs.of([{"input_ids": np.arange(3)}], cloudpickle.Pickler).to_list()
pack_template("Qwen3Template", {"enable_thinking": False}), pack_template(OwnTemplate, {})
list(buckets(named_tensors({"w": np.ones((2, 3), np.float16)})))
config = SimpleNamespace(peft_type="LORA", to_dict=lambda: {"peft_type": "LORA"})
pack_adapter(config, {"q_proj.lora_A.weight": np.ones((2, 3))})
call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
print(MessageParser(tool_parser="hermes").message(call)["tool_calls"][0]["function"]["name"])
"""
    assert run_without_extras(code) == "add"


def test_feature_without_its_extra_names_the_extra() -> None:
    """A ConfigError with the command that installs it."""
    code = """
from importlib import import_module
from twinkle_serve import Template, TorchSampler, hub, vLLMSampler
from twinkle_serve.checkpoint import named_tensors
from twinkle_serve.errors import ConfigError

for feature in (
    lambda: TorchSampler("demo"),
    lambda: vLLMSampler("demo"),
    lambda: import_module("graphs.sampler"),
    lambda: Template(hub.DEMO),
    lambda: list(named_tensors(hub.DEMO)),
    lambda: hub.resolve("hf://org/name"),
):
    try:
        feature()
    except ConfigError as error:
        print(error)
"""
    remedy = ", which the server extra brings: pip install 'twinkle-serve[server]'."
    assert run_without_extras(code).splitlines() == [
        "TorchSampler needs torch, transformers, blake3" + remedy,
        "vLLMSampler needs torch, transformers, blake3" + remedy,
        "a service needs torch, transformers, blake3" + remedy,
        "a tokenizer needs transformers" + remedy,
        "reading weights from files needs torch" + remedy,
        "a download from a hub needs huggingface_hub" + remedy,
    ]


def test_extra_that_is_installed_passes() -> None:
    """And a missing module is named."""
    require_extra("a tokenizer", "server", "transformers")
    with pytest.raises(ConfigError, match="a pony needs no_such_module, which the server extra brings"):
        require_extra("a pony", "server", "transformers", "no_such_module")


def test_arrays_make_the_same_buckets_as_tensors() -> None:
    """Byte for byte, 0-d and non-contiguous ones included, and however the two are mixed."""
    import torch

    tensors = {name: tensor.float() for name, tensor in named_tensors(hub.DEMO)}
    tensors |= {"scalar": torch.tensor(1.5), "across": torch.arange(6.0).reshape(2, 3).T, "ids": torch.arange(3)}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    mixed = {name: arrays[name] if i % 2 else tensor for i, (name, tensor) in enumerate(tensors.items())}
    for source in (arrays, mixed):
        for limit in (1, 2**20):
            made = [part.tobytes() for part in buckets(source.items(), limit)]
            assert made == [part.tobytes() for part in buckets(tensors.items(), limit)]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1.0, np.nan, np.inf], np.float16), "'w' has 2 values of 3 that are not finite"),
        (np.array(["a"]), "'w' is an array of <U1, not of numbers"),
    ],
)
def test_invalid_array_is_refused(array: np.ndarray[Any, Any], message: str) -> None:
    """With the same errors as tensors."""
    with pytest.raises(WeightsError, match=message):
        list(buckets({"w": array}.items()))


def test_array_with_nan_is_accepted_on_request() -> None:
    """With allow_nonfinite, as tensors are."""
    (part,) = buckets({"w": np.array([np.nan])}.items(), allow_nonfinite=True)
    assert bucket_shapes(part) == {"w": (1,)}


def test_adapter_of_arrays_equals_adapter_of_tensors() -> None:
    """Byte for byte."""
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in lora_arrays().items()}
    assert pack_adapter(lora_config(), lora_arrays()) == (files := pack_adapter(lora_config(), tensors))
    assert describe_adapter(files).rank == 2
