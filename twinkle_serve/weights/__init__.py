"""Versions of adapters and of the model's own weights, each complete or absent."""

from twinkle_serve.weights.client import LocalStore, StoreClient
from twinkle_serve.weights.lock import StateLock
from twinkle_serve.weights.store import WeightStore

__all__ = ["LocalStore", "StateLock", "StoreClient", "WeightStore"]
