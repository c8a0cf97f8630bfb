"""A thousand requests that are wrong, each in a way of its own."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

JSON = "application/json"
DEEP = 200
"""Nesting beyond any limit."""


class BadRequest(NamedTuple):
    """A request, and the statuses that may answer it."""

    name: str
    path: str
    body: bytes
    headers: dict[str, str]
    statuses: tuple[int, ...] = (400,)


BODIES: dict[str, dict[str, Any]] = {
    "/sample": {"inputs": [{"input_ids": [1, 2, 3]}], "sampling_params": {"max_tokens": 2}, "num_samples": 1},
    "/score": {"inputs": {"input_ids": [1, 2, 3]}, "top_logprobs": 1},
    "/encode": {"inputs": {"messages": [{"role": "user", "content": "1+1="}]}},
    "/count_tokens": {"inputs": {"text": "1+1="}},
    "/decode": {"token_ids": [[1, 2], [3]]},
    "/v1/completions": {"prompt": "1+1=", "max_tokens": 2, "n": 1},
}
"""A valid body for each path."""


def bad_requests() -> Iterator[BadRequest]:
    """Yields them, always the same."""
    for path, body in BODIES.items():
        text = json.dumps(body)
        yield from _cut(path, text)
        yield from _not_json(path, text)
        yield from _other_values(path, body)
        yield from _other_media(path, text)
        yield from _noise(path, text)


def _cut(path: str, text: str) -> Iterator[BadRequest]:
    for end in range(0, len(text), max(1, len(text) // 40)):
        yield _json(f"cut at {end}", path, text[:end].encode())


def _not_json(path: str, text: str) -> Iterator[BadRequest]:
    inside = text.rstrip("}")
    for name, raw in {
        "spaces": b"  \n ",
        "a list": b"[1, 2]",
        "a list of bodies": f"[{text}]".encode(),
        "text": b'"text"',
        "null": b"null",
        "a number": b"17",
        "two bodies": f"{text}{text}".encode(),
        "trailing comma": f"{inside},}}".encode(),
        "single quotes": text.replace('"', "'").encode(),
        "byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "UTF-16": text.encode("utf-16"),
        "invalid UTF-8": f"{inside}, ".encode() + b'"\xff\xfe": 1}',
        "encoded surrogate": f"{inside}, ".encode() + b'"\xed\xa0\x80": 1}',
        "lone surrogate in a key": f'{inside}, "\\ud800": 1}}'.encode(),
        "lone surrogate in a value": f'{inside}, "user": "a\\udfffb"}}'.encode(),
        "NaN": f'{inside}, "timeout_s": NaN}}'.encode(),
        "Infinity": f'{inside}, "timeout_s": -Infinity}}'.encode(),
        "too large a float": f'{inside}, "timeout_s": 1e999}}'.encode(),
        "5,000 digits": f'{inside}, "seed": {"9" * 5000}}}'.encode(),
        "a control character": f'{inside}, "user": "\x00"}}'.encode(),
        "nested lists": b"[" * 10**5,
        "nested objects": b'{"a":' * 10**5,
        "closed nested lists": f'{inside}, "user": {"[" * DEEP}{"]" * DEEP}}}'.encode(),
        "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
        "comment": f"/* {text} */".encode(),
    }.items():
        yield _json(name, path, raw)
    for key in json.loads(text):
        yield _json(f"{key} twice", path, f'{inside}, "{key}": 1}}'.encode())


def _other_values(path: str, body: dict[str, Any]) -> Iterator[BadRequest]:
    """A value of another type, or out of bounds, at each place in a valid body."""
    values: tuple[Any, ...] = (True, -1, 1.5, 2**63, 10**400, "x" * 1000, {"x": []}, [[[]]], [{}], [None], ["a", 1])
    for place in _places(body):
        for value in values:
            other = _replaced(body, place, value)
            if not _may_be_valid(place, value):
                yield _json(f"{'.'.join(map(str, place))} is {str(value)[:20]}", path, json.dumps(other).encode())
    yield _json("unknown field", path, json.dumps({**body, "unknown_field": 1}).encode())


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from _places(inner, (*at, key))


def _may_be_valid(place: tuple[Any, ...], value: Any) -> bool:
    """Whether a value is one that some field takes at this place."""
    last = place[-1]
    if isinstance(value, str):
        return last in ("content", "text", "prompt", "role")
    if last == "sampling_params":
        return bool(value == [{}])
    return last == "content" or (last == "max_tokens" and isinstance(value, int) and value >= 2**63)


def _replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[place[0]] = _replaced(value[place[0]], place[1:], new)
    return copied


def _other_media(path: str, text: str) -> Iterator[BadRequest]:
    for media in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        "json",
        "é",
    ):
        yield BadRequest(f"content-type {media!r}", path, text.encode(), {"content-type": media}, (415,))
    packed = {"content-type": JSON, "content-encoding": "gzip"}
    yield BadRequest("gzip", path, gzip.compress(text.encode()), packed, (415,))
    for header in ("nan", "-1", "0", "soon", "1e999", ""):
        yield BadRequest(f"x-timeout-s {header!r}", path, b"{", {"content-type": JSON, "x-timeout-s": header})


def _noise(path: str, text: str) -> Iterator[BadRequest]:
    """Bodies with bytes exchanged, as long as they are not JSON any more."""
    random_of = random.Random(path)
    count = 0
    while count < 60:
        raw = bytearray(text.encode())
        for _ in range(random_of.randint(1, 4)):
            raw[random_of.randrange(len(raw))] = random_of.randrange(256)
        try:
            json.loads(raw)
        except ValueError:
            count += 1
            yield _json(f"noise {count}", path, bytes(raw))


def _json(name: str, path: str, body: bytes) -> BadRequest:
    return BadRequest(name, path, body, {"content-type": JSON})
