"""Sends new weights of the model to the engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twinkle_serve.data_format.weights import Bucket
from twinkle_serve.errors import UnsupportedError, WeightsError
from twinkle_serve.extras import require_extra
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.router_client import RouterClient
from twinkle_serve.sampler.transports import BucketFiles, MakeTransport, StoreTransport, UpdateRequest
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

    def __init__(self, client: RouterClient, make_transport: MakeTransport = StoreTransport) -> None:
        self._client, self._make_transport = client, make_transport
        self._sent: _Sent | None = None

    def send(
        self,
        update: UpdateRequest,
        make_buckets: Callable[[BucketFiles], Iterator[Bucket]],
        *,
        delta: bool,
    ) -> str:
        """Sends buckets of weights and publishes them as a version. Returns its label.

        Buckets are taken in the caller's thread, the next one while the last one is being sent.

        Args:
            make_buckets: yields them, in files that its argument makes.
            delta: send patches of the buckets that were sent last, where the service still has those.
        """
        if delta:
            require_extra("delta=True", "server", "blake3")
        transport = self._make_transport(self._client, update)
        if delta and not transport.takes_patches:
            raise UnsupportedError("delta=True sends to the store alone. Leave it out.")
        try:
            transport.offer()
            transport.begin()
            # Not earlier: until the update has begun, others may make and lose versions.
            files = _DeltaFiles(transport.files, self._bases(update.timeout_s)) if delta else None
            for bucket in make_buckets(files or transport.files):
                transport.send(bucket)
                if files is not None:
                    files.hash(bucket)
            label = transport.finish()
        except BaseException:
            transport.abort()
            raise
        if files is not None:
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


class _DeltaFiles:
    """Makes the files of a delta, and hashes what is sent."""

    def __init__(self, whole: BucketFiles, bases: list[BucketDigests | None]) -> None:
        """
        Args:
            whole: makes those of buckets that are sent whole.
            bases: earlier buckets in their order, of which patches can be made.
        """
        self._whole, self._bases = whole, bases
        self.writers = whole.writers
        self._files: list[TensorFile] = []
        self.digests: list[BucketDigests] = []
        """Of the buckets so far."""

    def new_file(self, capacity: int) -> TensorFile:
        """See `BucketSender.new_file`."""
        from twinkle_serve.weights.patches import PatchFile

        index = len(self._files)
        base = self._bases[index] if index < len(self._bases) else None
        self._files.append(self._whole.new_file(capacity) if base is None else PatchFile(base))
        return self._files[-1]

    def hash(self, bucket: Bucket) -> None:
        """Hashes the next bucket, which `new_file` was the file of."""
        from twinkle_serve.weights.patches import BucketDigests, PatchFile

        file = self._files[len(self.digests)]
        self.digests.append(file.digests if isinstance(file, PatchFile) else BucketDigests.of(bucket))
