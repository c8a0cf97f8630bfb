"""Samplers: the interface that trainers call."""

from twinkle_serve.sampler.base import RunningSampler, Sampler
from twinkle_serve.sampler.pause import Pause
from twinkle_serve.sampler.rollouts import AsyncRollouts, Rollouts
from twinkle_serve.sampler.samplers import TorchSampler, VLLMSampler, vLLMSampler
from twinkle_serve.sampler.verification import TokenDifference, Verification

__all__ = [
    "AsyncRollouts",
    "Pause",
    "Rollouts",
    "RunningSampler",
    "Sampler",
    "TokenDifference",
    "TorchSampler",
    "VLLMSampler",
    "Verification",
    "vLLMSampler",
]
