"""Tests of the chaos suite's checks: a check that finds nothing would pass any service."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from benchmarks.chaos import agents
from benchmarks.chaos.agents import request
from benchmarks.chaos.calls import MAX_PROMPTS, MAX_SAMPLES, TIMEOUT_S, TOKENS, Call, draw, reference
from benchmarks.chaos.checks import Answered, check, check_references
from benchmarks.chaos.faults import GATEWAY_KILLED, Faults
from benchmarks.chaos.publisher import BASE, RANK, AdapterMaker, Attempt, History, Publisher
from benchmarks.chaos.record import SHORT
from benchmarks.chaos.reference import Reference
from benchmarks.chaos.scorers import FakeScorer, TransformersScorer, each_bucket
from benchmarks.chaos.trajectories import check_session
from benchmarks.chaos.turns import (
    BROKEN,
    CONTEXT,
    CUT,
    ERROR_EVENT,
    KINDS,
    NO_END,
    PROXY_500,
    REFUSED,
    AgentSession,
    Choice,
    Conversations,
    Message,
    Turn,
    TurnAttempt,
)
from benchmarks.chaos.watch import Poll, Watch
from tests.support import weights
from tests.support.eventually import wait_until
from tests.support.gateway_app import gateway_app
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


# -- sessions of agents ------------------------------------------------------------------------------

ASK = Turn(
    kind="next",
    messages=(("user", "1+1="),),
    known=0,
    model="",
    n=1,
    max_tokens=3,
    ignore_eos=False,
    seed=None,
    stream=False,
)
TWO = replace(
    ASK, messages=(*ASK.messages, ("assistant", "3"), ("user", "2+2=")), known=2, model="left", n=2, stream=True
)
FORK = replace(ASK, kind="fork", messages=(*TWO.messages[:2], ("user", "4+4=")), known=2)
EDITED = replace(ASK, kind="edited", messages=(("user", "1+1="), ("assistant", "I say 2"), ("user", "5+5=")))


def kept_node(
    number: int, turn: str, prompt: tuple[int, ...], messages: list[Message], **changed: Any
) -> dict[str, Any]:
    """A node of a trajectory, whose sample is the tokens 11, 12 and one of its own."""
    begin, adapter = len(prompt), changed.get("adapter", "")
    return {
        "id": number,
        "parent": None,
        "turn": turn,
        "sample": 0,
        "branch": "",
        "messages": [{"role": role, "content": text} for role, text in messages],
        "token_ids": [*prompt, 11, 12, 20 + number],
        "sampled": [begin, begin + 3],
        "logprobs": [-1.0, -2.0, -3.0],
        "logprobs_mode": "raw_logprobs",
        "weight_versions": [{"weights": "step-1", "adapter": adapter, "start": begin, "end": begin + 3}],
        "adapter": adapter,
        "seed": None,
        "stop_reason": "length",
        "engine": "engine-dp0",
        **changed,
    }


def attempt(turn: Turn, prompt: tuple[int, ...], texts: dict[int, str]) -> TurnAttempt:
    """An acknowledged request, with the texts of its nodes."""
    told: dict[str, Any] = {} if turn.stream else {"adapter": "", "versions": (("step-1", 0, 3),)}
    choices = tuple(
        Choice(text=text, tokens=(11, 12, 20 + node), finish="length", node=None if turn.stream else node, **told)
        for node, text in texts.items()
    )
    return TurnAttempt(turn=turn, begun_at=CALLED, ended_at=CALLED + 5, prompt=prompt, choices=choices)


def failed_attempt(turn: Turn, error: str) -> TurnAttempt:
    return TurnAttempt(turn=turn, begun_at=CALLED, ended_at=CALLED + 5, error=error)


def agent_session() -> AgentSession:
    """All is well: a turn whose first answer was lost, two streamed samples, a fork, and an edited answer."""
    user, reply = ("user", "1+1="), ("assistant", "3")
    before = (5, 6, 11, 12, 21)
    nodes = [
        kept_node(0, "a", (5, 6), [user, reply]),
        kept_node(1, "b", (5, 6), [user, reply], branch="retry"),
        kept_node(2, "c", (7,), [("user", "2+2="), ("assistant", "4")], parent=1, adapter="left@1"),
        kept_node(3, "c", (7,), [("user", "2+2="), ("assistant", "5")], parent=1, adapter="left@1", sample=1),
        kept_node(4, "d", (8,), [("user", "4+4="), ("assistant", "<8>")], parent=1, branch="fork"),
        kept_node(5, "e", (9,), [*EDITED.messages, ("assistant", "10")], branch="edited"),
    ]
    nodes[4]["shown"] = {"role": "assistant", "content": "8"}
    attempts = [
        failed_attempt(ASK, "503"),
        attempt(ASK, (5, 6), {1: "3"}),
        attempt(TWO, (*before, 7), {2: "4", 3: "5"}),
        attempt(FORK, (*before, 8), {4: "8"}),
        attempt(EDITED, (9,), {5: "10"}),
    ]
    return AgentSession("id", "agent-0 session 0", attempts, nodes=nodes)


def session_kinds(session: AgentSession, gateway_kills: tuple[float, ...] = ()) -> set[str]:
    findings, _ = check_session(session, history(), gateway_kills)
    return {finding.kind for finding in findings}


def test_session_in_which_all_is_well_has_no_findings() -> None:
    """Its turns are calls whose prompts begin with the tokens of the turns before."""
    findings, calls = check_session(agent_session(), history(), ())
    assert findings == []
    assert [call.call.prompts[0] for call in calls if call.call.num_samples == 2] == [(5, 6, 11, 12, 21, 7)]
    assert len(calls) == 5 and sum(call.tokens for call in calls) == 18


def changed_node(session: AgentSession, number: int, **changed: Any) -> None:
    assert session.nodes is not None
    session.nodes[number] |= changed


def without_nodes(session: AgentSession, *numbers: int) -> None:
    """Leaves nodes out, and numbers the others anew; no client was told the old numbers."""
    assert session.nodes is not None
    kept = [node for node in session.nodes if node["id"] not in numbers]
    new = {node["id"]: i for i, node in enumerate(kept)}
    for node in kept:
        node |= {"id": new[node["id"]], "parent": new.get(node["parent"])}
    session.nodes = kept
    for i, each in enumerate(session.attempts):
        session.attempts[i] = replace(each, choices=tuple(replace(choice, node=None) for choice in each.choices))


def told(session: AgentSession, index: int, **changed: Any) -> None:
    """Changes the first choice of an answer."""
    first, *others = session.attempts[index].choices
    session.attempts[index] = replace(session.attempts[index], choices=(replace(first, **changed), *others))


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda s: without_nodes(s, 5), {"lost"}),
        (lambda s: without_nodes(s, 2, 3), {"lost", "mislabelled"}),  # the turn after it is no fork then
        (lambda s: changed_node(s, 5, token_ids=[9, 11, 12, 99]), {"lost", "doubled"}),
        (lambda s: changed_node(s, 5, token_ids=[9, 11, 12], sampled=[1, 3]), {"lost", "doubled"}),
        (lambda s: changed_node(s, 5, token_ids=[10, 11, 12, 25]), {"lost", "doubled"}),
        (lambda s: s.attempts.pop(0), {"doubled"}),
        (lambda s: s.attempts.pop(4), {"wrong"}),
        (lambda s: changed_node(s, 1, branch=""), {"mislabelled"}),
        (lambda s: changed_node(s, 4, branch=""), {"mislabelled"}),
        (lambda s: changed_node(s, 5, branch="root"), {"mislabelled"}),
        (lambda s: changed_node(s, 2, branch="fork"), {"mislabelled"}),
        (lambda s: changed_node(s, 4, shown={"role": "assistant", "content": "9"}), {"wrong"}),
        (lambda s: changed_node(s, 2, messages=[{"role": "user", "content": "2+3="}] * 2), {"wrong"}),
        (lambda s: changed_node(s, 0, stop_reason="stop"), set()),
        (lambda s: changed_node(s, 1, stop_reason="stop"), {"wrong"}),
        (lambda s: changed_node(s, 5, logprobs=None), {"wrong"}),
        (lambda s: changed_node(s, 2, adapter="right@1"), {"mislabelled"}),
        (lambda s: changed_node(s, 2, adapter="left@7"), {"mislabelled"}),
        (lambda s: changed_node(s, 0, weight_versions=[{"weights": "step-9", "start": 2, "end": 5}]), {"mislabelled"}),
        (lambda s: changed_node(s, 0, weight_versions=[{"weights": "initial", "start": 2, "end": 5}]), {"mislabelled"}),
        (lambda s: changed_node(s, 2, parent=9), {"wrong"}),
        (lambda s: changed_node(s, 3, token_ids=[6, 11, 12, 23]), {"wrong"}),
        (lambda s: changed_node(s, 3, sample=2), {"wrong"}),
        (lambda s: told(s, 2, text="40"), {"wrong"}),
        (lambda s: told(s, 2, finish="stop"), {"wrong"}),
        (lambda s: told(s, 2, tokens=(11, 12, 99)), {"lost", "doubled"}),
        (lambda s: told(s, 3, node=2), {"mislabelled"}),
        (lambda s: told(s, 3, versions=(("step-2", 0, 3),)), {"mislabelled"}),
        (lambda s: told(s, 3, adapter="left@1"), {"mislabelled"}),
        (lambda s: setattr(s, "nodes", None), {"lost"}),
        (lambda s: setattr(s, "problem", "it is gone"), {"failed"}),
    ],
)
def test_defect_of_a_session_is_found(spoil: Callable[[AgentSession], object], found: set[str]) -> None:
    """Each defect is found by itself."""
    session = agent_session()
    spoil(session)
    assert session_kinds(session) == found


def test_turn_that_was_tokenised_again_is_found() -> None:
    """Its tokens and messages are all there, but it does not continue the turn before."""
    session = agent_session()
    prompt = (5, 6, 11, 12, 21, 8)
    messages = [{"role": role, "content": text} for role, text in FORK.messages]
    changed_node(
        session,
        4,
        parent=None,
        branch="root",
        messages=[*messages, {"role": "assistant", "content": "8"}],
        token_ids=[*prompt, 11, 12, 24],
        sampled=[6, 9],
        weight_versions=[{"weights": "step-1", "start": 6, "end": 9}],
    )
    assert session_kinds(session) == {"wrong"}


@pytest.mark.parametrize(
    ("turn", "error", "found"),
    [
        (ASK, "503", set()),
        (ASK, "504", set()),
        (ASK, "429", set()),
        (ASK, "500", {"failed"}),
        (ASK, "400", {"failed"}),
        (ASK, "410", {"failed"}),
        (ASK, BROKEN, {"failed"}),
        (ASK, REFUSED, {"failed"}),
        (ASK, NO_END, {"hang"}),
        (ASK, CUT, {"failed"}),
        (TWO, BROKEN, set()),
        (TWO, CUT, {"failed"}),
        (TWO, f"{ERROR_EVENT}: unavailable", set()),
        (TWO, f"{ERROR_EVENT}: server_error", {"failed"}),
    ],
)
def test_request_may_fail_in_documented_ways_only(turn: Turn, error: str, found: set[str]) -> None:
    """By a status or an event that says so, or, once a stream has begun, by its connection."""
    session = agent_session()
    session.attempts.append(failed_attempt(turn, error))
    assert session_kinds(session) == found


def test_500_of_the_proxy_needs_a_killed_gateway() -> None:
    session = agent_session()
    session.attempts.append(failed_attempt(ASK, PROXY_500))
    assert session_kinds(session, (CALLED + 1,)) == set()
    assert session_kinds(session, (CALLED - 1,)) == session_kinds(session, (CALLED + 6,)) == {"failed"}


def test_request_that_ends_long_after_its_deadline_is_found() -> None:
    session = agent_session()
    session.attempts[0] = replace(session.attempts[0], ended_at=CALLED + TIMEOUT_S + 20)
    assert session_kinds(session) == {"hang"}


def test_agent_that_cannot_read_an_answer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    called = threading.Event()

    def unreadable(*_: object) -> TurnAttempt:
        called.set()
        raise ValueError("no JSON")

    monkeypatch.setattr(agents, "request", unreadable)
    load = agents.Agents("http://gateway", 1, seed=0)
    load.start()
    assert called.wait(60)
    assert load.stop(60) == ["agent-0 died of ValueError('no JSON')"]


EVENT: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": "4"}, "token_ids": [7], "finish_reason": None}]}
END: dict[str, Any] = {"choices": [{"index": 0, "delta": {}, "token_ids": [8], "finish_reason": "stop"}]}
FAILURE: dict[str, Any] = {"error": {"message": "gone", "type": "server_error", "code": "unavailable"}}


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ([EVENT, END, "[DONE]"], ""),
        ([EVENT, END], CUT),
        ([EVENT, "[DONE]"], CUT),
        ([EVENT], CUT),
        ([EVENT, FAILURE, "[DONE]"], f"{ERROR_EVENT}: unavailable"),
        ([EVENT, FAILURE], f"{ERROR_EVENT}: unavailable"),
    ],
)
def test_stream_is_acknowledged_by_its_end_alone(sent: list[Any], error: str) -> None:
    """All its events, and [DONE]."""
    data = b": waiting\n\n" + b"".join(
        b"data: " + (each if isinstance(each, str) else json.dumps(each)).encode() + b"\n\n" for each in sent
    )
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=data))
    with httpx.Client(transport=transport) as client:
        made = request(client, "http://gateway", replace(ASK, stream=True))
    assert made.error == error
    if not error:
        assert made.choices == (Choice(text="4", tokens=(7, 8), finish="stop"),)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [(503, "{}", "503"), (500, '{"error": {}}', "500"), (500, "Internal Server Error", PROXY_500), (200, "{}", CUT)],
)
def test_failed_answer_is_recorded_as_its_status(status: int, body: str, error: str) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(status, text=body))
    with httpx.Client(transport=transport) as client:
        assert request(client, "http://gateway", ASK).error == error


def test_conversations_that_are_drawn_are_those_that_the_checks_expect() -> None:
    """Equal messages are repeated turns, all kinds occur, and what is known ends with a sampled message."""
    rng, drawn = random.Random(3), []
    for _ in range(30):
        conversations = Conversations(rng)
        turns = []
        for _ in range(conversations.length):
            turn = conversations.next_turn()
            turns.append(turn)
            conversations.answered(turn, [Choice(text="3", tokens=(1,), finish="stop")])
        for turn in turns:
            same = [other for other in turns if other.messages == turn.messages]
            assert {replace(other, kind="next") for other in same} == {replace(turn, kind="next")}
            assert turn.known == 0 or turn.messages[turn.known - 1] == ("assistant", "3")
            assert ("assistant", "3") not in turn.messages[turn.known :]
        drawn += turns
    assert {turn.kind for turn in drawn} == set(KINDS)
    assert {turn.n for turn in drawn} == {1, 2} and {turn.stream for turn in drawn} == {True, False}


def test_faults_are_those_that_a_short_run_names() -> None:
    """An unknown kind would end a run in its middle."""
    faults = Faults("chaos", 2, None, "http://gateway", random.Random(0), cores=True)  # type: ignore[arg-type]
    assert GATEWAY_KILLED in faults.kinds and set(SHORT.kinds) <= set(faults.kinds)


def test_sessions_of_agents_whose_answers_are_lost_have_no_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a gateway in this process. Every third answer is lost after its turn was kept; the turn is repeated."""
    made: list[TurnAttempt] = []

    def lossy(client: httpx.Client, url: str, turn: Turn) -> TurnAttempt:
        made.append(attempt := request(client, url, turn))
        return replace(attempt, error="503", prompt=(), choices=()) if len(made) % 3 == 0 else attempt

    monkeypatch.setattr(agents, "request", lossy)
    monkeypatch.setattr(agents, "PAUSE_S", 0.0)
    published = History()
    with gateway_app(engine_args={"max_model_len": CONTEXT}) as gateway, gateway.served() as url:
        Publisher(gateway.sampler, published, 60.0)  # publishes the adapters, and is not started
        load = agents.Agents(url, 2, seed=5)
        load.start()
        wait_until(lambda: len(made) > 60, "turns are taken")
        assert load.stop(60) == []
        sessions = load.collect(None)
    checked = [check_session(session, published, ()) for session in sessions]
    assert [finding for findings, _ in checked for finding in findings] == []
    calls = [call for _, calls in checked for call in calls]
    scorer = Reference(published, FakeScorer())
    assert scorer.check(calls, 1.0, random.Random(0)) == []
    assert scorer.samples == sum(len(call.sequences) for call in calls) > 50
    branches = {node["branch"] for session in sessions for node in session.nodes or ()}
    assert branches >= {"", "retry", "fork", "edited"}
