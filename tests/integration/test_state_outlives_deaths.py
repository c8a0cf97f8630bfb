"""Adapters, the model's own weights and sessions outlive every process of the service, and engines have them again."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from deployments.sessions_client import ServeSessionsClient
from tests.support.deploy import deployed
from tests.support.eventually import wait_until
from tests.support.lora import save_adapter
from tests.support.processes import replica_process
from tests.support.weights import changed_weights
from twinkle_serve import SampleResponse
from twinkle_serve.errors import AdapterError, SessionGoneError, TwinkleServeError, WeightsError
from twinkle_serve.sampler import RunningSampler
from twinkle_serve.sessions import Conversation, SessionTurn

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
QUESTIONS = [{"messages": [{"role": "user", "content": f"{a}+{a}="}]} for a in range(10, 26)]
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
ARGS: dict[str, Any] = {"engine": "fake", "engine_args": {"max_model_len": 256}}
LABELS = (f"step-{number}" for number in itertools.count(1))
ALL = ("store", "router", "engine-dp0", "engine-dp1")


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    return changed_weights(1)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return [save_adapter(directory / str(seed), seed=seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def service(cluster: None, adapters: list[Path]) -> Iterator[RunningSampler]:
    """Two engines, two versions of each adapter, and one adapter in the config."""
    fixed = {"fixed": str(adapters[2])}
    with deployed("stateful", device_mesh={"dp_size": 2}, adapter_versions=2, adapters=fixed, **ARGS) as sampler:
        yield sampler


def labels_of(response: SampleResponse) -> set[str]:
    return {span.version for sequence in response.sequences for span in sequence.weight_versions}


def same(one: SampleResponse, other: SampleResponse) -> bool:
    return one.columns.tokens.tolist() == other.columns.tokens.tolist() and one.columns.adapter == other.columns.adapter


@pytest.mark.nightly
@pytest.mark.parametrize(
    "killed", [("store",), ("router",), ("engine-dp0",), ("store", "engine-dp0"), ALL], ids="-".join
)
def test_weights_and_adapters_are_there_again_after_a_death(
    service: RunningSampler, weights: dict[str, Any], adapters: list[Path], killed: tuple[str, ...]
) -> None:
    """The same labels mean the same weights on every engine; the next update and version find everything in place."""
    label, name = next(LABELS), "-".join(killed)
    service.update_weights(weights, label, bucket_bytes=2**20)
    first, second = (service.add_adapter_to_model(name, path) for path in adapters[:2])
    assert (first, second) == (f"{name}@1", f"{name}@2")
    expected = {adapter: service.sample(QUESTIONS, GREEDY, adapter) for adapter in (first, second, "fixed", "")}
    assert len({tuple(response.columns.tokens.tolist()) for response in expected.values()}) == 4
    for process in [replica_process("stateful", deployment) for deployment in killed]:
        process.kill()

    def answered_by_both() -> bool:
        engines: set[str] = set()
        for adapter, before in expected.items():
            try:
                again = service.sample(QUESTIONS, GREEDY, adapter, timeout_s=30)
            except TwinkleServeError:  # the call was on its way when something died
                return False
            assert labels_of(again) == {label} and same(again, before)
            engines |= set(again.columns.engine)
        return engines == {"engine-dp0", "engine-dp1"}

    wait_until(answered_by_both, "both engines answer", 60)
    with pytest.raises(WeightsError, match="exists already"):
        service.update_weights(weights, label)
    newer = next(LABELS)
    service.update_weights(weights, newer)
    assert labels_of(service.sample(QUESTIONS, GREEDY)) == {newer}
    assert service.add_adapter_to_model(name, adapters[0]) == f"{name}@3"
    assert same(service.sample(QUESTIONS, GREEDY, second), expected[second]), "the version before can still be named"
    with pytest.raises(AdapterError, match="unknown adapter"):
        service.sample(QUESTIONS, GREEDY, first)
    service.remove_adapter(name)


def test_engine_that_dies_in_an_update_comes_back_current(service: RunningSampler, weights: dict[str, Any]) -> None:
    """The others have the new version, and it has it too before it is used."""
    label = next(LABELS)

    def killing() -> Iterator[tuple[str, Any]]:
        yield from itertools.islice(weights.items(), 40)
        replica_process("stateful", "engine-dp1").kill()
        yield from itertools.islice(weights.items(), 40, None)

    service.update_weights(killing(), label, bucket_bytes=2**19)

    def states() -> dict[str, Any]:
        return {name: (engine["state"], engine.get("weights")) for name, engine in service.status()["engines"].items()}

    wait_until(lambda: states()["engine-dp1"] == ("ready", label), "engine-dp1 is back with the new weights", 60)
    assert states()["engine-dp0"] == ("ready", label)
    assert labels_of(service.sample(QUESTIONS, GREEDY)) == {label}


TRAINER = """
import signal, sys
import ray
from tests.support.weights import changed_weights
from twinkle_serve import connect

ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False)
sampler = connect("stateful")
if sys.argv[2] == "update":
    def weights():
        for number, pair in enumerate(changed_weights(2).items()):
            yield pair
            if number == 30:
                print("halfway", flush=True)
                signal.pause()
    sampler.update_weights(weights(), "never", bucket_bytes=2**18)
else:
    with sampler.pause(lease_s=2.0):
        print("paused", flush=True)
        signal.pause()
"""


def killed_trainer(what: str) -> None:
    """A trainer in a process of its own, which is killed in the middle of it."""
    address = ray.get_runtime_context().gcs_address
    root = str(Path(__file__).parents[2])
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, address, what],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline().strip() in ("halfway", "paused")
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()


def test_turns_of_sessions_are_there_again_after_a_death(service: RunningSampler) -> None:
    """Of store and router at once. The conversation continues with its own tokens, and its training input is the
    handle's; an append that is repeated is one."""
    sessions = ServeSessionsClient(serve.get_deployment_handle("store", "stateful"))
    call, session = service._client.loop.call, service.session("conversation")
    messages: list[dict[str, Any]] = list(QUESTIONS[0]["messages"])
    item: dict[str, Any] = {"messages": messages}
    params = {"max_tokens": 6, "ignore_eos": True, "seed": 1, "logprobs": 0}
    for number in range(3):
        conversation = Conversation.of_messages(messages)
        turn = SessionTurn(conversation, call(sessions.find_turn(session.id, conversation.query)))
        record = turn.record(service.sample([turn.input], params))
        if number == 1:
            for deployment in ("store", "router"):
                replica_process("stateful", deployment).kill()
        appended = [call(sessions.append_turn(session.id, record)) for _ in range(2)]
        assert appended == [[number]] * 2
        by_handle = service.sample([item], params).sequences[0].new_input_feature
        (feature,) = session.features()
        assert feature.pop("user_data") == {"session": session.id, "node": number}
        assert feature == by_handle
        new = {"role": "user", "content": f"{number}+1="}
        messages = [*by_handle["messages"], new]
        item = {**by_handle, "messages": messages}
    assert [node["branch"] for node in session.trajectory()["nodes"]] == [""] * 3
    assert [info.id for info in service.sessions()] == [session.id]
    assert session.end() and not session.end()
    with pytest.raises(SessionGoneError, match="session 'conversation' was deleted"):
        session.trajectory()


@pytest.mark.nightly
def test_trainer_that_dies_while_it_sends_leaves_nothing(service: RunningSampler, weights: dict[str, Any]) -> None:
    """The version before goes on; a second trainer is refused while the first may live, and told for how long."""
    before = service.status()["weights"]
    killed_trainer("update")
    assert service.status()["weights"] == before
    assert labels_of(service.sample(QUESTIONS, GREEDY)) == {before}
    with pytest.raises(WeightsError, match=r"an update to 'never' is under way, heard of .* given up after 60 s"):
        service.update_weights(weights, next(LABELS))
    replica_process("stateful", "router").kill()  # a router that begins drops it at once

    def taken() -> bool:
        try:
            service.update_weights(weights, next(LABELS))
        except TwinkleServeError:
            return False
        return True

    wait_until(taken, "an update is taken", 60)


def test_trainer_that_dies_in_a_pause_does_not_leave_it_paused(service: RunningSampler) -> None:
    """Its lease of 2 s ends."""
    killed_trainer("pause")
    assert len(service.sample(QUESTIONS, GREEDY, timeout_s=30).sequences) == len(QUESTIONS)
    assert not service.status()["paused"]


@pytest.mark.nightly
@pytest.mark.parametrize("keeps", [True, False])
def test_service_that_is_deployed_anew_finds_its_state_dir(
    weights: dict[str, Any], adapters: list[Path], tmp_path: Path, keeps: bool
) -> None:
    """As it was left, and the config's adapters are not put twice. Without a state_dir, shutdown leaves none."""
    args = {**ARGS, "adapters": {"fixed": str(adapters[0])}}
    if keeps:
        args["state_dir"] = str(tmp_path)
    with deployed("again", **args) as before:
        assert before.add_adapter_to_model("grown", adapters[1]) == "grown@1"
        before.update_weights(weights, "one")
        expected = before.sample(QUESTIONS, GREEDY, "grown")
    assert "again" not in serve.status().applications
    with deployed("again", **args) as after:
        found = after.status()["adapters"]
        assert set(found) == ({"fixed", "grown"} if keeps else {"fixed"})
        assert after.status()["weights"] == ("one" if keeps else "initial")
        if keeps:
            assert found == {"fixed": "fixed@1", "grown": "grown@1"}
            assert same(after.sample(QUESTIONS, GREEDY, "grown"), expected)
