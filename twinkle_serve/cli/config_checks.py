"""Checks of a config: whether it is valid, and fits a machine or cluster."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinkle_serve import hub
from twinkle_serve.cli import checks
from twinkle_serve.cli.checks import Check
from twinkle_serve.cli.ray_checks import cluster_nodes
from twinkle_serve.cli.tables import plural, size
from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.placement import Placement, place

if TYPE_CHECKING:
    from twinkle_serve.config import ServiceArgs

READER = "graphs.config_file:check_config_file"
"""Reads a config, as module:function: it knows Ray Serve's schema, and is above this package."""


def config_checks(path: Path | None, address: str | None) -> Iterator[Check]:
    """Checks a config, and its ports, devices and models."""
    if path is None:
        yield Check("config", "note", "none was named, and serve_config.yaml is not here")
        return
    module, _, function = READER.partition(":")
    try:
        config: Any = getattr(import_module(module), function)(path)
    except TwinkleServeError as error:
        yield Check("config", "failed", f"{path}: {error}", f"{type(error).__name__}; docs/config.md has every key.")
        return
    names = ", ".join(config.applications)
    yield Check("config", "ok", f"{path} is valid: {names}")
    for name, gateway in config.gateways.items():
        if gateway.listen is not None:
            yield checks.port(f"{name} port", gateway.listen.host, gateway.listen.port)
    for name, args in config.samplers.items():
        yield from _sampler(name, args, address)


def _sampler(name: str, args: ServiceArgs, address: str | None) -> Iterator[Check]:
    """Checks whether the engines of a sampler fit."""
    mesh = args.device_mesh.mesh()
    if args.device_group is not None:
        yield Check(f"{name} devices", "note", f"those of group {args.device_group!r}, which its run reserves")
        return
    try:
        placement = place(mesh, cluster_nodes(address))
    except TwinkleServeError as error:
        yield Check(f"{name} devices", "failed", str(error))
        return
    yield Check(
        f"{name} devices",
        "ok",
        f"{plural(mesh.dp_size, 'engine')} of {plural(mesh.devices_per_replica, f'{placement.device.upper()} device')}"
        + (" each fit" if mesh.dp_size > 1 else " fits"),
    )
    yield _model(name, args, placement, mesh.dp_size, mesh.devices_per_replica)


def _model(name: str, args: ServiceArgs, placement: Placement, engines: int, devices: int) -> Check:
    """Checks whether the weights of a model that is here fit into memory. Downloads nothing."""
    title = f"{name} model"
    try:
        directory = hub.resolve(args.model_id, revision=args.revision, download=False)
    except TwinkleServeError as error:
        if hub.is_path(args.model_id):
            return Check(title, "failed", str(error))
        return Check(title, "note", f"{args.model_id} is not here yet: it is downloaded at the start")
    weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    if placement.device == "cpu":
        free, wanted, where = checks.available_memory(), weights * engines, plural(engines, "engine")
    else:
        free = min((free for _, _, free in checks.gpu_memory()), default=0)
        wanted, where = weights // devices, "a GPU"
    text = f"{args.model_id}: {size(weights)} of weights; {size(wanted)} for {where}, {size(free)} are free"
    if not free or wanted <= free:
        return Check(title, "ok", text)
    return Check(title, "failed", text, "Raise device_mesh.tp_size, lower dp_size, or free memory.")
