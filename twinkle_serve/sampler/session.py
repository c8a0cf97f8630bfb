"""Sessions of a gateway's clients, for trainers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from twinkle_serve import timing
from twinkle_serve.data_format.prompts import InputFeature
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.router_client import RouterClient
from twinkle_serve.sessions import SessionInfo, features, trajectory
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
        return self._client.loop.call(self._call(RouterAPI.end_session, self.id))

    def end_async(self) -> Coroutine[Any, Any, bool]:
        """As `end`, for async code."""
        return self._client.loop.call_async(self._call(RouterAPI.end_session, self.id))

    async def _trajectory(self) -> dict[str, Any]:
        return trajectory(await self._call(RouterAPI.read_session, self.id))

    async def _features(self, nodes: Sequence[int] | None, shared_tokens_once: bool) -> list[InputFeature]:
        record = await self._call(RouterAPI.read_session, self.id)
        return features(record, nodes, shared_tokens_once=shared_tokens_once)

    def _call(
        self, method: Callable[Concatenate[RouterAPI, P], Awaitable[T]], *args: P.args, **options: P.kwargs
    ) -> Call[T]:
        return self._client.call(timing.CONTROL_TIMEOUT_S, method, *args, **options)


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
        return self._client.loop.call(self._client.call(timing.CONTROL_TIMEOUT_S, RouterAPI.list_sessions))
