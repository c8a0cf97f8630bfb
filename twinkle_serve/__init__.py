"""Twinkle Serve: the sampler of an RL post-training run, as a Ray Serve application.

Names are loaded on first use: importing this package loads neither torch nor vllm nor ray.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twinkle_serve.data_format import (
        InputFeature,
        SampledSequence,
        SampleResponse,
        SamplingParams,
        StructuredOutputs,
        Trajectory,
    )
    from twinkle_serve.errors import TwinkleServeError
    from twinkle_serve.gateway.client import gateway_session
    from twinkle_serve.mesh import DeviceGroup, DeviceMesh
    from twinkle_serve.remote import initialize, remote_class, remote_function, shutdown
    from twinkle_serve.sampler import Sampler, TorchSampler, VLLMSampler, vLLMSampler
    from twinkle_serve.sampler.connect import connect
    from twinkle_serve.template import Template

_HOMES = {
    "DeviceGroup": "mesh",
    "DeviceMesh": "mesh",
    "InputFeature": "data_format",
    "SampleResponse": "data_format",
    "SampledSequence": "data_format",
    "Sampler": "sampler",
    "SamplingParams": "data_format",
    "StructuredOutputs": "data_format",
    "Template": "template",
    "TorchSampler": "sampler",
    "Trajectory": "data_format",
    "TwinkleServeError": "errors",
    "VLLMSampler": "sampler",
    "connect": "sampler.connect",
    "gateway_session": "gateway.client",
    "initialize": "remote",
    "remote_class": "remote",
    "remote_function": "remote",
    "shutdown": "remote",
    "vLLMSampler": "sampler",
}

__all__ = [
    "DeviceGroup",
    "DeviceMesh",
    "InputFeature",
    "SampleResponse",
    "SampledSequence",
    "Sampler",
    "SamplingParams",
    "StructuredOutputs",
    "Template",
    "TorchSampler",
    "Trajectory",
    "TwinkleServeError",
    "VLLMSampler",
    "connect",
    "gateway_session",
    "get_logger",
    "initialize",
    "remote_class",
    "remote_function",
    "shutdown",
    "vLLMSampler",
]


def get_logger(name: str = "twinkle_serve") -> logging.Logger:
    """Returns the logger of that name, as Twinkle's function does."""
    return logging.getLogger(name)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
