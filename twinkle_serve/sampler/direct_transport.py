"""Weights that a trainer sends to the engines itself, by vLLM's own weight transfer.

No public method chooses this: it has been run with a backend on CPU alone (tests/conformance/test_transfers.py), and
not with nccl or ipc.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from twinkle_serve import timing
from twinkle_serve.checkpoint import read_bucket
from twinkle_serve.data_format.weights import Bucket, TransferCall, TransferOffer, TransferPlan, TransferTarget
from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.router_client import RouterClient
from twinkle_serve.sampler.transports import StoreTransport, UpdateRequest
from twinkle_serve.tensor_sums import weight_digest

logger = logging.getLogger(__name__)


class Sender(Protocol):
    """The trainer's side of a backend: vLLM's TrainerWeightTransferEngine (0.32)."""

    def send_weights(self) -> None:
        """Sends all weights, by the calls start_weight_update, update_weights and finish_weight_update."""

    def shutdown(self) -> None:
        """Frees its connections."""


class WeightSyncClient:
    """Calls all engines, in the form of vLLM's VLLMWeightSyncClient (0.32), which its senders take.

    The calls wait until the engines are paused, and return when all have answered. They raise a TwinkleServeError
    where an engine refuses, or the update is over.
    """

    def __init__(self, client: RouterClient) -> None:
        self._client = client
        self.upload = 0
        """Id of the update that the calls belong to."""
        self.limit_s = 0.0
        """For each."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init", init_info)

    def start_weight_update(self) -> None:
        self._call("start")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._call("update", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish")

    def _call(self, call: TransferCall, info: Any = None) -> None:
        client = self._client
        client.loop.call(client.call(self.limit_s, RouterAPI.transfer_weights, self.upload, call, info))


Connect: TypeAlias = Callable[[WeightSyncClient, tuple[TransferTarget, ...]], Sender]
"""Makes a sender and connects it to the workers of the targets, by init_weight_transfer_engine: vLLM's trainer_init.
"""


@dataclass(slots=True)
class _Connection:
    """A sender that is connected to engines."""

    id: int
    """Id of the update in which it was connected."""
    calls: WeightSyncClient
    sender: Sender

    def close(self) -> None:
        with contextlib.suppress(Exception):  # it has failed already, or the engines are gone
            self.sender.shutdown()


class DirectTransports:
    """Makes transports of one backend, and keeps the connection to the engines between updates."""

    def __init__(self, kind: str, connect: Connect) -> None:
        """
        Args:
            kind: name of the backend, as in the engines' weight_transfer_config.
        """
        self.kind, self._connect = kind, connect
        self._kept: _Connection | None = None
        self._latest = 0
        """Id of the update that sends, or sent last."""

    def __call__(self, client: RouterClient, update: UpdateRequest) -> DirectTransport:
        return DirectTransport(client, update, self)

    def send(self, client: RouterClient, upload: int, offer: TransferOffer, limit_s: float) -> None:
        """Sends all weights to the engines of an offer; connects to them first, unless they have kept a connection."""
        self._latest = upload
        kept, self._kept = self._kept, None  # a call that hangs has its own
        if kept is not None and kept.id != offer.connection:
            kept.close()
            kept = None
        calls = WeightSyncClient(client) if kept is None else kept.calls
        calls.upload, calls.limit_s = upload, limit_s
        connection = kept or _Connection(upload, calls, self._connect(calls, offer.targets))
        try:
            connection.sender.send_weights()
        except BaseException:
            connection.close()
            raise
        if upload == self._latest:
            self._kept = connection
        else:
            connection.close()

    def disconnect(self) -> None:
        """Ends the connection; the next update makes another."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.close()


class DirectTransport(StoreTransport):
    """Sends buckets to the store, and then weights to the paused engines, by vLLM's weight transfer.

    The store has checked every weight before an engine is paused, and has them for engines that come later. Engines
    compare what they get with it by digests.
    """

    takes_patches = False

    def __init__(self, client: RouterClient, update: UpdateRequest, transports: DirectTransports) -> None:
        super().__init__(client, update)
        self._transports = transports
        self._digests: dict[str, str] = {}

    def offer(self) -> None:
        self._ask()

    def _ask(self) -> TransferOffer:
        call = self._client.call(
            self._update.timeout_s, RouterAPI.offer_weights, self._transports.kind, self._update.track
        )
        return self._loop.call(call)

    def begin(self) -> None:
        self._begin(direct=True)

    def send(self, bucket: Bucket) -> None:
        super().send(bucket)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # nothing is written to arrays that are read-only
            data = torch.from_numpy(bucket)
        for name, weight in read_bucket(bucket).items():
            spec = weight.spec
            self._digests[name] = weight_digest(spec.shape, spec.dtype, data[weight.begin : weight.end])

    def finish(self) -> str:
        self._wait()
        upload, offer = self._upload, self._ask()
        assert upload is not None
        publishing = self._publish(TransferPlan(offer.targets, self._digests))
        sending: concurrent.futures.Future[None] = concurrent.futures.Future()
        device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
        # A collective may wait forever for an engine that has died; a thread can be left behind.
        threading.Thread(target=self._send_all, args=(upload, offer, device, sending), daemon=True).start()
        try:
            label = self._loop.wait(publishing)
        except TwinkleServeError as error:
            raise error from (sending.exception() if sending.done() else None)
        try:
            sending.result(timing.ANSWER_TIMEOUT_S)
        except Exception as error:
            logger.warning(f"{label!r} is published; its connection to the engines is not used again: {error!r}")
        self._upload = None
        self._open.close()
        return label

    def _send_all(
        self, upload: int, offer: TransferOffer, device: int | None, sending: concurrent.futures.Future[None]
    ) -> None:
        try:
            if device is not None:  # each thread has its own
                torch.accelerator.set_device_index(device)
            with torch.no_grad():
                self._transports.send(self._client, upload, offer, self._limit_s)
        except BaseException as error:
            sending.set_exception(error)
            self._abandon(upload, f"the trainer could not send: {type(error).__name__}: {str(error).rstrip('.')}.")
        else:
            sending.set_result(None)
