"""Engines in a device group: neighbouring devices of one node from the group, or an error that says what is wrong."""

from __future__ import annotations

import pytest

from twinkle_serve import DeviceMesh
from twinkle_serve.errors import MeshError
from twinkle_serve.placement import Device, GroupDevices, cores_of_devices, cpus_held, place_in_group


def group(*nodes: int, device_type: str = "cuda", gpus_per_worker: int = 1) -> GroupDevices:
    """A group with the given number of devices on each node."""
    devices = [Device(f"node{n}", f"10.0.0.{n}", str(i)) for n, count in enumerate(nodes) for i in range(count)]
    kind = "cuda" if device_type == "cuda" else "cpu"
    return GroupDevices("sampler", kind, tuple(devices), gpus_per_worker)  # type: ignore[arg-type]


def ids(engines: tuple[tuple[Device, ...], ...]) -> list[list[tuple[str, str]]]:
    return [[(device.node_id, device.id) for device in engine] for engine in engines]


def test_placement_gives_each_engine_neighbours_in_a_group() -> None:
    """dp 2 x tp 2 on four GPUs: two and two, in order; engines request none from Ray, since the holders have them."""
    placed = place_in_group(DeviceMesh.from_sizes(dp_size=2, tp_size=2), group(4))
    assert ids(placed.engines) == [[("node0", "0"), ("node0", "1")], [("node0", "2"), ("node0", "3")]]
    assert (placed.device, placed.executor, placed.group) == ("cuda", "mp", "sampler")
    assert (placed.num_gpus, placed.num_cpus, placed.bundles) == (0, 0.0, ())
    assert placed.engines[0][0].resource == "node:10.0.0.0"


def test_placement_leaves_a_device_idle_when_an_engine_would_span_nodes() -> None:
    """Three and three devices: the third of the first node stays idle, as engines need two on one node."""
    placed = place_in_group(DeviceMesh.from_sizes(dp_size=2, tp_size=2), group(3, 3))
    assert ids(placed.engines) == [[("node0", "0"), ("node0", "1")], [("node1", "0"), ("node1", "1")]]


def test_placement_takes_the_first_devices_when_the_mesh_is_smaller() -> None:
    """The others stay idle."""
    assert ids(place_in_group(DeviceMesh.from_sizes(), group(3)).engines) == [[("node0", "0")]]


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        (
            DeviceMesh.from_sizes(dp_size=2, tp_size=2),
            group(2),
            r"needs 4 devices \(dp_size=2 x tp_size=2\), group 'sampler' has 2\. Lower",
        ),
        (
            DeviceMesh.from_sizes(tp_size=4),
            group(2, 2),
            "needs 1 engines of 4 devices, each on one node; group 'sampler' has 2, 2 .*room for 0.*cannot span nodes",
        ),
        (
            DeviceMesh.from_sizes(dp_size=2, tp_size=2),
            group(4, gpus_per_worker=4),
            "gpus_per_worker=4, an engine of device_mesh spans 2 .*Set gpus_per_worker to 2",
        ),
        (DeviceMesh.from_sizes(device_type="cpu"), group(1), "device_type is cpu, group 'sampler' has cuda"),
        (DeviceMesh.from_sizes(device_type="cuda"), group(1, device_type="cpu"), "device_type is cuda, .* has cpu"),
    ],
)
def test_placement_refuses_a_mesh_when_it_does_not_fit_its_group(
    mesh: DeviceMesh, devices: GroupDevices, message: str
) -> None:
    """The message has both numbers and the remedy."""
    with pytest.raises(MeshError, match=message):
        place_in_group(mesh, devices)


@pytest.mark.parametrize("gpus_per_worker", [1, 2])
def test_placement_accepts_gpus_per_worker_when_it_is_one_or_the_replica(gpus_per_worker: int) -> None:
    """A worker is a device or a replica."""
    mesh = DeviceMesh.from_sizes(dp_size=2, tp_size=2, device_type="cuda")
    assert len(place_in_group(mesh, group(4, gpus_per_worker=gpus_per_worker)).engines) == 2


def test_cores_are_those_that_the_process_may_use() -> None:
    """Device 1 is the second allowed core, whatever its id; devices share cores if there are too few."""
    devices = group(3, device_type="cpu").devices
    assert cores_of_devices(devices, [4, 6, 8]) == [(4,), (6,), (8,)]
    assert cores_of_devices(devices, [5, 7]) == [(5,), (7,), (5,)]


def test_cores_of_a_full_node_leave_ray_room_for_the_router() -> None:
    """Router and store request 0.1 each, and would wait forever if a group reserved two full cores."""
    assert cpus_held(2) == pytest.approx(1.8)
