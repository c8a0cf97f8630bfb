"""How the router hands chunks to an engine's deployment, on a handle that answers as it is told."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError

from deployments.engine_client import ServeEngineClient
from twinkle_serve.data_format.groups import Group, Session
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.errors import EngineDeadError

SESSION = Session(incarnation="life", router="router")
GROUPS = [Group(id=i, prompt_ids=np.array([20, 21], np.int32), params=DecodingParams()) for i in range(3)]


class Handle:
    """A handle of a deployment whose replicas give these answers to a broadcast; None: they never answer."""

    def __init__(self, answers: list[Any] | None) -> None:
        self._answers = answers
        self.asked = asyncio.Event()
        self.aborted: list[Any] = []
        self.abort = self

    def options(self, **_: Any) -> Handle:
        return self

    def broadcast(self, method: str, *_: Any) -> Handle:
        assert method == "submit"
        return self

    async def results_async(self, *, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        self.asked.set()
        if self._answers is None:
            await asyncio.Event().wait()
        assert self._answers is not None
        return self._answers

    def remote(self, session: Session, attempts: list[Any]) -> None:
        assert session == SESSION
        self.aborted += attempts


async def submit(handle: Handle) -> None:
    await ServeEngineClient(handle).submit(SESSION, GROUPS)  # all of a handle that it needs


@pytest.mark.parametrize("answers", [[None], [EngineDeadError("it was restarted"), None]])
async def test_chunk_is_taken_by_the_replica_whose_session_it_is(answers: list[Any]) -> None:
    """Where one replica takes another's place, the other one refuses it."""
    handle = Handle(answers)
    await submit(handle)
    assert not handle.aborted


@pytest.mark.parametrize("answers", [[ActorDiedError()], [EngineDeadError("it was restarted"), ActorDiedError()]])
async def test_chunk_that_no_replica_takes_ends_the_use_of_the_engine(answers: list[Any]) -> None:
    """Dead, or another life of it."""
    with pytest.raises(EngineDeadError):
        await submit(Handle(answers))


async def test_chunk_that_is_given_up_on_its_way_is_aborted() -> None:
    """A broadcast cannot be called back: what it may have brought there must not be sampled for nobody."""
    handle = Handle(None)
    sending = asyncio.create_task(submit(handle))
    await handle.asked.wait()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert handle.aborted == [group.attempt for group in GROUPS]
