"""Ways of new weights from a trainer to the engines."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from twinkle_serve import timing
from twinkle_serve.data_format.weights import Bucket, PauseMode, TransferPlan
from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.router_client import BucketSender, RouterClient
from twinkle_serve.tensors import TensorFile


@dataclass(frozen=True, slots=True)
class UpdateRequest:
    """A version of the model's weights that a trainer sends."""

    label: str
    mode: PauseMode
    track: str
    durable: bool
    timeout_s: float
    """Limit of each step: sending a bucket, and publishing."""


class BucketFiles(Protocol):
    """Makes the files of buckets; see `BucketSender`."""

    writers: int

    def new_file(self, capacity: int) -> TensorFile: ...


class WeightTransport(Protocol):
    """Carries the buckets of one update from a trainer to the engines.

    Calls come in the order of the methods, from the trainer's thread; `abort` ends it at any point. Each raises a
    TwinkleServeError; the update is over then, and the version before it is current.

    Guarantees:
        Once `finish` has returned, the store has the version, and all engines that are in use.
        If it raises, none has it.
    """

    takes_patches: bool
    """Whether buckets may be patches of earlier ones."""

    def offer(self) -> None:
        """Asks the service whether it takes weights in this way. Raises UnsupportedError if not."""

    def begin(self) -> None:
        """Starts the update."""

    @property
    def files(self) -> BucketFiles:
        """Makes the files of buckets, in their order."""
        ...

    def send(self, bucket: Bucket) -> None:
        """Sends the next bucket, which must not change until `finish` has returned."""

    def finish(self) -> str:
        """Publishes the version. Returns its label."""
        ...

    def abort(self) -> None:
        """Gives the update up, unless it is published, and frees what it holds. Idempotent."""


MakeTransport: TypeAlias = Callable[[RouterClient, UpdateRequest], WeightTransport]


class StoreTransport(WeightTransport):
    """Sends buckets to the service's store, from which the engines load them."""

    takes_patches = True

    def __init__(self, client: RouterClient, update: UpdateRequest) -> None:
        self._client, self._update = client, update
        self._loop = client.loop
        self._open = contextlib.ExitStack()
        """Holds the files of buckets."""
        self._sender: BucketSender
        self._upload: int | None = None
        """Id of the update; None before `begin` and when it is over."""
        self._sent = 0
        self._on_its_way: concurrent.futures.Future[None] | None = None

    def offer(self) -> None:
        pass

    def begin(self) -> None:
        self._begin(direct=False)

    def _begin(self, *, direct: bool) -> None:
        update = self._update
        self._upload = self._loop.call(
            self._client.call(
                update.timeout_s,
                RouterAPI.begin_weights,
                update.label,
                update.mode,
                update.durable,
                update.track,
                direct,
            )
        )
        self._sender = self._open.enter_context(self._client.sending())

    @property
    def files(self) -> BucketFiles:
        return self._sender

    def send(self, bucket: Bucket) -> None:
        assert self._upload is not None
        argument = self._sender.send(bucket)
        self._wait()
        call = self._client.call(self._update.timeout_s, RouterAPI.append_weights, self._upload, self._sent, argument)
        self._on_its_way = self._loop.start(call)
        self._sent += 1

    def _wait(self) -> None:
        """Waits until the last bucket has arrived."""
        if (on_its_way := self._on_its_way) is not None:
            self._on_its_way = None
            self._loop.wait(on_its_way)

    def finish(self) -> str:
        self._wait()
        label = self._loop.wait(self._publish())
        self._upload = None
        self._open.close()
        return label

    @property
    def _limit_s(self) -> float:
        """Time for publishing. If it fails at its end, the engines go back within the same time; writing has as long
        again."""
        return 3 * self._update.timeout_s + timing.CONTROL_TIMEOUT_S

    def _publish(self, plan: TransferPlan | None = None) -> concurrent.futures.Future[str]:
        assert self._upload is not None
        self._loop.require_running()
        mode, timeout_s = self._update.mode, self._update.timeout_s
        call = self._client.call(self._limit_s, RouterAPI.publish_weights, self._upload, mode, timeout_s, plan)
        return self._loop.start(call)

    def abort(self) -> None:
        self._open.close()
        if self._upload is not None:
            self._abandon(self._upload)
            self._upload = None

    def _abandon(self, upload: int, *reason: str) -> None:
        with contextlib.suppress(TwinkleServeError):  # an upload without buckets is given up by the router in time
            self._loop.call(self._client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.abandon_weights, upload, *reason))
