"""Structured outputs on vLLM: checked in a helper process with the real backends, then sampled as they were checked."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.harness import EngineHarness
from tests.support.processes import core_processes
from twinkle_serve.data_format.structured_outputs import Kind, StructuredOutputs
from twinkle_serve.engines.vllm.grammars import GrammarChecks
from twinkle_serve.engines.vllm.processes import COMPILE_NICENESS
from twinkle_serve.engines.vllm.requests import checked_params_class, structured_outputs_params
from twinkle_serve.engines.vllm.tmpfs import EngineFiles
from twinkle_serve.errors import SamplingParamsError

pytestmark = pytest.mark.vllm

LIMIT_S = 2
IDS = itertools.count()


def _checks(config: Any, files: EngineFiles, backend: str) -> GrammarChecks:
    checks = GrammarChecks(config, files.owner, limit_s=LIMIT_S)
    checks._settings = replace(checks._settings, backend=backend)
    return checks


@pytest.fixture(scope="module")
async def both(vllm_engine: EngineHarness) -> AsyncIterator[dict[str, GrammarChecks]]:
    """Checks of the engine's specifications, with its own backend and with the other one; both helpers are up."""
    engine: Any = vllm_engine.engine
    files = EngineFiles()
    config = engine._llm.vllm_config
    made = {backend: _checks(config, files, backend) for backend in ("xgrammar", "guidance")}
    await asyncio.gather(*(checks.check("json_object", True) for checks in made.values()))
    yield made
    await asyncio.gather(*(checks.close() for checks in made.values()))
    files.close()


@pytest.fixture
def checks(both: dict[str, GrammarChecks]) -> GrammarChecks:
    return both["xgrammar"]


SCHEMA = {"type": "object", "properties": {"value": {"type": "integer"}}, "required": ["value"]}
TAG = {"structures": [{"begin": "<a>", "schema": SCHEMA, "end": "</a>"}], "triggers": ["<a>"]}

VALID: list[tuple[Kind, Any]] = [
    ("json", json.dumps(SCHEMA)),
    ("json", SCHEMA),
    ("regex", r"\d{3}-é+"),
    ("choice", ["yes", 'no "never"\n']),
    ("grammar", 'root ::= [0-9]+ ("+" [0-9]+)*'),
    ("grammar", 'start: "a" | "b"'),
    ("structural_tag", json.dumps(TAG)),
]


@pytest.mark.parametrize(("kind", "spec"), VALID)
async def test_valid_specifications_pass(checks: GrammarChecks, kind: Kind, spec: Any) -> None:
    await checks.check(kind, spec)


INVALID: list[tuple[Kind, Any, str]] = [
    ("json", '{"type": "strin"}', r'Unsupported type "strin"'),
    ("json", '{"$ref": "#/$defs/none"}', r"Cannot find field \$defs"),
    ("json", "true", "refused by vLLM's grammar backend xgrammar"),
    ("json", '{"type": "integer", "multipleOf": 3}', r"not supported by xgrammar.*backend: guidance"),
    ("json", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}', "matches no text"),
    ("regex", "(a", "The parenthesis is not closed"),
    ("regex", "a(?=b)", "Lookahead is not supported"),
    ("regex", "a\0", "NUL"),
    ("choice", [], "cannot be an empty list"),
    ("grammar", 'root ::= "a', 'Expect " in string literal'),
    ("grammar", "start: a b", "unknown name 'a'"),
    ("grammar", 'root ::= root "a"', "matches no text"),
    ("grammar", 'root ::= "a" x\nx ::= x "b"', "no token can follow 1 tokens"),
    ("structural_tag", "{}", "Invalid structural tag"),
]


@pytest.mark.parametrize(("kind", "spec", "message"), INVALID)
async def test_invalid_specifications_are_refused_with_the_reason(
    checks: GrammarChecks, kind: Kind, spec: Any, message: str
) -> None:
    """In one line, with the kind, and without the place in a library's source."""
    with pytest.raises(SamplingParamsError, match=rf"structured_outputs\.{kind} .*{message}") as refused:
        await checks.check(kind, spec)
    assert "\n" not in str(refused.value) and ".cc:" not in str(refused.value)


def _alternatives(levels: int) -> str:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"anyOf": [{"type": "object", "properties": {"a": schema}}, {"type": "array", "items": schema}]}
    return json.dumps(schema)


BLOW_UPS: list[tuple[str, Kind, Any, str]] = [
    ("xgrammar", "regex", "((a{1,1000}){1,1000}){1,1000}", "CPU time"),
    ("xgrammar", "regex", "|".join(f"w{i}x*" for i in range(20_000)), "more than 2 s of CPU time"),
    ("xgrammar", "choice", [f"choice number {i:06d}" for i in range(20_000)], "List fewer choices"),
    ("xgrammar", "json", _alternatives(15), "more than 2 s of CPU time"),
    ("xgrammar", "grammar", 'root ::= a a a a a a a a\na ::= "" | "a" | a a | a a a', "CPU time"),
    ("guidance", "regex", "((a{1,1000}){1,1000}){1,1000}", "too many expressions constructed"),
    ("guidance", "choice", [f"choice number {i:06d}" for i in range(10_000)], "max is 2000"),
    ("guidance", "json", '{"type": "array", "items": {"type": "integer"}, "minItems": 1000000000}', "1024 MiB"),
]


async def test_specifications_that_blow_up_are_refused_while_others_pass(both: dict[str, GrammarChecks]) -> None:
    """All at once: the valid ones wait behind the others, and none is refused for that."""
    began = time.monotonic()
    bad = [asyncio.create_task(both[backend].check(kind, spec)) for backend, kind, spec, _ in BLOW_UPS]
    await asyncio.sleep(0)
    good = [asyncio.create_task(both["xgrammar"].check("regex", f"[0-9]{{{i}}}")) for i in range(1, 9)]
    refusals = await asyncio.gather(*bad, return_exceptions=True)
    await asyncio.gather(*good)
    for (*_, kind, _, message), refusal in zip(BLOW_UPS, refusals, strict=True):
        assert isinstance(refusal, SamplingParamsError), (message, refusal)
        assert re.search(rf"structured_outputs\.{kind} .*{message}", str(refusal))
    assert time.monotonic() - began < 5 * LIMIT_S * len(BLOW_UPS)


async def test_limits_leave_room_for_common_specifications(checks: GrammarChecks) -> None:
    """A hundred properties, a thousand choices, recursion, and schemas as pydantic writes them."""
    properties = {f"property_{i}": {"type": "string"} for i in range(100)}
    node = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}
    await asyncio.gather(
        checks.check("json", {"type": "object", "properties": properties, "required": list(properties)}),
        checks.check("json", {"$ref": "#/$defs/node", "$defs": {"node": node}}),
        checks.check("json", {"type": "string", "maxLength": 1000}),
        checks.check("json", {"type": "array", "items": {"type": "number"}, "maxItems": 1000}),
        checks.check("choice", [f"label {i}" for i in range(1000)]),
        checks.check("regex", r"(Step [0-9]+: .{1,200}\n){1,20}Answer: -?[0-9]+"),
    )


def test_one_backend_is_used_for_all_requests(vllm_engine: EngineHarness) -> None:
    """With `auto` vLLM validates for several backends, and compiles with that of the first request."""
    engine: Any = vllm_engine.engine
    assert engine._llm.vllm_config.structured_outputs_config.backend == "xgrammar"


async def _sample(harness: EngineHarness, outputs: StructuredOutputs, **params: Any) -> list[Any]:
    """Samples as the engine would, past vLLM's own validation."""
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    llm = harness.engine._llm  # type: ignore[attr-defined]
    params = checked_params_class()(
        structured_outputs=structured_outputs_params(outputs, "xgrammar"),
        output_kind=RequestOutputKind.FINAL_ONLY,
        **params,
    )
    prompt = tokens_input(llm.get_tokenizer().encode("12+34="))
    stream = llm.generate(prompt, params, f"structured-{next(IDS)}")
    outputs_of_end: list[Any] = [output async for output in stream][-1].outputs
    return outputs_of_end


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        (StructuredOutputs(regex="[0-9]{3}"), "[0-9]{3}"),
        (StructuredOutputs(choice=["yes", 'no "never"\n']), 'yes|no "never"\n'),
        (StructuredOutputs(json={"enum": [10, "é"]}), '10|"é"|"\\\\u00e9"'),
        (StructuredOutputs(grammar='root ::= "a" [0-9] "b"'), "a[0-9]b"),
    ],
)
async def test_samples_match_what_was_checked(
    vllm_engine: EngineHarness, checks: GrammarChecks, outputs: StructuredOutputs, pattern: str
) -> None:
    await checks.check(outputs.kind, outputs.spec)
    samples = await _sample(vllm_engine, outputs, n=4, max_tokens=50)
    assert len(samples) == 4
    for sample in samples:
        assert re.fullmatch(pattern, sample.text), sample.text
        assert sample.finish_reason == "stop"


def _niceness(process: psutil.Process) -> list[int]:
    """Of each thread."""
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    return [int((task / "stat").read_text().rpartition(")")[2].split()[16]) for task in tasks]


async def test_grammars_are_compiled_below_the_model(vllm_engine: EngineHarness) -> None:
    """On CPU they would take its cores."""
    await _sample(vllm_engine, StructuredOutputs(regex="[0-9]{4}"), max_tokens=10)
    [core] = core_processes(psutil.Process())
    niceness = _niceness(core)
    assert min(niceness) == core.nice() < COMPILE_NICENESS
    assert max(niceness) == COMPILE_NICENESS


async def test_checked_requests_do_not_block_the_event_loop(vllm_engine: EngineHarness, checks: GrammarChecks) -> None:
    """vLLM would validate this schema for a fifth of a second."""
    outputs = StructuredOutputs(json=_alternatives(9))
    await checks.check(outputs.kind, outputs.spec)
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - began)

    ticking = asyncio.create_task(tick())
    await _sample(vllm_engine, outputs, max_tokens=5)
    ticking.cancel()
    assert longest < 0.1
