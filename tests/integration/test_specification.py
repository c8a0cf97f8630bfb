"""The snippets of the sampler's specification run as they stand, under the name `twinkle`, on real engines.

Each is the specification's own text. Where it names a model or GPUs that a test machine lacks, those literals alone are
replaced, by SUBSTITUTES.
"""

# ruff: noqa: W293  # the specification's own text

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.lora import save_adapter
from tests.support.ray_cluster import ray_cluster

SUBSTITUTES = {
    "'ms://Qwen/Qwen2.5-7B-Instruct'": "'demo'",
    "'path/to/lora'": "LORA",
    "dp_size=2, tp_size=2": "dp_size=2, tp_size=1",
    "dp_size=4": "dp_size=2",
    "ranks=4, device_type='cuda'": "ranks=2, device_type='cpu'",
}
"""Literal in the specification, literal in the test."""

INTERFACE = """
class Sampler(ABC):
    
    @abstractmethod
    def sample(
        self,
        inputs: Union[InputFeature, List[InputFeature], Trajectory, List[Trajectory]],
        sampling_params: Optional[SamplingParams] = None,
        adapter_name: str = '',
        *,
        num_samples: int = 1,
    ) -> SampleResponse:
        \"\"\"对给定输入进行采样\"\"\"
        ...
    
    def add_adapter_to_model(self, adapter_name: str, config_or_dir, **kwargs):
        \"\"\"添加 LoRA 适配器\"\"\"
        ...
    
    def set_template(self, template_cls: Union[Template, Type[Template], str], **kwargs):
        \"\"\"设置模板\"\"\"
        ...
"""

VLLM_SAMPLER = """
from twinkle.sampler import vLLMSampler
from twinkle.data_format import SamplingParams
from twinkle import DeviceMesh

# 创建采样器
sampler = vLLMSampler(
    model_id='ms://Qwen/Qwen2.5-7B-Instruct',
    device_mesh=DeviceMesh.from_sizes(dp_size=2, tp_size=2),
    remote_group='sampler_group'
)

# 添加 LoRA
sampler.add_adapter_to_model('my_lora', 'path/to/lora')

# 设置采样参数
params = SamplingParams(
    max_tokens=512,
    temperature=0.7,
    top_p=0.9,
    top_k=50
)

# 进行采样
response = sampler.sample(
    trajectories,
    sampling_params=params,
    adapter_name='my_lora',
    num_samples=4  # 每个 prompt 生成 4 个样本
)
"""

TORCH_SAMPLER = """
from twinkle.sampler import TorchSampler
from twinkle import DeviceMesh

sampler = TorchSampler(
    model_id='ms://Qwen/Qwen2.5-7B-Instruct',
    device_mesh=DeviceMesh.from_sizes(dp_size=1),
)

response = sampler.sample(trajectories, sampling_params=params)
"""

REMOTE = """
import twinkle
from twinkle import DeviceGroup, DeviceMesh
from twinkle.sampler import VLLMSampler

# 初始化 Ray 集群
device_groups = [
    DeviceGroup(name='sampler', ranks=4, device_type='cuda')
]
twinkle.initialize('ray', groups=device_groups)

# 创建远程采样器
sampler = VLLMSampler(
    model_id='ms://Qwen/Qwen2.5-7B-Instruct',
    device_mesh=DeviceMesh.from_sizes(dp_size=4),
    remote_group='sampler'
)

# sample 方法会在 remote worker 中执行
response = sampler.sample(trajectories, sampling_params=params)
"""

TRAJECTORIES = [{"messages": [{"role": "user", "content": f"{a}+{a}="}]} for a in (12, 345, 678)]


@pytest.fixture(scope="module", autouse=True)
def twinkle() -> Iterator[None]:
    """The name `twinkle` in this process, for these tests."""
    import twinkle_serve.as_twinkle  # noqa: F401

    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "twinkle"]:
        del sys.modules[name]
    del sys.modules["twinkle_serve.as_twinkle"]


def run(snippet: str, **names: Any) -> dict[str, Any]:
    """Runs a snippet with the substitutes; returns its names."""
    for literal, substitute in SUBSTITUTES.items():
        snippet = snippet.replace(literal, substitute)
    namespace = {"trajectories": TRAJECTORIES, **names}
    exec(compile(textwrap.dedent(snippet), "specification", "exec"), namespace)
    return namespace


def test_substitutes_are_literals_of_the_specification() -> None:
    """Each stands in a snippet, so that none is left over."""
    for literal in SUBSTITUTES:
        assert any(literal in snippet for snippet in (VLLM_SAMPLER, TORCH_SAMPLER, REMOTE)), literal


def test_specification_of_the_interface_is_met() -> None:
    """Ours has the abstract methods of the specified class and takes every call that it takes."""
    import inspect
    from abc import ABC, abstractmethod

    from twinkle.sampler import Sampler, TorchSampler, vLLMSampler

    specified = run(INTERFACE, ABC=ABC, abstractmethod=abstractmethod)["Sampler"]
    assert inspect.isabstract(Sampler) and Sampler.__abstractmethods__ == specified.__abstractmethods__
    for ours in (Sampler, vLLMSampler, TorchSampler):
        assert issubclass(ours, Sampler)
        for method in ("sample", "add_adapter_to_model", "set_template"):
            have = inspect.signature(getattr(ours, method)).parameters
            by_place = [
                p.name
                for p in inspect.signature(getattr(specified, method)).parameters.values()
                if p.kind is p.POSITIONAL_OR_KEYWORD
            ]
            assert list(have)[: len(by_place)] == by_place, "calls by place mean the same"
            for name, parameter in inspect.signature(getattr(specified, method)).parameters.items():
                if parameter.kind is not parameter.VAR_KEYWORD:
                    assert have[name].kind is parameter.kind, (ours, method, name)


def test_specification_of_the_torch_sampler_runs() -> None:
    """In this process."""
    from twinkle.data_format import SamplingParams

    names = run(TORCH_SAMPLER, params=SamplingParams(max_tokens=8))
    assert [seq.engine for seq in names["response"].sequences] == ["local"] * 3
    names["sampler"].shutdown()


def test_specification_of_the_vllm_sampler_runs(tmp_path: Path) -> None:
    """As a service beside others, on two vLLM engines, with the adapter."""
    with ray_cluster(num_cpus=4):
        names = run(VLLM_SAMPLER, LORA=str(save_adapter(tmp_path / "lora")))
        response = names["response"]
        assert len(response.sequences) == 12 and len(response) == 3
        assert {seq.adapter for seq in response.sequences} == {"my_lora@1"}
        assert {seq.engine for seq in response.sequences} == {"engine-dp0", "engine-dp1"}
        names["sampler"].shutdown()


def test_specification_of_remote_samplers_runs() -> None:
    """In a group of its own, whose devices the engines have."""
    from twinkle import shutdown
    from twinkle.data_format import SamplingParams

    with ray_cluster(num_cpus=3):
        names = run(REMOTE, params=SamplingParams(max_tokens=8))
        assert len(names["response"].sequences) == 3
        cores = [tuple(engine["cpus"]) for engine in names["sampler"].status()["engines"].values()]
        assert len(cores) == len(set(cores)) == 2
        names["sampler"].shutdown()
        shutdown()
