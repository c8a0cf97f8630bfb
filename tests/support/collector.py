"""A collector of OpenTelemetry's spans, by OTLP over gRPC."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it came."""

    service: str
    """`service.name` of its process."""
    name: str
    trace: str
    id: str
    parent: str
    """Id of its parent; "" for none."""
    attributes: dict[str, Any]
    begin_ns: int
    end_ns: int


@dataclass
class Collector:
    """The spans that came, and where to send them."""

    endpoint: str = ""
    spans: list[ReceivedSpan] = field(default_factory=list)

    def Export(self, request: Any, context: Any) -> Any:
        """Takes spans; called by gRPC, under OTLP's name."""
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

        for resource in request.resource_spans:
            service = _plain(resource.resource.attributes).get("service.name", "")
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        ReceivedSpan(
                            service,
                            span.name,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            _plain(span.attributes),
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                        )
                    )
        return ExportTraceServiceResponse()


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value") for each in attributes}


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    """A running collector."""
    import grpc  # type: ignore[import-untyped]
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

    made = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
    made.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield made
    finally:
        server.stop(1.0).wait()
