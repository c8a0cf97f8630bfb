"""Responses of a call as its prompts finish."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping

from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.errors import RequestError
from twinkle_serve.sampler.loop_thread import Items
from twinkle_serve.sampler.progress import each_with_progress
from twinkle_serve.sampler.router_client import RouterClient
from twinkle_serve.validation import whole_number


class Rollouts(Iterator[SampleResponse]):
    """Iterates over the responses to a call's prompts as they finish; other prompts can be cancelled meanwhile."""

    def __init__(
        self, client: RouterClient, request: SampleRequest, parts: Items[SampleResponse], *, progress: bool
    ) -> None:
        """
        Args:
            parts: responses over one or more prompts each.
            progress: show a progress bar.
        """
        self._client, self._request_id, self._parts = client, request.request_id, parts
        self._inputs = request.input_count
        responses = _each_prompt(parts)
        self._responses = each_with_progress(responses, request.input_count) if progress else responses

    def __next__(self) -> SampleResponse:
        return next(self._responses)

    def cancel(self, prompt_indices: Iterable[int] | None = None) -> int:
        """Stops sampling prompts, by index, or all that are not complete; the others continue.

        Returns:
            How many of them were not complete. No responses to these arrive.

        Raises:
            RequestError: no list of indices, or the call has no prompt of that index.
        """
        indices = _checked(prompt_indices, self._inputs)
        return self._client.loop.call(self._client.cancel(self._request_id, indices))

    def close(self) -> None:
        """Cancels the call and ends the iteration."""
        self._parts.close()
        with contextlib.suppress(StopIteration):
            while True:  # ends the progress bar
                next(self._responses)

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncRollouts(AsyncIterator[SampleResponse]):
    """As `Rollouts`, for async code."""

    def __init__(
        self, client: RouterClient, request: SampleRequest, parts: AsyncGenerator[SampleResponse, None]
    ) -> None:
        """
        Args:
            parts: responses over one or more prompts each.
        """
        self._client, self._request_id, self._parts = client, request.request_id, parts
        self._inputs = request.input_count
        self._arrived: list[SampleResponse] = []
        """Unread responses of the last part, in reverse."""

    async def __anext__(self) -> SampleResponse:
        while not self._arrived:
            self._arrived = list(await anext(self._parts))[::-1]
        return self._arrived.pop()

    async def cancel(self, prompt_indices: Iterable[int] | None = None) -> int:
        """See `Rollouts.cancel`."""
        indices = _checked(prompt_indices, self._inputs)
        return await self._client.loop.call_async(self._client.cancel(self._request_id, indices))

    async def aclose(self) -> None:
        """See `Rollouts.close`."""
        await self._parts.aclose()


def _checked(prompt_indices: Iterable[int] | None, inputs: int) -> list[int] | None:
    """
    Raises:
        RequestError: as `Rollouts.cancel`.
    """
    if prompt_indices is None:
        return None
    try:
        if isinstance(prompt_indices, (str, bytes, Mapping)):
            raise TypeError
        indices = list(prompt_indices)
    except TypeError:
        raise RequestError(
            f"prompt_indices must be a list of indices, got {prompt_indices!r}. For one prompt, give a list of one."
        ) from None
    return [whole_number("prompt_indices", index, 0, inputs - 1) for index in indices]


def _each_prompt(parts: Iterator[SampleResponse]) -> Iterator[SampleResponse]:
    for part in parts:
        yield from part
