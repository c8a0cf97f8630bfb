"""The alias `twinkle`: in a process that imports it, unless the name is taken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(code: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:

    env = {**os.environ, **environment}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60, check=False
    )


def installed(path: Path) -> Path:
    """Creates another package named twinkle."""
    (path / "twinkle").mkdir()
    (path / "twinkle" / "__init__.py").write_text("THEIRS = True\n")
    return path


def test_as_twinkle_aliases_every_module() -> None:
    """Packages and their modules are the same objects with the same classes, under upstream's names too."""
    code = """
import sys
import twinkle_serve.as_twinkle
import twinkle, twinkle.sampler, twinkle_serve
from twinkle import DeviceGroup, DeviceMesh, get_logger, initialize, remote_class, remote_function
from twinkle.sampler import Sampler, TorchSampler, VLLMSampler, vLLMSampler
from twinkle.sampler.base import Sampler as again
from twinkle.data_format import InputFeature, Message, SampledSequence, SampleResponse, SamplingParams, Trajectory
from twinkle.data_format.sampling import SamplingParams as moved
from twinkle.template import Qwen3_5Template, Template
from twinkle.errors import PromptError
import twinkle_serve.errors, twinkle_serve.sampler.base
assert twinkle is twinkle_serve and twinkle.sampler is twinkle_serve.sampler
assert again is Sampler is twinkle_serve.sampler.base.Sampler and moved is SamplingParams
assert PromptError is twinkle_serve.errors.PromptError and Qwen3_5Template is Template
assert twinkle_serve.errors.__spec__.name == 'twinkle_serve.errors'
assert 'torch' not in sys.modules and 'vllm' not in sys.modules
try:
    import twinkle.trainer
except ModuleNotFoundError as error:
    print(error)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "No module named 'twinkle.trainer'\n"


def test_as_twinkle_takes_upstreams_option_that_has_no_effect_here() -> None:
    """`return_encoded` is accepted with it, and an unknown option without."""
    code = """
from twinkle_serve.data_format.sample_request import SampleOptions, check_options
try:
    check_options({"return_encoded": True}, SampleOptions)
except TypeError as error:
    print(error)
import twinkle_serve.as_twinkle
print(check_options({"return_encoded": True, "num_samples": 2}, SampleOptions))
"""
    result = run(code)
    refused, accepted = result.stdout.splitlines()
    assert "unknown option 'return_encoded'" in refused and accepted == "{'num_samples': 2}", result.stderr


def test_as_twinkle_reads_tool_calls_in_json_and_in_xml() -> None:
    """Under either parser that the service names, as Twinkle's does; without the alias, each reads its own format."""
    code = """
from twinkle_serve.data_format.messages import MessageParser
texts = ('<tool_call>{"name": "f", "arguments": ""}</tool_call>', '<tool_call><function=f></function></tool_call>')
def count(name):
    return sum(len(MessageParser(tool_parser=name).message(text).get("tool_calls", [])) for text in texts)
print(count("hermes"), count("qwen3_coder"))
import twinkle_serve.as_twinkle
print(count("hermes"), count("qwen3_coder"))
"""
    result = run(code)
    assert result.stdout == "1 1\n2 2\n", result.stderr


def test_as_twinkle_is_refused_if_another_twinkle_is_installed(tmp_path: Path) -> None:
    """The message has its path and the remedy; `twinkle` is unchanged."""
    code = "import twinkle_serve.as_twinkle"
    result = run(code, installed(tmp_path))
    assert result.returncode == 1
    assert "ConfigError: another package named twinkle is installed" in result.stderr
    assert str(tmp_path) in result.stderr and "TWINKLE_SERVE_AS_TWINKLE=override" in result.stderr


def test_as_twinkle_overrides_if_requested(tmp_path: Path) -> None:
    """Also if the other package is imported already."""
    code = "import twinkle; import twinkle_serve.as_twinkle; import twinkle; print(hasattr(twinkle, 'THEIRS'))"
    result = run(code, installed(tmp_path), TWINKLE_SERVE_AS_TWINKLE="override")
    assert result.stdout == "False\n", result.stderr


def test_importing_twinkle_serve_does_not_define_twinkle() -> None:
    """The alias needs its own import."""
    assert run("import twinkle_serve, twinkle").returncode == 1


def test_as_twinkle_has_what_scripts_import_beside_the_sampler() -> None:
    """Helpers, platforms, the checkpoint engine, message types, under each of upstream's module names."""
    code = """
import os, sys
import twinkle_serve.as_twinkle
import twinkle
from twinkle import GPU, DeviceGroup, DeviceMesh, Platform, get_device_placement, initialize, is_master
from twinkle import check_unsafe, exists, find_free_port, find_node_ip, framework_util, requires, torch_util
from twinkle.infra import get_device_placement as placement, is_master as master, remote_class, remote_function
from twinkle.utils import construct_class, deep_getattr, is_last_rank, is_valid_ipv6_address, to_device
from twinkle.utils.platform import DeviceMesh as mesh, Platform as platform
from twinkle.utils.platforms import Platform as moved
from twinkle.utils.platforms.base import Platform as again
from twinkle.utils.device_mesh import DeviceGroup as group
from twinkle.utils.framework import Torch
from twinkle.checkpoint_engine import CheckpointEngineManager
from twinkle.checkpoint_engine.manager import CheckpointEngineManager as manager
from twinkle.data_format import Tool, ToolCall, pack_value, user_data_get
from twinkle.data_format.message import Tool as tool
from twinkle.data_format.types import SampledSequence, SampleResponse
from twinkle.template.base import Template
from twinkle.sampler.vllm_sampler.vllm_sampler import vLLMSampler
import twinkle_serve.mesh, twinkle_serve.platform
assert Platform is platform is moved is again is twinkle_serve.platform.Platform and mesh is DeviceMesh
assert group is DeviceGroup is twinkle_serve.mesh.DeviceGroup and manager is CheckpointEngineManager
assert placement is get_device_placement and tool is Tool and Torch is torch_util is framework_util
groups = [DeviceGroup('model', 4, device_type='GPU', gpus_per_worker=2), DeviceGroup('sampler', [4, 5], 'GPU')]
twinkle.initialize('local', groups=groups, name='run')
text = get_device_placement()
assert 'model: 4 devices (cuda), any ranks, 2 workers' in text and 'sampler: 2 devices (cuda), ranks 4, 5' in text
assert get_device_placement(groups[:1]) != text and 'none' in get_device_placement([])
assert is_master() and master() and is_last_rank()
assert exists('numpy>=1') and not exists('numpy<1') and not exists('no-such-package')
try:
    requires('numpy<1')
except ImportError as error:
    assert 'numpy<1' in str(error)
assert 0 < find_free_port() < 65536 and is_valid_ipv6_address('::1') and not is_valid_ipv6_address('127.0.0.1')
assert deep_getattr({'a': groups[0]}, 'a.name') == 'model' and deep_getattr({}, 'a.b', 3) == 3
assert to_device({'a': [1]}, 'cpu') == {'a': [1]}
assert construct_class('DeviceGroup', DeviceGroup, twinkle_serve.mesh, name='x', ranks=1).name == 'x'
assert construct_class(groups[0], DeviceGroup, twinkle) is groups[0]
check_unsafe(print)
os.environ['TWINKLE_TRUST_REMOTE_CODE'] = '0'
try:
    check_unsafe([{'a': print}])
except ValueError as error:
    print('refused')
assert not {'torch', 'vllm', 'ray'} & set(sys.modules), set(sys.modules)
"""
    result = run(code)
    assert result.stdout == "refused\n", result.stderr


def test_as_twinkle_makes_defaults_twinkles() -> None:
    """In this process alone, and not without the import. What a call or engine_args say counts all the same."""
    code = """
from twinkle_serve import conventions, sampler
from twinkle_serve.sampler import samplers
taken = []
samplers._client = lambda args, *_: taken.append(args.engine_args.get('logprobs_mode'))
def make(**engine_args):
    samplers.TorchSampler('demo', engine_args=engine_args)
    return taken.pop()
assert make() is None and not conventions.follows_twinkle()
import twinkle_serve.as_twinkle
from twinkle.sampler import TorchSampler
assert conventions.follows_twinkle() and TorchSampler is samplers.TorchSampler
assert make() == 'processed_logprobs' and make(logprobs_mode='raw_logprobs') == 'raw_logprobs'
print('done')
"""
    result = run(code)
    assert result.stdout == "done\n", result.stderr
