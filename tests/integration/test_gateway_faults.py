"""The gateway behind Serve's proxy: clients that go away or send bad HTTP, and processes that die."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.bad_requests import bad_requests
from tests.support.deploy import deployed
from tests.support.eventually import wait_until
from tests.support.gateway import gateway_url
from tests.support.processes import replica_process
from tests.support.service import is_idle
from twinkle_serve.gateway.native import read_samples
from twinkle_serve.sampler import RunningSampler

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
NAME = "sampler"
TOKEN_S = 0.02
LONG = {"inputs": [{"input_ids": [1, 2]}], "sampling_params": {"max_tokens": 2500, "ignore_eos": True}}
"""Fifty seconds."""
SHORT: dict[str, Any] = {
    "inputs": [{"input_ids": [1, 2]}] * 3,
    "sampling_params": {"max_tokens": 3, "seed": 1},
    "num_samples": 2,
}
FORMS = ("application/json", "application/x-ndjson", "application/octet-stream")


@pytest.fixture(scope="module")
def service(cluster: None) -> Iterator[RunningSampler]:
    engine_args = {"max_model_len": 3000, "max_num_seqs": 8, "token_latency_s": TOKEN_S}
    with deployed(NAME, engine="fake", device_mesh={"dp_size": 2}, engine_args=engine_args) as sampler:
        yield sampler


@pytest.fixture(scope="module")
def url(service: RunningSampler) -> Iterator[str]:
    with gateway_url(samplers={"sampler": NAME}, limits={"body_timeout_s": 2}) as url:
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200, "the sampler is ready")
        yield url


@pytest.fixture(autouse=True)
def nothing_left_behind(service: RunningSampler, url: str) -> Iterator[None]:
    """After each test nothing runs, and the gateway samples."""
    yield
    wait_until(lambda: is_idle(service), "the service is idle")
    assert httpx.post(f"{url}/sample", json=SHORT, timeout=60).status_code == 200


def connect_to(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def request(body: dict[str, Any], **headers: str) -> bytes:
    raw = json.dumps(body).encode()
    lines = [f"{name}: {value}" for name, value in headers.items()]
    head = ["POST /sample HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(raw)}", *lines]
    return "\r\n".join([*head, "", ""]).encode() + raw


def test_answers_over_serve_are_those_of_a_call_from_python(service: RunningSampler, url: str) -> None:
    """The proxy changes none of the three forms."""
    expected = service.sample(SHORT["inputs"], SHORT["sampling_params"], num_samples=2)
    answers = {form: httpx.post(f"{url}/sample", json=SHORT, headers={"accept": form}, timeout=60) for form in FORMS}
    assert {form: answer.headers["content-type"] for form, answer in answers.items()} == {form: form for form in FORMS}
    response = read_samples(answers["application/octet-stream"].content, SHORT["inputs"])
    assert response == expected
    prompts = answers["application/json"].json()["prompts"]
    assert [s["tokens"] for p in prompts for s in p["sequences"]] == [s.tokens for s in expected.sequences]
    lines = [json.loads(line) for line in answers["application/x-ndjson"].text.splitlines()]
    assert sorted(line["prompt"]["prompt_index"] for line in lines[:-1]) == [0, 1, 2]


def freed_s(service: RunningSampler, url: str, data: bytes) -> float:
    """Seconds from the end of a client's connection until its call is gone from the router."""
    with connect_to(url) as connection:
        connection.sendall(data)
        wait_until(lambda: service.status()["requests"] == 1 and not is_idle(service), "the call runs")
    began = time.monotonic()
    wait_until(lambda: service.status()["requests"] == 0, "the call ends", timeout_s=20)
    return time.monotonic() - began


EVENTS = {"prompt": [1, 2], "max_tokens": 2500, "ignore_eos": True, "stream": True}


@pytest.mark.parametrize("form", [*FORMS, "text/event-stream"])
def test_a_client_that_goes_away_frees_its_engine(service: RunningSampler, url: str, form: str) -> None:
    """Within 100 ms, if the machine has time; the samples would take 50 s."""
    data = request(LONG, accept=form)
    if form == "text/event-stream":
        data = request(EVENTS, accept=form).replace(b"/sample", b"/v1/completions", 1)
    times: list[float] = []
    while len(times) < 10 and min(times, default=1.0) >= 0.1:  # a busy machine has pauses
        times.append(freed_s(service, url, data))
    print(f"{form}: {[round(1000 * each) for each in times]} ms")
    assert min(times) < 0.1, times


def test_bad_requests_over_serve_harm_nobody(service: RunningSampler, url: str) -> None:
    """A part of the thousand, and raw HTTP; calls that run meanwhile are complete."""
    body = {"inputs": [{"input_ids": [1, 2]}], "sampling_params": {"max_tokens": 100, "seed": 1}, "num_samples": 2}
    with ThreadPoolExecutor(4) as pool, httpx.Client(base_url=url, timeout=60) as http:
        bystanders = [pool.submit(httpx.post, f"{url}/sample", json=body, timeout=120) for _ in range(4)]
        for name, path, raw, headers, statuses in list(bad_requests())[::13]:
            sent = [(key.encode(), value.encode()) for key, value in headers.items()]
            answer = http.post(path, content=raw, headers=sent)
            assert answer.status_code in statuses, (path, name, answer.text)
            assert answer.json()["error"]["message"]
        texts = {json.dumps(each.result().json()["prompts"][0]["sequences"][0]["tokens"]) for each in bystanders}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("data", "statuses"),
    [
        (b"POST /sample HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{", {408}),
        (b"POST /sample HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999999\r\n\r\n{", {413, 415}),
        (b"POST /sample HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", {400, 415}),
        (b"POST /sample HTTP/1.0\r\n\r\n", {415}),
        (b"GET /status?" + b"a" * 30_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", {400, 404, 414}),
        (b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 200_000 + b"\r\n\r\n", {200, 400, 431}),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", {400}),
        (b"OPTIONS /sample HTTP/1.1\r\nhost: x\r\n\r\n", {405}),
        (b"HEAD /sample HTTP/1.1\r\nhost: x\r\n\r\n", {405}),
        (b"GET /adapters/a%2f..%2f..%2fetc HTTP/1.1\r\nhost: x\r\n\r\n", {404}),
    ],
    ids=("slow", "large", "chunks", "http10", "query", "headers", "tls", "options", "head", "slashes"),
)
def test_bad_http_over_serve_is_refused(url: str, data: bytes, statuses: set[int]) -> None:
    with connect_to(url) as connection:
        with contextlib.suppress(ConnectionError):  # it may answer and close before all is sent
            connection.sendall(data)
        answer = connection.recv(65536)
    assert int(answer.split()[1]) in statuses, answer
    assert b"Traceback" not in answer


def test_dropped_connections_leave_nothing(service: RunningSampler, url: str) -> None:
    """In the head, in the body, and before the answer."""
    data = request(LONG)
    for end in (5, 40, len(data) - 30, len(data) - 1, len(data)):
        for _ in range(4):
            with connect_to(url) as connection:
                connection.sendall(data[:end])
    wait_until(lambda: is_idle(service), "their calls end", timeout_s=20)


def test_a_killed_engine_shows_in_readiness_and_loses_no_sample(service: RunningSampler, url: str) -> None:
    """Ready as long as one engine is; its samples are sampled by the other."""
    with ThreadPoolExecutor(1) as pool:
        body = {**SHORT, "sampling_params": {"max_tokens": 100, "seed": 1, "ignore_eos": True}}
        alone = httpx.post(f"{url}/sample", json=body, timeout=60).json()
        running = pool.submit(httpx.post, f"{url}/sample", json=body, timeout=120)
        wait_until(lambda: not is_idle(service), "the call runs")
        replica_process(NAME, "engine-dp0").kill()
        wait_until(lambda: readiness(url)[1].get("engine-dp0") != "ready", "its death is seen")
        assert readiness(url)[0] == 200
        assert [tokens(p) for p in running.result().json()["prompts"]] == [tokens(p) for p in alone["prompts"]]
    wait_until(lambda: readiness(url)[1].get("engine-dp0") == "ready", "the engine is back", timeout_s=120)


@pytest.mark.nightly
def test_without_an_engine_the_gateway_lives_and_is_not_ready(service: RunningSampler, url: str) -> None:
    """Also where no call runs that would notice the ends of the engines."""
    for name in ("engine-dp0", "engine-dp1"):
        replica_process(NAME, name).kill()
    wait_until(lambda: readiness(url)[0] == 503, "no engine is ready")
    assert httpx.get(f"{url}/healthz").status_code == 200
    wait_until(lambda: set(readiness(url)[1].values()) == {"ready"}, "the engines are back", timeout_s=120)


@pytest.mark.nightly
def test_a_call_survives_its_router(service: RunningSampler, url: str) -> None:
    """It is sent to the next one; the gateway lives and says that it is not ready meanwhile."""
    body = {**SHORT, "sampling_params": {"max_tokens": 100, "seed": 1, "ignore_eos": True}, "timeout_s": 200}
    alone = httpx.post(f"{url}/sample", json=body, timeout=60).json()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, f"{url}/sample", json=body, timeout=250)
        wait_until(lambda: not is_idle(service), "the call runs")
        replica_process(NAME, "router").kill()
        assert httpx.get(f"{url}/healthz", timeout=30).status_code == 200
        answer = running.result()
    assert answer.status_code == 200, answer.text
    assert [tokens(p) for p in answer.json()["prompts"]] == [tokens(p) for p in alone["prompts"]]
    wait_until(lambda: readiness(url)[0] == 200, "the router is back", timeout_s=120)


def tokens(prompt: dict[str, Any]) -> list[list[int]]:
    return [sequence["tokens"] for sequence in prompt["sequences"]]


def readiness(url: str) -> tuple[int, dict[str, str]]:
    """Status of `/readyz`, and the state of each engine."""
    answer = httpx.get(f"{url}/readyz", timeout=60)
    return answer.status_code, answer.json()["samplers"]["sampler"].get("engines", {})
