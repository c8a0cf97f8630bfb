"""Versions of deployments, so that what stays the same keeps its process when the application is deployed again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from ray.serve import Deployment
from ray.serve._private.config import DeploymentConfig

from twinkle_serve.config import ServiceArgs
from twinkle_serve.placement import Placement


def versioned(deployment: Deployment, *parts: Any) -> Deployment:
    """The deployment with a version of its own: the same for the same parts, in every process.

    Serve gives all deployments of an application that comes from a config one version, a hash of import path, runtime
    environment and args, and those of `serve.run` new ones each time: whatever changes, all processes are replaced. It
    writes the version into the deployment's config at the very end, so this is a config that keeps its own. Resources
    and runtime environment of the process Serve compares by itself.
    """
    version = hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()
    config = deployment._deployment_config
    made = deployment.options()
    made._deployment_config = _Versioned.model_construct(
        config.model_fields_set | {"version"}, **{**dict(config), "version": version}
    )
    return made


class _Versioned(DeploymentConfig):  # type: ignore[misc]  # untyped
    """Keeps the version that it was made with."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "version":
            super().__setattr__(name, value)


def common_parts(args: ServiceArgs) -> dict[str, Any]:
    """What every deployment of a service is made of: its arguments, but for the number of its engines."""
    parts = args.model_dump()
    for size in ("dp_size", "world_size"):
        del parts["device_mesh"][size]
    return parts


def engine_parts(placement: Placement, rank: int) -> dict[str, Any]:
    """What an engine is made of besides. Not how many share its node: one that stays keeps the cores that it has."""
    own = dataclasses.replace(placement, devices_per_node=1, engines=placement.engines[rank : rank + 1])
    return {"rank": rank, "placement": dataclasses.asdict(own)}
