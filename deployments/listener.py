"""An HTTP listener in the gateway's own process: Serve's proxy costs a request more than the gateway does."""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import socket
import time

import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from twinkle_serve.errors import ConfigError
from twinkle_serve.gateway.config import Address

OWNER_PATH = "/-/listener"
"""Answered with the listener's owner, without a key: replicas of one gateway share an address, others must not."""
PROBE_S = 2.0
"""Time that a listener has to name its owner."""
BIND_S = 10.0
"""Time that another owner has to leave the address, as a gateway that is being deleted does."""
RETRY_S = 0.1
BACKLOG = 2048
"""Connections that wait to be accepted."""
KEEP_ALIVE_S = 90
"""Longer than clients and proxies keep idle connections, so that they end them first."""
DRAIN_S = 4
"""Time that running requests have to end when the replica is stopped; Serve's `graceful_shutdown_timeout_s` is more."""

UNKNOWN = ""
"""Owner of a listener that does not name one."""


def bind(address: Address, owner: str) -> socket.socket:
    """Binds an address beside other listeners of its owner; the kernel divides the connections among them.

    Raises:
        ConfigError: someone else listens there, or it is not an address of this machine.
    """
    deadline = time.monotonic() + BIND_S
    while (found := owner_at(address)) not in (None, owner):
        if time.monotonic() > deadline:
            who = "another program" if found == UNKNOWN else "another gateway"
            raise ConfigError(f"args: listen={address}: {who} listens there. Set it to a free port.")
        time.sleep(RETRY_S)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=BACKLOG, reuse_port=True)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ConfigError(f"args: listen={address}: {reason}. Set it to a free port of this machine.") from None


def owner_at(address: Address) -> str | None:
    """Returns the owner of the listener at an address; None if nobody listens there."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    connection = http.client.HTTPConnection(host, address.port, timeout=PROBE_S)
    try:
        connection.request("GET", OWNER_PATH)
        answer = connection.getresponse()
        return answer.read(100).decode("latin-1") if answer.status == 200 else UNKNOWN
    except (TimeoutError, http.client.HTTPException, ConnectionResetError):
        return UNKNOWN
    except OSError:
        return None
    finally:
        connection.close()


class Listener:
    """Serves an ASGI application at an address, on the running event loop.

    Guarantees:
        After `close` no new connection is accepted, and running requests have had DRAIN_S to end.
    """

    def __init__(self, app: ASGIApp, bound: socket.socket, owner: str) -> None:
        self._app, self._owner = app, PlainTextResponse(owner)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # exceptions are logged where they are answered
        config = uvicorn.Config(
            self._answer,
            interface="asgi3",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=DRAIN_S,
        )
        self._server = uvicorn.Server(config)
        # `serve` would take the process's signals.
        self._task = asyncio.get_running_loop().create_task(self._server._serve([bound]))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == OWNER_PATH:
            await self._owner(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def close(self) -> None:
        """Stops accepting, and waits for running requests."""
        self._server.should_exit = True
        await asyncio.wait([self._task])
