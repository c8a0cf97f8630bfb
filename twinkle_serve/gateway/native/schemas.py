"""JSON schemas of native answers, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, TypeAlias

Schema: TypeAlias = dict[str, Any]

WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
INTS: Schema = {"type": "array", "items": WHOLE}
STRINGS: Schema = {"type": "array", "items": STRING}
LABELS: Schema = {"type": "object", "additionalProperties": STRING}


def object_of(**properties: Schema) -> Schema:
    """Returns the schema of an object with these properties, all of them required."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def nullable(schema: Schema) -> Schema:
    """Returns the schema of a value or null."""
    return {"anyOf": [schema, {"type": "null"}]}


LOGPROBS = nullable({"type": "array", "items": nullable(NUMBER), "description": "Nats; null where there is none."})
ROWS = {"type": "array", "items": {"type": "array", "items": nullable(NUMBER)}}
ID_ROWS = {"type": "array", "items": INTS}

SPAN = object_of(version=STRING, start=WHOLE, end=WHOLE)

SEQUENCE = object_of(
    tokens=INTS,
    logprobs=LOGPROBS,
    top_logprobs=nullable(object_of(tokens=ID_ROWS, logprobs=ROWS)),
    decoded=STRING,
    stop_reason={"enum": ["length", "stop", "abort", "error"]},
    seed=nullable(WHOLE),
    engine=STRING,
    adapter=STRING,
    weight_versions={"type": "array", "items": SPAN},
    message=nullable({"type": "object"}),
    sampling_mask=nullable(object_of(counts=INTS, tokens=INTS)),
)

PROMPT = object_of(
    prompt_index=WHOLE,
    prompt_token_ids=INTS,
    prompt_logprobs=LOGPROBS,
    top_prompt_logprobs=nullable(object_of(start=WHOLE, tokens=ID_ROWS, logprobs=ROWS)),
    sequences={"type": "array", "items": SEQUENCE},
)

SAMPLES = object_of(
    prompts={"type": "array", "items": PROMPT},
    prompt_indices=INTS,
    logprobs_mode=STRING,
    logprobs_are_masked=BOOLEAN,
)

LINE: Schema = {"description": "A line for each prompt, {prompt: …}; then {done: …} or {error: …}."}
