"""Requests to a gateway, and its errors as exceptions."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from email.message import Message
from typing import Any

from twinkle_serve import errors
from twinkle_serve.errors import (
    DeadlineError,
    QueueFullError,
    RequestError,
    ServiceError,
    ServiceNotReadyError,
    TwinkleServeError,
)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
JSON_MEDIA = "application/json"
CONNECT_REMEDY = "Start it with `twinkle-serve up`, or name another with --url, or a Ray application with --service."


class _EarlyAnswer(http.client.HTTPConnection):
    """Reads the answer of a server that ends the connection before it has read the whole body: the reason is there."""

    def request(self, *args: Any, **options: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            super().request(*args, **options)


class _EarlySecureAnswer(_EarlyAnswer, http.client.HTTPSConnection):
    """As `_EarlyAnswer`, over TLS."""


class _HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_EarlyAnswer, req)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_EarlySecureAnswer, req, context=self._context)  # type: ignore[attr-defined]


class Gateway:
    """Sends requests to one gateway."""

    def __init__(self, url: str, key: str | None) -> None:
        """
        Args:
            url: without a slash at the end.
        """
        self.url = url
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}
        # A proxy of the environment cannot reach what listens on this machine alone.
        local = urllib.parse.urlsplit(url).hostname in LOOPBACK
        proxies = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(_HTTPHandler, _HTTPSHandler, *proxies)

    def json(self, method: str, path: str, body: object = None, *, timeout_s: float) -> Any:
        """Returns the answer's JSON. `body` is sent as JSON."""
        data = self.read(method, path, body, timeout_s=timeout_s)
        try:
            return json.loads(data)
        except ValueError:
            raise ServiceError(
                f"{self.url}{path} answers with something other than JSON, {data[:60]!r}. Is it a gateway?"
            ) from None

    def read(self, method: str, path: str, body: object = None, *, accept: str = JSON_MEDIA, timeout_s: float) -> bytes:
        """Returns the answer's body."""
        with self._open(self._request(method, path, body, accept), timeout_s) as answer:
            try:
                data: bytes = answer.read()
            except (OSError, http.client.HTTPException) as error:
                raise self._lost(error) from None
        return data

    def send(
        self, method: str, path: str, data: bytes | Iterator[bytes], content_type: str, *, size: int, timeout_s: float
    ) -> Any:
        """Sends `size` bytes, as a whole or in pieces. Returns the answer's JSON."""
        headers = {**self._headers, "content-type": content_type, "content-length": str(size)}
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=headers)
        with self._open(request, timeout_s) as answer:
            return json.load(answer)

    def lines(self, path: str, body: object, *, accept: str, timeout_s: float) -> Iterator[bytes]:
        """Yields the lines of an answer as they arrive, without line breaks. Closing the iterator ends the request.

        Args:
            timeout_s: the longest time between two lines.
        """
        with self._open(self._request("POST", path, body, accept), timeout_s) as answer:
            try:
                for line in answer:
                    yield line.rstrip(b"\r\n")
            except (OSError, http.client.HTTPException) as error:
                raise self._lost(error) from None

    def _request(self, method: str, path: str, body: object, accept: str) -> urllib.request.Request:
        headers = {**self._headers, "accept": accept}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["content-type"] = JSON_MEDIA
        return urllib.request.Request(self.url + path, data=data, method=method, headers=headers)

    def _open(self, request: urllib.request.Request, timeout_s: float) -> http.client.HTTPResponse:
        try:
            answer: http.client.HTTPResponse = self._opener.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise error_of(error.code, error.read(), error.headers, self.url) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise self._late(timeout_s) from None
            reason = getattr(error.reason, "strerror", None) or error.reason
            raise ServiceNotReadyError(f"no gateway answers at {self.url}: {reason}. {CONNECT_REMEDY}") from None
        except TimeoutError:
            raise self._late(timeout_s) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServiceNotReadyError(f"no gateway answers at {self.url}: {error!r}. {CONNECT_REMEDY}") from None
        return answer

    def _late(self, timeout_s: float) -> TwinkleServeError:
        return ServiceError(f"the gateway at {self.url} did not answer within {timeout_s:g} s. See its log.")

    def _lost(self, error: Exception) -> TwinkleServeError:
        return ServiceError(f"the gateway at {self.url} broke off its answer: {error!r}. Send the request again.")


def error_of(status: int, body: bytes, headers: Message, url: str) -> TwinkleServeError:
    """Returns the exception for the answer of an error, of the type that a call by handle raises where it names one."""
    kind, message = "", ""
    try:
        error = json.loads(body)["error"]
        kind, message = str(error.get("type", "")), str(error["message"])
    except (ValueError, TypeError, KeyError, AttributeError):
        text = " ".join(body.decode(errors="replace").split())
        message = f"{url} answered with status {status}: {text[:200] or 'nothing else'}. Is it a gateway?"
    return named_error(kind, message, status, float(headers.get("retry-after") or 1))


def named_error(kind: str, message: str, status: int = 500, retry_after_s: float = 1.0) -> TwinkleServeError:
    """Returns an exception by the name of its type, else by an HTTP status."""
    found = getattr(errors, kind, None)
    if status in (401, 403):
        return RequestError(f"{message} Give a key with --key or TWINKLE_SERVE_KEY.")
    if found is QueueFullError or status == 429:
        return QueueFullError(message, retry_after_s)
    if isinstance(found, type) and issubclass(found, TwinkleServeError):
        return found(message)
    if status == 503:
        return ServiceNotReadyError(message)
    if status == 504:
        return DeadlineError(message)
    return RequestError(message) if status < 500 else ServiceError(message)
