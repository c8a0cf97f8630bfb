"""Planned calls and collected answers: every item once, for any mesh and batch."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve import DeviceMesh
from twinkle_serve.errors import ConfigError, MeshError, RequestError
from twinkle_serve.remote.collect import collect
from twinkle_serve.remote.dispatch import Layout, Modes, Plan, peers, plan

Pair = namedtuple("Pair", "left right")
DP2_TP2 = Layout.of(DeviceMesh.from_sizes(dp_size=2, tp_size=2))
FOUR = Layout.data_parallel(4)


def run(modes: Modes, layout: Layout, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Returns the caller's result if every worker runs `function`."""
    planned = plan(modes, layout, args, kwargs)
    answers = {call.order: function(*call.args, **call.kwargs) for call in planned.calls}
    ordered = [answers[order] for order in sorted(order for order in answers if order is not None)]
    return collect(modes.collect, ordered, single=planned.single, mesh=layout.mesh)


def called(planned: Plan) -> dict[int, Any]:
    """Returns the first argument of every called worker."""
    return {call.worker: call.args[0] for call in planned.calls}


def square(batch: list[int]) -> list[int]:
    return [item * item for item in batch]


@given(
    st.lists(st.integers(), max_size=12),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from(["slice", "slice_dp"]),
    st.booleans(),
)
def test_slices_return_every_item_once_in_order(
    batch: list[int], dp: int, tp: int, pp: int, fsdp: int, dispatch: str, sync: bool
) -> None:
    """As one worker with the whole batch, for any mesh, with small and empty batches too."""
    layout = Layout.of(DeviceMesh.from_sizes(dp_size=dp, tp_size=tp, pp_size=pp, fsdp_size=fsdp))
    assert run(Modes(dispatch, "all", "flatten", sync), layout, square, batch) == square(batch)


def test_slice_dp_gives_both_workers_of_a_replica_the_same_and_collects_once() -> None:
    """In Twinkle, dp 2 x tp 2 returned every result twice."""
    planned = plan(Modes("slice_dp"), DP2_TP2, ([1, 2, 3],), {})
    assert called(planned) == {0: [1, 2], 1: [1, 2], 2: [3], 3: [3]}
    assert [call.order for call in planned.calls] == [0, None, 1, None]


def test_slice_gives_every_worker_its_own_share() -> None:
    """Also within a replica."""
    planned = plan(Modes("slice"), DP2_TP2, ([1, 2, 3, 4, 5],), {})
    assert called(planned) == {0: [1, 2], 1: [3], 2: [4], 3: [5]}


def test_slice_does_not_call_workers_without_a_share() -> None:
    """Two items, four workers: two calls; a collective method calls all, and answers of idle ones are dropped."""
    assert called(plan(Modes("slice"), FOUR, ([1, 2],), {})) == {0: [1], 1: [2]}
    collective = plan(Modes("slice", sync=True), FOUR, ([1, 2],), {})
    assert called(collective) == {0: [1], 1: [2], 2: [], 3: []}
    assert [call.order for call in collective.calls] == [0, 1, None, None]


def test_slice_keeps_a_dict_and_a_string_whole() -> None:
    """In Twinkle, the messages of one dict were split across workers."""
    item = {"messages": [1, 2, 3, 4]}
    for whole in (item, "abcd", np.arange(4), Pair(1, 2), None):
        planned = plan(Modes("slice"), FOUR, ([1, 2], whole), {"also": whole})
        assert all(call.args[1] is whole and call.kwargs["also"] is whole for call in planned.calls)
    assert set(called(plan(Modes("slice"), FOUR, (item,), {}))) == {0, 1, 2, 3}


def test_slice_splits_tuples_and_keywords_too() -> None:
    """Slices of a tuple are tuples."""
    planned = plan(Modes("slice"), Layout.data_parallel(2), ((1, 2, 3),), {"weights": [4, 5, 6]})
    assert [(call.args, call.kwargs) for call in planned.calls] == [
        (((1, 2),), {"weights": [4, 5]}),
        (((3,),), {"weights": [6]}),
    ]


def test_slice_refuses_lists_of_different_lengths() -> None:
    """A list that is not a batch would be split silently."""
    with pytest.raises(RequestError, match="argument 0 has 4, stop has 2"):
        plan(Modes("slice"), FOUR, ([1, 2, 3, 4],), {"stop": ["a", "b"]})


def test_empty_batch_calls_no_worker_when_the_result_is_a_list() -> None:
    """And one replica if the result needs an answer."""
    assert plan(Modes("slice_dp", collect="flatten"), DP2_TP2, ([],), {}).calls == ()
    assert run(Modes("slice", collect="none"), FOUR, square, []) == []
    assert run(Modes("slice_dp", collect="sum"), DP2_TP2, len, []) == 0
    assert called(plan(Modes("slice_dp", collect="sum"), DP2_TP2, ([],), {})) == {0: [], 1: []}


def test_all_calls_every_worker_and_collects_one_of_each_replica() -> None:
    """Sums count a replica once."""
    planned = plan(Modes("all"), DP2_TP2, ([1, 2],), {})
    assert called(planned) == {worker: [1, 2] for worker in range(4)}
    assert run(Modes("all", collect="sum"), DP2_TP2, sum, [1, 2]) == 6


def test_first_calls_one_worker_with_the_whole_batch() -> None:
    """For any dispatch; its answer is not wrapped in a list."""
    assert called(plan(Modes("slice", "first"), FOUR, ([1, 2],), {})) == {0: [1, 2]}
    assert run(Modes("slice", "first"), FOUR, square, [1, 2]) == [1, 4]


def test_none_returns_a_list_even_when_one_worker_has_a_share() -> None:
    """The form of a result depends on the mesh, not on the size of the batch."""
    assert run(Modes("slice"), FOUR, square, [3]) == [[9]]
    assert run(Modes("slice_dp"), Layout.of(DeviceMesh.from_sizes(tp_size=2)), square, [3]) == [9]
    assert run(Modes("slice"), Layout.data_parallel(1), square, []) == []


def test_last_pp_collects_the_last_stage() -> None:
    """pp 2 x dp 2: ranks 2 and 3 are the last stage."""
    layout = Layout.of(DeviceMesh.from_sizes(pp_size=2, dp_size=2))
    planned = plan(Modes("slice_dp", collect="last_pp"), layout, ([1, 2],), {})
    assert {call.worker: call.order for call in planned.calls} == {0: None, 1: None, 2: 0, 3: 1}


def test_last_pp_first_returns_the_first_answer_of_the_last_stage() -> None:
    """One answer, also where the batch is empty."""
    layout = Layout.of(DeviceMesh.from_sizes(pp_size=2, dp_size=2))
    modes = Modes("slice_dp", collect="last_pp_first")
    planned = plan(modes, layout, ([1, 2],), {})
    assert {call.worker: call.order for call in planned.calls} == {0: None, 1: None, 2: 0, 3: 1}
    assert collect("last_pp_first", ["two", "three"], single=False, mesh=layout.mesh) == "two"
    assert [call.worker for call in plan(modes, layout, ([],), {}).calls if call.order is not None] == [2]
    everyone = Modes("all", collect="last_pp_first")
    assert {call.worker: call.order for call in plan(everyone, layout, (), {}).calls}[2] == 0


def test_avg_is_mean() -> None:
    """Upstream's two names for one mode."""
    for answers in ([1.0, 2.0], [{"a": 1, "b": 3}, {"a": 2, "b": 4}], [np.array([1.0]), np.array([3.0])]):
        results = [collect(method, answers, single=False, mesh=DP2_TP2.mesh) for method in ("avg", "mean")]
        assert results[0] == results[1]
    assert run(Modes("slice", collect="avg"), FOUR, square_sum, [1, 2, 3, 4]) == 7.5


def square_sum(batch: list[int]) -> float:
    return float(sum(item * item for item in batch))


def test_dispatch_function_gives_each_worker_its_arguments() -> None:
    """As documented: length, i, args, kwargs, device_mesh; all answers are collected."""

    def every_other(length: int, i: int, args: Any, kwargs: Any, device_mesh: DeviceMesh) -> Any:
        assert device_mesh.world_size == length
        return (args[0][i::length],), kwargs

    assert run(Modes(every_other, collect="none"), DP2_TP2, square, [1, 2, 3, 4, 5]) == [[1, 25], [4], [9], [16]]
    with pytest.raises(RequestError, match="must return \\(args, kwargs\\)"):
        run(Modes(lambda length, i, args, kwargs, mesh: args), FOUR, square, [1])


def test_peers_divide_workers() -> None:
    """Each caller gets its own; more callers than workers share them."""
    assert [peers(5, rank, 2) for rank in range(2)] == [[0, 1, 2], [3, 4]]
    assert [peers(2, rank, 3) for rank in range(3)] == [[0], [1], [0]]
    assert called(plan(Modes("slice", "peer"), FOUR, ([1, 2],), {}, caller=(1, 2))) == {2: [1], 3: [2]}


def test_layout_joins_ranks_that_ulysses_shares() -> None:
    """Four dp ranks, two per sequence: two parts of the data."""
    assert Layout.of(DeviceMesh.from_sizes(dp_size=4, ulysses_size=2)).data_ranks == (0, 0, 1, 1)
    with pytest.raises(MeshError, match=r"ulysses_size=2 does not divide its 3"):
        Layout.of(DeviceMesh.from_sizes(dp_size=3, ulysses_size=2))


def test_layout_counts_fsdp_as_data_as_twinkle_does() -> None:
    """dp rank x fsdp size + fsdp rank; fsdp is the outer dimension of the mesh."""
    assert Layout.of(DeviceMesh.from_sizes(dp_size=2, fsdp_size=2)).data_ranks == (0, 2, 1, 3)


def test_layout_of_workers_with_several_gpus() -> None:
    """A worker is a replica of two GPUs; two replicas in one worker are refused."""
    mesh = DeviceMesh.from_sizes(dp_size=2, tp_size=2)
    assert Layout.of(mesh, 2).data_ranks == (0, 1)
    with pytest.raises(MeshError, match="2 data-parallel ranks"):
        Layout.of(mesh, 4)
    with pytest.raises(MeshError, match="4 devices cannot be divided"):
        Layout.of(mesh, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dispatch": "slicedp"}, "unknown dispatch 'slicedp', did you mean 'slice_dp'.* Known: all, slice, slice_dp"),
        (
            {"collect": "median"},
            "unknown collect 'median'.*Known: avg, first, flatten, last_pp, last_pp_first, mean, none, sum",
        ),
        ({"execute": "last"}, "unknown execute 'last'.*Known: all, first, peer"),
        ({"collect": len}, "collect is called with \\(all_results, device_mesh\\)"),
        ({"dispatch": lambda x: x}, "dispatch is called with \\(length, i, args"),
        ({"sync": True, "execute": "first"}, "sync=True calls every worker"),
    ],
)
def test_unknown_modes_are_refused(wrong: dict[str, Any], message: str) -> None:
    """At decoration, with the known ones."""
    with pytest.raises(ConfigError, match=message):
        Modes(**wrong)


@pytest.mark.parametrize(
    ("method", "answers", "expected"),
    [
        ("flatten", [[1], [2, 3]], [1, 2, 3]),
        ("flatten", [([1], ["a"]), ([2], ["b"])], ([1, 2], ["a", "b"])),
        ("flatten", [Pair([1], [2]), Pair([3], [4])], Pair([1, 3], [2, 4])),
        ("flatten", [{"ids": [1]}, {"ids": [2]}], {"ids": [1, 2]}),
        ("flatten", [None, None], None),
        ("mean", [1, 4], 2.5),
        ("mean", [{"loss": 1.0}, {"loss": 2.0}], {"loss": 1.5}),
        ("sum", [1, 4], 5),
        ("first", [[1], [2]], [1]),
        ("none", [[1], [2]], [[1], [2]]),
        (lambda results, mesh: (sum(results), mesh.world_size), [1, 2], (3, 4)),
    ],
)
def test_collect_joins_answers(method: Any, answers: list[Any], expected: Any) -> None:
    """To the result of a single worker."""
    assert collect(method, answers, single=False, mesh=DP2_TP2.mesh) == expected


def test_collect_joins_arrays() -> None:
    """Concatenated, or elementwise."""
    one, two = np.array([1.0, 2.0]), np.array([3.0, 5.0])
    mesh = DP2_TP2.mesh
    assert collect("flatten", [one, two], single=False, mesh=mesh).tolist() == [1, 2, 3, 5]
    assert collect("mean", [one, two], single=False, mesh=mesh).tolist() == [2, 3.5]


def test_collect_returns_the_answer_of_a_single_worker_unchanged() -> None:
    """Of any type, as in mode local."""
    thing = object()
    for method in ("flatten", "mean", "sum", "first", "none", "last_pp"):
        assert collect(method, [thing], single=True, mesh=DP2_TP2.mesh) is thing


@pytest.mark.parametrize(
    ("method", "answers", "message"),
    [
        ("flatten", [1.0, 2.0], "joins lists and arrays.*returned float"),
        ("mean", [[1], [2]], "joins numbers and arrays.*returned list"),
        ("sum", [{"a": 1}, {"b": 1}], "the same keys"),
        ("sum", [np.zeros(2), np.zeros(3)], "elementwise"),
    ],
)
def test_collect_refuses_answers_that_it_cannot_join(method: str, answers: list[Any], message: str) -> None:
    """Dicts with other keys have no joint result, and the mean of a list is ambiguous."""
    with pytest.raises(RequestError, match=message):
        collect(method, answers, single=False, mesh=DP2_TP2.mesh)
