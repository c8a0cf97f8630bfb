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
