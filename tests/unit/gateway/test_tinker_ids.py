"""Ids of Tinker's sessions and futures describe themselves."""

from __future__ import annotations

import re

import pytest

from twinkle_serve.gateway.errors import NotFoundError
from twinkle_serve.gateway.tinker.ids import CLONE_STEP, RequestId, SamplingSession, new_session


def test_an_id_says_what_it_means_to_any_gateway() -> None:
    """Whatever characters its names have, it can stand in a path as it is."""
    session = SamplingSession("a/sämpler", "my lora@12", new_session(), 3)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", session.id)
    assert SamplingSession.of(session.id) == session
    assert session.model_path == "tinker://a/sämpler/my lora@12"


def test_a_request_has_one_id_and_the_group_of_its_client() -> None:
    """Copies of a client count in steps of CLONE_STEP; numbers have up to 19 digits."""
    session = SamplingSession("sampler", "", new_session(), 0)
    for seq_id, clone in ((0, 0), (CLONE_STEP - 1, 0), (7 * CLONE_STEP + 1, 7), (10**18, 10**9)):
        request = RequestId.of(session.request_id(seq_id))
        assert (request.sampling_session, request.seq_id) == (session, seq_id)
        assert request.group == session.group(clone)


@pytest.mark.parametrize(
    "made_up", ["", "x", "WyJh", "é", "bnVsbA", "WzEsMl0", "W1tdLHt9LDEsMl0", "WyJhIiwiYiIsMywiYyJd=", "[" * 5000]
)
def test_an_id_that_nobody_made_is_unknown(made_up: str) -> None:
    """Not an error of the gateway's."""
    with pytest.raises(NotFoundError, match="unknown sampling session"):
        SamplingSession.of(made_up)
    with pytest.raises(NotFoundError):
        RequestId.of(f"{made_up}.1")
    session = SamplingSession("sampler", "", new_session(), 0)
    with pytest.raises(NotFoundError, match="unknown request"):
        RequestId.of(f"{session.id}.{made_up}")
