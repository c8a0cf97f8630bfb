"""The sampler's own calls over HTTP. Importing it loads only what reads answers."""

from twinkle_serve.gateway.native.tensors import read_samples

__all__ = ["read_samples"]
