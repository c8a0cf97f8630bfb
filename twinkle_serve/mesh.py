"""Device meshes and device groups.

Names and the order of dimensions follow Twinkle's DeviceMesh and DeviceGroup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.errors import MeshError
from twinkle_serve.platform import Platform
from twinkle_serve.validation import one_of, whole_number

DeviceType: TypeAlias = Literal["auto", "cpu", "cuda"]
DEVICE_TYPES: tuple[DeviceType, ...] = get_args(DeviceType)


def _size(name: str, value: object) -> int:
    return whole_number(f"device_mesh.{name}", value, 1, error=MeshError)


TRAINING_SIZES = ("ulysses_size", "ep_size", "etp_size", "ep_fsdp_size", "vpp_size")
"""Sizes besides the dimensions of a mesh; a sampler has none of them."""

DEVICE_ALIASES = {"GPU": "cuda", "gpu": "cuda", "CPU": "cpu"}
"""Twinkle's names for the device types."""


def _device_type(where: str, value: object) -> DeviceType:
    value = DEVICE_ALIASES.get(value, value) if isinstance(value, str) else value
    return one_of(f"{where}.device_type", value, DEVICE_TYPES, error=MeshError)


DIMENSIONS = ("fsdp", "pp", "dp", "cp", "tp")
"""Dimensions of a mesh, the innermost last."""


@dataclass(frozen=True, init=False)
class DeviceMesh:
    """Devices arranged as fsdp x pp x dp x cp x tp, ranks counted with tp innermost.

    Build one with `from_sizes`. A dimension that is not named has size 1 and no axis in `mesh`.
    """

    sizes: tuple[tuple[str, int], ...]
    """Named dimensions in order, e.g. `(("dp", 2), ("tp", 2))`."""
    device_type: str = "auto"
    """auto, cpu or cuda. auto: cuda if the cluster has GPUs, else cpu."""
    ulysses_size: int = 1
    """Neighbouring data-parallel ranks that share a sequence. Training only."""
    ep_size: int = 1
    """Expert-parallel size. Training only."""
    etp_size: int = 1
    """Tensor-parallel size of experts. Training only."""
    ep_fsdp_size: int = 1
    """FSDP size of experts. Training only."""
    vpp_size: int = 1
    """Virtual pipeline stages. Training only."""
    sequence_parallel: bool = False
    """Whether tensor-parallel ranks split the sequence. Training only."""

    def __init__(
        self,
        sizes: tuple[tuple[str, int], ...] | None = None,
        device_type: str | None = "auto",
        ulysses_size: int | None = None,
        ep_size: int | None = None,
        etp_size: int | None = None,
        ep_fsdp_size: int | None = None,
        vpp_size: int | None = None,
        sequence_parallel: bool = False,
        *,
        mesh: object = None,
        mesh_dim_names: Sequence[str] | None = None,
    ) -> None:
        """Makes a mesh of an array of ranks, as Twinkle's constructor does; or of the sizes of its dimensions.

        Args:
            sizes: named dimensions in order.
            mesh: array of ranks instead, with one axis per name in `mesh_dim_names`.
            mesh_dim_names: some of fsdp, pp, dp, cp and tp, in this order.

        Raises:
            MeshError: other dimensions, or ranks in another order.
        """
        if (sizes is None) == (mesh is None):
            raise MeshError("DeviceMesh takes an array of ranks as mesh=…, with mesh_dim_names. Or use from_sizes.")
        if sizes is not None and not (isinstance(sizes, tuple) and all(isinstance(pair, tuple) for pair in sizes)):
            raise MeshError(f"DeviceMesh.sizes must be pairs of name and size, got {sizes!r:.80}. Or use mesh=….")
        values: dict[str, object] = {
            "sizes": _sizes_of(mesh, mesh_dim_names) if sizes is None else sizes,
            "device_type": _device_type("device_mesh", device_type or "auto"),
            "sequence_parallel": sequence_parallel,
        }
        training = (ulysses_size, ep_size, etp_size, ep_fsdp_size, vpp_size)
        values |= {
            name: 1 if size is None else _size(name, size) for name, size in zip(TRAINING_SIZES, training, strict=True)
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_sizes(
        cls,
        *,
        world_size: int = 1,
        dp_size: int = 1,
        fsdp_size: int | None = None,
        tp_size: int | None = None,
        pp_size: int | None = None,
        ulysses_size: int | None = None,
        cp_size: int | None = None,
        ep_size: int | None = None,
        etp_size: int | None = None,
        ep_fsdp_size: int | None = None,
        vpp_size: int | None = None,
        device_type: str | None = "auto",
        sequence_parallel: bool = False,
    ) -> DeviceMesh:
        """Builds a mesh from the sizes of its dimensions.

        Args:
            world_size: number of devices. 1 stands for the product of the dimensions; any other value must equal it.
            dp_size: data-parallel replicas.
            fsdp_size: FSDP shards.
            tp_size: tensor-parallel devices.
            pp_size: pipeline stages.
            ulysses_size: neighbouring data-parallel ranks that share a sequence.
            cp_size: context-parallel devices.
            ep_size: expert-parallel devices.
            etp_size: tensor-parallel devices of experts.
            ep_fsdp_size: FSDP shards of experts.
            vpp_size: virtual pipeline stages.
            device_type: auto, cpu or cuda; GPU, gpu and CPU are accepted too.
            sequence_parallel: whether tensor-parallel ranks split the sequence.

        Raises:
            MeshError: a size is not a whole number of at least 1, the device type is unknown, or `world_size` differs
                from the product of the dimensions.
        """
        named = {"fsdp": fsdp_size, "pp": pp_size, "dp": dp_size, "cp": cp_size, "tp": tp_size}
        sizes = tuple((name, _size(f"{name}_size", size)) for name, size in named.items() if size is not None)
        world = _size("world_size", world_size)
        product = prod(size for _, size in sizes)
        if world not in (1, product):
            dims = " x ".join(f"{name}_size={size}" for name, size in sizes)
            rest, remainder = divmod(world * dict(sizes)["dp"], product)
            fix = f", or set dp_size={rest}" if not remainder else ""
            raise MeshError(
                f"device_mesh.world_size={world} contradicts its dimensions, {dims} = {product}. "
                f"Leave world_size out{fix}."
            )
        if not isinstance(sequence_parallel, bool):
            raise MeshError(f"device_mesh.sequence_parallel must be true or false, got {sequence_parallel!r}.")
        training = zip(TRAINING_SIZES, (ulysses_size, ep_size, etp_size, ep_fsdp_size, vpp_size), strict=True)
        return cls(
            sizes=sizes,
            device_type=device_type,
            sequence_parallel=sequence_parallel,
            **{name: _size(name, size) for name, size in training if size is not None},  # type: ignore[arg-type]
        )

    @property
    def mesh_dim_names(self) -> tuple[str, ...]:
        """Names of the dimensions, in the order of the axes of `mesh`."""
        return tuple(name for name, _ in self.sizes)

    @cached_property
    def mesh(self) -> NDArray[np.int64]:
        """Ranks of the devices, int64. One axis per entry of `sizes`, of that size."""
        return np.arange(self.world_size).reshape([size for _, size in self.sizes])

    @property
    def world_size(self) -> int:
        """Number of devices."""
        return prod(size for _, size in self.sizes)

    def size(self, dim: str) -> int:
        """Size of a dimension by its short name (`dp`, `tp`, …); 1 if the mesh does not name it."""
        return dict(self.sizes).get(dim, 1)

    @property
    def dp_size(self) -> int:
        """Data-parallel replicas."""
        return self.size("dp")

    @property
    def tp_size(self) -> int:
        """Tensor-parallel devices."""
        return self.size("tp")

    @property
    def pp_size(self) -> int:
        """Pipeline stages."""
        return self.size("pp")

    @property
    def data_world_size(self) -> int:
        """Number of data-parallel ranks, FSDP shards among them: parts into which data is divided.

        Raises:
            MeshError: they cannot be divided by ulysses_size.
        """
        ranks, rest = divmod(self.dp_size * self.size("fsdp"), self.ulysses_size)
        if rest:
            raise MeshError(
                f"device_mesh.ulysses_size={self.ulysses_size} does not divide dp_size={self.dp_size} x "
                f"fsdp_size={self.size('fsdp')}."
            )
        return ranks

    @property
    def data_rank(self) -> int:
        """Data-parallel rank of this process; 0 if it is not in the mesh."""
        return self.get_data_rank_from_global_rank(Platform.get_rank())

    def get_data_rank_from_global_rank(self, global_rank: int) -> int:
        """Data-parallel rank of a process; 0 if it is not in the mesh."""
        place = self._place(global_rank)
        return (place.get("dp", 0) * self.size("fsdp") + place.get("fsdp", 0)) // self.ulysses_size

    def get_slice(self, total_length: int, rank: int | None = None) -> slice:
        """Part of `total_length` items of a data-parallel rank, by default this process's."""
        rank = self.data_rank if rank is None else rank
        if self.data_world_size == 1:
            return slice(0, total_length)
        rank = whole_number("get_slice: rank", rank, 0, self.data_world_size - 1, error=MeshError)
        items, rest = divmod(total_length, self.data_world_size)
        return slice(rank * items + min(rank, rest), (rank + 1) * items + min(rank + 1, rest))

    def has_dim(self, dim_name: str) -> bool:
        """Whether the mesh names a dimension."""
        return dim_name in self.mesh_dim_names

    def get_dim_size(self, dim_name: str) -> int:
        """Size of a dimension.

        Raises:
            MeshError: the mesh does not name it.
        """
        if not self.has_dim(dim_name):
            raise MeshError(f"device_mesh has no dimension {dim_name!r}. It has: {', '.join(self.mesh_dim_names)}.")
        return self.size(dim_name)

    def _place(self, rank: int) -> dict[str, int]:
        """Returns the index of a rank in each dimension; {} if it is not in the mesh."""
        if not 0 <= rank < self.world_size:
            return {}
        return dict(zip(self.mesh_dim_names, map(int, np.unravel_index(rank, self.mesh.shape)), strict=True))

    def _own(self, dim: str) -> int | None:
        return self._place(Platform.get_rank()).get(dim)

    def _named(self, dim: str) -> int:
        return self.size(dim) if self.has_dim(dim) else 0

    # Of this process, None if it is not in the mesh or the mesh does not name the dimension; and sizes of dimensions, 0
    # for one that the mesh does not name. Names and values are Twinkle's.
    dp_rank = property(lambda self: self._own("dp"), doc="Data-parallel rank of this process.")
    fsdp_rank = property(lambda self: self._own("fsdp"), doc="FSDP rank of this process.")
    tp_rank = property(lambda self: self._own("tp"), doc="Tensor-parallel rank of this process.")
    pp_rank = property(lambda self: self._own("pp"), doc="Pipeline stage of this process.")
    ep_rank = property(lambda self: self._own("ep"), doc="None: experts are no dimension of a mesh here.")
    cp_rank = property(lambda self: self._own("cp"), doc="Context-parallel rank of this process.")
    dp_world_size = property(lambda self: self._named("dp"), doc="Data-parallel replicas.")
    fsdp_world_size = property(lambda self: self._named("fsdp"), doc="FSDP shards.")
    tp_world_size = property(lambda self: self._named("tp"), doc="Tensor-parallel devices.")
    pp_world_size = property(lambda self: self._named("pp"), doc="Pipeline stages.")
    ep_world_size = property(lambda self: self._named("ep"), doc="0: experts are no dimension of a mesh here.")
    cp_world_size = property(lambda self: self._named("cp"), doc="Context-parallel devices.")

    @property
    def etp_world_size(self) -> int:
        """Tensor-parallel devices of experts."""
        return self.etp_size

    @property
    def devices_per_replica(self) -> int:
        """Number of devices of one data-parallel replica."""
        return self.tp_size * self.pp_size

    def require_sampling(self) -> DeviceMesh:
        """Returns the mesh itself if a sampler can use it.

        Raises:
            MeshError: a training-only dimension is larger than 1.
        """
        training = {name: size for name, size in self.sizes if name in ("fsdp", "cp") and size > 1}
        for name in TRAINING_SIZES:
            if getattr(self, name) > 1:
                training[name.removesuffix("_size")] = getattr(self, name)
        if training:
            name, size = next(iter(training.items()))
            raise MeshError(
                f"device_mesh.{name}_size={size}: a sampler has the dimensions dp, tp and pp. "
                f"Leave {name}_size out, and give its devices to dp_size or tp_size."
            )
        if self.sequence_parallel:
            raise MeshError("device_mesh.sequence_parallel=true is for training. Leave it out.")
        return self


def _sizes_of(mesh: object, names: Sequence[str] | None) -> tuple[tuple[str, int], ...]:
    """Returns the named dimensions of an array of ranks."""
    try:
        ranks = np.asarray(mesh)
    except ValueError as error:
        raise MeshError(f"device_mesh is no array of ranks: {error}") from error
    names = tuple(names or ())
    if list(names) != [name for name in DIMENSIONS if name in names] or len(names) != ranks.ndim:
        raise MeshError(
            f"device_mesh has the dimensions {', '.join(names) or 'none'} for an array of {ranks.ndim} axes. Name each "
            f"axis: {', '.join(DIMENSIONS)}, in this order."
        )
    if not np.array_equal(ranks.ravel(), np.arange(ranks.size)):
        raise MeshError(f"device_mesh must have the ranks 0, 1, … in order, got {ranks.ravel().tolist()}.")
    return tuple(zip(names, ranks.shape, strict=True))


@dataclass(frozen=True)
class DeviceGroup:
    """A named set of devices reserved for one role of a run.

    Raises:
        MeshError: an empty name, repeated or negative ranks, a count below 1, an unknown device type, or a number of
            devices that is not divisible by `gpus_per_worker`.
    """

    name: str
    """Unique in the cluster."""
    ranks: int | list[int]
    """Number of devices, or a list of ranks."""
    device_type: str = "auto"
    """auto, cpu or cuda. auto: cuda if the cluster has GPUs, else cpu. A device of cpu is a core."""
    visible_devices: str | None = None
    """Comma-separated device ids to choose from, as in CUDA_VISIBLE_DEVICES. None: all."""
    gpus_per_worker: int = 1
    """Devices of each worker of a remote class; they share a node."""

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise MeshError(f"DeviceGroup.name must be a non-empty string, got {self.name!r}.")
        where = f"DeviceGroup {self.name!r}"
        object.__setattr__(self, "device_type", _device_type(where, self.device_type))
        if isinstance(self.ranks, list):
            bad = [rank for rank in self.ranks if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0]
            if bad or not self.ranks or len(set(self.ranks)) != len(self.ranks):
                raise MeshError(f"{where}: ranks must be distinct whole numbers from 0, got {self.ranks!r}.")
        elif isinstance(self.ranks, bool) or not isinstance(self.ranks, int) or self.ranks < 1:
            raise MeshError(f"{where}: ranks must be a count of at least 1 or a list of ranks, got {self.ranks!r}.")
        per_worker = whole_number(f"{where}: gpus_per_worker", self.gpus_per_worker, 1, error=MeshError)
        object.__setattr__(self, "gpus_per_worker", per_worker)
        if self.world_size % per_worker:
            raise MeshError(
                f"{where}: {self.world_size} devices cannot be divided into workers of gpus_per_worker={per_worker}."
            )

    @property
    def world_size(self) -> int:
        """Number of devices."""
        return len(self.ranks) if isinstance(self.ranks, list) else self.ranks
