"""The checksum of a vLLM engine's weights."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed")

from twinkle_serve.engines.vllm.checksum import model_checksum
from twinkle_serve.tensor_sums import ROW

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool)


def model_of(**tensors: torch.Tensor) -> torch.nn.Module:
    model = torch.nn.Module()
    for name, tensor in tensors.items():
        model.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 7, 8 * ROW - 1, 8 * ROW, 3 * 8 * ROW + 5])
def test_checksum_is_of_every_byte(dtype: torch.dtype, size: int) -> None:
    """Wherever it is; of its place, the name, the shape and the dtype."""
    generator = torch.Generator().manual_seed(size)
    tensor = torch.randint(0, 2, (size,), generator=generator, dtype=torch.uint8).to(dtype)
    before = model_checksum(model_of(a=tensor))
    assert model_checksum(model_of(a=tensor.clone())) == before
    for index in {0, size // 2, size - 1} & set(range(size)):
        changed = tensor.clone().view(torch.uint8)
        changed[index * tensor.element_size()] ^= 1
        assert model_checksum(model_of(a=changed.view(dtype))) != before
    assert model_checksum(model_of(b=tensor)) != before
    assert model_checksum(model_of(a=tensor.view(1, -1))) != before


def test_checksum_is_of_the_places() -> None:
    """Values that change places in a row, in a column, or rows that do, change it."""
    tensor = torch.arange(4 * ROW, dtype=torch.int64)
    before = model_checksum(model_of(a=tensor))
    for one, other in ((3, 900), (7, 7 + ROW), (5, 2 * ROW + 9)):
        swapped = tensor.clone()
        swapped[[one, other]] = tensor[[other, one]]
        assert model_checksum(model_of(a=swapped)) != before
    assert model_checksum(model_of(a=tensor.view(4, ROW)[[1, 0, 2, 3]].reshape(-1))) != before


def test_checksum_of_a_view_is_that_of_its_values() -> None:
    tensor = torch.arange(3 * ROW, dtype=torch.int16)
    part = tensor[3:].view(-1)
    assert model_checksum(model_of(a=part)) == model_checksum(model_of(a=part.clone()))
    assert model_checksum(model_of(a=tensor.view(-1, 2).t())) == model_checksum(
        model_of(a=tensor.view(-1, 2).t().contiguous())
    )
