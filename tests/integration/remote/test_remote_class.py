"""Remote classes on a real Ray cluster: where their workers run, and what their calls return."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import psutil
import pytest

from tests.support.eventually import wait_until
from tests.support.processes import with_title
from tests.support.remote_objects import Counter, NeverReady, Relay, TooMuch, counter, gpu
from twinkle_serve import DeviceGroup, DeviceMesh
from twinkle_serve.errors import MeshError, WorkerError
from twinkle_serve.remote import initialize, remote_class, shutdown

pytestmark = [pytest.mark.ray, pytest.mark.own_cluster]


def test_workers_see_the_devices_of_their_group_alone() -> None:
    """And sampler and actor share none; several classes in one group share its own."""
    initialize("ray", groups=[gpu("actor", 2, gpus_per_worker=2), gpu("sampler", [1, 3])])
    actor, sampler, beside = counter("actor"), counter("sampler"), counter("sampler")
    assert actor.where()["CUDA_VISIBLE_DEVICES"] == "4,6"
    seen = sampler.where()
    assert [place["CUDA_VISIBLE_DEVICES"] for place in seen] == ["5", "7"]
    assert [(place["RANK"], place["WORLD_SIZE"], place["LOCAL_RANK"]) for place in seen] == [
        ("0", "2", "0"),
        ("1", "2", "0"),
    ]
    assert {place["CLUSTER_NAME"] for place in seen} == {"sampler"}
    assert len({place["port"] for place in seen}) == 1
    assert [place["CUDA_VISIBLE_DEVICES"] for place in beside.where()] == ["5", "7"]


def test_workers_of_cores_are_bound_to_their_own() -> None:
    """They see no GPU, and compute with as many threads as they have cores."""
    initialize("ray", groups=[DeviceGroup("data", 2, device_type="cpu")])
    seen = counter("data").where()
    mine = sorted(os.sched_getaffinity(0))
    assert [place["cores"] for place in seen] == [{mine[0]}, {mine[1 % len(mine)]}]
    assert {(place["CUDA_VISIBLE_DEVICES"], place["OMP_NUM_THREADS"]) for place in seen} == {("", "1")}


def test_remote_class_returns_what_the_plain_one_does() -> None:
    """dp 2 x tp 2: every item once, whatever the batch; and each was seen by one replica."""
    initialize("ray", groups=[gpu("actor", 4)])
    remote = counter("actor", device_mesh=DeviceMesh.from_sizes(dp_size=2, tp_size=2))
    plain = Counter()
    for batch in ([], [5], [1, 2, 3], list(range(9))):
        assert remote.add(batch) == plain.add(batch)
        assert remote.items_seen() == plain.items_seen()
        assert np.array_equal(remote.double(batch), plain.double(batch))
    assert len(remote) == len(plain) == 7
    assert remote.device_mesh.world_size == 4


def test_lazy_results_travel_between_workers_of_different_groups() -> None:
    """Sliced where they arrive, since the caller never had them."""
    initialize("ray", groups=[gpu("actor", 2), gpu("sampler", [3])])
    actor, sampler = counter("actor"), counter("sampler")
    lazy = actor.add_later([1, 2, 3])
    assert sampler.add(lazy) == [3, 4, 5]
    assert actor.add(lazy) == [3, 4, 5]
    assert actor.items_seen() == 6
    assert lazy() == [2, 3, 4]


def test_remote_object_can_be_called_from_another_worker() -> None:
    """A handle is an argument like any other."""
    initialize("ray", groups=[gpu("actor", 2), gpu("data", [2, 3])])
    relay: Any = Relay(counter("actor"), remote_group="data")  # type: ignore[call-arg]
    assert relay.add([1, 2, 3]) == [2, 3, 4]


def test_mesh_larger_than_its_group_is_refused() -> None:
    """Before a process is started."""
    initialize("ray", groups=[gpu("actor", 2)])
    with pytest.raises(MeshError, match=r"needs 4 devices \(dp_size=4\), group 'actor' has 2"):
        counter("actor", device_mesh=DeviceMesh.from_sizes(dp_size=4))
    with pytest.raises(MeshError, match="device_type is cpu, group 'actor' has cuda"):
        counter("actor", device_mesh=DeviceMesh.from_sizes(dp_size=2, device_type="cpu"))


def test_exception_of_a_worker_reaches_the_caller() -> None:
    """As itself where it can travel, else as a WorkerError with its text; a bystander goes on, a notifier is told."""
    told: list[str] = []
    initialize("ray", groups=[gpu("actor", 2)], name="run-7", notifier=told.append)
    remote, bystander = counter("actor"), counter("actor")
    with pytest.raises(TooMuch, match="3 is more than 2") as raised:
        remote.fail("typed")
    assert type(raised.value) is TooMuch and raised.value.limit == 2
    assert "Raised in worker 0 of Counter in group 'actor'" in "".join(raised.value.__notes__)
    with pytest.raises(WorkerError, match="worker 0 of Counter in group 'actor' raised Unpicklable: it has a lock"):
        remote.fail("unpicklable")
    assert remote.add([1, 2]) == [2, 3]
    with pytest.raises(WorkerError, match="worker 0 of Counter in group 'actor' died"):
        remote.fail("exit")
    with pytest.raises(WorkerError, match="worker 0 of Counter in group 'actor' died"):
        remote.add([1, 2])
    assert bystander.add([1, 2]) == [2, 3]
    assert [text.split(":")[0] for text in told] == [
        *["Counter.fail of run 'run-7' failed"] * 3,
        "Counter.add of run 'run-7' failed",
    ]


def test_constructor_that_fails_leaves_no_worker() -> None:
    """Its own exception, arguments that it does not take, and one that never ends."""
    initialize("ray", groups=[gpu("actor", 2)])
    bystander = counter("actor")
    before = worker_processes()
    assert len(before) == 2
    with pytest.raises(TooMuch, match="-1 is more than 0"):
        counter("actor", -1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sart'"):
        counter("actor", sart=1)
    never = remote_class(startup_timeout_s=5)(type("Never", (NeverReady,), {}))
    with pytest.raises(WorkerError, match=r"worker \d of Never in group 'actor'.* not ready in time"):
        never(remote_group="actor")
    wait_until(lambda: worker_processes() == before, "the workers are gone")
    assert bystander.add([1]) == [2]


def worker_processes() -> set[int]:
    """Processes of this cluster that run a Worker."""
    return {process.pid for process in with_title("ray::Worker")}


def test_methods_that_are_not_remote_are_refused_by_name() -> None:
    """The object is elsewhere, and the error says what to do."""
    initialize("ray", groups=[gpu("actor", 1)])
    remote = counter("actor")
    with pytest.raises(AttributeError, match=r"Counter.local_only is not a remote function.*Decorate"):
        remote.local_only()


def test_shutdown_ends_the_workers() -> None:
    """They would use devices that others can have then."""
    initialize("ray", groups=[gpu("actor", 2)])
    remote = counter("actor")
    pids = {place["pid"] for place in remote.where()}
    shutdown()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "the workers are gone")
    with pytest.raises(WorkerError, match="died"):
        remote.add([1])
