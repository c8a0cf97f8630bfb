"""Weights that a trainer sends to the engines itself, while they are paused for it. Free of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, Protocol, TypeVar

from twinkle_serve import timing
from twinkle_serve.data_format.weights import TransferCall, TransferPlan, TransferStep, TransferTarget, WeightsVersion
from twinkle_serve.engines.client import EngineClient
from twinkle_serve.errors import EngineDeadError, EngineError, TwinkleServeError, UnsupportedError, WeightsError
from twinkle_serve.routing.active_engine import ActiveEngine

T = TypeVar("T")


class CallEach(Protocol):
    """Makes a call to each engine that is being updated. Returns the answers by engine; those that died are missing."""

    async def __call__(self, what: str, call: Callable[[EngineClient], Awaitable[T]], /) -> dict[str, T]: ...


def targets(engines: Sequence[ActiveEngine]) -> tuple[TransferTarget, ...]:
    """Describes engines to a trainer that sends weights to them."""
    infos = [engine.info for engine in engines]
    return tuple(TransferTarget(info.name, info.incarnation, info.workers) for info in infos)


def require_transfer(engines: Sequence[ActiveEngine], kind: str) -> None:
    """Raises UnsupportedError for an engine that does not take weights by a backend of vLLM's weight transfer."""
    for engine in engines:
        if engine.info.transfer_backend != kind:
            by = f"by {engine.info.transfer_backend!r}" if engine.info.transfer_backend else "from the store alone"
            raise UnsupportedError(f"{engine.name} takes weights {by}, not by {kind!r}.")


@dataclass(slots=True, eq=False)
class _Call:
    call: TransferCall
    info: Any
    done: asyncio.Future[None]


class Transfer:
    """The calls of a trainer to engines, from the pause of these to the last one.

    Guarantees:
        Each call reaches every engine of the plan that is alive, after the one before it.
        Every call ends: with its answer, or with the error that ended the transfer.
        A trainer that gives up, or is silent for UPLOAD_LEASE_S, ends it.
    """

    def __init__(self, upload: int) -> None:
        """
        Args:
            upload: id of the update.
        """
        self._upload = upload
        self.plan: TransferPlan | None = None
        """Set before `load`."""
        self.connects = False
        """Whether the trainer has connected to the engines anew."""
        self.complete = False
        """Whether every engine of the plan has taken all calls."""
        self.waiting: asyncio.Task[Any] | None = None
        """Brings the update to `load`, and is cancelled if the trainer gives up until then."""
        self._calls: asyncio.Queue[_Call] = asyncio.Queue()
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Raises for calls that have no answer."""
        self._over.add_done_callback(asyncio.Future.exception)  # whether or not a call asks for it

    async def call(self, call: TransferCall, info: Any = None) -> None:
        """Makes a call to all engines. Returns when they have answered.

        Raises:
            TwinkleServeError: an engine refused, or the transfer is over.
        """
        done = asyncio.get_running_loop().create_future()
        self._calls.put_nowait(_Call(call, info, done))
        try:
            await asyncio.wait({done, self._over}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self.give_up("the trainer's call was cancelled.")
            raise
        if not done.done():
            self._over.result()

    def give_up(self, reason: str) -> None:
        """Ends the transfer, also in the middle of a call. Idempotent.

        Args:
            reason: a sentence.
        """
        self.end(WeightsError(reason))
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None

    @property
    def error(self) -> BaseException | None:
        """The error that ended the transfer; None while it runs."""
        return self._over.exception() if self._over.done() else None

    def end(self, error: BaseException) -> None:
        """Makes calls that have no answer, and later ones, raise an error. Idempotent: the first one counts."""
        if not self._over.done():
            self._over.set_exception(type(error)(str(error)) if isinstance(error, TwinkleServeError) else error)

    async def load(
        self, version: WeightsVersion, engines: Sequence[ActiveEngine], broadcast: CallEach
    ) -> dict[str, str]:
        """Makes the trainer's calls to paused engines, until it has finished. Returns their checksums.

        Raises:
            EngineError: the engines are others than in the plan, by a death too, or one failed.
            EngineDeadError: all engines died.
            WeightsError: the trainer gave up or was silent, or an engine has other weights than the store.
        """
        self.waiting = None
        passing = asyncio.ensure_future(self._pass_on(version, engines, broadcast))
        ends: list[asyncio.Future[Any]] = [passing, self._over]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not passing.done():
                self._over.result()
            if not (checksums := passing.result()):
                self.end(EngineDeadError("every engine died."))
            return checksums
        except BaseException as error:
            stopped = isinstance(error, asyncio.CancelledError)
            self.end(WeightsError("the engines took too long.") if stopped else error)
            raise
        finally:
            self.end(WeightsError("the transfer is finished."))
            passing.cancel()
            await asyncio.wait({passing})

    async def _pass_on(
        self, version: WeightsVersion, engines: Sequence[ActiveEngine], broadcast: CallEach
    ) -> dict[str, str]:
        plan, upload = self.plan, self._upload
        assert plan is not None
        if not engines:
            return {}
        if (present := targets(engines)) != plan.targets:
            raise EngineError(f"the trainer was to send to {_names(plan.targets)}; in use are {_names(present)}.")
        while True:
            step = await self._next()
            if step.call == "finish":
                checksums = await broadcast(
                    "finish_transfer", lambda client: client.finish_transfer(upload, version, plan.digests)
                )
                self.complete = len(checksums) == len(plan.targets)
                step.done.set_result(None)
                return checksums
            self.connects |= step.call == "init"
            sent = TransferStep(upload, step.call, step.info, plan.targets)
            if not await broadcast("transfer_weights", methodcaller("transfer_weights", sent)):
                return {}
            step.done.set_result(None)

    async def _next(self) -> _Call:
        try:
            async with asyncio.timeout(timing.UPLOAD_LEASE_S):
                return await self._calls.get()
        except TimeoutError:
            raise WeightsError(
                f"the trainer sent the engines nothing for {timing.UPLOAD_LEASE_S:g} s, and they wait for it."
            ) from None


def _names(engines: Sequence[TransferTarget]) -> str:
    return ", ".join(f"{engine.engine} ({engine.incarnation[:8]})" for engine in engines) or "none"
