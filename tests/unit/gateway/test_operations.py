"""History, running calls and engines over HTTP, for operators."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.eventually import eventually
from tests.support.gateway_app import GatewayUnderTest, gateway_app
from twinkle_serve.gateway.keys import Caller

LONG = {"inputs": {"text": "12+34="}, "sampling_params": {"max_tokens": 500, "ignore_eos": True}, "num_samples": 2}
ADMIN = {"authorization": "Bearer a"}
SAMPLE = {"authorization": "Bearer s"}


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayUnderTest]:
    keys = {"a": Caller("admin", "admin"), "s": Caller("agent", "sample")}
    with gateway_app(engine_args={"token_latency_s": 0.05}, keys=keys) as made:
        yield made


async def test_running_call_is_listed_with_its_caller_and_can_be_cancelled(gateway: GatewayUnderTest) -> None:
    async with gateway.http() as http:
        sampling = asyncio.ensure_future(http.post("/sample", json=LONG, headers=SAMPLE))

        async def listed() -> list[dict[str, Any]]:
            calls: list[dict[str, Any]] = (await http.get("/calls", headers=ADMIN)).json()["calls"]
            return [call for call in calls if call["samples"]]

        async def runs() -> bool:
            return bool(await listed())

        await eventually(runs)
        (call,) = await listed()
        assert (call["caller"], call["prompts"], call["samples"], call["samples_done"]) == ("agent", 1, 2, 0)
        answer = await http.post("/calls/cancel", json={"id": call["id"]}, headers=ADMIN)
        assert answer.json() == {"id": call["id"], "cancelled": 1}
        assert (await sampling).status_code == 400
        assert await listed() == []


async def test_history_is_read_from_a_time_on(gateway: GatewayUnderTest) -> None:
    async with gateway.http(**SAMPLE) as http:
        report = (await http.get("/telemetry")).json()
        assert [event["kind"] for event in report["events"]] == ["engine ready"]
        later = (await http.get("/telemetry", params={"since": report["now"]})).json()
    assert later["events"] == [] and later["now"] >= report["now"]


async def test_failures_of_engines_show_no_paths(gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor tracebacks: a key for sampling reads them."""
    telemetry = gateway.client._client._router._telemetry
    text = 'no file /home/operator/secret/model.bin\nTraceback (most recent call last):\n  File "/home/x.py", line 1'
    (name,) = gateway.sampler.status()["engines"]
    telemetry.event("engine lost", text, name)
    monkeypatch.setitem(telemetry._failures, name, text)
    async with gateway.http(**SAMPLE) as http:
        event = (await http.get("/telemetry")).json()["events"][-1]["text"]
        (engine,) = (await http.get("/status")).json()["engines"].values()
    for shown in (event, engine["last_failure"]):
        assert shown == "no file …/model.bin …"


@pytest.mark.parametrize("since", ["yesterday", "nan", "1e999", ""])
async def test_time_that_is_none_is_refused(gateway: GatewayUnderTest, since: str) -> None:
    async with gateway.http(**SAMPLE) as http:
        answer = await http.get("/telemetry", params={"since": since})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "since"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/calls", None),
        ("POST", "/calls/cancel", {"id": "x"}),
        ("POST", "/engines/drain", {"engine": "engine"}),
        ("POST", "/engines/undrain", {"engine": "engine"}),
        ("POST", "/engines/restart", {"engine": "engine"}),
    ],
)
async def test_operators_alone_may_do_so(gateway: GatewayUnderTest, method: str, path: str, body: Any) -> None:
    async with gateway.http() as http:
        assert (await http.request(method, path, json=body, headers=SAMPLE)).status_code == 403
        answer = await http.request(method, path, json=body, headers=ADMIN)
    if "engines" in path:  # the only one is in this process
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "UnsupportedError"
    else:
        assert answer.status_code == 200
