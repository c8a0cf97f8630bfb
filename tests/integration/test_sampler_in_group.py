"""A sampler and an actor model side by side, each in a device group of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

import twinkle_serve
from tests.support.deploy import deploy
from tests.support.samplers import FakeSampler
from twinkle_serve import DeviceGroup, DeviceMesh, TorchSampler, connect, remote_class, remote_function
from twinkle_serve.errors import MeshError
from twinkle_serve.remote import group_devices, known_groups
from twinkle_serve.remote.reservation import enter_group

pytestmark = pytest.mark.ray
QUESTION = {"messages": [{"role": "user", "content": "12+34="}]}
ENGINE_ARGS = {"dtype": "float32", "max_model_len": 128}


@remote_class()
class Actor:
    """A user's class that says where it runs."""

    @remote_function(dispatch="all", collect="none")
    def cores(self) -> list[int]:
        return sorted(os.sched_getaffinity(0))


@pytest.fixture(scope="module", autouse=True)
def groups(cluster: None) -> Iterator[None]:
    """Four cores as Ray counts them: two for the actor model, two for the sampler."""
    actor, sampler = DeviceGroup("actor", 2, device_type="cpu"), DeviceGroup("sampler", [2, 3], device_type="cpu")
    twinkle_serve.initialize("ray", groups=[actor, sampler])
    yield
    twinkle_serve.shutdown()
    assert "sampler" not in serve.status().applications, "its engines would go on using devices of nobody"


@pytest.mark.nightly
def test_sampler_takes_devices_of_its_group_alone() -> None:
    """Its engines have the cores of their group, the actor's workers those of theirs: none is shared."""
    actor: Any = Actor(remote_group="actor")  # type: ignore[call-arg]
    sampler = TorchSampler("demo", ENGINE_ARGS, DeviceMesh.from_sizes(dp_size=2), "sampler")
    ids = {name: [int(device.id) for device in group_devices(name).devices] for name in ("actor", "sampler")}
    assert ids == {"actor": [0, 1], "sampler": [2, 3]}
    cores = sorted(os.sched_getaffinity(0))
    engines = [engine["cpus"] for engine in sampler.status()["engines"].values()]
    assert engines == [[cores[i % len(cores)]] for i in ids["sampler"]]
    assert actor.cores() == [[cores[i % len(cores)]] for i in ids["actor"]]
    assert len(sampler.sample(QUESTION, {"max_tokens": 4}, num_samples=3).sequences) == 3
    sampler.shutdown()


@pytest.mark.nightly
def test_sampler_of_a_group_leaves_other_applications_alone() -> None:
    """Deployed next to another, called by handle and by name, and gone by its own shutdown."""
    other = deploy("other", engine="fake", device_mesh={"dp_size": 1})
    sampler = FakeSampler("demo", remote_group="sampler")
    assert {"other", "sampler"} <= set(serve.status().applications)
    expected = sampler.sample(QUESTION, {"temperature": 0}).sequences[0].tokens
    assert connect("sampler").sample(QUESTION, {"temperature": 0}).sequences[0].tokens == expected
    sampler.shutdown()
    assert "sampler" not in serve.status().applications
    assert len(other.sample(QUESTION, {"max_tokens": 2}).sequences) == 1
    other.shutdown()


SCRIPT = """
import os
import twinkle_serve
from tests.support.samplers import FakeSampler
from twinkle_serve import DeviceGroup

twinkle_serve.initialize("ray", groups=[DeviceGroup("crashing", 1, device_type="cpu")])
sampler = FakeSampler("demo", remote_group="crashing")
print(len(sampler.sample({"input_ids": [5]}, {"max_tokens": 2}).sequences), flush=True)
os._exit(3)  # a crash: nothing is given back
"""


@pytest.mark.nightly
def test_sampler_outlives_its_run_and_ends_when_its_group_is_replaced(tmp_path: Path) -> None:
    """A run that crashed leaves its service up, with its devices; the next one takes the group over, or has it anew."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    answer = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert (answer.returncode, answer.stdout) == (3, "1\n"), answer.stderr
    groups = [DeviceGroup("actor", 2, device_type="cpu"), DeviceGroup("sampler", [2, 3], device_type="cpu")]
    twinkle_serve.initialize("ray", groups=groups)
    assert "crashing" in known_groups(), "a sampler runs in it"
    orphan = connect("crashing")
    assert len(orphan.sample(QUESTION, {"max_tokens": 2}).sequences) == 1
    twinkle_serve.initialize("ray", groups=[*groups, DeviceGroup("crashing", [4], device_type="cpu")])
    assert "crashing" not in serve.status().applications


def test_engine_does_not_start_on_devices_that_its_group_has_lost() -> None:
    """An application that was built before the group was replaced gets an error, not somebody else's devices."""
    group = group_devices("sampler")
    with pytest.raises(MeshError, match="was freed or replaced after application 'late' got its devices"):
        enter_group("sampler", group_devices("actor").devices, "late")
    enter_group("sampler", group.devices[:1], "early")  # not of Serve, so it keeps nobody from anything


def test_sampler_that_does_not_fit_its_group_is_refused_at_once() -> None:
    """With both numbers; and so is a group that does not exist."""
    with pytest.raises(MeshError, match=r"needs 3 devices \(dp_size=3 x tp_size=1\), group 'sampler' has 2"):
        FakeSampler("demo", None, DeviceMesh.from_sizes(dp_size=3), "sampler")
    with pytest.raises(MeshError, match="'smapler', did you mean 'sampler'"):
        FakeSampler("demo", None, DeviceMesh.from_sizes(dp_size=1), "smapler")
    with pytest.raises(MeshError, match=r"dp_size=2: one engine runs in this process"):
        FakeSampler("demo", None, DeviceMesh.from_sizes(dp_size=2))


def test_group_with_a_sampler_of_this_run_is_not_replaced() -> None:
    """Its engines would go on using what is another group's by then. It goes on as it was.

    The last test: the sampler that it leaves ends with its group.
    """
    sampler = FakeSampler("demo", remote_group="sampler")
    actor, smaller = DeviceGroup("actor", 2, device_type="cpu"), DeviceGroup("sampler", [2], device_type="cpu")
    with pytest.raises(MeshError, match="application 'sampler' of this run are in it"):
        twinkle_serve.initialize("ray", groups=[actor, smaller])
    assert len(sampler.sample(QUESTION, {"max_tokens": 2}).sequences) == 1
