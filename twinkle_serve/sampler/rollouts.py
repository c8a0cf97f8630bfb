"""Responses of a call as its prompts finish."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator

from twinkle_serve.data_format import SampleResponse
from twinkle_serve.sampler.loop_thread import Items
from twinkle_serve.sampler.router_client import RouterClient


class Rollouts(Iterator[SampleResponse]):
    """Iterates over the responses to a call's prompts as they finish; other prompts can be cancelled meanwhile."""

    def __init__(self, client: RouterClient, request_id: str, parts: Items[SampleResponse], total: int | None) -> None:
        """
        Args:
            parts: responses over one or more prompts each.
            total: number of prompts for a progress bar; None shows none.
        """
        self._client, self._request_id, self._parts = client, request_id, parts
        self._responses = _each_prompt(parts) if total is None else _with_progress(_each_prompt(parts), total)

    def __next__(self) -> SampleResponse:
        return next(self._responses)

    def cancel(self, prompt_indices: Iterable[int] | None = None) -> int:
        """Stops sampling prompts, by index, or all that are not complete; the others continue.

        Returns:
            How many of them were not complete. No responses to these arrive.
        """
        indices = None if prompt_indices is None else list(prompt_indices)
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

    def __init__(self, client: RouterClient, request_id: str, parts: AsyncGenerator[SampleResponse, None]) -> None:
        """
        Args:
            parts: responses over one or more prompts each.
        """
        self._client, self._request_id, self._parts = client, request_id, parts
        self._arrived: list[SampleResponse] = []
        """Unread responses of the last part, in reverse."""

    async def __anext__(self) -> SampleResponse:
        while not self._arrived:
            self._arrived = list(await anext(self._parts))[::-1]
        return self._arrived.pop()

    async def cancel(self, prompt_indices: Iterable[int] | None = None) -> int:
        """See `Rollouts.cancel`."""
        indices = None if prompt_indices is None else list(prompt_indices)
        return await self._client.loop.call_async(self._client.cancel(self._request_id, indices))

    async def aclose(self) -> None:
        """See `Rollouts.close`."""
        await self._parts.aclose()


def _each_prompt(parts: Iterator[SampleResponse]) -> Iterator[SampleResponse]:
    for part in parts:
        yield from part


def _with_progress(responses: Iterator[SampleResponse], total: int) -> Iterator[SampleResponse]:
    """Shows a progress bar on the terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("prompts"), TimeElapsedColumn()
    )
    with bar:
        task = bar.add_task("", total=total)
        for response in responses:
            bar.advance(task)
            yield response
        bar.update(task, total=bar.tasks[0].completed)  # a template may leave prompts out
