"""Device groups on a real Ray cluster: reserved, replaced, shared and freed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import ray

from tests.support.eventually import wait_until
from tests.support.remote_objects import CPUS, GPUS, VISIBLE, Counter, counter, free, gpu, ids
from tests.support.service_logs import cluster_directory
from twinkle_serve import DeviceGroup, DeviceMesh
from twinkle_serve.errors import MeshError
from twinkle_serve.placement import place_in_group
from twinkle_serve.remote import group_devices, initialize, is_initialized, known_groups, shutdown

pytestmark = [pytest.mark.ray, pytest.mark.own_cluster]


def test_groups_take_their_devices_out_of_rays_books() -> None:
    """Nobody else can have them; listed ranks are these very GPUs; and groups are disjoint."""
    initialize("ray", groups=[gpu("sampler", 2), gpu("actor", [3, 0]), DeviceGroup("data", 1, device_type="cpu")])
    assert (ids("actor"), ids("sampler"), ids("data")) == (["7", "4"], ["5", "6"], ["0"])
    cpus, gpus = free()
    assert gpus == 0
    assert 0 < cpus < CPUS
    assert known_groups() == ["actor", "data", "sampler"]
    assert is_initialized()
    engines = place_in_group(DeviceMesh.from_sizes(dp_size=2), group_devices("sampler")).engines
    assert [[device.id for device in engine] for engine in engines] == [["5"], ["6"]]
    assert engines[0][0].resource in ray.nodes()[0]["Resources"]


def test_auto_groups_take_gpus_when_the_cluster_has_them() -> None:
    """And visible_devices and nproc_per_node restrict which."""
    initialize("ray", groups=[DeviceGroup("sampler", 1, visible_devices="6,7")])
    assert (group_devices("sampler").device_type, ids("sampler")) == ("cuda", ["6"])
    with pytest.raises(MeshError, match=r"the groups need 3 GPUs .*the cluster has 2"):
        initialize("ray", nproc_per_node=2, groups=[gpu("actor", 3)])
    with pytest.raises(MeshError, match="nproc_per_node=8, and no node of the cluster has more than 4 GPUs"):
        initialize("ray", nproc_per_node=8, groups=[gpu("actor", 1)])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([gpu("a", 1), gpu("b", 4)], r"need 5 GPUs \(a 1, b 4\), the cluster has 4"),
        ([gpu("a", [1]), gpu("b", [1])], "rank 1 is in two DeviceGroups"),
        ([gpu("a", 1), gpu("b", [4])], "rank 4, the cluster has 4 GPUs"),
        ([gpu("a", 1), DeviceGroup("b", 3, device_type="cpu")], r"need 3 cores \(b 3\), the cluster has 2"),
    ],
)
def test_initialize_takes_nothing_when_one_group_does_not_fit(groups: list[DeviceGroup], message: str) -> None:
    """All groups, or none; the fixture checks that all is free."""
    with pytest.raises(MeshError, match=message):
        initialize("ray", groups=groups)
    assert known_groups() == []


@pytest.mark.nightly
def test_initialize_takes_nothing_when_somebody_else_holds_devices() -> None:
    """Said within seconds, with both numbers; and a free rank can be had beside them."""

    @ray.remote(num_gpus=1, num_cpus=1)
    class Somebody:
        def gpu(self) -> str:
            return str(ray.get_gpu_ids()[0])

    somebody = Somebody.remote()  # type: ignore[attr-defined]
    held = VISIBLE.split(",").index(ray.get(somebody.gpu.remote()))
    try:
        with pytest.raises(
            MeshError, match=r"needs 4 GPUs, 3 of the cluster's 4 are free \(1 held by another process\)"
        ):
            initialize("ray", groups=[gpu("a", 4)])
        with pytest.raises(MeshError, match=f"rank {held} .* is held by another process"):
            initialize("ray", groups=[gpu("a", [held])])
        with pytest.raises(MeshError, match="needs 2 cores, 1 of the cluster's 2"):
            initialize("ray", groups=[gpu("a", 1), DeviceGroup("b", 2, device_type="cpu")])
        assert known_groups() == []
        initialize("ray", groups=[gpu("a", [rank for rank in range(GPUS) if rank != held])])
        assert VISIBLE.split(",")[held] not in ids("a")
    finally:
        ray.kill(somebody)


def test_initialize_replaces_a_group_of_another_shape_and_keeps_one_of_the_same() -> None:
    """GPUs move from group to group without being free in between; what fails leaves all as it was."""
    initialize("ray", groups=[gpu("actor", 2), gpu("sampler", 2)])
    before = ids("sampler")
    initialize("ray", groups=[gpu("actor", 1), gpu("sampler", 2)])
    assert ids("sampler") == before
    wait_until(lambda: free()[1] == 1, "what the smaller group left is free")
    with pytest.raises(MeshError, match="are free"):
        initialize("ray", groups=[gpu("actor", 3)])
    assert len(ids("actor")) == 1
    initialize("ray", groups=[gpu("actor", 2)])
    assert {*ids("actor"), *ids("sampler")} == set(VISIBLE.split(","))


def test_group_with_remote_objects_of_this_run_is_not_replaced() -> None:
    """Their workers would go on using devices of another group. The group itself can be asked for again."""
    initialize("ray", groups=[gpu("actor", 2), gpu("sampler", 2)])
    remote = counter("sampler")
    with pytest.raises(MeshError, match=r"'sampler' has ranks=2 .* asks for ranks=1 .* remote objects of this run are"):
        initialize("ray", groups=[gpu("actor", 3), gpu("sampler", 1)])
    initialize("ray", groups=[gpu("actor", 2), gpu("sampler", 2)])
    assert remote.add([1]) == [2]


def run_script(tmp_path: Path, address: str, body: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A driver of its own, as a user's script."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(body))
    environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(Path(__file__).parents[3]), **more}
    return subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)


SCRIPT = """
    import os, sys
    import twinkle_serve.remote as remote
    from twinkle_serve import DeviceGroup

    @remote.remote_class()
    class Square:
        def __init__(self, power):
            self.power = power

        @remote.remote_function(collect="flatten")
        def of(self, batch):
            return [item ** self.power for item in batch]

    remote.initialize("ray", groups=[DeviceGroup("sampler", 2, device_type="cuda")])
    square = Square(2, remote_group="sampler")
    devices = [device.id for device in remote.group_devices("sampler").devices]
    print(type(square).__name__, square.of([1, 2, 3]), devices, flush=True)
    os._exit(3)  # a crash: nothing is given back
"""


@pytest.mark.nightly
def test_group_of_a_crashed_run_is_taken_over(cluster: str, tmp_path: Path) -> None:
    """As it stands when it has the same shape, and replaced otherwise; a class of __main__ runs in its workers."""
    answer = run_script(tmp_path, cluster, SCRIPT)
    assert answer.returncode == 3, answer.stderr
    assert "Handle [1, 4, 9] ['4', '5']" in answer.stdout
    assert known_groups() == ["sampler"]
    initialize("ray", groups=[gpu("sampler", 2)])
    assert ids("sampler") == ["4", "5"]
    assert free()[1] == 2
    shutdown()
    assert known_groups() == []
    run_script(tmp_path, cluster, SCRIPT)
    initialize("ray", groups=[gpu("other", GPUS)])  # the run is over, and nothing goes on in its group
    assert known_groups() == ["other"]
    shutdown()
    run_script(tmp_path, cluster, SCRIPT)
    initialize("ray", groups=[gpu("sampler", [3])])
    assert ids("sampler") == ["7"]


@pytest.mark.nightly
def test_initialize_starts_a_cluster_when_there_is_none_and_shutdown_ends_it(tmp_path: Path) -> None:
    """RAY_ADDRESS=local stands for a machine without a cluster, which this one may have."""
    with cluster_directory() as directory:
        answer = run_script(
            tmp_path,
            "local",
            """
            import ray
            import twinkle_serve.remote as remote
            from twinkle_serve import DeviceGroup
            remote.initialize("ray", groups=[DeviceGroup("sampler", 1, device_type="cpu")])
            print(remote.known_groups(), ray.is_initialized())
            remote.shutdown()
            print(ray.is_initialized(), remote.is_initialized())
            """,
            RAY_TMPDIR=directory,
        )
    assert answer.stdout.splitlines()[-2:] == ["['sampler'] True", "False False"], answer


def test_group_of_a_living_run_is_shared_but_never_replaced_nor_freed(cluster: str, tmp_path: Path) -> None:
    """A second run may use it, and does not free it when it ends."""
    initialize("ray", groups=[gpu("sampler", 2)])
    answer = run_script(
        tmp_path,
        cluster,
        """
        import twinkle_serve.remote as remote
        from twinkle_serve import DeviceGroup
        remote.initialize("ray", groups=[DeviceGroup("sampler", 2, device_type="cuda")])
        remote.shutdown()
        try:
            remote.initialize("ray", groups=[DeviceGroup("sampler", 1, device_type="cuda")])
        except Exception as error:
            print(type(error).__name__, error)
        """,
    )
    assert "MeshError DeviceGroup 'sampler' is reserved by another running job" in answer.stdout, answer
    assert ids("sampler") == ["4", "5"]


def test_shutdown_frees_devices_at_once_for_the_next() -> None:
    """A reservation waits the moment that Ray takes to see it."""
    for _ in range(2):
        initialize("ray", groups=[gpu("sampler", 4), DeviceGroup("data", 2, device_type="cpu")])
        shutdown()
    assert not is_initialized()


def test_unknown_group_is_named_with_those_that_exist() -> None:
    """For group_devices and for remote classes."""
    initialize("ray", groups=[gpu("sampler", 1)])
    for ask in (lambda: group_devices("sampeler"), lambda: Counter(remote_group="sampeler")):  # type: ignore[call-arg]
        with pytest.raises(MeshError, match="unknown device group 'sampeler', did you mean 'sampler'"):
            ask()
