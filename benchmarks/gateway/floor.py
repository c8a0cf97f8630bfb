"""An application that does nothing, behind Serve's proxy: answers of the gateway's sizes, whole and as a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from twinkle_serve.placement import SIDE_CPUS

ANSWER_BYTES = 450
"""Size of the gateway's answer to a completion of 16 tokens."""
EVENT_BYTES = 230
"""Size of an event of its stream."""

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


@serve.deployment(
    name="floor", ray_actor_options={"num_cpus": SIDE_CPUS}, max_ongoing_requests=100_000, logging_config={"enable_access_log": False}
)
@serve.ingress(app)
class Floor:
    """The application, as the gateway is deployed."""


def build() -> Application:
    application: Application = Floor.bind()
    return application
