"""A backend of vLLM's own weight transfer on CPU: its nccl, over a TCP store in the place of a communicator of NCCL.

The test's process has the trainer's side. Workers import the module, which needs vLLM, in their processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import nccl_engine
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)

from tests.support.transfer_plugin import TCP


class TCPWeightTransferEngine(NCCLWeightTransferEngine):  # type: ignore[misc]  # vLLM has no types here
    """A worker's side: the lifecycle of vLLM's nccl engine."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        rank = self.parallel_config.rank + init_info.rank_offset
        self.model_update_group = join(init_info, rank)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # there is no accelerator to wait for

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            tensor = self.model_update_group.broadcast(None, src=0)
            assert (str(tensor.dtype), list(tensor.shape)) == (f"torch.{dtype}", shape)
            self.model.load_weights([(name, tensor)])

    def shutdown(self) -> None:
        self.model_update_group = None


class Shapes:
    """Shapes in an object that vLLM's own messages do not take, as they do not the handles of ipc."""

    def __init__(self, shapes: list[list[int]]) -> None:
        self._shapes = shapes

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: int) -> list[int]:
        return self._shapes[index]


class TCPTrainerEngine(NCCLTrainerWeightTransferEngine):  # type: ignore[misc]
    """The trainer's side: the handshake and the calls of vLLM's nccl engine."""

    model_update_group: StatelessProcessGroup

    def _broadcast(self, source: WeightSource, meta: list[ParamMeta]) -> None:
        for _, tensor in self._checked_iter(source, meta):
            self.model_update_group.broadcast(tensor, src=0)

    def send_weights(self) -> None:
        calls, update = self.client, self.client.update_weights
        calls.update_weights = lambda info: update({**info, "shapes": Shapes(info["shapes"])})
        try:
            super().send_weights()
        finally:
            calls.update_weights = update

    def shutdown(self) -> None:
        self.model_update_group = None


class DictSource(WeightSource):  # type: ignore[misc]
    """A trainer's tensors by name; they may change between updates."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.weights.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.weights.items())


def join(info: NCCLWeightTransferInitInfo | NCCLTrainerInitInfo, rank: int) -> StatelessProcessGroup:
    return StatelessProcessGroup.create(info.master_address, info.master_port, rank, info.world_size)


nccl_engine.open_trainer_endpoint = lambda info: join(info, 0)  # by which its trainer_init joins


def register() -> None:
    """Called by vLLM in the processes of workers, as a plugin."""
    if TCP not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TCP, TCPWeightTransferEngine)
