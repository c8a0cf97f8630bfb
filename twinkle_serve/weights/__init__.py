"""Versions of weights: kept whole, under names that mean one of them."""

from twinkle_serve.weights.client import LocalStore, StoreClient
from twinkle_serve.weights.store import WeightStore

__all__ = ["LocalStore", "StoreClient", "WeightStore"]
