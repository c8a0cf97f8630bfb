"""Spans of samples on an engine: all of its time there, until the first token, and from it on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

from twinkle_serve.data_format.groups import Group
from twinkle_serve.data_format.samples import SampleColumns
from twinkle_serve.engines.protocol import Engine
from twinkle_serve.traces import Span, Traces

MIN_LOOK_S, MAX_LOOK_S = 0.002, 0.1
LOOK_SHARE = 0.02
"""The first token of a sample is looked for after another LOOK_SHARE of the time that it has taken so far, within
MIN_LOOK_S and MAX_LOOK_S; engines have no event for it."""


class RunningSpan:
    """The span of a sample that is under way."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._began, self._first = time.perf_counter(), 0.0
        self.tokens = 0

    @property
    def traceparent(self) -> str:
        """For its children."""
        return self._span.traceparent

    def add(self, tokens: int) -> None:
        """Counts tokens."""
        self.tokens += tokens
        if tokens and not self._first:
            self.saw_token()

    def saw_token(self) -> None:
        """Notes that its first token is there."""
        self._first = time.perf_counter()

    def end(self, traces: Traces) -> None:
        """Records the time until the first token and the time from it on, where it was seen."""
        self._span.set(tokens=self.tokens)
        if self._first and self._span.is_recorded:
            now = time.perf_counter()
            traces.record("engine.prefill", self.traceparent, self._first - self._began, now - self._first)
            traces.record("engine.decode", self.traceparent, now - self._first)


class SampleSpans:
    """Records the samples of an engine that are part of a trace."""

    def __init__(self, traces: Traces, engine: Engine) -> None:
        self._traces, self._engine = traces, engine

    async def sample(self, group: Group, run: Callable[[Group], Awaitable[SampleColumns]]) -> SampleColumns:
        """Runs a group, as a span."""
        with self._recording(group) as span:
            group = replace(group, traceparent=span.traceparent)
            look = asyncio.ensure_future(self._look_for_token(group, span))
            try:
                columns = await run(group)
            finally:
                look.cancel()
            span.tokens = len(columns.tokens)
            return columns

    def stream(self, group: Group) -> contextlib.AbstractContextManager[RunningSpan]:
        """Records the block, which streams a group."""
        return self._recording(group)

    @contextlib.contextmanager
    def _recording(self, group: Group) -> Iterator[RunningSpan]:
        with self._traces.span(
            "engine.sample",
            group.traceparent,
            engine=self._engine.info.name,
            sample=group.first_sample,
            attempt=group.attempts,
            prompt_tokens=len(group.prompt_ids),
        ) as span:
            running = RunningSpan(span)
            try:
                yield running
            finally:
                running.end(self._traces)

    async def _look_for_token(self, group: Group, span: RunningSpan) -> None:
        passed = 0.0
        # A resumed sample has the tokens of its earlier engine in its prompt.
        while self._engine.partial_output(replace(group, partial=None), 0) is None:
            wait_s = min(max(MIN_LOOK_S, LOOK_SHARE * passed), MAX_LOOK_S)
            await asyncio.sleep(wait_s)
            passed += wait_s
        span.saw_token()

    def close(self) -> None:
        """Sends the spans that are left."""
        self._traces.close()
