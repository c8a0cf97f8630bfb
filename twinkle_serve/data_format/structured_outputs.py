"""Constraints on the text of samples: a JSON schema, a regular expression, a list of choices or a grammar."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from twinkle_serve.data_format.plain import shown
from twinkle_serve.errors import SamplingParamsError, one_line, unknown_name
from twinkle_serve.validation import finite_number

Kind: TypeAlias = Literal["json", "regex", "choice", "grammar", "json_object", "structural_tag"]
KINDS: tuple[Kind, ...] = get_args(Kind)

NAME = "structured_outputs"
"""Name of the sampling parameter, in messages."""

MAX_SCHEMA_NESTING = 64
"""Levels of objects and arrays in a JSON schema, as in vLLM."""
MAX_TAG_NESTING = 80
"""Levels in a structural tag, whose schemas are nested in it, as in vLLM."""
MAX_SPEC_BYTES = 2**20
"""A specification travels with each prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputs:
    """What samples must match: exactly one of these. Immutable; a dict with the same key is accepted wherever this is.

    Checks types and form only. Whether a schema, an expression or a grammar is valid, and small enough to be compiled,
    is the engine's to say.

    Raises:
        SamplingParamsError: none or several are given, or a value has the wrong type or form.
    """

    json: str | Mapping[str, object] | type | None = None
    """A JSON schema: a dict, JSON text or a pydantic model. Kept as JSON text, with the order of its properties: that
    is the order in which they are sampled."""
    regex: str | None = None
    """A regular expression for the whole sample."""
    choice: list[str] | tuple[str, ...] | None = None
    """Texts, of which the sample is one. Kept as a tuple."""
    grammar: str | None = None
    """A grammar in EBNF, or in Lark's form."""
    json_object: bool | None = None
    """True: any JSON object."""
    structural_tag: str | Mapping[str, object] | None = None
    """Tags in free text and the schemas of their contents: a dict or JSON text. Kept as JSON text."""

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            got = f"got {' and '.join(given)}" if given else "got none"
            raise SamplingParamsError(f"{NAME} must have exactly one of {', '.join(KINDS)}, {got}.")
        kind = given[0]
        value = _VALIDATORS[kind](f"{NAME}.{kind}", getattr(self, kind))
        object.__setattr__(self, kind, value)

    @classmethod
    def of(cls, value: StructuredOutputs | Mapping[str, object] | None) -> StructuredOutputs | None:
        """Converts a dict to StructuredOutputs; returns StructuredOutputs and None unchanged.

        Raises:
            SamplingParamsError: another type, an unknown key, none or several keys, or an invalid value.
        """
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise SamplingParamsError(
                f"{NAME} must be StructuredOutputs or a dict with one of {', '.join(KINDS)}, got {shown(value)}."
            )
        for key in value:
            if key not in KINDS:
                raise SamplingParamsError(unknown_name(f"key of {NAME}", key, KINDS) + ".")
        return cls(**value)  # type: ignore[arg-type]  # the constructor validates them

    @property
    def kind(self) -> Kind:
        """The field that is given."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def spec(self) -> str | tuple[str, ...] | bool:
        """The value of that field: JSON text for `json` and `structural_tag`, a tuple for `choice`."""
        spec: str | tuple[str, ...] | bool = getattr(self, self.kind)
        return spec


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise SamplingParamsError(f"{name} must be text that is not empty, got {shown(value)}.")
    _check_size(name, [value])
    return value


def _regex(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:  # white space is an expression
        raise SamplingParamsError(f"{name} must be text that is not empty, got {shown(value)}.")
    _check_size(name, [value])
    return value


def _choice(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise SamplingParamsError(f"{name} must be a list of one string or more, got {shown(value)}.")
    for item in value:
        if not isinstance(item, str) or not item:
            raise SamplingParamsError(f"{name} must hold strings that are not empty, got {shown(item)}.")
    if len(set(value)) < len(value):
        twice = next(item for i, item in enumerate(value) if item in value[:i])
        raise SamplingParamsError(f"{name} has {twice!r} twice. Give it once.")
    _check_size(name, value)
    return tuple(value)


def _json_object(name: str, value: object) -> bool:
    if value is not True:
        raise SamplingParamsError(f"{name} must be true if given, got {shown(value)}. Remove {NAME} for free text.")
    return value


def _schema(name: str, value: object) -> str:
    if isinstance(value, bool):
        raise SamplingParamsError(f"{name} must be a JSON schema, got {value}. For any object set json_object to true.")
    if isinstance(value, type) and callable(make_schema := getattr(value, "model_json_schema", None)):
        try:
            value = make_schema()
        except Exception as error:  # of pydantic, or of the model's own methods
            raise SamplingParamsError(f"{name}: {value} has no JSON schema: {one_line(error)}.") from error
    return _json(name, value, MAX_SCHEMA_NESTING, (Mapping, bool), "a JSON schema: a dict, JSON text or a model class")


def _tag(name: str, value: object) -> str:
    return _json(name, value, MAX_TAG_NESTING, (Mapping,), "an object: a dict or JSON text")


def _json(name: str, value: object, max_nesting: int, types: tuple[type, ...], what: str) -> str:
    """Converts JSON text, or a value of these types, to canonical JSON text."""
    if isinstance(value, str):
        _check_size(name, [value])
        parsed = _parsed(name, value)
    else:
        parsed = value
    if not isinstance(parsed, types):
        raise SamplingParamsError(f"{name} must be {what}, got {shown(value)}.")
    try:
        plain = _plain(name, parsed, max_nesting)
    except _NestingError:
        raise SamplingParamsError(
            f"{name} is nested too deeply: objects and arrays may nest at most {max_nesting} levels."
        ) from None
    try:
        text = json_module.dumps(plain, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError as error:  # an integer of thousands of digits
        raise SamplingParamsError(f"{name} cannot be written as JSON: {error}.") from None
    _check_size(name, [text])
    return text


def _parsed(name: str, text: str) -> object:
    def distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
        keys = dict(pairs)
        if len(keys) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise SamplingParamsError(f"{name} has the key {twice!r} twice in one object. Give it once.")
        return keys

    try:
        return json_module.loads(text, object_pairs_hook=distinct)
    except RecursionError:
        raise SamplingParamsError(f"{name} is nested too deeply. Flatten it.") from None
    except ValueError as error:
        raise SamplingParamsError(f"{name} is not valid JSON: {error}.") from None


class _NestingError(Exception):
    """A value is nested too deeply."""


def _plain(path: str, value: object, levels: int) -> Any:
    """Copies a JSON value to Python's own types.

    Args:
        path: of the value, for messages.
        levels: how deep its objects and arrays may nest.

    Raises:
        SamplingParamsError, _NestingError
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        _check_text(path, value)
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return finite_number(path, value, error=SamplingParamsError)
    if not isinstance(value, (Mapping, list, tuple)):
        raise SamplingParamsError(f"{path} must be a JSON value, got {shown(value)}.")
    if levels == 0:
        raise _NestingError
    if not isinstance(value, Mapping):
        return [_plain(f"{path}[{i}]", item, levels - 1) for i, item in enumerate(value)]
    for key in value:
        if not isinstance(key, str):
            raise SamplingParamsError(f"{path} must have strings as keys, got {shown(key)}.")
        _check_text(path, key)
    return {str.__str__(key): _plain(f"{path}.{key}", item, levels - 1) for key, item in value.items()}


def _check_size(name: str, texts: Iterable[str]) -> None:
    for text in texts:
        _check_text(name, text)
    size = sum(len(text.encode()) for text in texts)
    if size > MAX_SPEC_BYTES:
        raise SamplingParamsError(f"{name} has {size} bytes, at most {MAX_SPEC_BYTES} are possible. Shorten it.")


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SamplingParamsError(f"{name} must be text, got half of a surrogate pair: {shown(text)}.") from None


_VALIDATORS: dict[Kind, Callable[[str, object], object]] = {
    "json": _schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _text,
    "json_object": _json_object,
    "structural_tag": _tag,
}
