"""Both sides of a fake weight transfer with the interface of vLLM's, and a trainer's client in the router's process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load
from torch import Tensor

from twinkle_serve.data_format.weights import Bucket, TransferTarget
from twinkle_serve.engines.fake import FakeEngine
from twinkle_serve.engines.protocol import WeightsReceiver, compare_digests
from twinkle_serve.errors import DeadlineError, WeightsError
from twinkle_serve.packing import buckets
from twinkle_serve.routing.router import Router
from twinkle_serve.sampler.direct_transport import DirectTransports, Sender, WeightSyncClient
from twinkle_serve.sampler.router_client import BucketSender, RouterClient
from twinkle_serve.sampler.transports import UpdateRequest
from twinkle_serve.sampler.weight_upload import WeightUploads
from twinkle_serve.tasks import Call
from twinkle_serve.tensor_sums import weight_digest
from twinkle_serve.tensors import stored_dtype

T = TypeVar("T")

KIND = "fake"
"""Name of the backend."""


class Wire:
    """What the trainer and all workers share: a collective, as of nccl, and memory, as of ipc."""

    def __init__(self) -> None:
        self._arrived: dict[int, queue.SimpleQueue[Tensor]] = {}
        self.world_size = 0
        self.memory: dict[str, Tensor] = {}
        self.cut = threading.Event()
        """Set: nothing that waits goes on."""

    def join(self, rank: int, world_size: int) -> None:
        assert 0 < rank < world_size and rank not in self._arrived, "each worker has a number of its own"
        self.world_size = world_size
        self._arrived[rank] = queue.SimpleQueue()

    def leave(self, rank: int) -> None:
        self._arrived.pop(rank, None)

    def broadcast(self, tensor: Tensor) -> None:
        for arrived in list(self._arrived.values()):
            arrived.put(tensor.clone())

    def receive(self, rank: int) -> Tensor:
        arrived = self._arrived[rank]
        while not self.cut.is_set():
            with contextlib.suppress(queue.Empty):
                return arrived.get(timeout=0.05)
        raise ConnectionError("the wire was cut.")


WIRES: dict[str, Wire] = {}
"""By the address that init info has."""


class FakeTransferEngine:
    """A worker's side, with the methods of vLLM's WeightTransferEngine (0.32)."""

    def __init__(self, load_weights: Callable[[list[tuple[str, Tensor]]], None]) -> None:
        self._load_weights = load_weights
        self._wire: Wire | None = None
        self.rank = 0
        self.active = False

    def init_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self._wire, self.rank = WIRES[init_info["master_address"]], init_info["rank_offset"]
        self._wire.join(self.rank, init_info["world_size"])

    def start_weight_update(self) -> None:
        self.active = True

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        assert self._wire is not None and self.active, "init, start, update, finish"
        for index, name in enumerate(update_info["names"]):
            if "handles" in update_info:
                tensor = self._wire.memory[update_info["handles"][index]].clone()
            else:
                tensor = self._wire.receive(self.rank)
            assert list(tensor.shape) == update_info["shapes"][index]
            self._load_weights([(name, tensor)])

    def finish_weight_update(self) -> None:
        assert self.active
        self.active = False

    def shutdown(self) -> None:
        if self._wire is not None:
            self._wire.leave(self.rank)
            self._wire = None


class FakeReceiver(WeightsReceiver):
    """The transfer engine of a fake engine's only worker."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._weights: dict[str, Tensor] = {}
        self.side = FakeTransferEngine(lambda weights: self._weights.update(weights))
        self.changes: dict[str, Callable[[Tensor], Tensor]] = {}
        """What happens to weights on their way, by name."""
        self.inits = 0

    async def init(self, info: Any, workers: range) -> None:
        self.inits += 1
        self.side.shutdown()
        self.side.init_transfer_engine({**info, "rank_offset": info["rank_offset"] + workers.start})

    async def start(self) -> None:
        self._weights = {}
        # A thread of an earlier update may still wait for its trainer.
        init, self.side = self.side, FakeTransferEngine(self._weights.update)
        self.side._wire, self.side.rank = init._wire, init.rank
        self.side.start_weight_update()

    async def update(self, info: Any, workers: range) -> None:
        try:
            await asyncio.to_thread(self.side.update_weights, info)
        except ConnectionError as error:
            raise WeightsError(f"{self._engine.info.name}: {error}") from error

    async def finish(self, label: str, digests: Mapping[str, str]) -> str:
        self.side.finish_weight_update()
        came = {name: self.changes.get(name, lambda tensor: tensor)(t) for name, t in self._weights.items()}
        compare_digests(
            {name: weight_digest(tuple(t.shape), stored_dtype(t.dtype), t) for name, t in came.items()}, digests
        )

        async def parts() -> AsyncIterator[Bucket]:
            for part in buckets(came.items()):
                yield part

        return await self._engine.load_weights(label, parts())


@dataclass
class FakeSender(Sender):
    """A trainer's side, with the steps of vLLM's: of its nccl, which broadcasts while the workers wait in one call, or
    of its ipc, which makes a call for each part of the weights, with handles of memory.
    """

    source: Mapping[str, Tensor]
    calls: WeightSyncClient
    targets: Sequence[TransferTarget]
    by_handles: bool = False
    fails_at: str = ""
    """The step before which it raises: init, start, update, middle, finish."""
    waits: dict[str, threading.Event] = field(default_factory=dict)
    """Events to wait for, by the step after them."""
    address: str = ""
    _addresses = itertools.count()

    def __post_init__(self) -> None:
        self.address = f"wire-{next(self._addresses)}"
        self.wire = WIRES[self.address] = Wire()
        self._reach("init")
        world_size = 1 + sum(target.workers for target in self.targets)
        info = {"master_address": self.address, "rank_offset": 1, "world_size": world_size}
        self.calls.init_weight_transfer_engine(info)

    def _reach(self, step: str) -> None:
        if step in self.waits:
            assert self.waits[step].wait(60)
        if step == self.fails_at:
            raise RuntimeError(f"out of memory before {step}")

    def send_weights(self) -> None:
        self._reach("start")
        self.calls.start_weight_update()
        self._reach("update")
        if self.by_handles:
            self._send_handles()
        else:
            self._broadcast()
        self._reach("finish")
        self.calls.finish_weight_update()

    def _send_handles(self) -> None:
        names = list(self.source)
        for begin in range(0, len(names), 7):
            part = names[begin : begin + 7]
            if begin:
                self._reach("middle")
            self.wire.memory = {f"handle of {name}": self.source[name] for name in part}
            self.calls.update_weights(self._info(part) | {"handles": list(self.wire.memory)})

    def _broadcast(self) -> None:
        pool = ThreadPoolExecutor(1)
        try:
            received = pool.submit(self.calls.update_weights, self._info(list(self.source)))
            for index, tensor in enumerate(self.source.values()):
                if index == len(self.source) // 2:
                    self._reach("middle")
                self.wire.broadcast(tensor)
            received.result()
        finally:
            pool.shutdown(wait=False)

    def _info(self, names: Sequence[str]) -> dict[str, Any]:
        return {"names": names, "shapes": [list(self.source[name].shape) for name in names]}

    def shutdown(self) -> None:
        self.wire.cut.set()


class _RunningLoop:
    """The part of a `LoopThread` that transports use, for the event loop that runs already."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def require_running(self) -> None:
        pass

    def start(self, coroutine: Call[T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def wait(self, future: concurrent.futures.Future[T]) -> T:
        return future.result()

    def call(self, coroutine: Call[T]) -> T:
        return self.wait(self.start(coroutine))


class _Client:
    """The part of a `RouterClient` that transports use."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self.loop = _RunningLoop()

    async def call(self, timeout_s: float, method: Any, *args: Any) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await getattr(self._router, method.__name__)(*args)
        except TimeoutError:
            raise DeadlineError(f"{method.__name__} did not end") from None

    def sending(self) -> contextlib.AbstractContextManager[BucketSender]:
        return contextlib.nullcontext(BucketSender())


def client_of(router: Router) -> RouterClient:
    """A client of a router on the running event loop, for other threads."""
    return cast(RouterClient, _Client(router))


@dataclass
class Trainer:
    """Sends weights to a router, and to its engines itself. Its calls block: they are for other threads."""

    client: RouterClient
    by_handles: bool = False
    fails_at: str = ""
    changes: dict[str, Tensor] = field(default_factory=dict)
    """Weights that it sends to the engines instead of those of the store."""
    sender: FakeSender | None = None

    def __post_init__(self) -> None:
        self.transports = DirectTransports(KIND, self._connect)
        self._uploads = WeightUploads(self.client, self.transports)
        self._source: dict[str, Tensor] = {}

    def _connect(self, calls: WeightSyncClient, targets: Sequence[TransferTarget]) -> FakeSender:
        self.sender = FakeSender(self._source, calls, targets, self.by_handles, self.fails_at)
        return self.sender

    def update(self, label: str, parts: Sequence[Bucket], *, durable: bool = True, limit_s: float = 20.0) -> str:
        self._source.clear()
        with contextlib.suppress(Exception):  # bad ones, for the store to find
            for part in parts:
                self._source |= load(part.tobytes())
        self._source |= self.changes
        if self.sender is not None:
            self.sender.fails_at = self.fails_at
        update = UpdateRequest(label, "keep", "", durable, limit_s)
        return self._uploads.send(update, lambda files: iter(parts), delta=False)


def flipped(tensor: Tensor) -> Tensor:
    """A tensor that differs in the lowest bit of one value."""
    changed = tensor.clone()
    changed.view(-1).view(torch.uint8)[0] ^= 1
    return changed
