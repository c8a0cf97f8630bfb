"""The interface by which a sampler reaches its router, in this process or behind a Serve handle."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.sample_request import Inputs, SampleRequest
from twinkle_serve.data_format.sample_updates import UpdatesItem
from twinkle_serve.data_format.samples import StopReason
from twinkle_serve.data_format.weights import Bucket, BucketArgument
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.loop_thread import LoopThread
from twinkle_serve.tasks import Call

P = ParamSpec("P")
T = TypeVar("T")


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

    def put_large(self, bucket: Bucket) -> BucketArgument:
        """Returns a reference to a large argument."""
        ...

    def shutdown(self, *, force: bool = False) -> None:
        """See `EngineControls.shutdown`."""
