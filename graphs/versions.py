"""Versions of deployments, so that unchanged ones keep their processes when the application is deployed again."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from ray.serve import Deployment
from ray.serve._private.config import DeploymentConfig

from twinkle_serve.config import ServiceArgs
from twinkle_serve.placement import Placement


def versioned(deployment: Deployment, *parts: object) -> Deployment:
    """Returns the deployment with its own version: a hash of `parts`, the same in every process.

    Serve gives all deployments of a config file's application one version, a hash of import path, runtime environment
    and args, and new ones to `serve.run` each time, so any change replaces all processes. It writes the version into
    the deployment's config at the very end; hence a config that keeps its own. Serve compares resources and runtime
    environment of the process by itself.
    """
    version = hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()
    config = deployment._deployment_config
    copy = deployment.options()
    copy._deployment_config = _Versioned.model_construct(
        config.model_fields_set | {"version"}, **{**dict(config), "version": version}
    )
    return copy


class _Versioned(DeploymentConfig):  # type: ignore[misc]  # untyped
    """A config whose version cannot be changed."""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "version":
            super().__setattr__(name, value)


def common_parts(args: ServiceArgs) -> dict[str, object]:
    """Parts that every deployment of a service depends on: its arguments except the numbers of engines."""
    parts = args.model_dump(exclude={"tracks"})
    for size in ("dp_size", "world_size"):
        del parts["device_mesh"][size]
    return parts


def engine_parts(placement: Placement, rank: int, track: str) -> dict[str, object]:
    """Further parts of an engine. Not the number of devices on its node: a remaining engine keeps its cores."""
    own = dataclasses.replace(placement, devices_per_node=1, engines=placement.engines[rank : rank + 1])
    return {"rank": rank, "track": track, "placement": dataclasses.asdict(own)}
