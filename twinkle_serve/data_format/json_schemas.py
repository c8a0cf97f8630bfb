"""JSON schemas of tools' arguments: the types, values and keys that they declare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array"}
TYPE_ALIASES = {"str": "string", "bool": "boolean", "int": "integer", "float": "number", "None": "null"}
"""Python's names of JSON's types, which some schemas use."""


def variants_of(schema: object, root: object) -> list[Mapping[str, Any]]:
    """A JSON schema and those that it refers to by anyOf, oneOf, allOf, or a `$ref` to a part of `root`."""
    found: list[Mapping[str, Any]] = []
    rest = [schema]
    while rest:
        variant = rest.pop(0)
        if not isinstance(variant, Mapping) or any(variant is known for known in found):
            continue
        found.append(variant)
        for key in ("anyOf", "oneOf", "allOf"):
            choices = variant.get(key)
            rest += choices if isinstance(choices, (list, tuple)) else ()
        rest.append(_referred(variant.get("$ref"), root))
    return found


def _referred(reference: object, root: object) -> object:
    """The part of a schema to which a reference such as #/$defs/Name points; None if there is none."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    for name in reference.split("/")[1:]:
        key = unquote(name).replace("~1", "/").replace("~0", "~")
        root = root.get(key) if isinstance(root, Mapping) else None
    return root


def values_of(variant: Mapping[str, Any]) -> list[object]:
    """Values that a schema lists by `enum` or `const`."""
    listed, constant = variant.get("enum"), variant.get("const")
    return [*(listed if isinstance(listed, (list, tuple)) else ()), *([] if constant is None else [constant])]


def declared_types(schema: object, root: object) -> set[str]:
    """Types that a JSON schema allows, or those of the values that it lists; empty if it does not say."""
    types: set[str] = set()
    for variant in variants_of(schema, root):
        kind = variant.get("type")
        names = [item for item in (kind if isinstance(kind, (list, tuple)) else [kind]) if isinstance(item, str)]
        types.update(TYPE_ALIASES.get(name, name) for name in names)
        if not names:
            types.update(TYPES.get(type(value), "object") for value in values_of(variant))
        if variant.get("nullable") is True:
            types.add("null")
    return types


def properties_of(schema: object, root: object) -> Mapping[str, object] | None:
    """Schemas of an object's keys by name; None if it declares none."""
    declared = [variant["properties"] for variant in variants_of(schema, root) if "properties" in variant]
    known = [properties for properties in declared if isinstance(properties, Mapping)]
    return {key: value for properties in reversed(known) for key, value in properties.items()} if known else None
