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
from typing import Any, Protocol, TypeAlias

import torch

from twinkle_serve import timing
from twinkle_serve.checkpoint import read_bucket
from twinkle_serve.data_format.weights import Bucket, Receiver, TransferCall, TransferOffer, TransferPlan
from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.router_client import RouterClient
from twinkle_serve.sampler.transports import StoreTransport, Update
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

    def __init__(self) -> None:
        self._client: RouterClient
        self._upload = 0
        self._limit_s = 0.0

    def begin(self, client: RouterClient, upload: int, limit_s: float) -> None:
        """Makes later calls belong to an update, each for at most `limit_s`."""
        self._client, self._upload, self._limit_s = client, upload, limit_s

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
        client.loop.call(client.call(self._limit_s, RouterAPI.transfer_weights, self._upload, call, info))


Connect: TypeAlias = Callable[[WeightSyncClient, tuple[Receiver, ...]], Sender]
"""Makes a sender and connects it to the workers of the receivers, by init_weight_transfer_engine: vLLM's trainer_init.
"""


class DirectTransports:
    """Makes transports of one backend, and keeps its connection to the engines between updates."""

    def __init__(self, kind: str, connect: Connect) -> None:
        """
        Args:
            kind: name of the backend, as in the engines' weight_transfer_config.
        """
        self.kind, self._connect = kind, connect
        self._sender: Sender | None = None
        self._connection = 0
        """Id of the update in which it was connected."""
        self._calls = WeightSyncClient()

    def __call__(self, client: RouterClient, update: Update) -> DirectTransport:
        return DirectTransport(client, update, self)

    def send(self, client: RouterClient, upload: int, offer: TransferOffer, limit_s: float) -> None:
        """Sends all weights to engines, by the last connection if they still have that. A failure ends it."""
        self._calls.begin(client, upload, limit_s)
        if offer.connection != self._connection:
            self.disconnect()
        try:
            if self._sender is None:
                self._sender, self._connection = self._connect(self._calls, offer.receivers), upload
            self._sender.send_weights()
        except BaseException:
            self.disconnect()
            raise

    def disconnect(self) -> None:
        """Ends the connection; the next update makes another."""
        sender, self._sender, self._connection = self._sender, None, 0
        if sender is not None:
            with contextlib.suppress(Exception):  # it has failed already, or the engines are gone
                sender.shutdown()


class DirectTransport(StoreTransport):
    """Sends buckets to the store, and then weights to the paused engines, by vLLM's weight transfer.

    The store has checked every weight before an engine is paused, and has them for engines that come later. Engines
    compare what they get with it by digests.
    """

    takes_patches = False

    def __init__(self, client: RouterClient, update: Update, transports: DirectTransports) -> None:
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
        publishing = self._publish(TransferPlan(offer.receivers, self._digests))
        sending: concurrent.futures.Future[None] = concurrent.futures.Future()
        # A collective waits for as long as an engine that has died; a thread can be left behind.
        threading.Thread(target=self._send_all, args=(upload, offer, sending), daemon=True).start()
        try:
            label = self._loop.wait(publishing)
        except TwinkleServeError as error:
            raise error from (sending.exception() if sending.done() else None)
        if not concurrent.futures.wait([sending], timing.ANSWER_TIMEOUT_S).done or sending.exception() is not None:
            logger.warning(f"the connection to the engines is not used again, {label!r} came by it: {sending}")
            self._transports.disconnect()
        self._upload = None
        self._open.close()
        return label

    def _send_all(self, upload: int, offer: TransferOffer, sending: concurrent.futures.Future[None]) -> None:
        try:
            self._transports.send(self._client, upload, offer, self._limit_s)
        except BaseException as error:
            sending.set_exception(error)
            self._abandon(upload, f"{type(error).__name__}: {error}")
        else:
            sending.set_result(None)
