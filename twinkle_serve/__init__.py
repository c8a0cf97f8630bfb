"""Twinkle Serve: the sampler of an RL post-training run, as a Ray Serve application.

Names are loaded when they are first used: importing this loads neither torch nor vllm nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinkle_serve.client import ServiceSampler, connect
    from twinkle_serve.data_format import InputFeature, SampledSequence, SampleResponse, SamplingParams, Trajectory
    from twinkle_serve.errors import TwinkleServeError
    from twinkle_serve.mesh import DeviceGroup, DeviceMesh

_HOMES = {
    "DeviceGroup": "mesh",
    "DeviceMesh": "mesh",
    "InputFeature": "data_format",
    "SampleResponse": "data_format",
    "SampledSequence": "data_format",
    "SamplingParams": "data_format",
    "ServiceSampler": "client",
    "Trajectory": "data_format",
    "TwinkleServeError": "errors",
    "connect": "client",
}

__all__ = [
    "DeviceGroup",
    "DeviceMesh",
    "InputFeature",
    "SampleResponse",
    "SampledSequence",
    "SamplingParams",
    "ServiceSampler",
    "Trajectory",
    "TwinkleServeError",
    "connect",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
