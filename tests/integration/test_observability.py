"""Dashboards, alerts and logs over a real service: Prometheus scrapes it, and each expression has a value."""

from __future__ import annotations

import itertools
import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray

import graphs.sampler
from deployments.log_config import quiet
from deployments.router import router_deployment
from observability.alerts import ALERTS
from observability.dashboards import DASHBOARDS
from tests.support.collector import ReceivedSpan, collector
from tests.support.deploy import deployed
from tests.support.eventually import wait_until
from tests.support.gateway import gateway_url
from tests.support.prometheus import prometheus
from tests.support.service import QUESTIONS
from tests.support.weights import changed_weights
from twinkle_serve.sampler import RunningSampler

pytestmark = [pytest.mark.ray, pytest.mark.nightly]

EXPRESSIONS = {
    expression: title
    for title, expression in (
        *((panel.title, query.expression) for board in DASHBOARDS for panel in board.panels for query in panel.queries),
        *((alert.name, condition.expression) for alert in ALERTS for condition in alert.conditions),
    )
}
NAME = "observed"
LOAD_S = 300.0
VLLM_ARGS = {"max_model_len": 256, "dtype": "float32", "kv_cache_memory_bytes": 2**27, "disable_log_stats": False}


def log_lines(deployment: str) -> list[str]:
    """What a deployment of NAME has logged."""
    node = ray._private.worker._global_node
    logs = Path(node.get_session_dir_path()) / "logs" / "serve"
    return [line for path in logs.glob(f"replica_{NAME}_{deployment}_*.log") for line in path.read_text().splitlines()]


def load(sampler: RunningSampler, url: str) -> None:
    """Calls by handle and over HTTP, whole and streamed."""
    sampler.sample(QUESTIONS, {"max_tokens": 16}, num_samples=2)
    for stream in (False, True):
        body = {"model": "sampler", "prompt": "12+34=", "max_tokens": 64, "stream": stream}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()


@pytest.mark.vllm
def test_each_expression_of_dashboards_and_alerts_has_a_value_under_load(cluster: None, tmp_path: Path) -> None:
    """After an update of the weights. Alerts are evaluated without their thresholds, and Prometheus reads their rules.
    vLLM's own metrics, which its statistics turn on, are there as well, and the log has its line each 10 s."""
    with (
        deployed(NAME, engine="vllm", engine_args=VLLM_ARGS) as sampler,
        gateway_url(samplers={"sampler": NAME}) as url,
        prometheus(tmp_path) as server,
    ):
        sampler.update_weights(changed_weights(1), "v1")
        deadline = time.monotonic() + LOAD_S
        while missing := {title: text for text, title in EXPRESSIONS.items() if not server.values(text)}:
            assert time.monotonic() < deadline, missing
            load(sampler, url)
        wait_until(lambda: set(server.alert_states().values()) == {"ok"}, "Prometheus has evaluated the rules")
        assert server.alert_states().keys() == {alert.name for alert in ALERTS}
        own = f'application="{NAME}"'  # the cluster may have had other services
        assert server.values(f"sum(ray_twinkle_weights_version{{{own}}})") == [1.0]
        assert server.values(f'sum(ray_twinkle_weight_updates_total{{{own}, outcome="published"}})') == [1.0]
        assert server.values("sum(ray_vllm_generation_tokens_total)")[0] > 0
        assert any("tokens/s, " in line and line.startswith("INFO") for line in log_lines("router"))


TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.vllm
def test_a_trace_goes_from_the_client_to_vllm(cluster: None) -> None:
    """A collector receives the spans of a request from gateway, router, engine and vLLM, each below the one before."""
    with collector() as received:
        traces = {"endpoint": received.endpoint}
        vllm_args = {**VLLM_ARGS, "otlp_traces_endpoint": received.endpoint}
        with (
            deployed(NAME, engine="vllm", engine_args=vllm_args, traces=traces),
            gateway_url(samplers={"sampler": NAME}, traces=traces) as url,
        ):
            headers = {"content-type": "application/json", "traceparent": f"00-{TRACE}-{CALLER}-01"}
            body = {"model": "sampler", "prompt": "12+34=", "max_tokens": 200, "ignore_eos": True}
            request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                answer.read()

            def spans() -> dict[str, ReceivedSpan]:
                return {span.name: span for span in received.spans if span.trace == TRACE}

            names = {"POST /v1/completions", "router.sample", "router.queue", "engine.sample", "llm_request"}
            names |= {"engine.prefill", "engine.decode"}
            wait_until(lambda: names <= spans().keys(), f"spans {sorted(names)} arrive", timeout_s=60)
        found = spans()
    parents = ("POST /v1/completions", "router.sample", "engine.sample", "llm_request")
    assert found[parents[0]].parent == CALLER
    for parent, child in itertools.pairwise(parents):
        assert found[child].parent == found[parent].id, (parent, child)
        assert found[parent].begin_ns <= found[child].begin_ns and found[child].end_ns <= found[parent].end_ns + 10**9
    services = {found[name].service for name in parents[:3]}
    assert services == {"twinkle-serve.gateway", "twinkle-serve.router", "twinkle-serve.engine"}
    assert found["engine.sample"].attributes["twinkle.tokens"] == 200
    assert found["llm_request"].attributes["gen_ai.usage.completion_tokens"] == 200


def test_log_in_json_has_the_figures_as_fields(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TWINKLE_SERVE_LOG_ENCODING=JSON asks for: one object a line, its message as in a text log."""
    in_json = router_deployment.options(logging_config=quiet("json"))
    monkeypatch.setattr(graphs.sampler, "router_deployment", in_json)

    def records() -> list[dict[str, Any]]:
        return [json.loads(line) for line in log_lines("router") if line.startswith("{")]

    with deployed(NAME, engine="fake", engine_args={"token_latency_s": 0.05}) as sampler:
        text = sampler.sample_stream(QUESTIONS[0], {"max_tokens": 900, "ignore_eos": True})
        next(text)
        wait_until(lambda: any("tokens_per_s" in record for record in records()), "the line of each 10 s")
        record = next(record for record in records() if "tokens_per_s" in record)
        assert record["levelname"] == "INFO" and f"{NAME}#router" in record["actor_name"]
        assert record["engines_ready"] == record["engines"] == 1
        assert "1 of 1 engines ready" in record["message"]
