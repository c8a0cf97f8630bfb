"""Objects within a body that their `type` tells apart, such as blocks of a message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twinkle_serve.gateway.bodies import Body, BodyT, parse_model
from twinkle_serve.gateway.errors import InvalidRequestError


def parse_part(value: object, kinds: Mapping[str, type[Body]], where: str, default: str | None = None) -> Body:
    """Validates an object as the model of its type.

    Args:
        kinds: model of each supported type.
        where: path of the object in the body.
        default: type of an object that names none.

    Raises:
        InvalidRequestError: the type is not supported, or a field is invalid; the message names the path.
    """
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{where} must be an object, got {type(value).__name__}.", where)
    kind = value.get("type", default)
    if not isinstance(kind, str) or kind not in kinds:
        known = ", ".join(kinds)
        raise InvalidRequestError(f"{where}.type={kind!r:.80} is not supported. Supported: {known}.", f"{where}.type")
    return parse_at(value, kinds[kind], where)


def parse_at(value: object, model: type[BodyT], where: str) -> BodyT:
    """Validates an object within a body. Null asks for nothing. Raises InvalidRequestError with its path."""
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item is not None}
    try:
        return parse_model(value, model)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{where}: {error}", f"{where}.{error.param}" if error.param else where) from None


def parse_parts(
    values: str | Sequence[Any], kinds: Mapping[str, type[Body]], where: str, text: type[Body]
) -> list[Body]:
    """Validates content: a list of parts, or a text that stands for one part.

    Args:
        text: model of a part of text.
    """
    if isinstance(values, str):
        return [parse_at({"type": "text", "text": values}, text, where)]
    return [parse_part(value, kinds, f"{where}.{i}") for i, value in enumerate(values)]
