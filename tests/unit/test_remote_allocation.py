"""Allocation of devices to groups: listed ranks, counts, visible devices, workers on a node, and holders."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve import DeviceGroup
from twinkle_serve.errors import MeshError
from twinkle_serve.placement import Device
from twinkle_serve.remote.allocation import Slot, allocate, check_requests


def slots(*nodes: int, held: dict[int, str] | None = None) -> list[Slot]:
    """Slots with the given number of GPUs on each node; `held` by rank."""
    devices = [Device(f"node{n}", f"10.0.0.{n}", str(i)) for n, count in enumerate(nodes) for i in range(count)]
    return [Slot(device, (held or {}).get(rank)) for rank, device in enumerate(devices)]


def gpu(name: str, ranks: int | list[int], **more: Any) -> DeviceGroup:
    return DeviceGroup(name, ranks, device_type="cuda", **more)


def ranks(taken: tuple[Device, ...], all_slots: list[Slot]) -> list[int]:
    return [[slot.device for slot in all_slots].index(device) for device in taken]


def test_count_takes_devices_that_no_list_claims() -> None:
    """Listed ranks are served first, in any order of the groups."""
    cluster = slots(4)
    taken = allocate([gpu("sampler", 2), gpu("actor", [1, 0])], cluster, "GPUs")
    assert ranks(taken["actor"], cluster) == [1, 0]
    assert ranks(taken["sampler"], cluster) == [2, 3]


def test_count_prefers_one_node_when_one_has_enough() -> None:
    """Engines of a group cannot span nodes, so a group should not either if it can avoid it."""
    cluster = slots(3, 4)
    assert ranks(allocate([gpu("sampler", 4)], cluster, "GPUs")["sampler"], cluster) == [3, 4, 5, 6]


def test_count_keeps_workers_on_a_node_when_it_spans_several() -> None:
    """Three and three GPUs in workers of two: one GPU of the first node is not used."""
    cluster = slots(3, 3)
    taken = allocate([gpu("actor", 4, gpus_per_worker=2)], cluster, "GPUs")
    assert ranks(taken["actor"], cluster) == [0, 1, 3, 4]


def test_count_skips_held_and_invisible_devices() -> None:
    """Rank 0 is held by another group, GPU 1 is not visible."""
    cluster = slots(4, held={0: "group 'other'"})
    taken = allocate([gpu("sampler", 2, visible_devices="0, 2,3")], cluster, "GPUs")
    assert ranks(taken["sampler"], cluster) == [2, 3]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (gpu("a", 4), r"needs 4 GPUs, 3 of the cluster's 4 are free \(1 held by group 'b'\)"),
        (gpu("a", 3, visible_devices="1"), "needs 3 GPUs of visible_devices='1', 2 of"),
        (gpu("a", [0]), r"rank 0 of DeviceGroup 'a' \(GPU 0 of 10.0.0.0\) is held by group 'b'"),
        (gpu("a", [1], visible_devices="2"), "rank 1 .* is not in its visible_devices='2'"),
        (
            gpu("a", [1, 2], gpus_per_worker=2),
            "worker 0 with gpus_per_worker=2 would span the nodes 10.0.0.0, 10.0.0.1",
        ),
    ],
)
def test_allocation_refuses_unavailable_devices(group: DeviceGroup, message: str) -> None:
    """Two nodes of two GPUs, the first GPU is held."""
    with pytest.raises(MeshError, match=message):
        allocate([group], slots(2, 2, held={0: "group 'b'"}), "GPUs")


def test_allocation_counts_cores_that_others_use_without_naming_them() -> None:
    """Ray only counts CPUs: with one of two in use, either core is available, but not both."""
    one = DeviceGroup("a", [1], device_type="cpu")
    assert allocate([one], slots(2), "cores", {"node0": 1})["a"][0].id == "1"
    with pytest.raises(MeshError, match="needs 2 cores, 1 of the cluster's 2"):
        allocate([DeviceGroup("a", 2, device_type="cpu")], slots(2), "cores", {"node0": 1})
    with pytest.raises(MeshError, match="held by another process"):
        allocate([DeviceGroup("a", [0, 1], device_type="cpu")], slots(2), "cores", {"node0": 1})


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.lists(st.integers(0, 4), min_size=1, max_size=3))
def test_groups_never_share_a_device(counts: list[int], nodes: list[int]) -> None:
    """All get the requested number, disjoint, or there are too few devices."""
    cluster = slots(*nodes)
    groups = [gpu(f"g{i}", count) for i, count in enumerate(counts)]
    if sum(counts) > len(cluster):
        with pytest.raises(MeshError):
            allocate(groups, cluster, "GPUs")
        return
    taken = [device for devices in allocate(groups, cluster, "GPUs").values() for device in devices]
    assert len(taken) == len(set(taken)) == sum(counts)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([gpu("a", 3), gpu("b", 2)], r"the groups need 5 GPUs \(a 3, b 2\), the cluster has 4"),
        ([gpu("a", [0, 1]), gpu("b", [1])], "rank 1 is in two DeviceGroups, 'a' and 'b'"),
        ([gpu("a", [4])], "'a' lists rank 4, the cluster has 4 GPUs, ranks 0 to 3"),
        ([gpu("a", 1), gpu("a", 1)], "two DeviceGroups have the name 'a'"),
        ([DeviceGroup("c", 1, device_type="cpu", visible_devices="0")], "visible_devices='0' chooses GPUs"),
    ],
)
def test_requests_are_refused_when_no_cluster_of_this_size_can_serve_them(
    groups: list[DeviceGroup], message: str
) -> None:
    """Before any device is reserved."""
    with pytest.raises(MeshError, match=message):
        check_requests(groups, {"cuda": 4, "cpu": 2})


def test_requests_count_ranks_of_cores_and_gpus_separately() -> None:
    """Core 0 and GPU 0 are different devices."""
    check_requests([gpu("a", [0]), DeviceGroup("c", [0], device_type="cpu")], {"cuda": 1, "cpu": 1})
