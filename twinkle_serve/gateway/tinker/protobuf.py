"""Writes Protocol Buffers: the few wire types that Tinker's answers have."""

from __future__ import annotations

from collections.abc import Iterable

VARINT, LENGTH_DELIMITED = 0, 2


def varint(value: int) -> bytes:
    """Encodes a number from 0 to 2**64 - 1, seven bits to a byte."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def number_field(field: int, value: int) -> bytes:
    """Encodes a field that holds a number; nothing for 0, the default."""
    return varint(field << 3 | VARINT) + varint(value) if value else b""


def bytes_field(field: int, value: bytes) -> bytes:
    """Encodes a field that holds bytes, or an encoded message."""
    return varint(field << 3 | LENGTH_DELIMITED) + varint(len(value)) + value


def numbers_field(field: int, values: Iterable[int]) -> bytes:
    """Encodes a repeated field of numbers, packed."""
    return bytes_field(field, b"".join(map(varint, values)))
