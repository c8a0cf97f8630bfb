"""Tests of the chaos suite's checks: a check that finds nothing would pass any service."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.chaos.calls import MAX_PROMPTS, MAX_SAMPLES, TIMEOUT_S, TOKENS, Call, draw, reference
from benchmarks.chaos.checks import Answered, check, check_references
from benchmarks.chaos.publisher import BASE, RANK, AdapterMaker, Attempt, History
from benchmarks.chaos.reference import Reference
from benchmarks.chaos.scorers import FakeScorer, TransformersScorer, each_bucket
from benchmarks.chaos.watch import Poll, Watch
from tests.support import weights
from tests.support.processes import core_processes
from tests.support.titles import titled
from twinkle_serve import SampleResponse, hub
from twinkle_serve.adapters import pack_adapter
from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.data_format.groups import Group
from twinkle_serve.data_format.samples import NO_SEED, SampleColumns
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines.fake import FakeEngine

PROMPTS, SAMPLES, LENGTH = 3, 2, 50
CALL = Call(
    prompts=((11, 12), (13, 14, 15), (16,)),
    num_samples=SAMPLES,
    max_tokens=LENGTH,
    ignore_eos=True,
    seed=None,
    adapter="left",
    iterated=False,
)
FIRST, SECOND = 100.0, 200.0
"""Times at which the second and third version of everything were published."""
CALLED = 150.0


def history() -> History:
    """left@1 and step-1 from FIRST on, left@2 and step-2 from SECOND on."""
    made = History()
    for seed, at in ((1, FIRST), (2, SECOND)):
        made.attempts[BASE].append(
            Attempt(name=BASE, seed=seed, label=f"step-{seed}", begun_at=at - 5, published_at=at)
        )
        made.attempts["left"].append(
            Attempt(name="left", seed=seed, label=f"left@{seed}", begun_at=at - 5, published_at=at)
        )
    return made


def columns(call: Call = CALL, **changed: Any) -> SampleColumns:
    """The columns of a correct response."""
    count = len(call.prompts) * call.num_samples
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        "group": np.repeat(np.arange(len(call.prompts)), call.num_samples),
        "sample": np.tile(np.arange(call.num_samples, dtype=np.int32), len(call.prompts)),
        "lengths": np.full(count, call.max_tokens, np.int32),
        "tokens": rng.integers(10, 250, count * call.max_tokens).astype(np.int32),
        "logprobs": np.full((count * call.max_tokens, 1), -1.0, np.float32),
        "logprob_tokens": None,
        "stop_reason": np.zeros(count, np.uint8),
        "decoded": [""] * count,
        "seed": np.full(count, NO_SEED),
        "engine": ["engine-dp0"] * count,
        "adapter": ["left@1"] * count,
        "weight_versions": [(("step-1", 0),)] * count,
    }
    return SampleColumns(**{**values, **changed})


def answered(made: SampleColumns | None = None, call: Call = CALL, **changed: Any) -> Answered:
    response = SampleResponse(
        columns=columns(call) if made is None else made,
        prompts=[np.array(ids, np.int32) for ids in call.prompts],
        inputs=[{} for _ in call.prompts],
        logprobs_mode="raw_logprobs",
        prompt_indices=tuple(range(len(call.prompts))),
    )
    values: dict[str, Any] = {
        "name": "trainer-0 call 0",
        "call": call,
        "begun_at": CALLED,
        "ended_at": CALLED + 60,
        "responses": [response],
        "error": "",
        "message": "",
    }
    return Answered(**{**values, **changed})


def kinds(call: Answered) -> set[str]:
    return {finding.kind for finding in check(call, history())}


def test_correct_response_has_no_findings() -> None:
    """With old versions that were current at the call, and with new ones published while it ran."""
    assert kinds(answered()) == set()
    mixed = columns(adapter=["left@2"] * 6, weight_versions=[(("step-1", 0), ("step-2", 20))] * 6)
    assert kinds(answered(mixed)) == set()
    seeded = replace(CALL, seed=5)
    assert kinds(answered(columns(seed=np.arange(6)), seeded)) == set()


TWICE = np.tile(np.arange(10, 10 + LENGTH, dtype=np.int32), 6)


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"tokens": TWICE}, "doubled"),
        ({"sample": np.array([0, 0, 0, 1, 0, 1], np.int32)}, "doubled"),
        ({"seed": np.arange(6)}, "mislabelled"),
        ({"stop_reason": np.full(6, 1, np.uint8)}, "wrong"),
        ({"stop_reason": np.full(6, 2, np.uint8)}, "wrong"),
        ({"logprobs": None}, "wrong"),
        ({"logprobs": np.full((300, 1), np.nan, np.float32)}, "wrong"),
        ({"adapter": [""] * 6}, "mislabelled"),
        ({"adapter": ["right@1"] * 6}, "mislabelled"),
        ({"adapter": ["left@7"] * 6}, "mislabelled"),
        ({"weight_versions": [(("initial", 0),)] * 6}, "mislabelled"),
        ({"weight_versions": [(("step-9", 0),)] * 6}, "mislabelled"),
        ({"weight_versions": [(("step-2", 0), ("step-1", 9))] * 6}, "mislabelled"),
        ({"weight_versions": [(("step-1", 3),)] * 6}, "mislabelled"),
    ],
)
def test_defect_of_a_sample_is_found(changed: dict[str, Any], kind: str) -> None:
    """Each defect is found by itself."""
    assert kind in kinds(answered(columns(**changed)))


def test_adapter_version_that_was_outdated_at_the_call_is_found() -> None:
    """left@2 was published before the call, which got left@1."""
    assert kinds(answered(begun_at=SECOND + 1, ended_at=SECOND + 2)) == {"mislabelled"}


def test_missing_doubled_and_swapped_samples_and_prompts_are_found() -> None:
    """A missing sample, a missing prompt, a doubled prompt, and swapped prompts are all found."""
    whole = answered().responses[0]
    assert kinds(answered(whole.columns.take(np.arange(5)))) == {"lost"}
    parts = list(whole)
    assert kinds(answered(responses=parts[:2])) == {"lost"}
    assert kinds(answered(responses=[*parts, parts[0]])) == {"doubled", "mislabelled"}
    swapped = replace(whole, prompts=[whole.prompts[i] for i in (1, 0, 2)])
    assert kinds(answered(responses=[swapped])) == {"mislabelled"}
    assert kinds(answered(responses=parts[::-1])) == {"mislabelled"}
    iterated = replace(CALL, iterated=True)
    assert kinds(answered(call=iterated, responses=parts[::-1])) == set()
    assert kinds(answered(responses=parts[:1], error="EngineError")) == set()  # the failure is a separate finding


def test_call_that_ends_long_after_its_deadline_is_found() -> None:
    """A call that hangs is a finding, whatever its result."""
    assert kinds(answered(ended_at=CALLED + TIMEOUT_S + 20)) == {"hang"}


def test_repeated_call_with_the_same_versions_must_have_the_same_tokens() -> None:
    """Tokens are compared up to the first change of the weights, and no further."""
    call = reference(0, "left")
    one = columns(call, seed=np.arange(6))
    other = one.tokens.copy()
    other[20::32] += 1  # token 20 of each
    late: list[tuple[tuple[str, int], ...]] = [(("step-1", 0), ("step-2", 20))] * 6
    first, same = answered(one, call), answered(replace(one, tokens=other, weight_versions=late), call)
    assert check_references([first, same]) == ([], 6)
    differing, compared = check_references([first, answered(replace(one, tokens=other), call)])
    assert compared == 6 and {finding.kind for finding in differing} == {"wrong"}


def test_version_with_a_lost_answer_belongs_to_one_of_the_attempts_between() -> None:
    """left@2 may belong to the attempt that raised, or to the next one, made twice; left@4 belongs to none."""
    made = history()
    one, three = made.attempts["left"]
    three.label = "left@3"
    lost = Attempt(name="left", seed=9, begun_at=SECOND - 20, error="EngineError")
    made.attempts["left"] = [one, lost, three]
    assert made.adapter("left@1") == [one]
    assert made.adapter("left@2") == [lost, three]
    assert made.adapter("left@4") == made.adapter("right@1") == made.adapter("left") == []


@pytest.mark.parametrize(
    ("label", "found"), [("step-1", set()), ("step-2", {"mislabelled"}), ("initial", {"mislabelled"})]
)
def test_logprobs_tell_one_version_of_the_model_from_another(label: str, found: set[str]) -> None:
    """Samples whose logprobs another reference computed under step-1 agree with step-1 only."""
    call = replace(CALL, adapter="")
    made = columns(call, adapter=[""] * 6)
    other, changed = weights.Reference(), weights.changed_weights(1)
    logprobs = []
    for row, group in enumerate(made.group):
        tokens = made.tokens[row * LENGTH : (row + 1) * LENGTH]
        ids = [*call.prompts[group], *tokens.tolist()]
        logprobs.append(other.logprobs(changed, ids)[-LENGTH:])
    named = replace(
        made,
        logprobs=np.concatenate(logprobs)[:, None].astype(np.float32),
        weight_versions=[((label, 0),)] * 6,
    )
    scorer = Reference(history(), TransformersScorer())
    findings = scorer.check([answered(named, call)], 1.0, random.Random(0))
    assert {finding.kind for finding in findings} == found
    assert scorer.samples == (0 if found else 6)


@pytest.mark.parametrize(
    ("label", "adapter", "found"),
    [("step-1", "left@1", set()), ("step-2", "left@1", {"mislabelled"}), ("step-1", "left@2", {"mislabelled"})],
)
async def test_fake_engine_tells_versions_from_one_another(label: str, adapter: str, found: set[str]) -> None:
    """Samples of a fake engine with step-1 and left@1 agree with these versions only."""
    engine, maker = FakeEngine("sampling", str(hub.DEMO), {}), AdapterMaker()
    version = AdapterVersion(name="left", version=1, id=7, rank=RANK)
    await engine.start()
    await engine.load_weights("step-1", each_bucket(weights.changed_weights(1)))
    await engine.load_adapter(version, pack_adapter(maker.config, maker.made(1)))
    params = DecodingParams(max_tokens=LENGTH, ignore_eos=True)
    parts = [
        await engine.sample_group(
            Group(id=i, prompt_ids=np.array(ids, np.int32), params=params, count=SAMPLES, adapter=version)
        )
        for i, ids in enumerate(CALL.prompts)
    ]
    sampled = replace(
        SampleColumns.concat(parts), adapter=[adapter] * PROMPTS * SAMPLES, weight_versions=[((label, 0),)] * 6
    )
    scorer = Reference(history(), await asyncio.to_thread(FakeScorer))
    findings = await asyncio.to_thread(scorer.check, [answered(sampled)], 1.0, random.Random(0))
    assert {finding.kind for finding in findings} == found
    assert scorer.samples == (0 if found else 6) and scorer.largest == 0.0


def test_engines_are_not_ready_while_the_service_does_not_answer() -> None:
    """The watch sees two engines for a second, one for two, and then no answer for ten."""
    watch = Watch(None, 2)  # nothing is asked here
    both, one = {"a": "ready", "b": "ready"}, {"a": "ready", "b": "dead"}
    watch.polls = [Poll(0, both), Poll(1, one), Poll(3, both), Poll(13, both)]
    assert watch.engine_seconds(0, 13) == 1 * 2 + 2 * 1 + 2 * 2
    assert watch.outage_s(0, 13) == 8
    assert watch.all_ready_since(13.1) == 13
    assert watch.all_ready_since(15.1) is None
    watch.polls.append(Poll(13.2, one))
    assert watch.all_ready_since(13.3) is None
    told = "0.0 s a ready, b ready; 1.0 s a ready, b dead; 3.0 s a ready, b ready; 5.0 s no answer; "
    assert watch.told(0) == told + "13.0 s a ready, b ready; 13.2 s a ready, b dead"


@pytest.mark.parametrize("changed", [False, True])
def test_cores_are_found_with_and_without_their_title(changed: bool) -> None:
    """The title cannot be set once that variable has changed. multiprocessing's own helper processes do not count."""
    spawning = multiprocessing.get_context("spawn")
    begun, end = spawning.Event(), spawning.Event()
    process = spawning.Process(target=titled, args=(changed, begun, end), daemon=True)
    process.start()
    try:
        assert begun.wait(60)
        core = psutil.Process(process.pid)
        assert core.name().startswith("VLLM::EngineCor") is not changed
        assert core_processes(psutil.Process()) == [core]
    finally:
        end.set()
        process.join(60)
    assert core_processes(psutil.Process()) == []


def test_calls_have_every_shape() -> None:
    """Draws reach the smallest and largest of each size, with and without seeds, all adapters, and both methods."""
    rng = random.Random(0)
    calls = [draw(rng) for _ in range(3000)]
    for values, least, most in (
        ([len(call.prompts) for call in calls], 1, MAX_PROMPTS),
        ([call.num_samples for call in calls], 1, MAX_SAMPLES),
        ([call.max_tokens for call in calls], *TOKENS),
    ):
        assert (min(values), max(values)) == (least, most)
    assert {call.adapter for call in calls} == {"left", "right", ""}
    assert {(call.iterated, call.seed is None) for call in calls} == {(a, b) for a in (0, 1) for b in (0, 1)}
