"""Slots of a vLLM engine for the adapters that run at the same time."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncGenerator

from twinkle_serve.data_format.adapters import AdapterVersion


class AdapterSlots:
    """Limits how many adapters run at the same time; the groups of others wait, first come, first served.

    On CPU vLLM has a slot that must stay empty (`WorkerExtension.keep_last_slot_empty`); its scheduler would fill it.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._running: Counter[int] = Counter()
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def holding(self, adapter: AdapterVersion | None) -> AsyncGenerator[None, None]:
        """Waits for a slot and holds it. The base model needs none."""
        if adapter is None:
            yield
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((adapter.id, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._running[adapter.id] -= 1
                self._running += Counter()  # drops adapters that no group uses
            self._admit()

    def _admit(self) -> None:
        while self._waiting:
            adapter_id, turn = self._waiting[0]
            if not turn.cancelled():
                if adapter_id not in self._running and len(self._running) >= self._slots:
                    return
                self._running[adapter_id] += 1
                turn.set_result(None)
            self._waiting.popleft()
