"""Sends new weights of the model to the engines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twinkle_serve import timing
from twinkle_serve.data_format.weights import Bucket, PauseMode
from twinkle_serve.errors import TwinkleServeError, WeightsError
from twinkle_serve.extras import require_extra
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.router_client import BucketSender, RouterClient
from twinkle_serve.tensors import TensorFile

if TYPE_CHECKING:
    from twinkle_serve.weights.patches import BucketDigests


@dataclass(slots=True)
class _Sent:
    """A version as it was sent."""

    label: str
    buckets: list[BucketDigests]


class WeightUploads:
    """Sends versions of the model's weights, one at a time.

    Remembers the hashes of the last one that it was asked to send as a delta.
    """

    def __init__(self, client: RouterClient) -> None:
        self._client = client
        self._sent: _Sent | None = None

    def send(
        self,
        version: str,
        mode: PauseMode,
        track: str,
        make_buckets: Callable[[Callable[[int], TensorFile]], Iterator[Bucket]],
        timeout_s: float,
        *,
        durable: bool,
        delta: bool,
    ) -> str:
        """Sends buckets of weights and publishes them as a version. Returns its label.

        Buckets are taken in the caller's thread, the next one while the last one is being sent.

        Args:
            make_buckets: yields them, in the files that the function given to it makes; see `BucketSender.new_file`.
            timeout_s: limit of each step: sending a bucket, and publishing.
            durable: return when the version is on the disk.
            delta: send patches of the buckets that were sent last, where the service still has those.
        """
        if delta:
            require_extra("delta=True", "server", "blake3")
        client, loop = self._client, self._client.loop
        upload = loop.call(client.call(timeout_s, RouterAPI.begin_weights, version, mode, durable, track))
        try:
            with client.sending() as sender:
                files = _Files(sender, self._bases(timeout_s)) if delta else sender
                on_its_way = None
                for index, bucket in enumerate(make_buckets(files.new_file)):
                    argument = sender.send(bucket)
                    if on_its_way is not None:
                        loop.wait(on_its_way)
                    on_its_way = loop.start(client.call(timeout_s, RouterAPI.append_weights, upload, index, argument))
                    if isinstance(files, _Files):
                        files.hash(bucket)
                if on_its_way is not None:
                    loop.wait(on_its_way)
                # If publishing fails at its end, the engines go back within the same time; writing has as long again.
                limit_s = 3 * timeout_s + timing.CONTROL_TIMEOUT_S
                label = loop.call(client.call(limit_s, RouterAPI.publish_weights, upload, mode, timeout_s))
        except BaseException:
            with contextlib.suppress(TwinkleServeError):  # an upload without buckets is given up by the router in time
                loop.call(client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.abandon_weights, upload))
            raise
        if isinstance(files, _Files):
            self._sent = _Sent(label, files.digests)
        return label

    def _bases(self, timeout_s: float) -> list[BucketDigests | None]:
        """Hashes of the buckets that were sent last; None for those that the service does not have as they were."""
        if self._sent is None:
            return []
        call = self._client.call(timeout_s, RouterAPI.weights_buckets, self._sent.label)
        try:
            kept = set(self._client.loop.call(call))
        except WeightsError:  # another version is current, and this one is gone
            return []
        return [bucket if bucket.checksum in kept else None for bucket in self._sent.buckets]


class _Files:
    """Makes the files of a delta, and hashes what is sent."""

    def __init__(self, sender: BucketSender, bases: list[BucketDigests | None]) -> None:
        self._sender, self._bases = sender, bases
        self._files: list[TensorFile] = []
        self.digests: list[BucketDigests] = []
        """Of the buckets so far."""

    def new_file(self, capacity: int) -> TensorFile:
        """See `BucketSender.new_file`."""
        from twinkle_serve.weights.patches import PatchFile

        index = len(self._files)
        base = self._bases[index] if index < len(self._bases) else None
        self._files.append(self._sender.new_file(capacity) if base is None else PatchFile(base))
        return self._files[-1]

    def hash(self, bucket: Bucket) -> None:
        """Hashes the next bucket, which `new_file` was the file of."""
        from twinkle_serve.weights.patches import BucketDigests, PatchFile

        file = self._files[len(self.digests)]
        self.digests.append(file.digests if isinstance(file, PatchFile) else BucketDigests.of(bucket))
