"""The actor of a worker: one object of the user's class, on its own devices."""

from __future__ import annotations

import os
import random
import socket
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray import cloudpickle

from twinkle_serve.errors import WorkerError
from twinkle_serve.parent import end_with_parent
from twinkle_serve.placement import Device, cores_of_devices
from twinkle_serve.remote.dispatch import Layout, plan
from twinkle_serve.remote.lazy import Args, Kwargs, Value, is_lazy, resolved
from twinkle_serve.remote.session import seed_everything, session


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception to be raised in the caller."""

    pickled: bytes | None
    """The pickled exception; None if it cannot be pickled."""
    text: str
    """Type and message."""
    trace: str
    """Traceback."""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        text = f"{type(error).__name__}: {error}"
        try:
            pickled = cloudpickle.dumps(error)
            cloudpickle.loads(pickled)
        except Exception:
            pickled = None
        return cls(pickled, text, traceback.format_exc())

    def error(self, worker: str) -> Exception:
        """Returns the exception itself if this process can unpickle it, else a WorkerError with its text."""
        error: Exception = WorkerError(f"{worker} raised {self.text}")
        if self.pickled is not None:
            try:
                loaded = cloudpickle.loads(self.pickled)
            except Exception as reason:
                error.add_note(f"It could not be rebuilt here: {reason!r}")
            else:
                error = loaded
        error.add_note(f"Raised in {worker}:\n{self.trace}")
        return error


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer of a worker."""

    order: int | None
    """Position among the collected answers; None if it is not collected."""
    single: bool
    """As `Plan.single`."""
    value: Value = None
    """The returned value, if it is collected."""
    failure: Failure | None = None
    """The exception raised, if any."""


class Worker:
    """The actor's class.

    Guarantees:
        - The environment is complete before the user's class and its arguments are unpickled here, and before the
          modules that they import.
    """

    def __init__(
        self, environment: Mapping[str, str], devices: Sequence[Device], layout: Layout, state: Mapping[str, object]
    ) -> None:
        end_with_parent(os.getppid())
        os.environ.update(environment)
        if not environment["CUDA_VISIBLE_DEVICES"]:
            cores = cores_of_devices(devices, sorted(os.sched_getaffinity(0)))
            os.sched_setaffinity(0, {core for device in cores for core in device})
        self._rank = int(environment["RANK"])
        self._layout = layout
        session.__dict__.update(state)

    def rendezvous(self) -> Reply:
        """Replies with the address and a free port of this node, where the workers of the instance can rendezvous."""
        # Below the kernel's range of ephemeral ports, so that no other process gets it meanwhile.
        for port in random.SystemRandom().sample(range(20000, 32000), 100):
            with socket.socket() as probe:
                try:
                    probe.bind(("", port))
                except OSError:
                    continue
                return Reply(None, True, (ray.util.get_node_ip_address(), port))
        raise WorkerError("no free port between 20000 and 32000 on this node for MASTER_PORT.")

    def construct(self, master: tuple[str, int], kind: type, args: Args, kwargs: Mapping[str, Value]) -> Reply:
        """Constructs the object."""
        os.environ.update({"MASTER_ADDR": master[0], "MASTER_PORT": str(master[1])})
        try:
            if session.seed is not None:
                seed_everything(session.seed)
            args, kwargs = resolved(args, kwargs)
            self._object = kind(*args, **kwargs)
        except Exception as error:
            return Reply(None, True, failure=Failure.of(error))
        return Reply(None, True)

    def call(
        self,
        method: str,
        args: Args,
        kwargs: Kwargs,
        order: int | None,
        single: bool,
        caller: tuple[int, int],
    ) -> Reply:
        """Calls a remote function. With lazy arguments it slices here, since the caller did not have their values."""
        try:
            remote = getattr(type(self._object), method).remote
            if is_lazy(args, kwargs):
                args, kwargs = resolved(args, kwargs)
                planned = plan(remote.modes, self._layout, args, kwargs, caller)
                own_call = next((call for call in planned.calls if call.worker == self._rank), None)
                if own_call is None:
                    return Reply(None, planned.single)
                args, kwargs, order, single = own_call.args, own_call.kwargs, own_call.order, planned.single
            value = remote.function(self._object, *args, **kwargs)
        except Exception as error:
            return Reply(order, single, failure=Failure.of(error))
        return Reply(order, single, value if order is not None else None)
