"""Which versions a router keeps, and how stale what it hands out is."""

from __future__ import annotations

import pytest

from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.errors import AdapterError
from twinkle_serve.routing.adapters import Adapters


def version(number: int, name: str = "policy") -> AdapterVersion:
    return AdapterVersion(name=name, version=number, id=100 + number, rank=8)


def test_newest_versions_can_be_named_and_older_ones_only_while_used() -> None:
    """Two are kept here; what a request holds goes when the request has ended, and not before."""
    adapters = Adapters({"policy": [version(1)]}, max_versions=2)
    adapters.acquire(version(1))
    assert adapters.publish(version(2)) == [] and adapters.publish(version(3)) == []
    assert adapters.resolve("policy") == version(3)
    assert [adapters.resolve(f"policy@{number}") for number in (1, 2, 3)] == [version(1), version(2), version(3)]
    assert adapters.staleness(version(1)) == 2 and adapters.staleness(version(3)) == 0
    assert adapters.release(version(1)) == [version(1)]
    with pytest.raises(AdapterError, match="unknown adapter 'policy@1'"):
        adapters.resolve("policy@1")
    assert adapters.publish(version(4)) == [version(2)]


def test_name_that_is_taken_away_leaves_what_is_used() -> None:
    """Once each."""
    adapters = Adapters({"policy": [version(1), version(2)], "other": [version(3, "other")]}, max_versions=2)
    adapters.acquire(version(2))
    adapters.acquire(version(2))
    assert adapters.remove("policy") == [version(1)]
    assert adapters.newest == {"other": version(3, "other")} and adapters.staleness(version(2)) == 0
    assert adapters.release(version(2)) == [] and adapters.release(version(2)) == [version(2)]
    assert list(adapters.held) == [version(3, "other")]
    with pytest.raises(AdapterError, match="unknown adapter 'policy'"):
        adapters.remove("policy")
