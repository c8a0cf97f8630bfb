"""Versions of weights: kept whole, under names that mean one of them."""

from twinkle_serve.weights.link import LocalStore, StoreLink
from twinkle_serve.weights.store import WeightStore

__all__ = ["LocalStore", "StoreLink", "WeightStore"]
