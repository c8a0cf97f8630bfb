"""`twinkle.infra`: remote classes, and where they run."""

from __future__ import annotations

from collections.abc import Sequence

from twinkle_serve.mesh import DeviceGroup
from twinkle_serve.platform import Platform
from twinkle_serve.remote import initialize, remote_class, remote_function
from twinkle_serve.remote.session import session

__all__ = ["get_device_placement", "initialize", "is_master", "remote_class", "remote_function"]

is_master = Platform.is_master


def get_device_placement(device_group: Sequence[DeviceGroup] | None = None) -> str:
    """Describes device groups, for a log.

    Args:
        device_group: the groups. None: those of `initialize`.
    """
    groups = session.groups if device_group is None else device_group
    lines = [f"  {group.name}: {_devices(group)}" for group in groups]
    return "\n".join(["device groups:", *(lines or ["  none"])])


def _devices(group: DeviceGroup) -> str:
    ranks = f"ranks {', '.join(map(str, group.ranks))}" if isinstance(group.ranks, list) else "any ranks"
    workers = group.world_size // group.gpus_per_worker
    return (
        f"{group.world_size} devices ({group.device_type}), {ranks}, "
        f"{workers} workers of gpus_per_worker={group.gpus_per_worker}"
    )
