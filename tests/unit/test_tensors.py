"""Tensors of a trainer as safetensors files: copied when they are taken, of any kind that has values."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.support.lora import random_adapter
from twinkle_serve import hub
from twinkle_serve.adapters import pack_adapter
from twinkle_serve.checkpoint import named_tensors
from twinkle_serve.errors import AdapterError, StoreError, WeightsError
from twinkle_serve.packing import buckets, stay_as_they_are
from twinkle_serve.tensors import HEADER_ROOM, MappedTensorFile, TensorFile

TENSORS: dict[str, torch.Tensor] = dict(named_tensors(hub.DEMO))


def unpacked(parts: Any) -> dict[str, torch.Tensor]:
    """The tensors of all buckets."""
    return {name: tensor for part in parts for name, tensor in safetensors.torch.load(part.tobytes()).items()}


def equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in others)


def one_tensor() -> Iterator[tuple[str, Any]]:
    memory = torch.empty(max(tensor.numel() for tensor in TENSORS.values()))
    for name, tensor in TENSORS.items():
        yield name, memory[: tensor.numel()].view(tensor.shape).copy_(tensor)


def one_array() -> Iterator[tuple[str, Any]]:
    for name, tensor in one_tensor():
        yield name, tensor.numpy()


def freed_at_once() -> Iterator[tuple[str, Any]]:
    """The memory is overwritten when the next pair is asked for."""
    for name, tensor in TENSORS.items():
        copy = tensor.clone()
        yield name, copy
        copy.fill_(7.0)


@pytest.mark.parametrize("source", [one_tensor, one_array, freed_at_once])
@pytest.mark.parametrize("bucket_bytes", [1, 2**19, 2**30])
def test_memory_that_is_used_again_for_the_next_weight_changes_nothing(
    source: Callable[[], Iterator[tuple[str, Any]]], bucket_bytes: int
) -> None:
    """Gather and offload buffers are filled anew for each pair."""
    assert equal(unpacked(buckets(source(), bucket_bytes)), TENSORS)


class OneMemory(Mapping[str, torch.Tensor]):
    """An adapter's tensors, each in the memory of the one before."""

    def __init__(self) -> None:
        self.config, self.tensors = adapter()
        self._memory = torch.empty(max(tensor.numel() for tensor in self.tensors.values()))

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        return self._memory[: tensor.numel()].view(tensor.shape).copy_(tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def adapter() -> tuple[Any, dict[str, torch.Tensor]]:
    """A LoraConfig and its tensors."""
    from peft import get_peft_model_state_dict

    model = random_adapter(seed=1)
    tensors = get_peft_model_state_dict(model)
    return model.peft_config["default"], {name: tensor.detach() for name, tensor in tensors.items()}


@pytest.mark.parametrize("take", [lambda lazy: lazy, lambda lazy: lazy.items(), lambda lazy: (p for p in lazy.items())])
def test_adapter_from_memory_that_is_used_again_is_whole(take: Callable[[OneMemory], Any]) -> None:
    """A lazy mapping, or pairs, as for weights."""
    lazy = OneMemory()
    assert equal(safetensors.torch.load(pack_adapter(lazy.config, take(lazy)).weights), lazy.tensors)


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        ({}, "no LoRA weights, it is empty"),
        ([], "no LoRA weights, it is empty"),
        (None, "a LoraConfig alone has no weights"),
        ("lora.pt", "must map names to tensors, or be pairs of both, got 'lora.pt'"),
        (3, "must map names to tensors, or be pairs of both, got 3"),
        ([torch.ones(2)], "must map names to tensors, or be pairs of both"),
        ({"q.lora_A.weight": [[1.0]]}, "must map names to tensors, got 'q.lora_A.weight' and list"),
        ({3: torch.ones(2, 2)}, "must map names to tensors, got 3 and Tensor"),
        ({"q.weight": torch.ones(2, 2)}, "no LoRA weights, its first name is 'q.weight'"),
        ([("q.weight", torch.ones(2)), ("base_model.model.q.weight", torch.ones(2))], "'q.weight' twice"),
    ],
)
def test_state_dict_that_is_not_an_adapters_is_refused(state_dict: Any, message: str) -> None:
    """With its kind."""
    with pytest.raises(AdapterError, match=message):
        pack_adapter(adapter()[0], state_dict)


def test_bucket_stays_when_its_tensors_change_later() -> None:
    """Also while it is being sent."""
    own = {name: tensor.clone() for name, tensor in TENSORS.items()}
    parts = list(buckets(own.items(), 2**19))
    for tensor in own.values():
        tensor.zero_()
    assert equal(unpacked(parts), TENSORS)


def dtensor(tensor: torch.Tensor) -> Any:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    return distribute_tensor(tensor, init_device_mesh("cpu", (1,)), [Shard(0)])


@pytest.fixture
def process_group() -> Iterator[None]:
    """Of this process alone, for sharded tensors."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Own(torch.Tensor):  # type: ignore[misc]
    """A class of a trainer's library."""


FORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "numpy": lambda tensor: tensor.numpy(),
    "big-endian": lambda tensor: tensor.numpy().astype(">f4"),
    "parameter": torch.nn.Parameter,
    "with a gradient": lambda tensor: torch.nn.Parameter(tensor) * 1.0,
    "column-major": lambda tensor: tensor.T.contiguous().T if tensor.dim() == 2 else tensor,
    "every second": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    "a class of its own": lambda tensor: tensor.as_subclass(Own),
    "DTensor": dtensor,
    "DTensor parameter": lambda tensor: torch.nn.Parameter(dtensor(tensor)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_weights_and_adapters_take_tensors_as_trainers_have_them(
    process_group: None, form: Callable[[torch.Tensor], Any]
) -> None:
    """Both by the same way, with the values of plain tensors."""
    assert equal(unpacked(buckets(((name, form(tensor)) for name, tensor in TENSORS.items()), 2**19)), TENSORS)
    config, lora = adapter()
    files = pack_adapter(config, {name: form(tensor) for name, tensor in lora.items()})
    assert equal(safetensors.torch.load(files.weights), lora)


def test_shard_of_a_tensor_is_refused(process_group: None) -> None:
    """Of the kind that FSDP's sharded state_dict has, which nothing here can gather."""
    from torch.distributed._shard.sharded_tensor import init_from_local_shards
    from torch.distributed._shard.sharded_tensor.shard import Shard

    shard = Shard.from_tensor_and_offsets(torch.ones(2, 4), [0, 0], 0)
    tensor: Any = init_from_local_shards([shard], 2, 4)
    with pytest.raises(WeightsError, match="weight 'w' is a ShardedTensor"):
        list(buckets({"w": tensor}.items()))


def test_tensor_that_cannot_be_gathered_is_refused() -> None:
    """With the reason of the process group."""

    class Lost(torch.Tensor):  # type: ignore[misc]
        def full_tensor(self) -> None:
            raise RuntimeError("no backend for this device")

    with pytest.raises(WeightsError, match="weight 'w' cannot be read: RuntimeError: no backend for this device"):
        list(buckets({"w": torch.ones(2).as_subclass(Lost)}.items()))


def test_tensors_that_share_memory_are_packed_each() -> None:
    """Views of one storage, and one tensor under several names."""
    flat = torch.arange(24.0)
    tensors = {"a.lora_A.weight": flat[:12].view(2, 6), "a.lora_B.weight": flat[6:18].view(6, 2)}
    tensors["b.lora_A.weight"] = tensors["a.lora_A.weight"]
    assert equal(unpacked(buckets(tensors.items())), tensors)
    config, _ = adapter()
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    assert equal(safetensors.torch.load(pack_adapter(config, tensors).weights), named)


def freed() -> torch.Tensor:
    tensor = torch.ones(2, 4)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.ones(2, 4, device="meta"), "is on the meta device and has no values"),
        (freed, "has no storage: its memory was freed"),
        (torch.nn.UninitializedParameter, "is of a lazy module and has no values"),
        (lambda: torch.nested.nested_tensor([torch.ones(4)]), "is nested. Send it dense"),
        (lambda: torch.nested.nested_tensor([torch.ones(4)], layout=torch.jagged), "is nested. Send it dense"),
        (lambda: torch.ones(2, 4).to_sparse(), "has the layout torch.sparse_coo. Send it dense"),
        (lambda: np.ma.masked_equal([[1.0]], 1.0), "is a masked array"),  # type: ignore[no-untyped-call]
        (lambda: np.array([["a", "b"]]), "is an array of <U1, not of numbers"),
        (lambda: np.array([[1.0, None]]), "is an array of object, not of numbers"),
        (lambda: torch.ones(2, 4, dtype=torch.complex128), "is a tensor of torch.complex128, not of numbers"),
    ],
)
def test_tensor_without_plain_values_is_refused(make: Callable[[], Any], message: str) -> None:
    """By name, as a weight and as a part of an adapter."""
    with pytest.raises(WeightsError, match=f"weight 'w' .*{message}"):
        list(buckets({"w": make()}.items()))
    config, _ = adapter()
    with pytest.raises(AdapterError, match=f"tensor 'q.lora_A.weight' of the adapter .*{message}"):
        pack_adapter(config, {"q.lora_A.weight": make()})


def test_tensors_of_all_dtypes_are_readable() -> None:
    """In whatever order they come: each starts at a multiple of its item size."""
    dtypes = ("bool", "float64", "uint8", "bfloat16", "float8_e4m3fn", "int64", "int8", "float16", "float32", "int16")
    tensors = {name: torch.ones(3).to(getattr(torch, name)) for name in dtypes}
    read = unpacked(buckets(tensors.items()))
    assert read.keys() == tensors.keys()
    assert all(
        read[name].dtype == tensor.dtype and bool((read[name] == tensor).all()) for name, tensor in tensors.items()
    )


@pytest.fixture(params=["memory", "path"])
def new_file(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], TensorFile]:
    """Makes files of either kind."""
    numbers = itertools.count()
    return TensorFile if request.param == "memory" else lambda size: MappedTensorFile(tmp_path / f"{next(numbers)}")


def test_files_of_either_kind_have_the_same_tensors(new_file: Callable[[int], TensorFile]) -> None:
    """Contiguous or not, of torch or numpy, of any byte order, empty, a scalar."""
    tensors: dict[str, Any] = {
        "plain": torch.arange(12, dtype=torch.float32).view(3, 4),
        "transposed": torch.arange(12, dtype=torch.float32).view(3, 4).t(),
        "bfloat16": torch.ones(5, dtype=torch.bfloat16),
        "array": np.arange(6, dtype=np.int64).reshape(2, 3),
        "columns": np.arange(6, dtype=np.int64).reshape(2, 3).T,
        "big-endian": np.arange(4, dtype=">f4"),
        "empty": torch.zeros(0, 3),
        "scalar": np.array(2.5, dtype=np.float32),
    }
    for size in (1, 100, 2**20):
        made = [part.tobytes() for part in buckets(tensors.items(), size, new_file=new_file)]
        expected = [part.tobytes() for part in buckets(tensors.items(), size)]
        assert len(made) == len(expected)
        for one, other in zip(map(safetensors.torch.load, made), map(safetensors.torch.load, expected), strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


@pytest.mark.parametrize("writers", [2, 3, 8])
@pytest.mark.parametrize("size", [1, 900, 2**20])
def test_several_writers_make_the_same_buckets(new_file: Callable[[int], TensorFile], writers: int, size: int) -> None:
    """In the same order."""
    rng = np.random.default_rng(0)
    dtypes = [torch.float32, torch.bfloat16, torch.int8, torch.float64]
    tensors: dict[str, Any] = {
        f"weight-{i}": torch.from_numpy(rng.integers(-100, 100, rng.integers(0, 90))).to(dtypes[i % 4])
        for i in range(60)
    }
    expected = [safetensors.torch.load(part.tobytes()) for part in buckets(tensors.items(), size)]
    found = [
        safetensors.torch.load(part.tobytes())
        for part in buckets(tensors.items(), size, new_file=new_file, writers=writers)
    ]
    assert [part.keys() for part in found] == [part.keys() for part in expected]
    assert all(torch.equal(part[name], tensors[name]) for part in found for name in part)


BAD_TENSORS: dict[str, tuple[Any, str]] = {
    "not finite": (torch.tensor([1.0, float("nan")]), "has 1 values of 2 that are not finite"),
    "meta": (torch.zeros(2, device="meta"), "is on the meta device"),
    "sparse": (torch.zeros(2, 2).to_sparse(), "sparse"),
    "no tensor": (3, "must be pairs of name and tensor"),
    "texts": (np.array(["a"]), "is an array of <U1, not of numbers"),
}


@pytest.mark.parametrize("writers", [1, 3])
@pytest.mark.parametrize("what", BAD_TENSORS)
def test_bad_tensor_is_refused_in_its_turn(what: str, writers: int) -> None:
    """The buckets before it have been made, and no thread is left."""
    bad, said = BAD_TENSORS[what]
    good = {f"weight-{i}": torch.full((4,), float(i)) for i in range(5)}
    tensors: dict[str, Any] = {**good, "bad": bad, "later": torch.zeros(4)}
    made = buckets(tensors.items(), 1, writers=writers)
    first = [next(made) for _ in range(2)]
    assert [list(safetensors.torch.load(part.tobytes())) for part in first] == [["weight-0"], ["weight-1"]]
    with pytest.raises(WeightsError, match=said):
        list(made)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_writers_end_with_their_reader() -> None:
    """Who stops before the last bucket waits for those that are being made, and for no others."""
    files: list[TensorFile] = []

    def new_file(capacity: int) -> TensorFile:
        files.append(TensorFile(capacity))
        return files[-1]

    made = buckets(((f"weight-{i}", torch.ones(4)) for i in range(100)), 1, new_file=new_file, writers=3)
    next(made)
    made.close()  # type: ignore[attr-defined]
    assert len(files) == 3
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_tensors_that_stay_as_they_are() -> None:
    """Those of a dict, of classes that cannot compute their values when they are read."""
    model = torch.nn.Linear(2, 2)
    for steady in (model.state_dict(), dict(model.named_parameters()), {"array": np.ones(2)}):
        assert stay_as_they_are(steady)

    class Sharded(torch.Tensor):  # type: ignore[misc]  # torch has no types here
        pass

    lazy = torch.ones(2).as_subclass(Sharded)
    for other in (model.named_parameters(), [("a", torch.ones(2))], {"a": torch.ones(2), "b": lazy}, "/a/path"):
        assert not stay_as_they_are(other)


def test_full_disk_is_an_error_with_its_remedy() -> None:
    file = MappedTensorFile(Path("/dev/full"))
    with pytest.raises(StoreError, match=r"cannot be written to .*: .*No space left.*--shm-size"):
        file.add("weight", np.zeros(10))


def test_header_beyond_its_room_is_written_too(new_file: Callable[[int], TensorFile]) -> None:
    """With more names than fit before the tensors."""
    file, count = new_file(0), HEADER_ROOM // 50
    for number in range(count):
        file.add(f"weight-{number}", np.full(1, number, np.int64))
    whole = file.finish()
    start = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    assert start > HEADER_ROOM and len(json.loads(whole[8:start].tobytes())) == count
    assert int(safetensors.torch.load(whole.tobytes())[f"weight-{count - 1}"]) == count - 1
