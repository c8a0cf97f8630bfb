"""Requests when engines end or hang: two engines in this process."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from tests.support.eventually import eventually
from tests.support.failing_service import POISON, PROMPTS, Service, exact
from twinkle_serve.data_format.groups import Group, Session
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.errors import EngineDeadError, PoisonPromptError, RequestError
from twinkle_serve.routing.router import Router


async def test_samples_that_had_arrived_are_kept_when_their_engine_ends(service: Service) -> None:
    """Only the rest of their group is sampled again, with its seeds."""
    reference = await service.router.sample(PROMPTS[:1], {"max_tokens": 4, "seed": 3}, num_samples=4)
    for engine in service.engines.values():
        engine.gate = asyncio.Event()
        engine.sampled.clear()
    parts = Router.sample_iter(service.router, PROMPTS[:1], {"max_tokens": 4, "seed": 3}, num_samples=4)
    call = asyncio.ensure_future(anext(parts))

    async def one_has_arrived() -> bool:
        return any(request.samples_missing == 3 for request in service.router._requests.values())

    await eventually(one_has_arrived)
    for engine in service.engines.values():
        engine.end(EngineDeadError("killed"))
        engine.gate.set() if engine.gate else None
    response = await call
    assert response.columns.tokens.tolist() == reference.columns.tokens.tolist()
    begun = sum((engine.sampled for engine in service.engines.values()), Counter())
    assert begun[24, 0] == 1, "what was there is not sampled again"
    assert [seq.seed for seq in response.sequences] == [seq.seed for seq in reference.sequences]


async def test_call_of_one_engine_waits_for_that_engine(service: Service) -> None:
    """Its samples are those of any engine; they start anew there when it ends. Another name is refused at once."""
    params = {"max_tokens": 8, "seed": 3}
    reference = await service.router.sample(PROMPTS, params, num_samples=2)
    for name in ("a", "b"):
        response = await service.router.sample(PROMPTS, params, num_samples=2, engine=name)
        assert {sequence.engine for sequence in response.sequences} == {name}
        assert response.columns.tokens.tolist() == reference.columns.tokens.tolist()
    engine = service.engines["b"]
    engine.gate = asyncio.Event()
    call = asyncio.ensure_future(service.router.sample(PROMPTS, params, num_samples=2, engine="b"))

    async def runs() -> bool:
        status = await service.router.status()
        return status["engines"]["b"]["sequences"] > 0

    await eventually(runs)
    engine.gate.set()
    engine.end(EngineDeadError("killed"))
    response = await call
    assert {sequence.engine for sequence in response.sequences} == {"b"} and service.restarts == 1
    assert response.columns.tokens.tolist() == reference.columns.tokens.tolist()
    with pytest.raises(RequestError, match="unknown engine 'c'"):
        await service.router.sample(PROMPTS, params, engine="c")


async def test_poison_prompt_fails_alone_and_is_named(service: Service) -> None:
    """It ends two engines; those beside it, on both, are sampled to their end."""
    poison = {"input_ids": [POISON, 20, 21]}
    bystanders = [
        asyncio.ensure_future(service.router.sample(PROMPTS, {"max_tokens": 8}, num_samples=4)) for _ in range(3)
    ]
    with pytest.raises(PoisonPromptError, match=r"inputs\[1\] \(3 tokens: 65, 20, 21\) was on [ab], [ab] when"):
        await service.router.sample([PROMPTS[0], poison], {"max_tokens": 4})
    for bystander in bystanders:
        assert exact(await bystander, len(PROMPTS), 4)
    assert service.restarts == 2
    assert exact(await service.router.sample(PROMPTS, {"max_tokens": 2}), len(PROMPTS), 1)


async def test_prompt_that_takes_longer_to_end_its_second_engine_is_found_all_the_same(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was cleared by then, and another suspect is beside it: that one is not taken for it."""
    monkeypatch.setattr("twinkle_serve.routing.poison.CLEARED_AFTER_S", 0.02)
    for engine in service.engines.values():
        engine.fuses = [0.1, 0.4, 0.4, 0.4]
        engine._args = engine._args.model_copy(update={"token_latency_s": 0.01})
    fuses = service.engines["a"].fuses
    service.engines["b"].fuses = fuses  # of the prompt, wherever it is
    bystander = asyncio.ensure_future(
        service.router.sample(PROMPTS[:6], {"max_tokens": 60, "ignore_eos": True}, num_samples=2)
    )
    with pytest.raises(PoisonPromptError, match=r"inputs\[0\]"):
        await service.router.sample({"input_ids": [POISON, 20, 21]}, {"max_tokens": 90, "ignore_eos": True})
    assert exact(await bystander, 6, 2)


async def test_slow_reader_of_a_stream_does_not_make_its_engine_look_hung(service: Service) -> None:
    """It has finished long since."""
    deltas = service.router.sample_stream(PROMPTS[0], {"max_tokens": 40, "ignore_eos": True})
    assert await anext(deltas)
    await asyncio.sleep(1.0)  # three times stall_timeout_s
    assert [reason async for _, reason in deltas][-1] == "length"
    assert not service.restarts


async def test_engines_that_are_killed_again_and_again_lose_no_call(service: Service) -> None:
    """However often a group meets it: it was no fault of its own."""
    for engine in service.engines.values():
        engine._args = engine._args.model_copy(update={"token_latency_s": 0.002})
    calls = [asyncio.ensure_future(service.router.sample(PROMPTS, {"max_tokens": 30}, num_samples=2)) for _ in range(2)]
    for number in range(8):
        engine = list(service.engines.values())[number % 2]
        before = service.restarts
        engine.end(EngineDeadError("killed"))

        async def is_back(before: int = before) -> bool:
            return service.restarts > before

        await eventually(is_back)
    for call in calls:
        assert exact(await call, len(PROMPTS), 2)


async def test_engine_that_hangs_is_given_up_and_replaced(service: Service) -> None:
    """It answers, but samples nothing for stall_timeout_s; its samples go elsewhere."""
    service.engines["a"].hangs = True
    assert exact(await service.router.sample(PROMPTS, {"max_tokens": 4}, num_samples=2), len(PROMPTS), 2)

    async def replaced() -> bool:
        return service.restarts == 1

    await eventually(replaced)


async def test_idle_and_paused_engines_are_not_taken_for_hung(service: Service) -> None:
    """Three times stall_timeout_s with nothing to sample, and with something that may not be sampled."""
    lease = await service.router.pause("keep", 30.0)
    call = asyncio.ensure_future(service.router.sample(PROMPTS, {"max_tokens": 4}))
    done, _ = await asyncio.wait({call}, timeout=0.9)
    assert not done and not service.restarts
    await service.router.resume(lease)
    assert exact(await call, len(PROMPTS), 1)


async def test_min_groups_cuts_off_the_tail(service: Service) -> None:
    """The response has what was complete first; the rest leaves queue and engines."""
    for engine in service.engines.values():
        engine.gate = asyncio.Event()
    many = [{"input_ids": [30, 20]}] * 3
    # Prompts with one sample finish; those with gated samples cannot.
    slow = asyncio.ensure_future(service.router.sample(many, {"max_tokens": 4}, num_samples=2, request_id="slow"))
    response = await service.router.sample(PROMPTS, {"max_tokens": 4}, min_groups=5)
    assert 5 <= len(response) <= len(PROMPTS)
    assert sorted(response.prompt_indices) == list(response.prompt_indices)
    assert len(response.sequences) == len(response)
    assert not slow.done()
    assert await service.router.cancel("slow") == 3
    with pytest.raises(RequestError, match="every prompt of the call was cancelled"):
        await slow


async def test_cancel_of_a_group_leaves_the_others(service: Service) -> None:
    """Its engine is free of it; the call ends with what is left."""
    for engine in service.engines.values():
        engine.gate = asyncio.Event()
    call = asyncio.ensure_future(service.router.sample(PROMPTS[:3], {"max_tokens": 4}, num_samples=2, request_id="one"))

    async def running() -> bool:
        return service.running() == 3

    await eventually(running)
    assert await service.router.cancel("one", [1, 7]) == 1
    assert await service.router.cancel("one", [1]) == 0, "it is gone already"

    async def freed() -> bool:
        return service.running() == 2

    await eventually(freed)
    for engine in service.engines.values():
        assert engine.gate is not None
        engine.gate.set()
    response = await call
    assert response.prompt_indices == (0, 2)
    assert [seq.prompt_index for seq in response.sequences] == [0, 0, 2, 2]
    assert await service.router.cancel("one") == 0


async def test_min_groups_that_cannot_be_is_refused(service: Service) -> None:
    """With both numbers."""
    with pytest.raises(RequestError, match="min_groups must be a number from 1 to the call's 2 prompts, got 3"):
        await service.router.sample(PROMPTS[:2], min_groups=3)
    with pytest.raises(RequestError, match="sample_timeout_s must be a number of seconds above 0, got -1"):
        await service.router.sample(PROMPTS[:2], sample_timeout_s=-1)


async def test_sample_that_runs_for_too_long_ends_where_it_is(service: Service) -> None:
    """With what it has."""
    for engine in service.engines.values():
        engine._args = engine._args.model_copy(update={"token_latency_s": 0.01})
    response = await service.router.sample(
        PROMPTS[:2], {"max_tokens": 100, "ignore_eos": True}, num_samples=2, sample_timeout_s=0.2
    )
    assert exact(response, 2, 2)
    for seq in response.sequences:
        assert seq.stop_reason == "abort" and 0 < len(seq.tokens) < 100
        assert len(seq.logprobs or []) == len(seq.tokens)


async def test_engine_is_sent_nothing_of_the_routers_bookkeeping(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups are of the type that both share, whatever the router keeps of them."""
    submit, sent = EngineServer.submit, list[Group]()

    async def recorded(self: EngineServer, session: Session, groups: Sequence[Group], more: bool = False) -> None:
        sent.extend(groups)
        await submit(self, session, groups, more)

    monkeypatch.setattr(EngineServer, "submit", recorded)
    assert exact(await service.router.sample(PROMPTS[:2], {"max_tokens": 2, "seed": 4}, num_samples=2), 2, 2)
    assert {type(group) for group in sent} == {Group}
    assert {type(group.params) for group in sent} == {DecodingParams}


async def test_engine_aborts_what_no_living_router_claims(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that is gone asks after its engines no more."""
    monkeypatch.setattr("twinkle_serve.timing.ROUTER_LEASE_S", 0.2)
    server, engine = service.servers["a"], service.engines["a"]
    engine.gate = asyncio.Event()
    incarnation = (await server.describe("gone")).incarnation
    group = Group(id=7, prompt_ids=np.array([30, 20], np.int32), params=service_params(), count=3)
    session = Session(incarnation=incarnation, router="gone")
    await server.submit(session, [group])
    items = [item async for item in server.results(session)]
    assert sum(0 if item.columns is None else len(item.columns) for item in items) == 1, "the one that was not gated"
    assert not service.running()


def service_params() -> DecodingParams:
    return DecodingParams(max_tokens=4)
