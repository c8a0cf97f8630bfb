"""Engines of several services on a machine take different cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from twinkle_serve import cores
from twinkle_serve.cores import CoreClaims


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims that no running service has."""
    monkeypatch.setattr(cores, "PREFIX", f"\0twinkle-serve-test-{os.getpid()}-")


@pytest.fixture
def claims() -> Iterator[list[CoreClaims]]:
    """Claims of several processes."""
    made = [CoreClaims() for _ in range(4)]
    yield made
    for each in made:
        each.close()


def test_second_service_takes_free_cores(claims: list[CoreClaims]) -> None:
    allowed = [0, 1, 2, 3]
    assert claims[0].take([(0,)], allowed) == [(0,)]
    assert claims[1].take([(0,)], allowed) == [(1,)]
    assert claims[2].take([(0,), (1,)], allowed) == [(2,), (3,)]


def test_cores_are_shared_where_none_is_free(claims: list[CoreClaims], caplog: pytest.LogCaptureFixture) -> None:
    assert claims[0].take([(0,), (1,)], [0, 1]) == [(0,), (1,)]
    assert claims[1].take([(0,)], [0, 1]) == [(0,)]
    assert "shares cores [0]" in caplog.text


def test_part_of_the_cores_is_enough_if_it_is_half(claims: list[CoreClaims]) -> None:
    allowed = list(range(8))
    assert claims[0].take([(0, 1, 2)], allowed) == [(0, 1, 2)]
    assert claims[1].take([(0, 1, 2, 3, 4, 5, 6)], allowed) == [(3, 4, 5, 6, 7)]
    assert claims[2].take([(0, 1, 2, 3)], allowed) == [(0, 1, 2, 3)], "shared"


def test_devices_get_equal_shares_and_the_rest_stays_free(claims: list[CoreClaims]) -> None:
    allowed = list(range(8))
    assert claims[0].take([(0,)], allowed) == [(0,)]
    assert claims[1].take([(0, 1, 2), (4, 5, 6)], allowed) == [(1, 2, 3), (4, 5, 6)]
    assert claims[2].take([(0,)], allowed) == [(7,)]


def test_cores_are_free_again_when_their_service_ends(claims: list[CoreClaims]) -> None:
    script = (
        "import sys; from twinkle_serve import cores; cores.PREFIX = sys.argv[1].replace('@', chr(0));"
        "claims = cores.CoreClaims(); print(claims.take([(0,)], [0, 1]), flush=True); sys.stdin.read()"
    )
    name = cores.PREFIX.replace("\0", "@")
    with subprocess.Popen(
        [sys.executable, "-c", script, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "[(0,)]\n"
        assert claims[0].take([(0,)], [0, 1]) == [(1,)]
        process.kill()
        process.wait()
    assert claims[1].take([(0,)], [0, 1]) == [(0,)]


def test_close_gives_cores_back(claims: list[CoreClaims]) -> None:
    claims[0].take([(0,)], [0, 1])
    claims[0].close()
    claims[0].close()
    assert claims[1].take([(0,)], [0, 1]) == [(0,)]
