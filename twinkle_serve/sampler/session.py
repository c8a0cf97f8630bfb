"""Sessions of a gateway's clients, for trainers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from twinkle_serve import timing
from twinkle_serve.data_format.prompts import InputFeature
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.router_client import RouterClient
from twinkle_serve.sessions import SessionInfo, SessionRecord, features, trajectory
from twinkle_serve.tasks import Call

P = ParamSpec("P")
T = TypeVar("T")


class Session:
    """The conversations that clients of a gateway have had under one id, token by token.

    Every call raises SessionNotFoundError before the first turn, SessionGoneError once the session has ended, and
    UnsupportedError if the sampler is not a service.
    """

    def __init__(self, client: RouterClient, session_id: str) -> None:
        """
        Args:
            client: reaches the router of the sampler.
            session_id: chosen by the client of the gateway.
        """
        self._client = client
        self.id = session_id

    def trajectory(self) -> dict[str, Any]:
        """Returns the tree of turns as plain values; see `twinkle_serve.sessions.trajectory`."""
        return self._client.loop.call(self._trajectory())

    def trajectory_async(self) -> Coroutine[Any, Any, dict[str, Any]]:
        """As `trajectory`, for async code."""
        return self._client.loop.call_async(self._trajectory())

    def features(self, nodes: Sequence[int] | None = None, *, shared_tokens_once: bool = False) -> list[InputFeature]:
        """Returns the conversations as training inputs, as `new_input_feature` has them: ids, labels, logprobs and
        weight versions of every turn. `user_data` has the session and the number of the last node.

        Args:
            nodes: the nodes that they end with, as numbered in the trajectory. None: all that no turn follows.
            shared_tokens_once: whether sampled tokens that several of them share are labels in the first one only.

        Raises:
            SessionError: no such node.
        """
        return self._client.loop.call(self._features(nodes, shared_tokens_once))

    def features_async(
        self, nodes: Sequence[int] | None = None, *, shared_tokens_once: bool = False
    ) -> Coroutine[Any, Any, list[InputFeature]]:
        """As `features`, for async code."""
        return self._client.loop.call_async(self._features(nodes, shared_tokens_once))

    def end(self) -> bool:
        """Ends the session and deletes its turns; its id cannot be used again. Returns whether there was one.

        Idempotent.
        """
        return self._client.loop.call(self._end())

    def end_async(self) -> Coroutine[Any, Any, bool]:
        """As `end`, for async code."""
        return self._client.loop.call_async(self._end())

    async def _trajectory(self) -> dict[str, Any]:
        return trajectory(await self._record())

    async def _features(self, nodes: Sequence[int] | None, shared_tokens_once: bool) -> list[InputFeature]:
        return features(await self._record(), nodes, shared_tokens_once=shared_tokens_once)

    async def _record(self) -> SessionRecord:
        (record,) = await _call(self._client, RouterAPI.read_sessions, [self.id])
        return record

    async def _end(self) -> bool:
        (ended,) = await _call(self._client, RouterAPI.end_sessions, [self.id])
        return ended


class SessionCalls:
    """Access to sessions. Mixed into RunningSampler."""

    _client: RouterClient

    def session(self, session_id: str) -> Session:
        """Returns a session of a gateway's client; it need not have begun yet."""
        return Session(self._client, session_id)

    def sessions(self) -> list[SessionInfo]:
        """Returns the sessions, the least recently used one first.

        Raises:
            UnsupportedError: the sampler is not a service.
        """
        return self._client.loop.call(_call(self._client, RouterAPI.list_sessions))

    def session_features(
        self, session_ids: Sequence[str], *, shared_tokens_once: bool = False
    ) -> list[list[InputFeature]]:
        """Returns the conversations of many sessions as training inputs, in one call.

        Args:
            shared_tokens_once: as of `Session.features`.

        Returns:
            For each session its features, as `Session.features` returns them.

        Raises:
            SessionNotFoundError: one of them has no turn.
            SessionGoneError: one of them has ended.
            UnsupportedError: the sampler is not a service.
        """
        return self._client.loop.call(self._features(list(session_ids), shared_tokens_once))

    def session_features_async(
        self, session_ids: Sequence[str], *, shared_tokens_once: bool = False
    ) -> Coroutine[Any, Any, list[list[InputFeature]]]:
        """As `session_features`, for async code."""
        return self._client.loop.call_async(self._features(list(session_ids), shared_tokens_once))

    def end_sessions(self, session_ids: Sequence[str]) -> list[bool]:
        """Ends many sessions in one call. Returns for each whether there was one; see `Session.end`."""
        return self._client.loop.call(_call(self._client, RouterAPI.end_sessions, list(session_ids)))

    def end_sessions_async(self, session_ids: Sequence[str]) -> Coroutine[Any, Any, list[bool]]:
        """As `end_sessions`, for async code."""
        return self._client.loop.call_async(_call(self._client, RouterAPI.end_sessions, list(session_ids)))

    async def _features(self, session_ids: Sequence[str], shared_tokens_once: bool) -> list[list[InputFeature]]:
        records = await _call(self._client, RouterAPI.read_sessions, session_ids)
        return [features(record, shared_tokens_once=shared_tokens_once) for record in records]


def _call(
    client: RouterClient,
    method: Callable[Concatenate[RouterAPI, P], Awaitable[T]],
    *args: P.args,
    **options: P.kwargs,
) -> Call[T]:
    return client.call(timing.CONTROL_TIMEOUT_S, method, *args, **options)
