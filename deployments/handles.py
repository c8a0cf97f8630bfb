"""Typed calls through Serve handles, and Ray's errors as ours."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Concatenate, ParamSpec, TypeVar

from ray.exceptions import ActorDiedError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from twinkle_serve import tasks
from twinkle_serve.errors import EngineDeadError
from twinkle_serve.remote.errors import raised_error

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")


def send(
    handle: DeploymentHandle, method: Callable[Concatenate[S, P], Awaitable[T]], *args: P.args, **options: P.kwargs
) -> Awaitable[T]:
    """Calls a method of a deployment, named by a method of its class or Protocol. Returns Serve's response."""
    response: Awaitable[T] = getattr(handle, method.__name__).remote(*args, **options)
    return response


async def call(
    handle: DeploymentHandle, method: Callable[Concatenate[S, P], Awaitable[T]], *args: P.args, **options: P.kwargs
) -> T:
    """As `send`, and awaits the answer.

    Raises:
        EngineDeadError: the deployment's process is gone.
        TwinkleServeError: any error that the method raised.
    """
    response: Any = send(handle, method, *args, **options)
    try:
        with engine_errors():
            answer: T = await response
            return answer
    except asyncio.CancelledError:  # Serve continues a call that nothing awaits any more
        with suppress(Exception):
            response.cancel()
        raise


async def iterate(
    handle: DeploymentHandle, method: Callable[Concatenate[S, P], AsyncIterator[T]], *args: P.args, **options: P.kwargs
) -> AsyncGenerator[T, None]:
    """Calls a method that yields, through a streaming handle. Closing the iterator cancels it. Raises as `call`."""
    with engine_errors():
        items = getattr(handle, method.__name__).remote(*args, **options)
        try:
            async for item in items:
                yield item
        finally:
            with suppress(Exception):  # the call may be over
                items.cancel()


@contextmanager
def engine_errors() -> Iterator[None]:
    """Replaces errors of Ray and Serve by ours."""
    try:
        yield
    except (RayError, RayServeException) as error:
        if (raised := raised_error(error)) is not None:
            raise raised from None
        raise EngineDeadError(_reason(error)) from None
    except asyncio.CancelledError:
        if tasks.is_cancelled():
            raise
        raise EngineDeadError("the call was cancelled on its way") from None


def _reason(error: Exception) -> str:
    """Returns an error of Ray as one line; of an actor's death, its process and why it ended."""
    text = str(error)
    if not (isinstance(error, ActorDiedError) and text.startswith(ActorDiedError.BASE_ERROR_MSG)):
        return f"{type(error).__name__}: {' '.join(text.split())}"
    facts = [f"{name} {found[1]}" for name in ("pid", "ip") if (found := re.search(rf"^\s*{name}: (\S+)", text, re.M))]
    process = f"its process ({', '.join(facts)})" if facts else "its process"
    cause = re.search(r"The actor is dead because (.*?)(?:\. |\.?$)", text, re.M)
    if cause is None or cause[1] == "its worker process has died":
        return f"{process} ended unexpectedly"
    return f"{process} ended: {cause[1]}"
