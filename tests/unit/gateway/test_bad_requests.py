"""Requests that are wrong: each is told so, in the form of its protocol, and harms nobody."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.bad_requests import BODIES, bad_requests
from tests.support.eventually import eventually, wait_until
from tests.support.gateway_app import GatewayUnderTest, ask, gateway_app

LONG = {"inputs": [{"input_ids": [1, 2]}], "sampling_params": {"max_tokens": 900, "ignore_eos": True}, "timeout_s": 60}
LEAKS = ("Traceback", "/work", "/tmp", "/home", "site-packages", ".py", "pickle", "object at 0x")
HEAD = b"POST /sample HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayUnderTest]:
    with gateway_app(limits={"body_timeout_s": 0.5, "body_bytes": 2**20}) as made:
        yield made


@pytest.fixture(scope="module")
def port(gateway: GatewayUnderTest) -> Iterator[int]:
    with gateway.served() as url:
        yield int(url.rpartition(":")[2])


@pytest.fixture(scope="module")
def slow() -> Iterator[GatewayUnderTest]:
    """A gateway whose samples take as long as their callers wait."""
    with gateway_app(engine_args={"token_latency_s": 0.02}) as made:
        yield made


def check_form(path: str, answer: dict[str, Any]) -> str:
    """Checks an error's form, and that it gives nothing away. Returns its message."""
    error = answer["error"]
    if path.startswith("/v1/"):
        assert set(error) == {"message", "type", "param", "code"}
    else:
        assert {"type", "message"} <= set(error) <= {"type", "message", "param", "retry_after_s"}
    assert not [leak for leak in LEAKS if leak in error["message"]], error
    return str(error["message"])


async def test_a_thousand_bad_requests_are_refused_and_harm_nobody(gateway: GatewayUnderTest) -> None:
    """Each has its 4xx and a message; a request that runs meanwhile has the samples that it has alone."""
    body = {"inputs": [{"input_ids": [1, 2]}], "sampling_params": {"max_tokens": 200, "seed": 1}, "num_samples": 8}
    wrong, count = [], 0
    async with gateway.http() as http:
        alone = (await http.post("/sample", json=body)).json()
        bystanders = []
        for count, (name, path, raw, headers, statuses) in enumerate(bad_requests(), 1):
            if count % 100 == 0:
                bystanders.append(asyncio.create_task(http.post("/sample", json=body)))
            sent = [(key.encode(), value.encode()) for key, value in headers.items()]
            answer = await http.post(path, content=raw, headers=sent)
            if answer.status_code not in statuses:
                wrong.append((path, name, answer.status_code, answer.text[:200]))
                continue
            assert check_form(path, answer.json()), (path, name)
        assert [(await each).json() for each in bystanders] == [alone] * len(bystanders)
    assert not wrong, "\n".join(map(str, wrong))
    assert count >= 1000 and gateway.is_idle()


async def test_paths_and_methods_that_do_not_exist_are_told_in_their_protocol(gateway: GatewayUnderTest) -> None:
    async with gateway.http() as http:
        for path in (
            "/v1/nothing",
            "/nothing",
            "/sample/",
            "/v1//completions",
            "/adapters/a%2Fb%2F..%2Fc",
            "/%00",
            "/é",
        ):
            answer = await http.get(path)
            assert answer.status_code == 404, path
            check_form(path, answer.json())
        for path in BODIES:
            for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD", "MADE-UP"):
                answer = await http.request(method, path)
                assert (answer.status_code, answer.headers["allow"]) == (405, "POST"), (method, path)
        for path in ("/healthz", "/readyz"):
            assert (await http.head(path)).status_code == 200


async def test_queries_are_strict_and_may_be_long(gateway: GatewayUnderTest) -> None:
    async with gateway.http() as http:
        for query in (
            "sampler=x",
            "sampler=sampler&sampler=sampler",
            "x=1",
            "a" * 50_000,
            "%ff=%fe",
            "sampler=%ed%a0%80",
        ):
            answer = await http.get(f"/status?{query}")
            assert answer.status_code in (400, 404), query
            assert len(check_form("/status", answer.json())) < 1000
        assert (await http.get("/status?sampler=sampler")).status_code == 200
        assert (await http.post("/sample?x=1", json=BODIES["/sample"])).status_code == 400


@pytest.mark.parametrize(
    ("accept", "status", "media"),
    [
        ("*/*", 200, "application/json"),
        ("text/html, application/*;q=0.9", 200, "application/json"),
        ("application/octet-stream", 200, "application/octet-stream"),
        ("application/x-ndjson, application/json", 200, "application/x-ndjson"),
        ("text/html", 406, "application/json"),
        (",;", 406, "application/json"),
    ],
)
async def test_an_answer_has_a_form_that_the_client_reads(
    gateway: GatewayUnderTest, accept: str, status: int, media: str
) -> None:
    async with gateway.http(accept=accept) as http:
        answer = await http.post("/sample", json=BODIES["/sample"])
    assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (status, media)


def exchange(port: int, data: bytes, *, close: bool = False) -> bytes:
    """Sends bytes, and reads until the server closes or a whole answer is there."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(data)
        if close:
            return b""
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                received += chunk
                head, _, body = received.partition(b"\r\n\r\n")
                if b"content-length:" in head and len(body) >= int(head.split(b"content-length:")[1].split()[0]):
                    break
        return received


def whole(body: bytes, extra: bytes = b"") -> bytes:
    return HEAD + b"content-length: %d\r\n" % len(body) + extra + b"\r\n" + body


RAW = {
    "no body at all": (HEAD + b"\r\n", b"400"),
    "slow body": (HEAD + b"content-length: 100\r\n\r\n{", b"408"),
    "announced too large": (HEAD + b"content-length: 99999999\r\n\r\n{", b"413"),
    "negative length": (HEAD + b"content-length: -5\r\n\r\n{}", b"400"),
    "a length that is no number": (HEAD + b"content-length: many\r\n\r\n{}", b"400"),
    "bad chunk size": (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", b"400"),
    "chunked, invalid": (HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{]\r\n0\r\n\r\n", b"400"),
    "chunked, cut off": (HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n{", b"408"),
    "chunked, too large": (
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"10000\r\n%b\r\n" % (b" " * 65536) * 17 + b"0\r\n\r\n",
        b"413",
    ),
    "HTTP/1.0": (whole(b"{").replace(b"HTTP/1.1", b"HTTP/1.0"), b"400"),
    "HTTP/3.7": (whole(b"{").replace(b"HTTP/1.1", b"HTTP/3.7"), b"400"),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
    "a header without a colon": (HEAD + b"nonsense\r\n\r\n", b"400"),
    "a header with NUL": (HEAD + b"x: \x00\r\n\r\n", b"400"),
    "many headers": (whole(b"{", b"".join(b"x-%d: y\r\n" % i for i in range(500))), b"400"),
    "expectation": (whole(b"{", b"expect: 100-continue\r\nconnection: close\r\n"), b"400"),
}


@pytest.mark.parametrize("name", RAW)
def test_bad_http_is_refused(gateway: GatewayUnderTest, port: int, name: str) -> None:
    """By the gateway, or by the server in front of it."""
    data, status = RAW[name]
    lines = exchange(port, data).split(b"\r\n")
    statuses = [line.split()[1] for line in lines if line.startswith(b"HTTP/1") and line.split()[1] != b"100"]
    assert statuses == [status], lines
    assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    assert gateway.is_idle()


def test_connections_that_drop_leave_nothing(gateway: GatewayUnderTest, port: int) -> None:
    """In the head, in the body, and before the answer."""
    body = json.dumps(LONG).encode()
    request = whole(body)
    for end in (1, 20, len(HEAD), len(request) - len(body), len(request) - 1, len(request)):
        for _ in range(10):
            exchange(port, request[:end], close=True)
    wait_until(gateway.is_idle, "calls of dropped connections end")
    assert httpx.post(f"http://127.0.0.1:{port}/sample", json=BODIES["/sample"]).status_code == 200


ENDLESS = {"max_tokens": 900, "ignore_eos": True}
REQUESTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "json": ("/sample", LONG, "application/json"),
    "lines": ("/sample", LONG, "application/x-ndjson"),
    "tensors": ("/sample", LONG, "application/octet-stream"),
    "completion": ("/v1/completions", {"prompt": [1, 2], **ENDLESS}, "*/*"),
    "events": ("/v1/completions", {"prompt": [1, 2], "stream": True, **ENDLESS}, "*/*"),
}
"""Path, body and accepted form of requests that take long."""


@pytest.mark.parametrize("name", REQUESTS)
def test_a_client_that_goes_away_frees_its_engine(slow: GatewayUnderTest, name: str) -> None:
    """Within 100 ms, not when its samples are complete."""
    path, body, accept = REQUESTS[name]
    data = whole(json.dumps(body).encode(), f"accept: {accept}\r\n".encode()).replace(b"/sample", path.encode(), 1)
    times: list[float] = []
    with slow.served() as url:
        while len(times) < 10 and min(times, default=1.0) >= 0.1:  # a busy machine has pauses
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
                connection.sendall(data)
                wait_until(lambda: not slow.is_idle(), "the call arrives")
            began = time.monotonic()
            wait_until(slow.is_idle, "the engine is free")
            times.append(time.monotonic() - began)
    assert min(times) < 0.1, times


async def test_a_client_that_goes_away_ends_its_request_at_once(slow: GatewayUnderTest) -> None:
    """In the gateway itself, whatever server is in front of it."""
    gone = asyncio.Event()
    request = asyncio.create_task(ask(slow.app, "/sample", json.dumps(LONG).encode(), gone_after=gone))
    await eventually(lambda: not slow.is_idle())
    gone.set()
    assert await asyncio.wait_for(request, 5) == []


async def test_a_request_whose_server_ends_it_ends_its_call(slow: GatewayUnderTest) -> None:
    """As Serve does with requests of a replica that stops."""
    request = asyncio.create_task(ask(slow.app, "/sample", json.dumps(LONG).encode()))
    await eventually(lambda: not slow.is_idle())
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await eventually(slow.is_idle)
