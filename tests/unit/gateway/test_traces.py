"""Traces: the spans of a call from its caller to the engine, and nothing where the config has none."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.support.gateway_app import GatewayUnderTest, gateway_app
from tests.support.local_sampler import QUESTION
from twinkle_serve import traces
from twinkle_serve.config import TraceArgs
from twinkle_serve.errors import ConfigError, RequestError
from twinkle_serve.traces import Traces, carrying, check_exporter, current_traceparent, valid_traceparent

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
UNSAMPLED = f"00-{TRACE}-{PARENT}-00"
ARGS = TraceArgs(endpoint="http://collector:4317")
PROMPT = {"prompt": "12+34=", "max_tokens": 8, "ignore_eos": True, "model": "sampler"}


class Recorded:
    """The spans of a gateway and a sampler that have ended."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def spans(self, gateway: GatewayUnderTest) -> list[ReadableSpan]:
        """All of them; the gateway and its sampler end with this."""
        assert gateway.context.traces is not None
        gateway.context.traces.close()
        gateway.sampler.shutdown()
        return list(self._exporter.get_finished_spans())


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Spans go to memory, not to a collector."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(exporter, "shutdown", lambda: None)  # of the part that ends first
    monkeypatch.setattr(traces, "make_exporter", lambda endpoint, protocol: exporter)
    return Recorded(exporter)


@pytest.fixture
def gateway(recorded: Recorded) -> Iterator[GatewayUnderTest]:
    with gateway_app(engine_args={"token_latency_s": 0.01}, sampler_traces=ARGS, traces=ARGS) as app:
        yield app


def one(spans: list[ReadableSpan], name: str) -> ReadableSpan:
    (span,) = [span for span in spans if span.name == name]
    return span


def is_child(span: ReadableSpan, parent: ReadableSpan) -> bool:
    return span.parent is not None and span.parent.span_id == parent.context.span_id


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return float(span.end_time - span.start_time) / 1e9


async def test_spans_lead_from_the_client_to_the_engine(gateway: GatewayUnderTest, recorded: Recorded) -> None:
    """One trace: the client's span, the gateway, the router, its queue, the engine, its prefill and its decoding."""
    async with gateway.http(traceparent=TRACEPARENT) as http:
        answer = await http.post("/v1/completions", json={**PROMPT, "n": 2})
    assert answer.status_code == 200
    spans = await asyncio.to_thread(recorded.spans, gateway)
    assert {f"{span.context.trace_id:032x}" for span in spans} == {TRACE}
    request, call = one(spans, "POST /v1/completions"), one(spans, "router.sample")
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == PARENT
    assert request.kind == call.kind == SpanKind.SERVER
    assert is_child(call, request)
    assert is_child(one(spans, "router.queue"), call)
    samples = [span for span in spans if span.name == "engine.sample"]
    assert sorted(span.attributes["twinkle.sample"] for span in samples if span.attributes) == [0, 1]
    for sample in samples:
        assert is_child(sample, call)
        assert sample.attributes is not None
        assert sample.attributes["twinkle.engine"] == "local"
        assert sample.attributes["twinkle.tokens"] == 8
        prefill, decode = (
            next(span for span in spans if span.name == name and is_child(span, sample))
            for name in ("engine.prefill", "engine.decode")
        )
        assert seconds(decode) > seconds(prefill)  # 7 tokens of 10 ms after one
        assert seconds(prefill) + seconds(decode) == pytest.approx(seconds(sample), abs=0.01)
    assert {span.resource.attributes["service.name"] for span in spans} == {
        "twinkle-serve.gateway",
        "twinkle-serve.router",
        "twinkle-serve.engine",
    }
    assert request.attributes is not None
    assert dict(request.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
    }


async def test_stream_has_the_spans_of_its_sample(gateway: GatewayUnderTest, recorded: Recorded) -> None:
    """Of a text stream by handle, and of one over HTTP, whose span lasts as long as its answer."""
    async with gateway.http(traceparent=TRACEPARENT) as http:
        await http.post("/v1/completions", json={**PROMPT, "stream": True})
    with carrying(TRACEPARENT):
        deltas = list(gateway.sampler.sample_stream(QUESTION, {"max_tokens": 8, "ignore_eos": True}))
    assert deltas
    spans = await asyncio.to_thread(recorded.spans, gateway)
    assert len([span for span in spans if span.name == "engine.decode"]) == 2
    assert seconds(one(spans, "POST /v1/completions")) > 0.05


async def test_callers_current_span_is_the_parent(gateway: GatewayUnderTest, recorded: Recorded) -> None:
    """Of a trainer that has OpenTelemetry: its own provider, and its own spans."""
    tracer = TracerProvider().get_tracer("trainer")
    with tracer.start_as_current_span("step") as step:
        response = gateway.sampler.sample([QUESTION, QUESTION], {"max_tokens": 2})
    assert len(response.sequences) == 2
    spans = await asyncio.to_thread(recorded.spans, gateway)
    call = one(spans, "router.sample")
    assert call.parent is not None
    assert call.parent.span_id == step.get_span_context().span_id
    assert call.attributes is not None
    assert call.attributes["twinkle.prompts"] == 2
    assert len([span for span in spans if span.name == "router.queue"]) == 2


async def test_failed_call_is_a_failed_span(gateway: GatewayUnderTest, recorded: Recorded) -> None:
    """With the error's message; a refusal over HTTP, which is the client's mistake, has its status alone."""
    with pytest.raises(RequestError):
        gateway.sampler.sample(QUESTION, {"max_tokens": 2}, min_groups=7)
    async with gateway.http() as http:
        assert (await http.post("/v1/completions", json={**PROMPT, "max_tokens": -1})).status_code == 400
        assert (await http.get("/nowhere")).status_code == 404
        assert (await http.get("/healthz")).status_code == 200  # a load balancer's, which is no span
    spans = await asyncio.to_thread(recorded.spans, gateway)
    call = one(spans, "router.sample")
    assert call.status.status_code == StatusCode.ERROR
    assert "min_groups" in str(call.status.description)
    requests = {span.name: span for span in spans if span.name.startswith(("POST", "GET"))}
    assert requests.keys() == {"POST /v1/completions", "GET"}
    assert {span.status.status_code for span in requests.values()} == {StatusCode.UNSET}


async def test_trace_that_its_caller_does_not_record_is_not_recorded(
    gateway: GatewayUnderTest, recorded: Recorded
) -> None:
    async with gateway.http(traceparent=UNSAMPLED) as http:
        assert (await http.post("/v1/completions", json=PROMPT)).status_code == 200
    assert await asyncio.to_thread(recorded.spans, gateway) == []


async def test_invalid_traceparent_begins_a_new_trace(gateway: GatewayUnderTest, recorded: Recorded) -> None:
    """W3C: a traceparent that cannot be read is ignored."""
    async with gateway.http(traceparent="00-nothing") as http:
        assert (await http.post("/v1/completions", json=PROMPT)).status_code == 200
    spans = await asyncio.to_thread(recorded.spans, gateway)
    assert one(spans, "POST /v1/completions").parent is None


async def test_traceparent_is_handed_on_where_nothing_is_recorded() -> None:
    """To the router and to engines, whose vLLM may record spans by itself."""
    with gateway_app() as gateway:
        async with gateway.http(traceparent=TRACEPARENT) as http:
            await http.post("/v1/completions", json=PROMPT)
            await http.post("/v1/completions", json=PROMPT, headers={"traceparent": "junk"})
        assert [request.traceparent for request in gateway.client.requests] == [TRACEPARENT, ""]


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        (TRACEPARENT, True),
        (UNSAMPLED, True),
        (TRACEPARENT.upper(), False),
        ("01" + TRACEPARENT[2:], False),
        (f"00-{'0' * 32}-{PARENT}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (TRACEPARENT + "\n", False),
        ("", False),
        (None, False),
        (7, False),
    ],
)
def test_traceparent_is_read_as_w3c_writes_it(value: object, valid: bool) -> None:
    assert valid_traceparent(value) == (value if valid else "")


def test_there_is_no_traceparent_without_a_span() -> None:
    assert current_traceparent() == ""


def test_sample_ratio_records_a_part_of_the_traces_that_begin_here() -> None:
    """None of them at 0; a caller's own are recorded all the same."""
    exporter = InMemorySpanExporter()
    recorder = Traces("router", exporter, sample_ratio=0.0)
    with recorder.span("own", "") as own, recorder.span("child", own.traceparent):
        pass
    with recorder.span("of a caller", TRACEPARENT):
        pass
    recorder.close()
    assert [span.name for span in exporter.get_finished_spans()] == ["of a caller"]


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_missing_exporter_is_reported_with_its_remedy(
    protocol: traces.Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the application is built, before anything is deployed."""
    monkeypatch.setitem(traces.EXPORTERS, protocol, "opentelemetry.exporter.nowhere.trace_exporter")
    with pytest.raises(ConfigError, match=r"traces needs opentelemetry\.exporter\.nowhere.*twinkle-serve\[traces\]"):
        check_exporter(protocol)


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_spans_of_a_collector_that_is_gone_are_dropped(protocol: traces.Protocol) -> None:
    """The exporter of each protocol exists, and a call does not wait for it."""
    assert traces.make_exporter("http://127.0.0.1:9", protocol) is not None


def test_config_without_traces_imports_no_sdk() -> None:
    """It takes a tenth of a second and 10 MB in each process; nor is the part that Ray imports asked for a span."""
    code = (
        "import sys\n"
        "from twinkle_serve.config import traces_of\n"
        "from twinkle_serve.traces import carrying, current_traceparent, valid_traceparent\n"
        "assert traces_of(None, 'router') is None\n"
        f"with carrying(valid_traceparent({TRACEPARENT!r})):\n"
        f"    assert current_traceparent() == {TRACEPARENT!r}\n"
        "assert current_traceparent() == ''\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
