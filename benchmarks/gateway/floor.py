"""An application that does nothing, behind Serve's proxy: answers of the gateway's sizes, whole and as a stream."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from benchmarks.gateway.workloads import COMPLETIONS, Done, Endpoint, body_of
from deployments.log_config import QUIET
from twinkle_serve.placement import SIDE_CPUS

ANSWER_BYTES = 450
"""Size of the gateway's answer to a completion of 16 tokens."""
EVENT_BYTES = 230
"""Size of an event of its stream."""
EVENTS, INTERVAL_S = 64, 0.01

app = FastAPI()


@app.post("/whole")
async def whole(request: Request) -> Response:
    """Reads the body, and answers with ANSWER_BYTES."""
    await request.json()
    return Response(b"x" * ANSWER_BYTES, media_type="application/json")


@app.post("/stream")
async def stream(request: Request) -> Response:
    """Answers with `events` events, one each `interval_s`."""
    body = await request.json()
    return StreamingResponse(_events(body["events"], body["interval_s"]), media_type="text/event-stream")


async def _events(count: int, interval_s: float) -> AsyncGenerator[bytes, None]:
    event = b"data: " + json.dumps("x" * (EVENT_BYTES - 10)).encode() + b"\n\n"
    for i in range(count):
        if i:
            await asyncio.sleep(interval_s)
        yield event


@serve.ingress(app)
class Floor:
    """The application as a deployment."""


def build() -> Application:
    """Builds the application, deployed as the gateway is."""
    deployment = serve.deployment(
        name="floor", ray_actor_options={"num_cpus": SIDE_CPUS}, max_ongoing_requests=100_000, logging_config=QUIET
    )(Floor)
    application: Application = deployment.bind()
    return application


async def _whole(endpoint: Endpoint, requests: int, at_a_time: int) -> Done:
    done = Done()
    body = body_of(COMPLETIONS, endpoint, random.Random(0), 16)
    rest = iter(range(requests))

    async def caller() -> None:
        for _ in rest:
            began = time.perf_counter()
            await endpoint.http.post("/whole", body)
            done.seconds_of_requests.append(time.perf_counter() - began)
            done.requests += 1

    await asyncio.gather(*(caller() for _ in range(at_a_time)))
    return done


async def alone(endpoint: Endpoint) -> Done:
    """100 requests, one after the other."""
    return await _whole(endpoint, 100, 1)


async def flight(endpoint: Endpoint) -> Done:
    """512 requests, 64 at a time."""
    return await _whole(endpoint, 512, 64)


async def streams(endpoint: Endpoint) -> Done:
    """32 streams of EVENTS events, one each INTERVAL_S; an event counts as a token."""
    done = Done()

    async def caller() -> None:
        began = time.perf_counter()
        times = [
            time.perf_counter() - began
            async for _ in endpoint.http.events("/stream", {"events": EVENTS, "interval_s": INTERVAL_S})
        ]
        done.seconds_to_first.append(times[0])
        done.seconds_of_requests.append(times[-1])
        done.requests += 1
        done.tokens += len(times)

    await asyncio.gather(*(caller() for _ in range(32)))
    return done


WORKLOADS: Mapping[str, Callable[[Endpoint], Awaitable[Done]]] = {"alone": alone, "flight": flight, "streams": streams}
