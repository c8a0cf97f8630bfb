"""Device groups and remote classes for tests, on two cores and four GPUs, which Ray only counts."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
from ray._private.state import available_resources_per_node

from twinkle_serve import DeviceGroup, DeviceMesh
from twinkle_serve.remote import group_devices, remote_class, remote_function

CPUS, GPUS = 2, 4
VISIBLE = "4,5,6,7"
"""The GPUs that the node is told to use: a rank is no id."""


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
    """Reports its process and devices, and raises or ends on request."""

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


def counter(group: str, *args: Any, **kwargs: Any) -> Any:
    return Counter(*args, remote_group=group, **kwargs)  # type: ignore[call-arg]
