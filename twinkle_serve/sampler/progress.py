"""Progress bars of calls, on the terminal."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from twinkle_serve import timing
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.router_client import RouterClient

if TYPE_CHECKING:
    from rich.progress import Progress

POLL_S = 0.5
"""How often the router is asked how far a call is."""


class _Bar:
    """Counts things that are done, with tokens per second and the time that is left."""

    def __init__(self, what: str, total: int) -> None:
        from rich import progress

        self._bar: Progress = progress.Progress(
            progress.TextColumn("sampling"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn(what + "  {task.fields[rate]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("", total=total, rate="")
        self._began = time.monotonic()

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, done: int, tokens: int, total: int | None = None) -> None:
        """Shows how many are done, and their tokens."""
        rate = f"{tokens / max(time.monotonic() - self._began, 1e-3):,.0f} tokens/s"
        self._bar.update(self._task, completed=done, total=total, rate=rate)


def each_with_progress(responses: Iterator[SampleResponse], total: int) -> Iterator[SampleResponse]:
    """Yields responses to single prompts, and counts them."""
    done = tokens = 0
    with _Bar("prompts", total) as bar:
        for response in responses:
            done, tokens = done + 1, tokens + sum(len(sequence.tokens) for sequence in response.sequences)
            bar.show(done, tokens)
            yield response
        bar.show(done, tokens, done)  # a template may leave prompts out


@contextlib.contextmanager
def progress_of(client: RouterClient, request: SampleRequest) -> Iterator[None]:
    """Shows how many samples of a call are done, as the router counts them, while the call runs."""
    over = threading.Event()

    def follow(bar: _Bar) -> None:
        while not over.wait(POLL_S):
            with contextlib.suppress(TwinkleServeError):  # the call itself will say so
                calls = client.loop.call(client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.calls))
                for call in calls:
                    if call["id"] == request.request_id and call["samples"]:
                        bar.show(call["samples_done"], call["tokens_done"], call["samples"])

    with _Bar("samples", request.input_count) as bar:
        thread = threading.Thread(target=follow, args=(bar,), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(2 * POLL_S)
