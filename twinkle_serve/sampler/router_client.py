"""The interface by which a sampler reaches its router, in this process or behind a Serve handle."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.sample_request import Inputs, SampleRequest
from twinkle_serve.data_format.sample_updates import UpdatesItem
from twinkle_serve.data_format.samples import StopReason
from twinkle_serve.data_format.weights import Bucket, BucketArgument
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.loop_thread import LoopThread
from twinkle_serve.tasks import Call
from twinkle_serve.tensors import TensorFile

P = ParamSpec("P")
T = TypeVar("T")


class BucketSender:
    """Makes buckets of weights, and arguments of calls from them. This one is for a router in this process."""

    writers = 1
    """How many files may be written at the same time, each by a thread. In memory of this process, one after another:
    that holds a bucket and the one that is being sent."""

    def new_file(self, capacity: int) -> TensorFile:
        """Returns an empty file for the tensors of a bucket, which `send` takes at the least cost.

        Args:
            capacity: expected size in bytes.
        """
        return TensorFile(capacity)

    def send(self, bucket: Bucket) -> BucketArgument:
        """Returns the argument for a bucket."""
        return bucket


class RouterClient(Protocol):
    """Calls a router. The coroutines run on `loop`.

    Every call raises a TwinkleServeError; an abandoned one is cancelled at the router.
    """

    loop: LoopThread

    def snapshot(self, inputs: Inputs) -> Inputs:
        """Returns inputs as they are now, ready to be sent.

        Raises:
            PromptError: inputs that cannot be copied.
        """
        ...

    def prepare(self, request: SampleRequest) -> SampleRequest:
        """Returns a request with its inputs as they are now, ready for one of the calls below.

        Raises:
            PromptError: inputs that cannot be copied.
        """
        ...

    async def run(self, request: SampleRequest) -> SampleResponse:
        """See `RouterAPI.run`."""
        ...

    def run_iter(self, request: SampleRequest) -> AsyncGenerator[SampleResponse, None]:
        """See `RouterAPI.run_iter`."""
        ...

    def run_updates(self, request: SampleRequest) -> AsyncGenerator[UpdatesItem, None]:
        """See `RouterAPI.run_updates`."""
        ...

    def run_stream(self, request: SampleRequest) -> AsyncGenerator[tuple[str, StopReason | None], None]:
        """See `RouterAPI.run_stream`."""
        ...

    def call(
        self,
        timeout_s: float,
        method: Callable[Concatenate[RouterAPI, P], Awaitable[T]],
        *args: P.args,
        **options: P.kwargs,
    ) -> Call[T]:
        """Calls another method of the router, given as `RouterAPI.name`.

        Args:
            timeout_s: bounds the call, where the method does not bound itself.

        Raises:
            DeadlineError: it took longer.
        """
        ...

    def cancel(self, request_id: str, inputs: list[int] | None) -> Call[int]:
        """See `RouterAPI.cancel`."""
        ...

    def sending(self) -> AbstractContextManager[BucketSender]:
        """Yields a sender, whose arguments are there for the length of the block."""
        ...

    def shutdown(self, *, force: bool = False) -> None:
        """See `EngineControls.shutdown`."""
