"""States of applications, as Serve reports them."""

from __future__ import annotations

from collections.abc import Mapping

from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
)


def application(
    status: str, deployed_at: float = 5.0, messages: Mapping[str, str] | None = None, **deployments: str
) -> ApplicationStatusOverview:
    """An application with deployments, engine_dp0 for engine-dp0, in these states.

    Args:
        messages: of deployments, by name.
    """
    return ApplicationStatusOverview(
        status=ApplicationStatus(status),
        message="",
        last_deployed_time_s=deployed_at,
        deployments={
            (name := key.replace("_", "-")): DeploymentStatusOverview(
                status=DeploymentStatus(state),
                status_trigger=DeploymentStatusTrigger.UNSPECIFIED,
                replica_states={},
                message=(messages or {}).get(name, ""),
            )
            for key, state in deployments.items()
        },
    )
