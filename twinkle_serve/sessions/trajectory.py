"""A session as plain data, and as training inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.columns import IGNORED_LABEL, grown_columns
from twinkle_serve.data_format.messages import Encoded, tools_checksum
from twinkle_serve.data_format.prompts import InputFeature
from twinkle_serve.data_format.weights import SampledSpan
from twinkle_serve.errors import SessionError
from twinkle_serve.sessions.codec import unpack_turn
from twinkle_serve.sessions.records import Sample, SessionRecord, Turn, joined_messages, loads
from twinkle_serve.sessions.tree import Node, SessionTree

CONVERSATION = "messages"
RAW = "raw"


def trajectory(record: SessionRecord) -> dict[str, Any]:
    """Returns the tree of a session as plain values that JSON has.

    `session`, `created`, `expires`, and `nodes` in the order in which they were added. A node is one sample, with what
    its turn adds to the node before it:

    - `id`, `parent` (None at the beginning of a conversation), `turn`, `sample` (index among the samples of the turn),
      `created` (seconds since 1970), `branch` (see `Branch`), `kind` (messages or raw).
    - `messages`: the new messages of the client and the sampled one, as the template's parser makes it. `shown`: the
      sampled message as the client was given it, where it differs. `replaces_message`: whether the sampled message
      continues the one before it and replaces it. `tools`, without a parent. A raw turn has `text` instead: of its
      prompt, and of its sample.
    - `token_ids`: those of the new messages and of the sample. `sampled`: [index of the first sampled token in them,
      index after the last]. `logprobs` of the sampled tokens, nats, None if not requested, and their `logprobs_mode`.
      `weight_versions`: the sampled tokens by their weights, as in an InputFeature, by index in `token_ids`.
    - `adapter`, `seed`, `stop_reason`, `engine`, and `usage`: tokens of the whole prompt and of the sample.
    """
    tree = _tree(record)
    first = {turn.id: numbers[0] for turn in tree.turns if (numbers := tree.nodes_of(turn.id))}
    info = record.info
    nodes = [_plain_node(node, node.id - first[node.turn.id]) for node in tree.nodes]
    return {"session": info.id, "created": info.created, "expires": info.expires, "nodes": nodes}


def features(
    record: SessionRecord, nodes: Sequence[int] | None = None, *, shared_tokens_once: bool = False
) -> list[InputFeature]:
    """Returns linear paths of a session as training inputs, as `new_input_feature` has them.

    Each begins with the first message or token of its conversation and ends with a sample. `user_data` has `session`
    and `node`, the last node. Earlier turns are labelled, too.

    Args:
        nodes: the nodes that the paths end with. None: all that no turn follows, in the order in which they were added.
        shared_tokens_once: whether a sampled token that several of these paths share is a label in the first one only.
            False: in each, since a reward is usually one of a whole path; a loss over all tokens then counts it several
            times.

    Raises:
        SessionError: no such node.
    """
    tree = _tree(record)
    chosen = tree.leaves() if nodes is None else [_node(tree, number) for number in nodes]
    labelled: set[int] = set()
    made = []
    for leaf in chosen:
        made.append(_feature(record.info.id, leaf, labelled if shared_tokens_once else frozenset()))
        labelled.update(node.id for node in leaf.path)
    return made


def _tree(record: SessionRecord) -> SessionTree:
    return SessionTree(map(unpack_turn, record.turns))


def _node(tree: SessionTree, number: int) -> Node:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(tree.nodes):
        raise SessionError(f"node {number!r} does not exist, the session has {len(tree.nodes)} nodes.")
    return tree.nodes[number]


def _plain_node(node: Node, index: int) -> dict[str, Any]:
    turn, sample = node.turn, node.sample
    start = len(turn.prompt)
    return {
        "id": node.id,
        "parent": turn.parent,
        "turn": turn.id,
        "sample": index,
        "created": turn.created,
        "branch": turn.branch,
        "kind": RAW if turn.raw else CONVERSATION,
        **_plain_messages(turn, sample),
        "token_ids": [*turn.prompt.tolist(), *sample.tokens.tolist()],
        "sampled": [start, start + len(sample.tokens)],
        "logprobs": None if sample.logprobs is None else sample.logprobs.tolist(),
        "logprobs_mode": turn.logprobs_mode,
        "weight_versions": _spans(sample, start),
        "adapter": sample.adapter,
        "seed": sample.seed,
        "stop_reason": sample.stop_reason,
        "engine": sample.engine,
        "usage": {"prompt_tokens": turn.prompt_length, "completion_tokens": len(sample.tokens)},
    }


def _plain_messages(turn: Turn, sample: Sample) -> dict[str, Any]:
    if turn.raw:
        return {"text": [turn.text, sample.text]}
    given = loads(turn.messages)
    new = [*(given[:-1] if turn.replaces and sample.reply else given), *filter(None, [loads(sample.reply)])]
    plain: dict[str, Any] = {"messages": new, "replaces_message": turn.replaces and bool(sample.reply)}
    if sample.shown:
        plain["shown"] = loads(sample.shown)
    if turn.parent is None:
        plain["tools"] = loads(turn.tools)
    return plain


def _spans(sample: Sample, offset: int) -> list[SampledSpan]:
    ends = [start for _, start in sample.weight_versions[1:]] + [len(sample.tokens)]
    return [
        SampledSpan(weights=label, adapter=sample.adapter, start=offset + start, end=offset + end)
        for (label, start), end in zip(sample.weight_versions, ends, strict=bool(sample.weight_versions))
        if start < end
    ]


def _feature(session: str, leaf: Node, labelled: set[int] | frozenset[int]) -> InputFeature:
    """Returns the path to a node as one training input.

    Args:
        labelled: nodes whose tokens are no labels.
    """
    path, ids = leaf.path, leaf.ids()
    learnt = np.full(len(ids), IGNORED_LABEL, np.int64)
    logprobs = np.zeros(len(ids))
    spans: list[SampledSpan] = []
    for node in path:
        start = node.length - len(node.sample.tokens)
        _extend(spans, _spans(node.sample, start))
        if node.id not in labelled:
            learnt[start : node.length] = node.sample.tokens
            if node.sample.logprobs is not None:
                logprobs[start : node.length] = node.sample.logprobs
    feature: dict[str, Any] = {
        **_messages_of(leaf, ids),
        "input_ids": ids.tolist(),
        "labels": [*learnt[1:].tolist(), IGNORED_LABEL],
        **grown_columns({}, len(ids)),
        "weight_versions": spans,
        "user_data": {"session": session, "node": leaf.id},
    }
    if any(node.sample.logprobs is not None for node in path):
        feature["logprobs"] = [*logprobs[1:].tolist(), 0.0]
    return cast(InputFeature, feature)


def _messages_of(leaf: Node, ids: NDArray[np.int32]) -> dict[str, Any]:
    if leaf.turn.raw:
        return {}
    messages, checksums = joined_messages(leaf.steps())
    tools = loads(leaf.path[0].turn.tools)
    encoded = Encoded(
        ids=len(ids),
        checksum=leaf.checksum,
        messages=checksums,
        tools=tools_checksum(tools),
        assistant_start=leaf.turn.assistant_start,
    )
    if leaf.turn.written is not None:
        encoded["written"] = leaf.turn.written
    return {"messages": messages, **({} if tools is None else {"tools": tools}), "encoded": encoded}


def _extend(spans: list[SampledSpan], following: Sequence[SampledSpan]) -> None:
    """Appends spans. One that continues the last one, of the same weights and adapter, extends it."""
    for span in following:
        if spans and spans[-1] == {**span, "start": spans[-1]["start"], "end": span["start"]}:
            spans[-1]["end"] = span["end"]
        else:
            spans.append(span)
