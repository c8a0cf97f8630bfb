"""Training inputs and trajectories of sessions, of samples by a router."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.support.local_sampler import make
from tests.support.sessions import args, begin
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.columns import IGNORED_LABEL
from twinkle_serve.errors import SessionError, UnsupportedError
from twinkle_serve.sampler import RunningSampler
from twinkle_serve.sessions import SessionStore, features, trajectory


@pytest.fixture(scope="module")
def sampler() -> Iterator[RunningSampler]:
    sampler, _ = make()
    yield sampler
    sampler.shutdown()


@pytest.fixture
def store() -> SessionStore:
    return SessionStore(args())


def user(text: str = "1+1=") -> dict[str, Any]:
    return {"role": "user", "content": text}


def params(seed: int, **changed: Any) -> dict[str, Any]:
    return {"max_tokens": 7, "logprobs": 0, "seed": seed, "ignore_eos": True, **changed}


def play(
    store: SessionStore, sampler: RunningSampler, messages: list[Any], **options: Any
) -> tuple[list[int], SampleResponse]:
    """One turn. Returns its nodes and the response."""
    turn = begin(store, "s", messages)
    response = sampler.sample([turn.input], params(**options))
    return store.append("s", turn.record(response)), response


def answer(response: SampleResponse, sample: int = 0) -> dict[str, Any]:
    message: dict[str, Any] = response.sequences[sample].new_input_feature["messages"][-1]
    return message


def without_user_data(feature: Any) -> dict[str, Any]:
    return {key: value for key, value in feature.items() if key != "user_data"}


def test_features_are_those_of_the_conversation_by_handle(store: SessionStore, sampler: RunningSampler) -> None:
    """Of several samples and branches: ids, labels, logprobs, weights and messages of every turn. The next call accepts
    them as its input."""
    nodes, first = play(store, sampler, [user()], seed=1, num_samples=2)
    by_handle = {}
    for sample, (number, text) in enumerate(zip(nodes, ("a", "b"), strict=True)):
        following = user(text)
        (node,), _ = play(store, sampler, [user(), answer(first, sample), following], seed=2)
        before = sampler.sample([{"messages": [user()]}], params(1, num_samples=2)).sequences[sample].new_input_feature
        item = {**before, "messages": [*before["messages"], following]}
        by_handle[node] = sampler.sample([item], params(2)).sequences[0].new_input_feature
        assert features(store.read("s"), [number])[0]["labels"] == before["labels"]
    made = features(store.read("s"))
    assert {feature["user_data"]["node"]: without_user_data(feature) for feature in made} == by_handle
    assert all(feature["user_data"]["session"] == "s" for feature in made)
    again = sampler.sample([{**made[0], "messages": [*made[0]["messages"], user()]}], params(3))
    assert again.prompts[0][: made[0]["length"]].tolist() == made[0]["input_ids"]


def test_samples_without_logprobs_have_zeros_beside_others(store: SessionStore, sampler: RunningSampler) -> None:
    """As by handle; without any logprobs the column is missing."""
    _, first = play(store, sampler, [user()], seed=1, logprobs=None)
    (feature,) = features(store.read("s"))
    assert "logprobs" not in feature
    play(store, sampler, [user(), answer(first), user()], seed=2)
    item = first.sequences[0].new_input_feature
    item = {**item, "messages": [*item["messages"], user()]}
    (feature,) = features(store.read("s"))
    assert without_user_data(feature) == sampler.sample([item], params(2)).sequences[0].new_input_feature


def test_shared_tokens_are_labels_once_if_asked_for(store: SessionStore, sampler: RunningSampler) -> None:
    """In the first of the paths that have them; otherwise in each."""
    _, first = play(store, sampler, [user()], seed=1)
    for text in "abc":
        play(store, sampler, [user(), answer(first), user(text)], seed=2)
    record = store.read("s")

    def labels(**options: Any) -> list[int]:
        made = features(record, **options)
        for feature in made:
            learnt = np.array(feature["labels"]) != IGNORED_LABEL
            assert ((np.array(feature["logprobs"]) != 0) == learnt).all()
            assert sum(span["end"] - span["start"] for span in feature["weight_versions"]) in (7, 14)
        return [int((np.array(feature["labels"]) != IGNORED_LABEL).sum()) for feature in made]

    assert labels() == [14, 14, 14]
    assert labels(shared_tokens_once=True) == [14, 7, 7]
    assert labels(nodes=[3, 1, 0], shared_tokens_once=True) == [14, 7, 0]


def test_unknown_node_is_refused(store: SessionStore, sampler: RunningSampler) -> None:
    """With the number of those that there are."""
    play(store, sampler, [user()], seed=1)
    for number in (1, -1, True, "0"):
        with pytest.raises(SessionError, match=f"node {number!r} does not exist, the session has 1 nodes"):
            features(store.read("s"), [number])  # type: ignore[list-item]


def test_trajectory_has_what_the_engine_had(store: SessionStore, sampler: RunningSampler) -> None:
    """Joined ids are prompt and sample; values are JSON."""
    _, first = play(store, sampler, [user()], seed=5)
    (number,), second = play(store, sampler, [user(), answer(first), user("a")], seed=6, num_samples=1)
    tree = json.loads(json.dumps(trajectory(store.read("s")), allow_nan=False))
    nodes = tree["nodes"]
    sequence = second.sequences[0]
    ids = [*nodes[0]["token_ids"], *nodes[number]["token_ids"]]
    assert ids == [*second.prompts[0].tolist(), *sequence.tokens]
    node = nodes[number]
    start, end = node["sampled"]
    assert node["token_ids"][start:end] == sequence.tokens
    logprobs = sequence.logprob_array
    assert logprobs is not None and np.array_equal(np.float32(node["logprobs"]), logprobs)
    assert node["weight_versions"] == [{"weights": "initial", "adapter": "", "start": start, "end": end}]
    assert (node["seed"], node["engine"], node["stop_reason"]) == (sequence.seed, "local", "length")
    assert node["usage"] == {"prompt_tokens": len(second.prompts[0]), "completion_tokens": 7}
    assert node["logprobs_mode"] == second.logprobs_mode and node["created"] > 1e9
    assert node["messages"] == [user("a"), answer(second)] and nodes[0]["tools"] is None


def test_samples_during_an_update_name_both_weights(store: SessionStore, sampler: RunningSampler) -> None:
    """As spans of the whole sequence, as by handle; consecutive ones of the same weights are one."""
    turn = begin(store, "s", [user()])
    response = sampler.sample([turn.input], params(1))
    response.columns.weight_versions[0] = (("initial", 0), ("step-1", 3))
    response.columns.adapter[0] = "a@1"
    store.append("s", turn.record(response))
    by_handle = response.sequences[0].new_input_feature
    (feature,) = features(store.read("s"))
    assert feature["weight_versions"] == by_handle["weight_versions"] and len(feature["weight_versions"]) == 2
    turn = begin(store, "s", by_handle["messages"])
    response = sampler.sample([{**by_handle}], params(2))
    response.columns.weight_versions[0] = (("step-1", 0),)
    response.columns.adapter[0] = "a@1"
    assert turn.continues_message
    store.append("s", turn.record(response))
    (feature,) = features(store.read("s"))
    assert without_user_data(feature) == response.sequences[0].new_input_feature
    assert len(feature["weight_versions"]) == 2, "the message was continued with the same weights"


def test_sampler_in_this_process_has_no_sessions(sampler: RunningSampler) -> None:
    """They are of gateways, which a service has."""
    session = sampler.session("s")
    for call in (session.trajectory, session.features, session.end, sampler.sessions):
        with pytest.raises(UnsupportedError, match=r"sessions are conversations through a gateway, .* Deploy it"):
            call()
