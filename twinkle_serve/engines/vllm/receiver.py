"""vLLM's own weight transfer, as an engine's receiver of weights from a trainer."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from twinkle_serve.engines.protocol import WeightsReceiver, compare_digests

if TYPE_CHECKING:
    from twinkle_serve.engines.vllm.engine import VLLMEngine

RANK_OFFSET = "rank_offset"
"""In the init info of vLLM's collective backends: number of its first worker in the group with the trainer."""


class TransferReceiver(WeightsReceiver):
    """Passes a trainer's calls on to the weight transfer engines of the workers (vLLM 0.32, `WeightTransferEngine`)."""

    def __init__(self, engine: VLLMEngine) -> None:
        self._engine = engine

    async def init(self, info: Any, workers: range) -> None:
        await self._engine.call_workers("shutdown_weight_transfer_engine")  # of an earlier trainer
        if RANK_OFFSET in info:
            info = {**info, RANK_OFFSET: info[RANK_OFFSET] + workers.start}
        await self._call("init_weight_transfer_engine", info)

    async def start(self) -> None:
        await self._engine.call_workers("begin_transfer")

    async def update(self, info: Any, workers: range) -> None:
        # A list has an item for each worker of all engines.
        own = [info[i] for i in workers] if isinstance(info, list) else info
        await self._call("update_weights", own)

    async def _call(self, method: str, info: Any) -> None:
        """Makes a call with objects that vLLM's messages do not take, such as the handles of ipc."""
        await self._engine.call_workers("unpickle_and_call", method, pickle.dumps(info))

    async def finish(self, label: str, digests: Mapping[str, str]) -> str:
        answers = await self._engine.call_workers("finish_transfer")
        for _, came in answers:
            compare_digests(came, digests)
        await self._engine.use_new_weights(label)
        return " ".join(checksum for checksum, _ in answers)
