"""An HTTP listener in the gateway's own process: Serve's proxy costs a request more than the gateway does."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import time

import uvicorn
from starlette.types import ASGIApp

from twinkle_serve.errors import ConfigError
from twinkle_serve.gateway.config import Address

BIND_S = 10.0
"""A replica that is being replaced may hold the address for so long."""
RETRY_S = 0.1
BACKLOG = 2048
"""Connections that wait to be accepted."""
KEEP_ALIVE_S = 90
"""Longer than clients and proxies keep idle connections, so that they end them first."""
DRAIN_S = 4
"""Time that running requests have to end when the replica is stopped; Serve's `graceful_shutdown_timeout_s` is more."""


def bind(address: Address, *, shared: bool) -> socket.socket:
    """Binds an address, and waits for a replica that is leaving it.

    Args:
        shared: other replicas of this node listen there too, and the kernel divides the connections among them.

    Raises:
        ConfigError: the address is in use, or is not one of this machine.
    """
    deadline = time.monotonic() + BIND_S
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    while True:
        try:
            return socket.create_server((address.host, address.port), family=family, backlog=BACKLOG, reuse_port=shared)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise ConfigError(
                    f"args: listen={address}: {os.strerror(error.errno or 0)}. Set it to a free port of this machine."
                ) from None
        time.sleep(RETRY_S)


class Listener:
    """Serves an ASGI application at an address, on the event loop of whoever makes it.

    Guarantees:
        After `close` no new connection is accepted, and running requests have had DRAIN_S to end.
    """

    def __init__(self, app: ASGIApp, bound: socket.socket) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # exceptions are logged where they are answered
        config = uvicorn.Config(
            app,
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

    async def close(self) -> None:
        """Stops accepting, and waits for running requests."""
        self._server.should_exit = True
        await asyncio.wait([self._task])
