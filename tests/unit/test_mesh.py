"""Meshes and groups: valid sizes, and errors that name the invalid one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve import DeviceGroup, DeviceMesh
from twinkle_serve.errors import MeshError, UnsupportedError
from twinkle_serve.platform import Platform


def test_mesh_arranges_ranks_in_the_order_fsdp_pp_dp_cp_tp() -> None:
    """tp is innermost: neighbouring ranks share a replica."""
    mesh = DeviceMesh.from_sizes(tp_size=2, dp_size=3, pp_size=2)
    assert mesh.mesh_dim_names == ("pp", "dp", "tp")
    assert mesh.mesh.shape == (2, 3, 2)
    assert mesh.mesh.ravel().tolist() == list(range(12))
    assert (mesh.world_size, mesh.dp_size, mesh.tp_size, mesh.pp_size) == (12, 3, 2, 2)
    assert mesh.devices_per_replica == 4


def test_mesh_without_sizes_is_one_device() -> None:
    """Every dimension defaults to 1."""
    mesh = DeviceMesh.from_sizes()
    assert (mesh.world_size, mesh.devices_per_replica) == (1, 1)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4))
def test_mesh_world_size_is_the_product(dp: int, tp: int, pp: int) -> None:
    """Given or derived; any other value is an error."""
    sizes: dict[str, Any] = {"dp_size": dp, "tp_size": tp, "pp_size": pp}
    product = math.prod(sizes.values())
    assert DeviceMesh.from_sizes(**sizes).world_size == product
    assert DeviceMesh.from_sizes(world_size=product, **sizes).world_size == product
    with pytest.raises(MeshError, match=f"world_size={product + 1} contradicts"):
        DeviceMesh.from_sizes(world_size=product + 1, **sizes)


@pytest.mark.parametrize("value", [0, -1, 1.0, "2", True, float("nan"), np.float64(2)])
def test_mesh_refuses_invalid_sizes(value: Any) -> None:
    """The error names the dimension and the value."""
    with pytest.raises(MeshError, match=r"device_mesh.tp_size must be"):
        DeviceMesh.from_sizes(tp_size=value)


def test_mesh_refuses_an_unknown_device_type() -> None:
    """The message lists the known ones."""
    with pytest.raises(MeshError, match="auto, cpu, cuda, got 'tpu'"):
        DeviceMesh.from_sizes(device_type="tpu")


@pytest.mark.parametrize("name", ["fsdp", "cp", "ep", "etp", "vpp", "ulysses"])
def test_mesh_refuses_training_dimensions_for_sampling(name: str) -> None:
    """A sampler has dp, tp and pp; other sizes must be 1."""
    one, two = ({f"{name}_size": size} for size in (1, 2))
    DeviceMesh.from_sizes(**one).require_sampling()  # type: ignore[arg-type]
    with pytest.raises(MeshError, match=f"{name}_size=2: a sampler has"):
        DeviceMesh.from_sizes(**two).require_sampling()  # type: ignore[arg-type]


def test_group_counts_its_devices() -> None:
    """Ranks are a count or a list."""
    assert DeviceGroup("sampler", 4).world_size == 4
    assert DeviceGroup("sampler", [0, 2], device_type="cuda").world_size == 2


@pytest.mark.parametrize(
    "bad",
    [
        {"name": "", "ranks": 1},
        {"name": "g", "ranks": 0},
        {"name": "g", "ranks": []},
        {"name": "g", "ranks": [0, 0]},
        {"name": "g", "ranks": [-1]},
        {"name": "g", "ranks": True},
        {"name": "g", "ranks": 1, "device_type": "tpu"},
        {"name": "g", "ranks": 3, "gpus_per_worker": 2},
        {"name": "g", "ranks": 3, "gpus_per_worker": 0},
    ],
)
def test_group_refuses_invalid_arguments(bad: dict[str, Any]) -> None:
    """Each raises a MeshError."""
    with pytest.raises(MeshError):
        DeviceGroup(**bad)


def test_mesh_places_this_process_by_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each dimension that it names; None in others, and for a rank that it does not have."""
    mesh = DeviceMesh.from_sizes(dp_size=2, fsdp_size=3, tp_size=2)
    for rank in range(12):
        monkeypatch.setenv("RANK", str(rank))
        fsdp, dp, tp = (int(at[0]) for at in np.where(mesh.mesh == rank))
        assert (mesh.fsdp_rank, mesh.dp_rank, mesh.tp_rank, mesh.pp_rank, mesh.cp_rank) == (fsdp, dp, tp, None, None)
        assert mesh.data_rank == mesh.get_data_rank_from_global_rank(rank) == dp * 3 + fsdp
    for outside in ("12", "-1"):
        monkeypatch.setenv("RANK", outside)
        assert mesh.dp_rank is mesh.tp_rank is None and mesh.data_rank == 0
    monkeypatch.delenv("RANK")
    assert mesh.dp_rank is None and mesh.data_rank == 0


def test_mesh_counts_each_dimension_and_the_parts_of_data() -> None:
    """0 for a dimension that it does not name, as upstream's."""
    mesh = DeviceMesh.from_sizes(dp_size=4, fsdp_size=2, tp_size=2, ulysses_size=2)
    sizes = ("dp", "fsdp", "tp", "pp", "cp", "ep")
    assert [getattr(mesh, f"{name}_world_size") for name in sizes] == [4, 2, 2, 0, 0, 0]
    assert (mesh.data_world_size, mesh.etp_world_size, mesh.world_size) == (4, 1, 16)
    assert [mesh.get_slice(10, rank) for rank in range(4)] == [slice(0, 3), slice(3, 6), slice(6, 8), slice(8, 10)]
    assert mesh.get_slice(10) == slice(0, 3) and mesh.has_dim("tp") and not mesh.has_dim("pp")
    assert mesh.get_dim_size("fsdp") == 2
    with pytest.raises(MeshError, match="no dimension 'pp'"):
        mesh.get_dim_size("pp")
    with pytest.raises(MeshError, match="ulysses_size=2 does not divide dp_size=3"):
        _ = DeviceMesh.from_sizes(dp_size=3, ulysses_size=2).data_world_size


def test_mesh_is_made_of_an_array_of_ranks_too() -> None:
    """If it is one that from_sizes makes; another order of ranks or dimensions is refused, not rearranged."""
    ranks = np.arange(16).reshape(2, 2, 4)
    made = DeviceMesh(mesh=ranks, mesh_dim_names=("pp", "dp", "tp"), device_type="GPU", ep_size=None)
    assert made == DeviceMesh.from_sizes(pp_size=2, dp_size=2, tp_size=4, device_type="cuda")
    assert hash(made) == hash(DeviceMesh.from_sizes(pp_size=2, dp_size=2, tp_size=4, device_type="cuda"))
    assert DeviceMesh(mesh=[0, 1], mesh_dim_names=("dp",), device_type=None) == DeviceMesh.from_sizes(dp_size=2)
    wrong: list[tuple[Any, Any, str]] = [
        (ranks, ("dp", "pp", "tp"), "in this order"),
        (ranks, ("pp", "dp"), "array of 3 axes"),
        (ranks, ("pp", "dp", "sp"), "in this order"),
        (ranks, None, "dimensions none"),
        (ranks[::-1], ("pp", "dp", "tp"), "ranks 0, 1"),
        (None, None, "takes an array of ranks"),
    ]
    for mesh, names, message in wrong:
        with pytest.raises(MeshError, match=message):
            DeviceMesh(mesh=mesh, mesh_dim_names=names)


def test_platform_reads_what_launchers_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """And knows a process that no launcher has started."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NNODES", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    alone = (Platform.get_rank(), Platform.get_local_rank(), Platform.get_world_size(), Platform.get_local_world_size())
    assert alone == (-1, -1, 1, 1) and (Platform.get_nnodes(), Platform.get_node_rank()) == (1, 0)
    assert Platform.is_master() and Platform.is_local_master() and Platform.is_last_rank()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not Platform.is_master() and not Platform.is_local_master() and Platform.is_last_rank()
    assert Platform.get_local_device(platform="GPU") == "cuda:1" and Platform.get_local_device(platform="cpu") == "cpu"
    assert Platform.device_prefix("CUDA") == "cuda" and Platform.visible_device_env("GPU") == "CUDA_VISIBLE_DEVICES"
    assert Platform.device_prefix() in ("cuda", "cpu") and Platform.visible_device_env("CPU") is None
    with pytest.raises(UnsupportedError, match="one of GPU, CUDA, CPU, got 'NPU'"):
        Platform.get_platform("NPU")


def test_mesh_of_other_arguments_is_refused() -> None:
    """With a MeshError: upstream's arguments by position, an array of no shape, sizes of other types."""
    ranks, ragged = np.arange(4).reshape(2, 2), [[0, 1], [2]]
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (("cuda", ranks, ("dp", "tp")), {}, "sizes must be pairs"),
        ((5,), {}, "sizes must be pairs"),
        ((), {"mesh": ragged, "mesh_dim_names": ("dp", "tp")}, "no array of ranks"),
        ((), {"mesh": [0, 1], "mesh_dim_names": ("dp",), "ulysses_size": "2"}, "ulysses_size must be a whole number"),
    ]
    for positional, named, message in wrong:
        with pytest.raises(MeshError, match=message):
            DeviceMesh(*positional, **named)


def test_part_of_a_rank_that_is_not_there_is_refused() -> None:
    """It would be empty, or that of another rank. A mesh of one rank has one part, the whole."""
    for rank in (2, -1, 5):
        with pytest.raises(MeshError, match="rank must be between 0 and 1"):
            DeviceMesh.from_sizes(dp_size=2).get_slice(10, rank)
    assert DeviceMesh.from_sizes(tp_size=2).get_slice(10, 1) == slice(0, 10)
