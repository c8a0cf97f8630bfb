"""Device groups, and users' classes that run in them.

    initialize("ray", groups=[DeviceGroup("actor", 4), DeviceGroup("sampler", 4)])

Importing this module does not load Ray; `initialize("ray")` does.
"""

from twinkle_serve.placement import Device, GroupDevices
from twinkle_serve.remote.decorators import remote_class, remote_function
from twinkle_serve.remote.lazy import LazyResult
from twinkle_serve.remote.reservation import (
    group_devices,
    initialize,
    is_initialized,
    known_groups,
    mode,
    shutdown,
)

__all__ = [
    "Device",
    "GroupDevices",
    "LazyResult",
    "group_devices",
    "initialize",
    "is_initialized",
    "known_groups",
    "mode",
    "remote_class",
    "remote_function",
    "shutdown",
]
