"""What `initialize` told this process, and what this process must give back. No Ray here."""

from __future__ import annotations

import os
import random
import sys
import uuid
import weakref
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from twinkle_serve.mesh import DeviceMesh

Mode = Literal["local", "ray"]


@dataclass
class Session:
    """One per process; `session` below."""

    mode: Mode | None = None
    """None before `initialize`."""
    seed: int | None = None
    lazy_collect: bool = False
    mesh: DeviceMesh | None = None
    """The mesh of remote classes that are given none."""
    started_cluster: bool = False
    owned_groups: set[str] = field(default_factory=set)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tells this process from others in the ledger."""
    instances: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    """Remote instances whose workers this process started."""
    samplers: set[Any] = field(default_factory=set)
    """Samplers that this process deployed into groups; each has a `shutdown`. Their engines outlive these objects."""


session = Session()


def reset() -> None:
    """As before `initialize`."""
    session.__dict__.update(Session().__dict__)


def current_group() -> str | None:
    """The group whose worker this process is."""
    return os.environ.get("CLUSTER_NAME") if "WORKER_NAME" in os.environ else None


def seed_everything(seed: int) -> None:
    """Seeds random, numpy, and torch where it has been imported: importing it here would cost seconds."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)
