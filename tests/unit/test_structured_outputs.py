"""StructuredOutputs: exactly one kind, of the right type and form, in one canonical form."""

from __future__ import annotations

import copy
import enum
import json
import pickle
import subprocess
import sys
from typing import Any

import pydantic
import pytest

from twinkle_serve.data_format.structured_outputs import MAX_SPEC_BYTES, StructuredOutputs
from twinkle_serve.errors import SamplingParamsError

SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"enum": ["é", 1.5, None, True]}}}
TEXT = '{"type":"object","properties":{"z":{"type":"integer"},"a":{"enum":["é",1.5,null,true]}}}'
TAG = {"structures": [{"begin": "<a>", "schema": SCHEMA, "end": "</a>"}], "triggers": ["<a>"]}


class Answer(pydantic.BaseModel):
    reason: str
    value: int


class Colour(enum.StrEnum):
    RED = "red"


class Broken(pydantic.BaseModel):
    value: Any

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise TypeError("no schema\nfor this")


def nested(levels: int) -> Any:
    """A schema of so many objects, each in the next."""
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"not": schema}
    return schema


def tag_of(schema: Any) -> Any:
    return {"format": schema}


@pytest.mark.parametrize(
    ("given", "kind", "spec"),
    [
        ({"json": SCHEMA}, "json", TEXT),
        ({"json": json.dumps(SCHEMA, indent=4)}, "json", TEXT),
        ({"json": Answer}, "json", json.dumps(Answer.model_json_schema(), separators=(",", ":"))),
        ({"json": "true"}, "json", "true"),
        ({"json": {"enum": (Colour.RED, 3)}}, "json", '{"enum":["red",3]}'),
        ({"json": nested(64)}, "json", json.dumps(nested(64), separators=(",", ":"))),
        ({"regex": r"\d+|é"}, "regex", r"\d+|é"),
        ({"regex": " "}, "regex", " "),
        ({"choice": ["yes", "no"]}, "choice", ("yes", "no")),
        ({"choice": ("yes",)}, "choice", ("yes",)),
        ({"grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ({"json_object": True}, "json_object", True),
        ({"structural_tag": TAG}, "structural_tag", json.dumps(TAG, ensure_ascii=False, separators=(",", ":"))),
        (
            {"structural_tag": tag_of(nested(79))},
            "structural_tag",
            json.dumps(tag_of(nested(79)), separators=(",", ":")),
        ),
    ],
)
def test_one_kind_is_kept_in_its_canonical_form(given: dict[str, Any], kind: str, spec: object) -> None:
    """Equal constraints are equal, hash alike and survive pickling; the caller's own objects are not kept."""
    outputs = StructuredOutputs.of(given)
    assert outputs is not None
    assert (outputs.kind, outputs.spec) == (kind, spec)
    assert outputs == StructuredOutputs(**copy.deepcopy(given)) and len({outputs, StructuredOutputs(**given)}) == 1
    assert pickle.loads(pickle.dumps(outputs)) == outputs


def test_order_of_properties_is_kept() -> None:
    """It is the order in which they are sampled."""
    schemas: list[dict[str, object]] = [{"properties": {key: {} for key in keys}} for keys in ("ab", "ba")]
    assert StructuredOutputs(json=schemas[0]) != StructuredOutputs(json=schemas[1])


def test_none_is_free_text() -> None:
    assert StructuredOutputs.of(None) is None
    outputs = StructuredOutputs(regex="a")
    assert StructuredOutputs.of(outputs) is outputs
    assert StructuredOutputs.of({"regex": "a", "json": None}) == outputs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"structured_outputs must have exactly one of json, regex, .*, got none\."),
        ({"json": None}, "got none"),
        ({"json": SCHEMA, "regex": "a"}, r"got json and regex\."),
        ({"regexp": "a"}, r"unknown key of structured_outputs 'regexp', did you mean 'regex'\?"),
        ({1: "a"}, "unknown key of structured_outputs 1"),
        ("a+", r"must be StructuredOutputs or a dict with one of json, .*, got 'a\+' \(str\)"),
        ([SCHEMA], "must be StructuredOutputs or a dict"),
        ({"json": "{"}, r"structured_outputs\.json is not valid JSON: "),
        ({"json": ""}, "is not valid JSON"),
        (
            {"json": "[]"},
            r"structured_outputs\.json must be a JSON schema: a dict, JSON text or a model class, got '\[\]'",
        ),
        ({"json": 3}, "must be a JSON schema"),
        ({"json": True}, "For any object set json_object to true"),
        ({"json": Answer(reason="", value=1)}, "must be a JSON schema: a dict, JSON text or a model class"),
        ({"json": Broken}, r"has no JSON schema: TypeError: no schema for this\."),
        ({"json": int}, "must be a JSON schema"),
        ({"json": '{"a":1,"a":2}'}, r"structured_outputs\.json has the key 'a' twice"),
        ({"json": '{"maximum":NaN}'}, r"structured_outputs\.json\.maximum must be finite, got nan\."),
        ({"json": '{"maximum":1e999}'}, "must be finite, got inf"),
        ({"json": {"maximum": float("inf")}}, "must be finite"),
        ({"json": {"enum": [10**5000]}}, "cannot be written as JSON"),
        (
            {"json": {"properties": {1: {}}}},
            r"structured_outputs\.json\.properties must have strings as keys, got 1 \(int\)",
        ),
        ({"json": {"enum": [{1}]}}, r"structured_outputs\.json\.enum\[0\] must be a JSON value, got \{1\} \(set\)"),
        ({"json": {"enum": [b"a"]}}, r"enum\[0\] must be a JSON value"),
        ({"json": {"const": "\ud800"}}, r"structured_outputs\.json\.const must be text, got half of a surrogate pair"),
        ({"json": {"\ud800": 1}}, "half of a surrogate pair"),
        ({"json": '{"const":"\\ud800"}'}, "half of a surrogate pair"),
        ({"json": nested(65)}, r"structured_outputs\.json is nested too deeply: .* at most 64 levels"),
        ({"json": json.dumps(nested(65))}, "nested too deeply"),
        ({"json": "[" * 100_000}, "nested too deeply"),
        ({"json": {"const": "x" * MAX_SPEC_BYTES}}, rf"has {MAX_SPEC_BYTES + 12} bytes, at most {MAX_SPEC_BYTES}"),
        ({"regex": ""}, r"structured_outputs\.regex must be text that is not empty, got '' \(str\)"),
        ({"regex": 3}, r"must be text that is not empty, got 3 \(int\)"),
        ({"regex": b"a"}, "must be text"),
        ({"regex": "\udfff"}, r"structured_outputs\.regex must be text, got half of a surrogate pair"),
        ({"regex": "é" * MAX_SPEC_BYTES}, "bytes, at most"),
        ({"choice": []}, r"structured_outputs\.choice must be a list of one string or more, got \[\] \(list\)"),
        ({"choice": "yes"}, r"must be a list of one string or more, got 'yes' \(str\)"),
        ({"choice": {"yes", "no"}}, "must be a list"),
        ({"choice": ["yes", ""]}, r"structured_outputs\.choice must hold strings that are not empty, got '' \(str\)"),
        ({"choice": ["yes", 1]}, r"must hold strings that are not empty, got 1 \(int\)"),
        ({"choice": ["yes", "no", "yes"]}, r"structured_outputs\.choice has 'yes' twice\. Give it once\."),
        ({"choice": ["yes", "\ud800"]}, "half of a surrogate pair"),
        ({"grammar": " \n"}, r"structured_outputs\.grammar must be text that is not empty"),
        ({"grammar": ["root"]}, "must be text that is not empty"),
        ({"json_object": False}, r"structured_outputs\.json_object must be true if given, got False \(bool\)\. Remove"),
        ({"json_object": 1}, "must be true if given"),
        (
            {"structural_tag": "[]"},
            r"structured_outputs\.structural_tag must be an object: a dict or JSON text, got '\[\]'",
        ),
        ({"structural_tag": Answer}, "must be an object"),
        (
            {"structural_tag": tag_of(nested(80))},
            r"structured_outputs\.structural_tag is nested too deeply: .* 80 levels",
        ),
    ],
)
def test_bad_input_is_refused_at_once_with_field_and_remedy(given: Any, message: str) -> None:
    with pytest.raises(SamplingParamsError, match=message) as refused:
        StructuredOutputs.of(given)
    assert len(str(refused.value)) < 500, "a message shows a part of a large value"


def test_schema_that_contains_itself_is_refused() -> None:
    schema: dict[str, Any] = {}
    schema["not"] = schema
    with pytest.raises(SamplingParamsError, match="nested too deeply"):
        StructuredOutputs(json=schema)


def test_callers_schema_may_change_afterwards() -> None:
    schema: dict[str, Any] = {"enum": [1]}
    outputs = StructuredOutputs(json=schema)
    schema["enum"].append(2)
    assert outputs.spec == '{"enum":[1]}'


def test_client_needs_no_vllm() -> None:
    """A trainer's environment has no vLLM."""
    code = (
        "import sys; from twinkle_serve.data_format.structured_outputs import StructuredOutputs;"
        "StructuredOutputs(json='{}'); print([name for name in ('vllm', 'torch', 'xgrammar') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
