"""Faults: kills, stops and a full object store, each with a way to tell that it is over."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import psutil
import ray

from benchmarks.chaos.load import Trainers
from tests.support.gateway import NAME as GATEWAY
from tests.support.gateway import answers
from tests.support.processes import core_processes, with_title

STOPPED_S = (2.0, 45.0)
"""How long a process is stopped: some resume before anything notices, others are replaced meanwhile."""
FILLED_S = (3.0, 20.0)
"""How long the object store is full."""
FILLED_PART = 1.2
"""Multiple of the object store's capacity: the excess is spilled, along with objects of others."""
ARRAY_BYTES = 2**23

ENGINE_KILLS = ("engine replica killed", "engine core killed")
GATEWAY_KILLED = "gateway killed"


class NoVictim(Exception):
    """The process to strike does not exist at the moment."""


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault that was caused."""

    target: str
    over: Callable[[], bool]
    """Whether the target is replaced or running again; the service may still be recovering."""
    seen: Callable[[], list[str]] = list
    """Describes the processes in the target's place, to explain why it is not over."""


class Faults:
    """Causes faults in the processes of one application on this machine, and of its gateway."""

    def __init__(
        self, application: str, engines: int, trainers: Trainers, url: str, rng: random.Random, *, cores: bool
    ) -> None:
        """
        Args:
            url: of the gateway.
            cores: whether each engine has a core process of vLLM's as a child.
        """
        self._application, self._trainers, self._url, self._rng = application, trainers, url, rng
        self._engines = [f"engine-dp{rank}" for rank in range(engines)]
        self._stopped: set[psutil.Process] = set()
        self.kinds: dict[str, Callable[[frozenset[str]], Strike]] = {
            "engine replica killed": lambda ready: self._kill(self._replica(self._engine(ready))),
            "engine replica stopped": lambda ready: self._stop(self._replica(self._engine(ready))),
            "router killed": lambda _: self._kill(self._replica("router")),
            "store killed": lambda _: self._kill(self._replica("store")),
            "controller killed": lambda _: self._kill(Victim("controller", "ServeController")),
            GATEWAY_KILLED: lambda _: self._kill_gateway(),
            "trainer killed": lambda _: self._kill_trainer(),
            "object store filled": lambda _: self._fill(),
        }
        if cores:
            self.kinds |= {
                "engine core killed": lambda ready: self._kill(self._core(self._engine(ready))),
                "engine core stopped": lambda ready: self._stop(self._core(self._engine(ready))),
            }

    def strike(self, kind: str, ready: frozenset[str]) -> Strike:
        """Causes a fault.

        Args:
            ready: names of the ready engines; faults of engines strike one of these.

        Raises:
            NoVictim: the process to strike does not exist at the moment.
        """
        return self.kinds[kind](ready)

    def end(self) -> None:
        """Resumes all stopped processes: a stopped process cannot shut down."""
        for process in list(self._stopped):
            self._resume(process)

    def doubled(self) -> str:
        """Describes the processes of deployments that have more than one; "" if none has."""
        victims = [*map(self._replica, (*self._engines, "router", "store")), GATEWAY_REPLICA]
        seen = [victim.seen() for victim in victims]
        return "; ".join(itertools.chain.from_iterable(each for each in seen if len(each) > 1))

    def _engine(self, ready: frozenset[str]) -> str:
        if not ready:
            raise NoVictim("no engine is ready")
        return self._rng.choice(sorted(ready))

    def _replica(self, deployment: str) -> Victim:
        return Victim(deployment, f"ServeReplica:{self._application}:{deployment}")

    def _core(self, engine: str) -> Victim:
        return Victim(f"core of {engine}", self._replica(engine).title, core=True)

    def _kill(self, victim: Victim) -> Strike:
        process = victim.process()
        process.kill()
        return Strike(f"{victim.name} (pid {process.pid})", lambda: victim.replaced(process), victim.seen)

    def _stop(self, victim: Victim) -> Strike:
        process, seconds = victim.process(), self._rng.uniform(*STOPPED_S)
        process.suspend()
        self._stopped.add(process)
        threading.Timer(seconds, self._resume, [process]).start()

        def over() -> bool:
            return process not in self._stopped if process.is_running() else victim.replaced(process)

        return Strike(f"{victim.name} (pid {process.pid}) for {seconds:.0f} s", over, victim.seen)

    def _resume(self, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
        self._stopped.discard(process)

    def _kill_gateway(self) -> Strike:
        strike = self._kill(GATEWAY_REPLICA)
        return Strike(strike.target, lambda: strike.over() and answers(f"{self._url}/healthz"), strike.seen)

    def _kill_trainer(self) -> Strike:
        life = self._rng.choice(self._trainers.living)
        life.killed = True
        psutil.Process(life.pid).kill()
        fresh = self._trainers.add()
        return Strike(f"{life.path.stem} (pid {life.pid})", lambda: self._trainers.connected(fresh))

    def _fill(self) -> Strike:
        seconds = self._rng.uniform(*FILLED_S)
        arrays = int(ray.cluster_resources()["object_store_memory"] * FILLED_PART / ARRAY_BYTES)
        over = threading.Event()
        held: list[ray.ObjectRef] = []

        def empty() -> None:
            held.clear()
            over.set()

        def fill() -> None:
            # One by one: requests for room wait in the raylet, and other processes' must get their turn.
            for _ in range(arrays):
                held.append(ray.put(np.zeros(ARRAY_BYTES, np.uint8)))
            threading.Timer(seconds, empty).start()

        threading.Thread(target=fill, daemon=True).start()
        return Strike(f"{arrays} arrays of {ARRAY_BYTES // 2**20} MiB for {seconds:.0f} s", over.is_set)


@dataclass(frozen=True, slots=True)
class Victim:
    """A process of the service, found by its title."""

    name: str
    title: str
    core: bool = False
    """Whether it is vLLM's core process under the process of that title."""

    def process(self) -> psutil.Process:
        """Returns the newest such process: an older one may not be gone yet.

        Raises:
            NoVictim: there is none.
        """
        found = with_title(self.title)
        if self.core and found:
            found = core_processes(_newest(found))
        if not found:
            raise NoVictim(f"{self.name} does not run")
        return _newest(found)

    def replaced(self, process: psutil.Process) -> bool:
        """Whether another process has taken this one's place."""
        try:
            return bool(self.process() != process)  # processes compare by pid and start time
        except NoVictim:
            return False

    def seen(self) -> list[str]:
        """Describes all processes of its title, with their children."""
        return [_tree(process) for process in with_title(self.title)]


GATEWAY_REPLICA = Victim(GATEWAY, f"ServeReplica:{GATEWAY}:gateway")


def _newest(processes: list[psutil.Process]) -> psutil.Process:
    return max(processes, key=psutil.Process.create_time)


def _tree(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess), process.oneshot():
        under = ", ".join(f"{child.name()} {child.pid}" for child in process.children(recursive=True))
        age_s = time.time() - process.create_time()
        return f"{process.name()} {process.pid} ({process.status()}, since {age_s:.0f} s, above {under or 'none'})"
    return f"{process.pid} (ended)"
