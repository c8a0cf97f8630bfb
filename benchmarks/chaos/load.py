"""Trainers: actors that sample continuously, and are replaced when killed."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from benchmarks.chaos.calls import TIMEOUT_S, Begun, Call, Ended, draw
from twinkle_serve import SampleResponse, connect

AFTER_FAILURE_S = 0.5
"""Pause after a failed call, so that a service that refuses everything is not called a thousand times per second."""


class Trainer:
    """A trainer process. It records each call in its file when the call begins, and with its responses when it ends."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path, self._seed = path, seed
        self._end = threading.Event()
        self._writing = threading.Lock()
        self._numbers = itertools.count()
        self._callers: list[threading.Thread] = []

    def process(self) -> int:
        """Returns its pid."""
        return os.getpid()

    def start(self, application: str, callers: int) -> None:
        """Connects, and starts `callers` threads that each make one call after another."""
        self._sampler = connect(application)
        self._file = self._path.open("wb")
        self._callers = [threading.Thread(target=self._run, args=(caller,), daemon=True) for caller in range(callers)]
        for thread in self._callers:
            thread.start()

    def stop(self) -> None:
        """Ends the threads after their last calls."""
        self._end.set()
        for thread in self._callers:
            thread.join()
        self._file.close()

    def _run(self, caller: int) -> None:
        rng = random.Random(f"{self._seed}/{caller}")
        while not self._end.is_set():
            number, call = next(self._numbers), draw(rng)
            self._keep(Begun(number=number, call=call, at=time.monotonic()))
            responses: list[SampleResponse] = []
            error, message = "", ""
            try:
                self._make(call, responses)
            except Exception as raised:  # recorded, and checked with the rest
                error, message = type(raised).__name__, str(raised)
            self._keep(Ended(number=number, at=time.monotonic(), responses=responses, error=error, message=message))
            if error:
                self._end.wait(AFTER_FAILURE_S)

    def _make(self, call: Call, responses: list[SampleResponse]) -> None:
        inputs = [{"input_ids": list(ids)} for ids in call.prompts]
        params = {"max_tokens": call.max_tokens, "ignore_eos": call.ignore_eos, "seed": call.seed}
        options: dict[str, Any] = {"num_samples": call.num_samples, "timeout_s": TIMEOUT_S}
        if call.iterated:
            for response in self._sampler.sample_iter(inputs, params, call.adapter, **options):
                responses.append(response)  # one by one: responses before an error are checked too
        else:
            responses.append(self._sampler.sample(inputs, params, call.adapter, **options))

    def _keep(self, record: Begun | Ended) -> None:
        data = pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)
        with self._writing:
            self._file.write(data)
            self._file.flush()


@dataclass(slots=True)
class Life:
    """A trainer from its start to its end."""

    path: Path
    actor: Any
    pid: int
    started: Any
    """Object reference that is ready when the trainer has connected."""
    killed: bool = False


@dataclass(slots=True)
class Trainers:
    """A constant number of trainers."""

    application: str
    directory: Path
    seed: int
    callers: int
    """Calls that each trainer has in flight."""
    lives: list[Life] = field(default_factory=list)
    """All trainers so far."""

    def add(self) -> Life:
        number = len(self.lives)
        path = self.directory / f"trainer-{number}.pickle"
        actor = ray.remote(Trainer).options(num_cpus=0).remote(path, self.seed * 1000 + number)
        pid = ray.get(actor.process.remote(), timeout=60)
        life = Life(path, actor, pid, actor.start.remote(self.application, self.callers))
        self.lives.append(life)
        return life

    @property
    def living(self) -> list[Life]:
        return [life for life in self.lives if not life.killed]

    def connected(self, life: Life, timeout_s: float = 0) -> bool:
        """Whether it has connected.

        Raises:
            Exception: connecting failed.
        """
        done, _ = ray.wait([life.started], timeout=timeout_s)
        if done:
            ray.get(life.started)
        return bool(done)

    def stop(self, timeout_s: float) -> list[str]:
        """Ends all trainers. Returns a description of each that died by itself or has hanging calls."""
        wrong = []
        stops = {life.actor.stop.remote(): life for life in self.living}
        ended, hanging = ray.wait(list(stops), num_returns=len(stops), timeout=timeout_s)
        for stop in ended:
            try:
                ray.get(stop)
            except ray.exceptions.RayError as error:
                wrong.append(f"{stops[stop].path.stem} died by itself: {error}")
        wrong += [f"{stops[stop].path.stem} has calls that do not end" for stop in hanging]
        for life in self.living:
            ray.kill(life.actor)
        return wrong
