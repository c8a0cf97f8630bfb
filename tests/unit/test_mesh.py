"""Meshes and groups: valid sizes, and errors that name the invalid one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve import DeviceGroup, DeviceMesh
from twinkle_serve.errors import MeshError


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
