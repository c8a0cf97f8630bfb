"""A session of a gateway from the side of a trainer that is outside of the Ray cluster."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Sequence
from typing import Any, Self, cast

from twinkle_serve.data_format.prompts import InputFeature
from twinkle_serve.errors import (
    RequestError,
    ServiceError,
    SessionError,
    SessionGoneError,
    SessionNotFoundError,
    TwinkleServeError,
)

DEFAULT_URL = "http://127.0.0.1:8000"
MAX_ID_LENGTH = 256

_ERRORS: dict[int, type[TwinkleServeError]] = {404: SessionNotFoundError, 410: SessionGoneError, 400: SessionError}


def gateway_session(
    url: str = DEFAULT_URL, session_id: str | None = None, *, key: str | None = None, timeout_s: float = 60.0
) -> GatewaySession:
    """Makes a session for an agent that speaks HTTP, and gives its trajectory afterwards. Sends nothing yet.

        with gateway_session() as session:
            run_agent(openai.OpenAI(base_url=session.base_url, api_key="-"))
            features = session.features()

    Args:
        url: of the gateway, as `scripts/serve` prints it, without `/v1`.
        session_id: 1 to 256 characters; None: a new one.
        key: key of the gateway, if it has any.
        timeout_s: deadline of each of the session's own requests, seconds.

    Raises:
        SessionError: an invalid id.
    """
    return GatewaySession(url, uuid.uuid4().hex if session_id is None else session_id, key, timeout_s)


class GatewaySession:
    """One session of a gateway. As a context it ends with its block.

    Every request raises SessionNotFoundError before the first turn, SessionGoneError once the session has ended, and
    ServiceError if the gateway does not answer.
    """

    def __init__(self, url: str, session_id: str, key: str | None, timeout_s: float) -> None:
        """See `gateway_session`."""
        if not isinstance(session_id, str) or not 1 <= len(session_id) <= MAX_ID_LENGTH:
            raise SessionError(f"session_id must be text of 1 to {MAX_ID_LENGTH} characters, got {session_id!r:.80}.")
        self.id = session_id
        self._root = f"{url.rstrip('/')}/session/{urllib.parse.quote(session_id, safe='')}"
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._timeout_s = timeout_s

    @property
    def base_url(self) -> str:
        """`base_url` for OpenAI's client."""
        return f"{self._root}/v1"

    @property
    def anthropic_base_url(self) -> str:
        """`base_url` for Anthropic's client, which adds `/v1` itself."""
        return self._root

    def trajectory(self) -> dict[str, Any]:
        """Returns the tree of turns as plain values; see `twinkle_serve.sessions.trajectory`."""
        return self._request("GET", "/trajectory")

    def features(self, nodes: Sequence[int] | None = None, *, shared_tokens_once: bool = False) -> list[InputFeature]:
        """Returns the conversations as training inputs; see `twinkle_serve.sessions.features`."""
        query = {"format": "features", "shared_tokens_once": str(shared_tokens_once).lower()}
        if nodes is not None:
            query["nodes"] = ",".join(map(str, nodes))
        answer = self._request("GET", f"/trajectory?{urllib.parse.urlencode(query)}")
        return cast(list[InputFeature], answer["features"])

    def end(self) -> bool:
        """Ends the session and deletes its turns. Returns whether there was one. Idempotent."""
        return bool(self._request("DELETE", "")["ended"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _request(self, method: str, path: str) -> dict[str, Any]:
        request = urllib.request.Request(self._root + path, method=method, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                return cast(dict[str, Any], json.load(answer))
        except urllib.error.HTTPError as error:
            raise _error(error) from None
        except (OSError, ValueError) as error:
            raise ServiceError(f"the gateway did not answer at {self._root}: {error}.") from error


def _error(error: urllib.error.HTTPError) -> TwinkleServeError:
    body = error.read().decode(errors="replace")
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, TypeError, KeyError):
        message = f"HTTP {error.code}: {body[:200]}"
    kind = _ERRORS.get(error.code, RequestError if error.code < 500 else ServiceError)
    return kind(message)
