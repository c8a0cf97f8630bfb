"""Tensors of torch and arrays of numpy as safetensors files. torch is imported only for torch tensors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor

AnyTensor: TypeAlias = "Tensor | NDArray[Any]"

Tensors: TypeAlias = Mapping[str, AnyTensor] | Iterable[tuple[str, AnyTensor]]
"""Tensors by name, or pairs of both: torch's on any device, or numpy's."""

DtypeClass: TypeAlias = Literal["float", "fp8", "fp4", "integer", "bool", "complex"]
"""Kinds of values. Floats of any width convert into each other."""

DTYPES: dict[str, tuple[str, int, DtypeClass]] = {
    "float64": ("F64", 8, "float"),
    "float32": ("F32", 4, "float"),
    "float16": ("F16", 2, "float"),
    "bfloat16": ("BF16", 2, "float"),
    "float8_e4m3fn": ("F8_E4M3", 1, "fp8"),
    "float8_e5m2": ("F8_E5M2", 1, "fp8"),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1, "fp8"),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1, "fp8"),
    "float8_e8m0fnu": ("F8_E8M0", 1, "fp8"),
    "int64": ("I64", 8, "integer"),
    "int32": ("I32", 4, "integer"),
    "int16": ("I16", 2, "integer"),
    "int8": ("I8", 1, "integer"),
    "uint64": ("U64", 8, "integer"),
    "uint32": ("U32", 4, "integer"),
    "uint16": ("U16", 2, "integer"),
    "uint8": ("U8", 1, "integer"),
    "bool": ("BOOL", 1, "bool"),
    "complex64": ("C64", 8, "complex"),
}
"""Name in safetensors, bytes per value and class of each dtype, by its name in torch and numpy."""

BITS: dict[str, int] = {name: 8 * size for name, size, _ in DTYPES.values()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits per value, by safetensors' name of the dtype."""

CLASSES: dict[str, DtypeClass] = {name: kind for name, _, kind in DTYPES.values()} | dict.fromkeys(
    ("F4", "F6_E2M3", "F6_E3M2"), "fp4"
)
"""Class by safetensors' name of the dtype."""

MAX_FINITE: dict[str, float] = {
    "F16": 65504.0,
    "BF16": float.fromhex("0x1.fep127"),
    "F32": float.fromhex("0x1.fffffep127"),
    "F64": float.fromhex("0x1.fffffffffffffp1023"),
}
"""Largest finite value, by safetensors' name of the dtype."""

_EXPONENT_BITS = {"F16": 5, "BF16": 8, "F32": 8, "F64": 11}

WRAPPERS: dict[str, str] = {
    "_fsdp_wrapped_module.": "Its name is FSDP's. Take the names of FSDP's own state_dict, or that part out of them.",
    "_flat_param": "It is a flat parameter of FSDP. Take the full state_dict that FSDP gathers.",
    "_orig_mod.": "Its name is torch.compile's. Send the state_dict of model._orig_mod.",
    "_checkpoint_wrapped_module.": "Its name is activation checkpointing's. Take that part out of the names.",
    "parametrizations.": "It is parametrized. Call torch.nn.utils.parametrize.remove_parametrizations first.",
    "module.": "Its name is that of a wrapper, such as DistributedDataParallel. Send the state_dict of model.module.",
}
"""What to do about a name that a trainer's wrapper gave, by the start of one of its parts."""

RANGE_CHUNK_BYTES = 2**18
"""Stays in a core's cache."""

HEADER_ROOM = 2**20
"""Bytes kept free for the header before the tensors; a longer header costs a copy."""


def is_tensor(value: object) -> bool:
    """Whether a value is a tensor or an array, of whatever library. Some tensors of torch raise when asked for their
    shape: nested ones, and those of lazy modules."""
    try:
        return hasattr(value, "shape")
    except RuntimeError:
        return True


def gathered(tensor: object) -> AnyTensor:
    """Returns the full tensor, detached and on its device; anything but a torch tensor becomes a numpy array.

    A sharded tensor (DTensor) is gathered, in which every rank of its mesh must take part.

    Raises:
        ValueError: it has no values, or its values are not plain numbers. The message continues a sentence that begins
            with the tensor's name.
    """
    if getattr(tensor, "is_meta", False):
        raise ValueError("is on the meta device and has no values. Load or initialize the model first.")
    if hasattr(tensor, "local_shards"):
        raise ValueError("is a ShardedTensor, which holds a part of the values. Take FSDP's full state_dict.")
    if hasattr(tensor, "cls_to_become"):
        raise ValueError("is of a lazy module and has no values. Call the module once to initialize it.")
    if isinstance(tensor, np.ma.MaskedArray):
        raise ValueError("is a masked array, whose mask would be lost. Fill it.")
    try:
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        plain = full.detach() if hasattr(full, "detach") else np.asarray(full)
    except Exception as error:  # of a process group, or of a class that is not torch's or numpy's
        raise ValueError(f"cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(plain, np.ndarray):
        return _dense(plain)
    if plain.dtype.name not in DTYPES:
        raise ValueError(f"is an array of {plain.dtype}, not of numbers.")
    return plain


def _dense(tensor: Any) -> Tensor:
    """Returns a detached torch tensor. Raises ValueError where its values are not in its own memory, or packed."""
    import torch

    if tensor.is_nested:
        raise ValueError("is nested. Send it dense.")
    if tensor.layout != torch.strided:
        raise ValueError(f"has the layout {tensor.layout}. Send it dense.")
    if dtype_name(tensor) not in DTYPES:
        raise ValueError(f"is a tensor of {tensor.dtype}, not of numbers.")
    if type(tensor) is not torch.Tensor:
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        except Exception as error:  # of the class
            raise ValueError(f"is a {type(tensor).__name__} and cannot be copied: {error}") from error
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        raise ValueError("has no storage: its memory was freed, as FSDP does with gathered weights. Gather it first.")
    dense: Tensor = tensor
    return dense


def dtype_name(tensor: AnyTensor) -> str:
    """Returns the name of a tensor's dtype without its library: `float32`."""
    return tensor.dtype.name if isinstance(tensor, np.ndarray) else str(tensor.dtype).removeprefix("torch.")


def item_bytes(tensor: AnyTensor) -> int:
    """Returns the size of a value of a tensor as it is stored. Raises ValueError for a dtype that is not."""
    if (name := dtype_name(tensor)) not in DTYPES:
        raise ValueError(f"has the dtype {name}, which is not stored.")
    return DTYPES[name][1]


def stored_dtype(dtype: object) -> str:
    """Returns safetensors' name of a dtype of torch."""
    return DTYPES[str(dtype).removeprefix("torch.")][0]


def count_nonfinite(tensor: AnyTensor) -> int:
    """Counts the values of a gathered tensor or array that are NaN or infinite."""
    if isinstance(tensor, np.ndarray):
        return 0 if tensor.dtype.kind in "iub" else int((~np.isfinite(tensor)).sum())
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    if tensor.element_size() == 1:  # neither call takes 8-bit floats
        tensor = tensor.float()
    # The extremes of a tensor with NaN are NaN. torch.isfinite takes 20 times as long, and memory.
    if all(map(math.isfinite, torch.stack(torch.aminmax(tensor)).tolist())):
        return 0
    return int((~torch.isfinite(tensor)).sum())


_LARGEST_FINITE_BITS = {
    "F16": 0x7BFF,
    "BF16": 0x7F7F,
    "F32": 0x7F7FFFFF,
    "F64": 0x7FEFFFFFFFFFFFFF,
    "F8_E5M2": 0x7B,
    "F8_E4M3": 0x7E,
}
"""Of floats without their sign, by safetensors' name of the dtype; larger ones are NaN or infinite."""


def nonfinite_in(dtype: str, data: NDArray[np.uint8]) -> int:
    """Counts the values in a tensor's bytes that are NaN or infinite.

    Args:
        dtype: safetensors' name.
    """
    if dtype.endswith("FNUZ"):
        return int((data == 0x80).sum())  # their only NaN
    if dtype not in _LARGEST_FINITE_BITS:
        return 0
    unsigned = np.dtype(f"u{BITS[dtype] // 8}")
    sign, largest = unsigned.type(1 << (BITS[dtype] - 1)), unsigned.type(_LARGEST_FINITE_BITS[dtype])
    count = 0
    for start in range(0, len(data), RANGE_CHUNK_BYTES):
        bits = np.frombuffer(data[start : start + RANGE_CHUNK_BYTES], unsigned) & ~sign
        if bits.max() > largest:
            count += int((bits > largest).sum())
    return count


def find_remedy(name: str, remedies: Mapping[str, str], default: str) -> str:
    """Returns the remedy for a tensor's name, of the first key that one of its parts starts with."""
    return next((remedy for part, remedy in remedies.items() if f".{part}" in f".{name}"), default)


def range_is_narrower(dtype: str, target: str) -> bool:
    """Whether a dtype has values that are infinite in another; bfloat16 counts as float32, whose exponents it has."""
    return _EXPONENT_BITS.get(dtype, 0) > _EXPONENT_BITS.get(target, 16)


def overflow(dtype: str, data: NDArray[np.uint8], target: str) -> float | None:
    """Returns the largest magnitude of a tensor's finite values if these would be infinite in another dtype, else None.

    Reads the values only if the other dtype's range is narrower.

    Args:
        dtype: safetensors' name, as is `target`.
    """
    if not range_is_narrower(dtype, target):
        return None
    largest = _max_magnitude(dtype, data)
    return largest if largest > MAX_FINITE[target] else None


def _max_magnitude(dtype: str, data: NDArray[np.uint8]) -> float:
    """Returns the largest magnitude of the finite values in a tensor's bytes."""
    unsigned = np.dtype(f"u{BITS[dtype] // 8}")
    # Floats are sign and magnitude: without their sign, their bits have the order of their magnitudes.
    sign = unsigned.type(1 << (BITS[dtype] - 1))
    infinite = unsigned.type(((1 << _EXPONENT_BITS[dtype]) - 1) << (BITS[dtype] - 1 - _EXPONENT_BITS[dtype]))
    top = np.zeros(1, unsigned)
    for start in range(0, len(data), RANGE_CHUNK_BYTES):
        bits = np.frombuffer(data[start : start + RANGE_CHUNK_BYTES], unsigned) & ~sign
        if bits.max() >= infinite:
            bits = bits[bits < infinite]
        top[0] = bits.max(initial=top[0])
    return float(FLOAT_READERS[dtype](top.view(np.uint8))[0])


def _read_bfloat16(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Widens bfloat16, which numpy lacks, and which is the upper half of a float32."""
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)


FLOAT_READERS: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.floating]]] = {
    "BF16": _read_bfloat16,
    "F16": lambda data: np.frombuffer(data, np.float16),
    "F32": lambda data: np.frombuffer(data, np.float32),
    "F64": lambda data: np.frombuffer(data, np.float64),
}
"""Readers of values from bytes, by safetensors' name of the dtype."""


class TensorFile:
    """Writes a safetensors file in memory.

    Guarantees:
        A tensor is copied when it is added; its owner may change or free it afterwards.
    """

    def __init__(self, capacity: int) -> None:
        """
        Args:
            capacity: expected bytes of all tensors; the memory is used as they are added.
        """
        self._buffer = np.empty(HEADER_ROOM + capacity, np.uint8)
        self._end = HEADER_ROOM
        self._header: dict[str, dict[str, object]] = {}

    @property
    def names(self) -> Collection[str]:
        """Names of the tensors so far."""
        return self._header.keys()

    @property
    def size(self) -> int:
        """Bytes of all tensors so far."""
        return self._end - HEADER_ROOM

    def aligns(self, tensor: AnyTensor) -> bool:
        """Whether a tensor that is added next starts at a multiple of its item size, as readers need."""
        return self.size % item_bytes(tensor) == 0

    def add(self, name: str, tensor: AnyTensor) -> None:
        """Adds a tensor from `gathered`.

        Raises:
            ValueError: it cannot be copied; see `gathered`.
        """
        begin, end = self._end, self._end + tensor.nbytes
        if tensor.nbytes:
            self._append(tensor)
        self._header[name] = {
            "dtype": DTYPES[dtype_name(tensor)][0],
            "shape": list(tensor.shape),
            "data_offsets": [begin - HEADER_ROOM, end - HEADER_ROOM],
        }
        self._end = end

    def _append(self, tensor: AnyTensor) -> None:
        """Copies a tensor behind the others."""
        begin, end = self._end, self._end + tensor.nbytes
        if end > len(self._buffer):
            grown = np.empty(max(end, 2 * len(self._buffer)), np.uint8)
            grown[:begin] = self._buffer[:begin]
            self._buffer = grown
        _copy(tensor, self._buffer[begin:end])

    def finish(self, metadata: Mapping[str, str] | None = None) -> NDArray[np.uint8]:
        """Returns the file. Nothing can be added afterwards."""
        header = encode_header(self._header, metadata)
        if (start := HEADER_ROOM - len(header)) < 0:
            return np.concatenate([np.frombuffer(header, np.uint8), self._buffer[HEADER_ROOM : self._end]])
        self._buffer[start:HEADER_ROOM] = np.frombuffer(header, np.uint8)
        return self._buffer[start : self._end]


class MappedTensorFile(TensorFile):
    """Writes a safetensors file to a path, without a copy in this process's memory."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            StoreError: it cannot be written, as from `add` and `finish`.
        """
        super().__init__(0)
        self._path = path
        with self._translated_errors():
            self._file = path.open("wb", buffering=0)
            self._file.seek(HEADER_ROOM)

    def _append(self, tensor: AnyTensor) -> None:
        self._write(memory_of(tensor))

    def finish(self, metadata: Mapping[str, str] | None = None) -> NDArray[np.uint8]:
        """Returns the file, mapped. Nothing can be added afterwards."""
        header = encode_header(self._header, metadata, HEADER_ROOM)
        longer = len(header) > HEADER_ROOM
        with self._translated_errors():
            tensors = np.fromfile(self._path, np.uint8, offset=HEADER_ROOM) if longer else np.empty(0, np.uint8)
            self._file.seek(0)
            self._write(np.frombuffer(header, np.uint8))
            self._write(tensors)
            self._file.close()
            return np.memmap(self._path, np.uint8, "r")

    def _write(self, data: NDArray[np.uint8]) -> None:
        left = data.data
        with self._translated_errors():
            while left:
                left = left[self._file.write(left) :]

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"weights cannot be written to {self._path.parent.parent}: {error}. Free space there; with docker, "
                "raise --shm-size."
            ) from error


def encode_header(
    entries: Mapping[str, Mapping[str, object]], metadata: Mapping[str, str] | None = None, size: int = 0
) -> bytes:
    """Returns the start of a safetensors file: the length of the header, and the header, padded to 8 bytes.

    Args:
        size: pads it to as many bytes.
    """
    content = {"__metadata__": metadata, **entries} if metadata else entries
    header = json.dumps(content, separators=(",", ":")).encode()
    header += b" " * max(-len(header) % 8, size - 8 - len(header))
    return len(header).to_bytes(8, "little") + header


def digest(tensor: AnyTensor) -> str:
    """Returns a hash of the values of a tensor from `gathered`, as bytes of its dtype.

    Raises:
        ValueError: it cannot be copied; see `gathered`.
    """
    memory = np.empty(tensor.nbytes, np.uint8)
    if tensor.nbytes:
        _copy(tensor, memory)
    return hashlib.blake2b(memory.data, digest_size=16).hexdigest()


def memory_of(tensor: AnyTensor) -> NDArray[np.uint8]:
    """Returns the bytes of a tensor from `gathered`, where they are if they are as in a file.

    Raises:
        ValueError: they cannot be copied; see `gathered`.
    """
    if (memory := _plain_memory(tensor)) is None:
        memory = np.empty(tensor.nbytes, np.uint8)
        _copy(tensor, memory)
    return memory


def _plain_memory(tensor: AnyTensor) -> NDArray[np.uint8] | None:
    if isinstance(tensor, np.ndarray):
        plain = tensor.flags.c_contiguous and tensor.dtype.newbyteorder("<") == tensor.dtype
        return tensor.reshape(-1).view(np.uint8) if plain else None
    import torch

    if tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj():
        memory: NDArray[np.uint8] = tensor.view(-1).view(torch.uint8).numpy()
        return memory
    return None


def _copy(tensor: AnyTensor, memory: NDArray[np.uint8]) -> None:
    """Copies a tensor's values into memory, row-major and little-endian."""
    if isinstance(tensor, np.ndarray):
        np.copyto(memory.view(tensor.dtype.newbyteorder("<")).reshape(tensor.shape), tensor)
        return
    import torch

    try:
        if tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj():
            # One thread: several, as torch takes, gain nothing and wait for each other where cores are busy.
            np.copyto(memory, tensor.view(-1).view(torch.uint8).numpy())
            return
        torch.from_numpy(memory).view(tensor.dtype).view(tensor.shape).copy_(tensor)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(f"cannot be copied to host memory: {type(error).__name__}: {error}") from error
