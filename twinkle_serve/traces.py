"""Traces: spans of calls by OpenTelemetry, which is imported only where a config has `traces`.

A call carries the W3C `traceparent` of the span that it is part of, whether or not this process records spans.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, Literal

from twinkle_serve.errors import ConfigError, one_line

TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""W3C Trace Context, version 00."""

Protocol = Literal["grpc", "http/protobuf"]
Kind = Literal["INTERNAL", "SERVER"]

EXPORTERS = {
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
}
REMEDY = "pip install 'twinkle-serve[traces]', or remove `traces` from the config."

HTTP_ATTRIBUTES = {
    "http_method": "http.request.method",
    "http_route": "http.route",
    "http_status": "http.response.status_code",
}
"""OpenTelemetry's names."""

_carried: ContextVar[str] = ContextVar("traceparent", default="")


def valid_traceparent(value: object) -> str:
    """Returns a traceparent; "" for an invalid one, which is ignored as W3C demands."""
    return value if isinstance(value, str) and TRACEPARENT.fullmatch(value) else ""


@contextlib.contextmanager
def carrying(traceparent: str) -> Iterator[None]:
    """Makes `current_traceparent` return this in the block, and in tasks that it starts."""
    token = _carried.set(traceparent)
    try:
        yield
    finally:
        _carried.reset(token)


def current_traceparent() -> str:
    """Returns the traceparent of `carrying`, or else of OpenTelemetry's current span; "" where there is none."""
    if carried := _carried.get():
        return carried
    # A caller with a current span has imported it.
    current = getattr(sys.modules.get("opentelemetry.trace"), "get_current_span", None)
    return "" if current is None else _traceparent(current().get_span_context())


def _traceparent(context: Any) -> str:
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


ODD = "13579bdf"
"""Last digits of a traceparent whose span is recorded."""
NOT_RECORDED = f"00-{1:032x}-{1:016x}-00"
"""Of traces that begin here and are not recorded: parts that get it do not record them either."""


class Span:
    """A span that is under way."""

    def __init__(self, span: Any, traceparent: str = "") -> None:
        """
        Args:
            span: OpenTelemetry's; None for one that is not recorded.
            traceparent: of one that is not recorded.
        """
        self._span = span
        self.traceparent = traceparent if span is None else _traceparent(span.get_span_context())
        """For its children."""

    @property
    def is_recorded(self) -> bool:
        """False for one that was not chosen as a sample of all traces."""
        return self._span is not None

    def name(self, name: str) -> None:
        """Changes its name."""
        if self._span is not None:
            self._span.update_name(name)

    def set(self, **attributes: str | int | float | bool) -> None:
        """Sets attributes: those of HTTP by OpenTelemetry's names, others as `twinkle.NAME`."""
        if self._span is None:
            return
        for name, value in attributes.items():
            self._span.set_attribute(HTTP_ATTRIBUTES.get(name, f"twinkle.{name}"), value)

    def fail(self, text: str) -> None:
        """Marks it as failed."""
        if self._span is None:
            return
        from opentelemetry.trace import Status, StatusCode

        self._span.set_status(Status(StatusCode.ERROR, text))


def check_exporter(protocol: Protocol) -> None:
    """Raises ConfigError if a package is missing that exports spans."""
    from importlib.util import find_spec

    for module in ("opentelemetry.sdk", EXPORTERS[protocol].rpartition(".")[0]):
        try:
            found = find_spec(module)
        except ModuleNotFoundError:  # of a parent
            found = None
        if found is None:
            raise ConfigError(f"args: traces needs {module}, which is not installed. {REMEDY}")


def make_exporter(endpoint: str, protocol: Protocol) -> Any:
    """Returns OpenTelemetry's exporter of spans to a collector."""
    import importlib

    check_exporter(protocol)
    exporter = importlib.import_module(EXPORTERS[protocol]).OTLPSpanExporter
    # Without `insecure`, gRPC takes an address without a scheme to be one with TLS.
    if protocol == "grpc":
        return exporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    return exporter(endpoint=endpoint)


class Traces:
    """Records the spans of one part of a service, and sends them to a collector in a thread of its own.

    Guarantees:
        A span belongs to the trace of its parent, and is recorded if that is.
        A collector that is slow or gone delays no call; spans are dropped then.
        Spans that are not recorded do not reach OpenTelemetry, which would take 20 µs for each.
    """

    def __init__(self, part: str, exporter: Any, sample_ratio: float = 1.0) -> None:
        """
        Args:
            part: gateway, router or engine: `service.name` is `twinkle-serve.PART`.
            exporter: an OpenTelemetry SpanExporter.
            sample_ratio: part of the traces that begin here that are recorded.
        """
        from opentelemetry.context import Context
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(
            sampler=ALWAYS_ON, resource=Resource.create({"service.name": f"twinkle-serve.{part}"})
        )
        # Not the process's own provider: a caller's, or vLLM's, is left alone.
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("twinkle_serve")
        self._read = TraceContextTextMapPropagator().extract
        self._context, self._kinds = Context, SpanKind
        self._sample_ratio = sample_ratio

    def chooses(self, parent: str) -> bool:
        """Returns whether a span is recorded: by its parent, or by chance where that is ""."""
        return parent[-1] in ODD if parent else random.random() < self._sample_ratio

    def _start(self, name: str, parent: str, kind: Kind, start_ns: int | None = None) -> Any:
        # An empty context: without a parent, a span of the caller's in this thread would be taken.
        context = self._context()
        if parent:
            context = self._read({"traceparent": parent}, context=context)
        return self._tracer.start_span(name, context=context, kind=self._kinds[kind], start_time=start_ns)

    def span(
        self, name: str, parent: str, kind: Kind = "INTERNAL", **attributes: str | int | float | bool
    ) -> AbstractContextManager[Span]:
        """Records the block as a span. An exception fails it, but for a cancellation, which is an attribute.

        Args:
            parent: its traceparent; "" begins a trace.
        """
        if not self.chooses(parent):
            return contextlib.nullcontext(Span(None, parent or NOT_RECORDED))
        return self.recorded(name, parent, kind, **attributes)

    @contextlib.contextmanager
    def recorded(
        self, name: str, parent: str, kind: Kind = "INTERNAL", **attributes: str | int | float | bool
    ) -> Iterator[Span]:
        """As `span`, for one that `chooses` has chosen."""
        started = self._start(name, parent, kind)
        span = Span(started)
        span.set(**attributes)
        try:
            yield span
        except (asyncio.CancelledError, GeneratorExit):
            span.set(cancelled=True)
            raise
        except BaseException as error:
            span.fail(one_line(error))
            raise
        finally:
            started.end()

    def record(
        self, name: str, parent: str, seconds: float, ended_ago_s: float = 0.0, **attributes: str | int | float | bool
    ) -> None:
        """Records a span that is over.

        Args:
            seconds: its duration.
        """
        if not self.chooses(parent):
            return
        end_ns = time.time_ns() - int(ended_ago_s * 1e9)
        started = self._start(name, parent, "INTERNAL", end_ns - int(seconds * 1e9))
        Span(started).set(**attributes)
        started.end(end_ns)

    def close(self) -> None:
        """Sends the spans that are left. Idempotent."""
        self._provider.shutdown()
