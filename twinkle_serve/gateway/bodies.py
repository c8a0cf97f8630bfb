"""Reads request bodies: bounded, in time, and strict."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect, Request

from twinkle_serve.errors import unknown_name
from twinkle_serve.gateway.config import LimitArgs
from twinkle_serve.gateway.errors import (
    BodyTimeoutError,
    BodyTooLargeError,
    InvalidRequestError,
    MediaTypeError,
)

JSON_TYPES = ("application/json", "text/json")
MAX_DEPTH = 100
"""Nesting of a JSON body. Templates and grammars recurse along it."""

_HALF_PAIR = re.compile("[\ud800-\udfff]")
_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


class Body(BaseModel):
    """Base of request bodies: no unknown fields, no conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


BodyT = TypeVar("BodyT", bound=BaseModel)


async def read_body(request: Request, limits: LimitArgs, *, max_bytes: int | None = None) -> bytes:
    """Reads a body.

    Raises:
        BodyTooLargeError: it is larger than the limit; raised as soon as that is known.
        BodyTimeoutError: it did not arrive within `body_timeout_s`.
        InvalidRequestError: the client went away before its end.
    """
    most = limits.body_bytes if max_bytes is None else max_bytes
    announced = content_length(request)
    if announced is not None and announced > most:
        raise too_large(announced, most)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > most:
                    raise too_large(size, most)
                chunks.append(chunk)
    except TimeoutError:
        raise too_slow(size, limits.body_timeout_s) from None
    except ClientDisconnect:
        raise InvalidRequestError("the connection ended before the body did.") from None
    return b"".join(chunks)


async def body_pieces(
    request: Request, limits: LimitArgs, *, max_bytes: int | None = None
) -> AsyncGenerator[bytes, None]:
    """Yields a body as it arrives. Raises as `read_body`; the time limit is that of each piece.

    Args:
        max_bytes: None: no limit.
    """
    size = 0
    announced = content_length(request)
    if announced is not None and max_bytes is not None and announced > max_bytes:
        raise too_large(announced, max_bytes)
    stream = request.stream()
    try:
        while True:
            async with asyncio.timeout(limits.body_timeout_s):
                piece = await anext(stream, None)
            if piece is None:
                return
            size += len(piece)
            if max_bytes is not None and size > max_bytes:
                raise too_large(size, max_bytes)
            yield piece
    except TimeoutError:
        raise too_slow(size, limits.body_timeout_s) from None
    except ClientDisconnect:
        raise InvalidRequestError("the connection ended before the body did.") from None


def content_length(request: Request) -> int | None:
    """Returns the size that a request announces; None if it announces none, or no number."""
    announced = request.headers.get("content-length", "")
    return int(announced) if announced.isascii() and announced.isdecimal() and len(announced) < 20 else None


def too_large(size: int, most: int) -> BodyTooLargeError:
    """Returns the error for a body of `size` bytes, and perhaps more, beyond the limit of `most`."""
    return BodyTooLargeError(f"the body has {size} bytes or more; the limit is {most}. Send several requests.")


def too_slow(size: int, timeout_s: float) -> BodyTimeoutError:
    """Returns the error for a body of which `size` bytes arrived in time."""
    return BodyTimeoutError(f"the body did not arrive within {timeout_s:g} s, only {size} bytes of it. Send it faster.")


async def read_json(request: Request, limits: LimitArgs) -> Any:
    """Reads a body of JSON.

    Raises:
        MediaTypeError: it is of another content type.
        InvalidRequestError: it is not JSON, or not all of it would be read: duplicate keys, NaN, half characters.
        HTTPError: as of `read_body`.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media not in JSON_TYPES and not media.endswith("+json"):
        raise MediaTypeError(f"content-type must be application/json, got {media[:200] or 'none'}.")
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise MediaTypeError(f"content-encoding {coding[:200]!r} is not read. Send the body as it is.")
    return parse_json(await read_body(request, limits))


async def read_model(request: Request, limits: LimitArgs, model: type[BodyT]) -> BodyT:
    """Reads a body of JSON as a model.

    Raises:
        InvalidRequestError: a field is unknown or invalid.
        HTTPError: as of `read_json`.
    """
    return parse_model(await read_json(request, limits), model)


def parse_json(body: bytes) -> Any:
    """Parses JSON. Raises InvalidRequestError as `read_json`."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the body is not UTF-8: {error.reason} at byte {error.start}.") from None
    if not text.strip():
        raise InvalidRequestError("the body is empty. Send a JSON object.")
    try:
        value = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant, parse_float=_finite
        )
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not JSON: {error.msg} at character {error.pos}.") from None
    except RecursionError:
        raise InvalidRequestError(f"the body is nested too deeply; the limit is {MAX_DEPTH}.") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise InvalidRequestError(f"the body holds a number that is too long: {error}.") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise InvalidRequestError(f"the body is nested too deeply; the limit is {MAX_DEPTH}.")
    if _ESCAPED_HALF.search(body):
        _refuse_half_characters(value)
    return value


def parse_model(value: object, model: type[BodyT]) -> BodyT:
    """Validates parsed JSON. Raises InvalidRequestError with the path of the first invalid field."""
    if not isinstance(value, dict):
        raise InvalidRequestError(f"the body must be a JSON object, got {_name(value)}.")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _invalid(error, model) from None


def _invalid(error: ValidationError, model: type[BaseModel]) -> InvalidRequestError:
    """Describes the first error; of a union, the alternative that got furthest."""
    first = max(error.errors(include_url=False), key=lambda item: (item["type"] == "extra_forbidden", len(item["loc"])))
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        return InvalidRequestError(unknown_name("field", path, model.model_fields) + ".", path)
    if first["type"] == "extra_forbidden":
        return InvalidRequestError(f"unknown field {path!r}. Leave it out.", path)
    if first["type"] == "missing":
        return InvalidRequestError(f"{path} is missing.", path)
    return InvalidRequestError(f"{path or 'body'}: {first['msg']}, got {_shown(first['input'])}.", path or None)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _name(value: object) -> str:
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidRequestError(f"the body has the key {_shown(twice)} twice in one object.")
    return value


def _finite(text: str) -> float:
    """Raises InvalidRequestError for a number that Python reads as infinity."""
    number = float(text)
    if not math.isfinite(number):
        raise InvalidRequestError(f"the body holds the number {_shown(text)}, which is too large.")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequestError(f"the body holds {name}, which is not JSON.")


def _depth(value: object) -> int:
    """Returns how deeply lists and objects are nested."""
    level: Sequence[object] = [value]
    depth = 0
    while level:
        depth += 1
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, (dict, list))
        ]
    return depth


def _refuse_half_characters(value: object) -> None:
    """Raises InvalidRequestError for text with half of a surrogate pair, which no tokenizer reads."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str) and (half := _HALF_PAIR.search(item)):
            raise InvalidRequestError(
                f"the body contains {half.group()!r}, half of a surrogate pair, which is no character. Leave it out."
            )
        if isinstance(item, dict):
            stack += [*item, *item.values()]
        elif isinstance(item, list):
            stack += item
