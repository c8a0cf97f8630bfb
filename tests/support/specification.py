"""The snippets of the sampler's specification, and how tests run them.

Each is the specification's own text. Where it names a model or GPUs that a test machine lacks, those literals alone are
replaced, by SUBSTITUTES; SMALL are the engine's arguments for such a machine.
"""

# ruff: noqa: W293  # the specification's own text

from __future__ import annotations

import contextlib
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from tests.support.samplers import ENGINE_ARGS

SUBSTITUTES = {
    "'ms://Qwen/Qwen2.5-7B-Instruct'": "'demo'",
    "'path/to/lora'": "LORA",
    "remote_group='sampler_group'": "remote_group='sampler_group', **SMALL",
    "remote_group='sampler'": "remote_group='sampler', **SMALL",
    "dp_size=2, tp_size=2": "dp_size=2, tp_size=1",
    "dp_size=4": "dp_size=1",
    "ranks=4, device_type='cuda'": "ranks=1, device_type='cpu'",
}
"""Literal in the specification, literal in the test."""

# The tests that share this sampler compare logprobs with the model's own, and Twinkle's default is another one.
SMALL: dict[str, Any] = {
    "engine_args": {**ENGINE_ARGS["vllm"], "logprobs_mode": "raw_logprobs"},
    "failover": "resume",
}

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


@contextlib.contextmanager
def as_twinkle() -> Iterator[None]:
    """The name `twinkle`, and its defaults, in this process."""
    import twinkle_serve.as_twinkle  # noqa: F401
    from twinkle_serve import conventions

    yield
    conventions.follow_twinkle(False)
    for name in [name for name in sys.modules if name.split(".")[0] == "twinkle"]:
        del sys.modules[name]
    del sys.modules["twinkle_serve.as_twinkle"]


def run(snippet: str, **names: Any) -> dict[str, Any]:
    """Runs a snippet with the substitutes; returns its names."""
    for literal, substitute in SUBSTITUTES.items():
        snippet = snippet.replace(literal, substitute)
    namespace = {"trajectories": TRAJECTORIES, "SMALL": SMALL, **names}
    exec(compile(textwrap.dedent(snippet), "specification", "exec"), namespace)
    return namespace
