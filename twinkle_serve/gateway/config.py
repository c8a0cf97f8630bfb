"""Configuration of the gateway: `args` of its application, parsed once, strictly."""

from __future__ import annotations

import ipaddress
from typing import Any

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator

from twinkle_serve.config import Strict, TraceArgs, describe_errors
from twinkle_serve.errors import ConfigError, unknown_name

MIB = 2**20


class LimitArgs(Strict):
    """`limits`: a request beyond one of them is refused before anything is sampled."""

    body_bytes: int = Field(default=64 * MIB, ge=1)
    """Size of a request's body."""
    body_timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Time that a body may take to arrive, seconds."""
    prompts: int = Field(default=4096, ge=1)
    """Prompts of a request."""
    samples: int = Field(default=1024, ge=1)
    """Samples of each prompt, `n`."""
    upload_bytes: int = Field(default=4096 * MIB, ge=1)
    """Size of an uploaded adapter, and of one tensor of uploaded weights."""


class Address(Strict):
    """Where a server listens, written `host:port`; an IPv6 host in brackets."""

    host: str
    port: int = Field(ge=1, le=65535)

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, data: Any) -> Any:
        if not isinstance(data, str):
            return data
        host, colon, port = data.rpartition(":")
        if not colon or not host or not port.isascii() or not port.isdecimal():
            raise ValueError(f"{data!r} is not host:port, as in 127.0.0.1:8000")
        return {"host": host.removeprefix("[").removesuffix("]"), "port": int(port)}

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class GatewayArgs(Strict):
    """Configuration of the gateway.

    Raises:
        ConfigError: an unknown key or an invalid value; the message lists the valid ones.
    """

    samplers: dict[str, str] = Field(default_factory=lambda: {"sampler": "sampler"})
    """Applications of samplers by the names under which clients see them. Several names may mean one application."""
    base_models: dict[str, str] = Field(default_factory=dict)
    """Samplers by the names of models, `org/name`, by which Tinker's clients ask for them. A sampler also answers to
    its own name, and to that of its model on a hub."""
    tinker_poller: bool = False
    """Have each Tinker client wait for all its samples by one request, not by one request for each."""
    num_replicas: int = Field(default=1, ge=1)
    """Number of processes that answer HTTP."""
    listen: Address | None = None
    """Where each process listens itself, as `host:port`; those of one node share the port. Serve's proxy, which answers
    too unless the config has `proxy_location: Disabled`, costs each request ten times as much. None: only there."""
    keys_file: str | None = None
    """File with one `name:scope:key` per line; scope is sample or admin. None: keys come from the environment variable
    TWINKLE_SERVE_KEYS, in the same form, separated by commas; without either no key is needed."""
    request_timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Deadline of a request that names none, seconds. None: the sampler's request_timeout_s."""
    limits: LimitArgs = LimitArgs()
    traces: TraceArgs | None = None
    """Where the spans of requests are sent. None: nowhere; a `traceparent` of a client is handed on all the same."""

    @model_validator(mode="wrap")
    @classmethod
    def _wrap_validation_error(cls, data: Any, parse: ModelWrapValidatorHandler[GatewayArgs]) -> GatewayArgs:
        # ConfigError is not a ValueError, so pydantic does not wrap it, not even in Ray Serve's own parsing.
        try:
            args = parse(data)
        except ValidationError as error:
            raise ConfigError(f"args: {describe_errors(error, cls)}") from None
        if not args.samplers:
            raise ConfigError("args: samplers is empty. Name at least one: {sampler: sampler}.")
        if names := [name for name in args.samplers if not name or "@" in name]:
            raise ConfigError(f"args: samplers: invalid name {names[0]!r}. A name is not empty and has no @.")
        if unknown := [name for name in args.base_models.values() if name not in args.samplers]:
            raise ConfigError(f"args: base_models: {unknown_name('sampler', unknown[0], args.samplers)}.")
        return args


def is_loopback(host: str) -> bool:
    """Whether a server that listens at a host can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_key_beyond_loopback(host: str, has_keys: bool, key: str = "http_options.host") -> None:
    """Refuses to listen where others can call without a key.

    Args:
        key: of the config, that gives the host.

    Raises:
        ConfigError: `host` is not loopback, and there is no key.
    """
    if has_keys or is_loopback(host):
        return
    raise ConfigError(
        f"{key}={host} listens beyond this machine, and the gateway has no key. Set TWINKLE_SERVE_KEYS or "
        "keys_file, or listen on 127.0.0.1."
    )
