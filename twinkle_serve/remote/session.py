"""State of this process set by `initialize`, and resources that it must release. Free of Ray."""

from __future__ import annotations

import os
import random
import sys
import uuid
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import numpy as np

from twinkle_serve.mesh import DeviceGroup, DeviceMesh

if TYPE_CHECKING:
    from twinkle_serve.remote.handle import Handle

Mode: TypeAlias = Literal["local", "ray"]


class Closable(Protocol):
    """A sampler whose service can be ended."""

    def shutdown(self) -> None: ...


@dataclass
class Session:
    """One per process; `session` below."""

    mode: Mode | None = None
    """None before `initialize`."""
    seed: int | None = None
    lazy_collect: bool = False
    mesh: DeviceMesh | None = None
    """Mesh of remote classes that get none."""
    name: str | None = None
    """Name of the run."""
    notifier: Callable[[str], object] | None = None
    """Called with a text for each exception of a remote function."""
    notified: deque[Exception] = field(default_factory=lambda: deque(maxlen=16))
    """The last exceptions that it was called for."""
    started_cluster: bool = False
    """Whether `initialize` started the Ray cluster."""
    groups: tuple[DeviceGroup, ...] = ()
    """As passed to `initialize`."""
    owned_groups: set[str] = field(default_factory=set)
    """Groups that `shutdown` frees."""
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Identifies this process in the ledger."""
    instances: weakref.WeakSet[Handle] = field(default_factory=weakref.WeakSet)
    """Remote instances whose workers this process started."""
    samplers: set[Closable] = field(default_factory=set)
    """Samplers that this process deployed into groups; each has a `shutdown`. Their engines outlive these objects."""


session = Session()


def reset() -> None:
    """Restores the state before `initialize`."""
    session.__dict__.update(Session().__dict__)


def current_group() -> str | None:
    """Name of the group if this process is one of its workers."""
    return os.environ.get("CLUSTER_NAME") if "WORKER_NAME" in os.environ else None


def seed_everything(seed: int) -> None:
    """Seeds random, numpy, and torch if it has been imported: importing it here would take seconds."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)
