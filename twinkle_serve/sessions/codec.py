"""Turns as bytes: a JSON header, and the messages and arrays after it."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.sessions.records import Sample, Turn, dumps, loads

LENGTH = struct.Struct("<Q")

Section: TypeAlias = bytes | NDArray[Any]

TURN_FIELDS = (
    *("id", "raw", "parent", "branch", "checksums", "replaces", "assistant_start", "written", "prompt_length"),
    *("prompt_checksum", "text", "logprobs_mode", "note", "created"),
)
"""Fields of a turn that are in the header as they are."""
SAMPLE_FIELDS = ("weight_versions", "adapter", "seed", "stop_reason", "engine", "checksum", "text")
"""Fields of a sample that are in the header as they are."""


def pack_turn(turn: Turn) -> bytes:
    """Writes a turn as bytes."""
    sections: list[Section] = [turn.root, turn.messages, turn.keys, turn.tools, turn.prompt.astype("<i4", copy=False)]
    for sample in turn.samples:
        logprobs = np.empty(0, "<f4") if sample.logprobs is None else sample.logprobs.astype("<f4", copy=False)
        sections += [sample.tokens.astype("<i4", copy=False), logprobs, sample.reply, sample.shown, sample.keys]
    data = [section if isinstance(section, bytes) else section.tobytes() for section in sections]
    header = {name: getattr(turn, name) for name in TURN_FIELDS}
    header["samples"] = [
        {**{name: getattr(sample, name) for name in SAMPLE_FIELDS}, "scored": sample.logprobs is not None}
        for sample in turn.samples
    ]
    header["sizes"] = [len(part) for part in data]
    head = dumps(header)
    return b"".join([LENGTH.pack(len(head)), head, *data])


def unpack_turn(record: bytes) -> Turn:
    """Reads a turn. Its arrays are read-only, and do not keep the bytes in memory.

    Raises:
        ValueError: the bytes were not written by `pack_turn`.
    """
    try:
        (length,) = LENGTH.unpack_from(record)
        header = loads(record[LENGTH.size : LENGTH.size + length])
        parts = _parts(record, LENGTH.size + length, header["sizes"])
        root, messages, keys, tools = (bytes(next(parts)) for _ in range(4))
        prompt = _array(next(parts), "<i4")
        samples = tuple(_sample(entry, parts) for entry in header["samples"])
        fields = {name: header[name] for name in TURN_FIELDS} | {"checksums": tuple(header["checksums"])}
        return Turn(root=root, messages=messages, keys=keys, tools=tools, prompt=prompt, samples=samples, **fields)
    except (KeyError, TypeError, struct.error, StopIteration) as error:
        raise ValueError(f"not a turn: {type(error).__name__}: {error}") from error


def _sample(entry: Mapping[str, Any], parts: Iterator[memoryview]) -> Sample:
    tokens, logprobs = _array(next(parts), "<i4"), _array(next(parts), "<f4")
    reply, shown, keys = (bytes(next(parts)) for _ in range(3))
    fields = {name: entry[name] for name in SAMPLE_FIELDS}
    fields["weight_versions"] = tuple((str(label), int(start)) for label, start in entry["weight_versions"])
    scored = logprobs if entry["scored"] else None
    return Sample(tokens=tokens, logprobs=scored, reply=reply, shown=shown, keys=keys, **fields)


def _parts(record: bytes, start: int, sizes: list[int]) -> Iterator[memoryview]:
    view = memoryview(record)
    for size in sizes:
        if start + size > len(view):
            raise ValueError(f"not a turn: it ends after {len(view)} bytes, within a section of {size} at {start}.")
        yield view[start : start + size]
        start += size


def _array(part: memoryview, dtype: str) -> NDArray[Any]:
    array = np.frombuffer(part, dtype).copy()
    array.setflags(write=False)
    return array
