"""A trainer that sends weights to a service's store, and to its engines by vLLM's weight transfer, on CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from tests.support.ray_cluster import free_port
from tests.support.transfer_plugin import TCP
from twinkle_serve.data_format.weights import TransferTarget
from twinkle_serve.packing import buckets
from twinkle_serve.sampler.direct_transport import DirectTransports, WeightSyncClient
from twinkle_serve.sampler.router_client import RouterClient
from twinkle_serve.sampler.transports import UpdateRequest
from twinkle_serve.sampler.weight_upload import WeightUploads


class TCPTrainer:
    """Its calls block: on an event loop, they are for other threads."""

    def __init__(self, client: RouterClient) -> None:
        self._uploads = WeightUploads(client, DirectTransports(TCP, self._connect))
        self._sent: dict[str, Tensor] = {}
        self.at: Callable[[int], object] = lambda index: None
        """Called before the transfer sends each weight, with its index."""
        self.connections: list[Sequence[TransferTarget]] = []

    def _connect(self, calls: WeightSyncClient, targets: Sequence[TransferTarget]) -> Any:
        from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        from tests.support.tcp_transfer import DictSource, TCPTrainerEngine

        assert isinstance(calls, VLLMWeightSyncClient)
        self.connections.append(targets)
        trainer = self

        class Source(DictSource):
            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                for index, item in enumerate(super().__iter__()):
                    trainer.at(index)
                    yield item

        world_size = 1 + sum(target.workers for target in targets)
        info = NCCLTrainerInitInfo("127.0.0.1", free_port(), world_size, packed=False, rank=0)
        return TCPTrainerEngine.trainer_init(info, client=calls, source=Source(self._sent))

    def update(
        self,
        label: str,
        weights: Mapping[str, Tensor],
        sent: Mapping[str, Tensor] | None = None,
        *,
        timeout_s: float = 60.0,
    ) -> str:
        """Sends weights to the store, and the same or others to the engines."""
        self._sent.clear()
        self._sent |= weights if sent is None else sent
        update = UpdateRequest(label, "keep", "", True, timeout_s)
        parts = buckets(weights.items(), 2**20)
        return self._uploads.send(update, lambda files: parts, delta=False)
