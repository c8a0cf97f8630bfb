"""`twinkle-serve doctor`: its checks and its exit code. Nothing is started."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.command_line import run
from tests.support.docs import ROOT
from tests.support.local_sampler import make
from twinkle_serve import sampler
from twinkle_serve.cli import checks, ray_checks
from twinkle_serve.cli.checks import Check
from twinkle_serve.errors import EngineStartError, ServiceNotReadyError
from twinkle_serve.remote import clusters


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """None runs on this machine, whatever does."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(clusters, "find_cluster", lambda address=None: None)


def config(path: Path, listen: str = "127.0.0.1:8000", **args: object) -> str:
    """serve_config.yaml with some args of its own."""
    document = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    document["applications"][0]["args"].update({"device_mesh": {"device_type": "cpu"}, **args})
    document["applications"][1]["args"] = {"listen": listen}
    path.write_text(yaml.safe_dump(document))
    return str(path)


def doctor(*arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Runs it. Returns the exit code, and the checks by name."""
    result = run("doctor", *arguments, "--json")
    found = json.loads(result.stdout)
    assert found["passed"] == (result.exit_code == 0)
    return result.exit_code, {check["name"]: check for check in found["checks"]}


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which something listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_config_that_fits_passes(tmp_path: Path) -> None:
    """Also as a table, with a mark for each check."""
    path = config(tmp_path / "config.yaml")
    code, found = doctor(path)
    assert code == 0
    assert {"python", "ray", "vllm", "torch", "transformers", "CPU", "memory", "/dev/shm", "Ray token"} <= {*found}
    assert found["config"]["result"] == found["sampler devices"]["result"] == found["sampler model"]["result"] == "ok"
    assert "1 engine of 1 CPU device fits" in found["sampler devices"]["text"]
    assert "3.2 MiB of weights" in found["sampler model"]["text"]
    result = run("doctor", path)
    assert result.exit_code == 0 and result.stderr == ""
    assert "no check failed" in result.stdout and "✓" in result.stdout


@pytest.mark.parametrize(
    ("args", "check", "text"),
    [
        ({"modelid": "demo"}, "config", "unknown key 'modelid', did you mean 'model_id'"),
        ({"engine_args": {"max_seqs": 3}, "engine": "torch"}, "config", "unknown torch engine argument 'max_seqs'"),
        ({"device_mesh": {"dp_size": 999, "device_type": "cpu"}}, "sampler devices", "needs 999 CPUs"),
        ({"device_mesh": {"dp_size": 1, "device_type": "cuda"}}, "sampler devices", "needs 1 GPUs"),
        ({"model_id": "/no/such/model"}, "sampler model", "no directory at /no/such/model"),
    ],
)
def test_a_config_that_cannot_run_fails(
    args: dict[str, Any], check: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the error that the start would end with."""
    monkeypatch.setattr(checks, "gpu_memory", list)
    code, found = doctor(config(tmp_path / "config.yaml", **args))
    assert code == 1 and found[check]["result"] == "failed" and text in found[check]["text"]


def test_a_model_that_is_larger_than_memory_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU, of all engines; on GPUs, of the part on each."""
    monkeypatch.setattr(checks, "available_memory", lambda: 1_000_000)
    code, found = doctor(config(tmp_path / "config.yaml"))
    assert code == 1 and "976.6 KiB are free" in found["sampler model"]["text"]
    assert found["memory"]["result"] == "warning"
    monkeypatch.setattr(checks, "gpu_memory", lambda: [("GPU", 2_000_000, 2_000_000)] * 2)
    mesh = {"tp_size": 2, "device_type": "cuda"}
    code, found = doctor(config(tmp_path / "config.yaml", device_mesh=mesh))
    assert code == 0 and "1.6 MiB for a GPU" in found["sampler model"]["text"]


def test_a_taken_port_is_a_warning(taken: int, tmp_path: Path) -> None:
    """The service itself may run already."""
    code, found = doctor(config(tmp_path / "config.yaml", f"127.0.0.1:{taken}"))
    assert code == 0 and found["gateway port"]["result"] == "warning" and str(taken) in found["gateway port"]["text"]


def test_a_package_of_another_version_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """With both versions and the command; so does one that is missing."""
    known = {"twinkle-serve": "1", "ray": "2.0", "torch": None}
    requires = ["ray[serve]==2.60.0", "torch>=2; extra == 'server'", "nonsense; extra == 'dev'"]
    monkeypatch.setattr(checks, "_version", lambda name: known.get(name))
    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    found = {check.name: check for check in checks.versions()}
    assert found["ray"] == Check("ray", "failed", "2.0 is installed, ==2.60.0 is required", "pip install 'ray==2.60.0'")
    assert found["torch"].text == "not installed" and found["vllm"].result == "warning"
    assert "nonsense" not in found


def test_several_clusters_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which to join must be said."""

    def several(address: str | None = None) -> None:
        raise ServiceNotReadyError("several Ray clusters run here: a, b. Set RAY_ADDRESS to one.")

    monkeypatch.setattr(clusters, "find_cluster", several)
    (check,) = ray_checks.ray_checks(None)
    assert check.result == "failed" and "a, b" in check.text


def test_a_cluster_that_is_named_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not answer is a failed check, and the config cannot be placed."""
    found = clusters.Found("127.0.0.1:9", "address=127.0.0.1:9")
    monkeypatch.setattr(clusters, "find_cluster", lambda address=None: found if address else None)
    code, by_name = doctor(str(ROOT / "serve_config.yaml"), "--address", "127.0.0.1:9")
    assert code == 1
    for name in ("joining it", "sampler devices"):
        assert by_name[name]["result"] == "failed" and "Connection refused" in by_name[name]["text"]


def test_engines_are_compared_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that does not start is a failed check."""
    monkeypatch.setattr(sampler, "vLLMSampler", lambda *_: make()[0])
    monkeypatch.setattr(sampler, "TorchSampler", lambda *_: make()[0])
    (check,) = checks.engines()
    assert check.result == "ok" and "largest difference" in check.text

    def broken(*_: object) -> None:
        raise EngineStartError("no room")

    monkeypatch.setattr(sampler, "vLLMSampler", broken)
    (check,) = checks.engines()
    assert check.result == "failed" and check.text == "EngineStartError: no room"
