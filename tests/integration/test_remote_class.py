"""Device groups and remote classes on a real Ray cluster of two cores and four GPUs, which Ray only counts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray._private.state import available_resources_per_node

from tests.support.eventually import wait_until
from tests.support.processes import with_title
from tests.support.ray_cluster import ray_cluster
from tests.support.service_logs import cluster_directory
from twinkle_serve import DeviceGroup, DeviceMesh
from twinkle_serve.errors import MeshError, WorkerError
from twinkle_serve.placement import place_in_group
from twinkle_serve.remote import (
    group_devices,
    initialize,
    is_initialized,
    known_groups,
    remote_class,
    remote_function,
    shutdown,
)

pytestmark = [pytest.mark.ray, pytest.mark.own_cluster]
CPUS, GPUS = 2, 4
VISIBLE = "4,5,6,7"
"""The GPUs that the node is told to use: a rank is no id."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Its address."""
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE)
            address = stack.enter_context(ray_cluster(CPUS, num_gpus=GPUS, with_serve=False))
        yield address


@pytest.fixture(autouse=True)
def session(cluster: str) -> Iterator[None]:
    """Every test gives back all that it took."""
    yield
    shutdown()
    assert known_groups() == []
    wait_until(lambda: free() == (CPUS, GPUS), "all devices are free")


def free() -> tuple[float, float]:
    """CPUs and GPUs that Ray could give to somebody."""
    (node,) = available_resources_per_node().values()
    return node.get("CPU", 0.0), node.get("GPU", 0.0)


def gpu(name: str, ranks: int | list[int], **more: Any) -> DeviceGroup:
    return DeviceGroup(name, ranks, device_type="cuda", **more)


def ids(name: str) -> list[str]:
    return [device.id for device in group_devices(name).devices]


class TooMuch(Exception):
    """Raised in workers."""

    def __init__(self, amount: int, limit: int) -> None:
        super().__init__(f"{amount} is more than {limit}")
        self.amount = amount
        self.limit = limit

    def __reduce__(self) -> tuple[Any, ...]:
        return TooMuch, (self.amount, self.limit)


class Unpicklable(Exception):
    """Holds a lock, which cannot travel."""

    def __init__(self) -> None:
        super().__init__("it has a lock")
        self.lock = threading.Lock()


@remote_class(execute="all")
class Counter:
    """Says where it runs, and does what it is told."""

    def __init__(self, start: int = 0, device_mesh: DeviceMesh | None = None) -> None:
        if start < 0:
            raise TooMuch(start, 0)
        self.total = start
        self.environment = dict(os.environ)
        self.mesh = device_mesh

    @remote_function(collect="none")
    def where(self) -> dict[str, Any]:
        names = ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_RANK", "CLUSTER_NAME", "OMP_NUM_THREADS")
        found: dict[str, Any] = {name: self.environment.get(name) for name in names}
        return {**found, "port": os.environ["MASTER_PORT"], "pid": os.getpid(), "cores": os.sched_getaffinity(0)}

    @remote_function(dispatch="slice_dp", collect="flatten")
    def add(self, batch: list[int]) -> list[int]:
        self.total += len(batch)
        return [item + 1 for item in batch]

    @remote_function(dispatch="slice_dp", collect="flatten", lazy_collect=True)
    def add_later(self, batch: list[int]) -> list[int]:
        return self.add(batch)

    @remote_function(dispatch="all", collect="sum")
    def items_seen(self) -> int:
        return self.total

    @remote_function(dispatch="slice", collect="flatten")
    def double(self, batch: list[Any]) -> Any:
        return np.asarray(batch) * 2

    @remote_function(dispatch="all", execute="first")
    def fail(self, how: str) -> None:
        if how == "exit":
            os._exit(1)
        raise TooMuch(3, 2) if how == "typed" else Unpicklable()

    @remote_function(dispatch="all", collect="first")
    def __len__(self) -> int:
        return 7

    def local_only(self) -> None: ...


@remote_class(execute="first")
class Relay:
    """Calls another remote object from its worker."""

    def __init__(self, counter: Any) -> None:
        self.counter = counter

    @remote_function(dispatch="all")
    def add(self, batch: list[int]) -> list[int]:
        result: list[int] = self.counter.add(batch)
        return result


@remote_class()
class NeverReady:
    """Its constructor waits for what does not come."""

    def __init__(self) -> None:
        threading.Event().wait()


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
    """Their workers would go on using what is another group's by then; as it is, the group can be asked for again."""
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
    environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(Path(__file__).parents[2]), **more}
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
    """A second run may attach to it; what it does not own, it does not give back."""
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


def counter(group: str, *args: Any, **kwargs: Any) -> Any:
    return Counter(*args, remote_group=group, **kwargs)  # type: ignore[call-arg]


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
