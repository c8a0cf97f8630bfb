"""All engines stand still together: for a pause, or to load other weights of the model's own. Free of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from twinkle_serve.data_format.weights import PauseMode, WeightsVersion
from twinkle_serve.errors import DeadlineError, EngineDeadError, EngineError, TwinkleServeError
from twinkle_serve.routing.membership import PROBE_TIMEOUT_S, ActiveEngine, EngineMembership


class PauseCoordinator:
    """Pauses the engines in use, and changes their weights.

    Guarantees: they go on when nothing holds them any more.
    Guarantees: all engines in use load a version or none keeps it.
    """

    def __init__(self, membership: EngineMembership) -> None:
        self._engines = membership

    async def hold(self, key: object, mode: PauseMode) -> None:
        """Pauses every engine, until `release` of the same key. A failure leaves it unpaused.

        Raises:
            EngineDeadError: they died, and do not return.
        """
        async with self._engines.changing:
            self._engines.holds.add(key)
            try:
                await self._pause(mode)
            except BaseException:
                await self._let_go(key)
                raise

    async def release(self, key: object) -> None:
        """Ends a pause; the engines go on when no other one holds them. Again: nothing."""
        async with self._engines.changing:
            await self._let_go(key)

    async def update(
        self, version: WeightsVersion, mode: PauseMode, commit: Callable[[], Awaitable[None]], timeout_s: float
    ) -> None:
        """Has every engine load a version of the model's own weights, while nothing is sampled.

        Guarantees: if it raises, the engines have the version before, and nobody stays paused by it.
        Guarantees: engines that die on the way do not fail it, as long as one is left; they come back with what is
            current.

        Args:
            mode: what becomes of running samples.
            commit: records that the version is current; called when the engines have it.

        Raises:
            WeightsError: an engine does not take it.
            EngineError: an engine failed on it, or engines ended with different weights.
            EngineDeadError: all died.
            DeadlineError: it took longer than `timeout_s`, waiting for another pause or update included.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                await self._engines.some_engine()
                await self._engines.changing.acquire()
        except TimeoutError:
            raise DeadlineError(
                f"no engine could be paused within {timeout_s:g} s for {version.label!r}: none is up, or another pause "
                f"begins or ends. {self._engines.weights_version.label!r} is current."
            ) from None
        try:
            await self._update(version, mode, commit, timeout_s, deadline)
        finally:
            self._engines.changing.release()

    async def change(self, method: str, *args: Any) -> None:
        """A control call to every engine in use, `sleep` or `wake_up`, while nothing else changes what they load.

        One that wakes up holds no version until it has loaded it, and is not to be taken for one that has lost it.

        Raises:
            TwinkleServeError: an engine refused, with its name.
            DeadlineError: they took longer than a load may.
        """
        limit_s = self._engines.load_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._engines.wait_for_info()
                async with self._engines.changing:
                    await self._broadcast(method, *args)
        except TimeoutError:
            raise DeadlineError(f"the engines did not {method} within startup_timeout_s={limit_s:g}.") from None

    async def _let_go(self, key: object) -> None:
        self._engines.holds.discard(key)
        # What another one holds may have run meanwhile: to drain it, or in a pause that was given up.
        await self._broadcast_or_evict(PROBE_TIMEOUT_S, *(("pause", "keep") if self._engines.holds else ("resume",)))
        for name in self._engines.active:
            self._engines.states[name] = "ready"

    async def _pause(self, mode: PauseMode) -> None:
        if mode == "wait":
            self._engines.states |= dict.fromkeys(self._engines.active, "draining")
        await self._broadcast("pause", mode)

    async def _update(
        self,
        version: WeightsVersion,
        mode: PauseMode,
        commit: Callable[[], Awaitable[None]],
        timeout_s: float,
        deadline: float,
    ) -> None:
        key, loading = object(), False
        self._engines.holds.add(key)
        try:
            async with asyncio.timeout_at(deadline):
                await self._pause(mode)
                loading = True
                checksums = await self._broadcast("load_weights", version)
            if not checksums:
                raise EngineDeadError(f"every engine died while it loaded {version.label!r}.")
            if len(set(checksums.values())) > 1:
                found = ", ".join(f"{name} {checksum}" for name, checksum in checksums.items())
                raise EngineError(f"engines have different weights after they loaded {version.label!r}: {found}.")
            await commit()
            self._engines.weights_version = version
        except BaseException as error:
            if loading:
                await self._broadcast_or_evict(timeout_s, "load_weights", self._engines.weights_version)
            where = f"{self._engines.weights_version.label!r} is current"
            if isinstance(error, TimeoutError):
                step = "loaded" if loading else "paused"
                raise DeadlineError(
                    f"the engines were not {step} within {timeout_s:g} s for {version.label!r}; {where}."
                ) from None
            if isinstance(error, TwinkleServeError):
                raise type(error)(f"{error} {where}.") from None
            raise
        finally:
            await self._let_go(key)

    async def _broadcast_or_evict(self, timeout_s: float, method: str, *args: Any) -> None:
        """A control call to every engine in use. One that does not take it is not used until it has caught up."""

        async def tell(name: str, use: ActiveEngine) -> None:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._engines.control(name, use, method, *args)
            except Exception as error:
                self._engines.lose(name, use, error)

        await asyncio.gather(*(tell(name, use) for name, use in list(self._engines.active.items())))

    async def _broadcast(self, method: str, *args: Any) -> dict[str, Any]:
        """A control call to every engine in use; returns when all have answered, with the answers of the living.

        Raises:
            TwinkleServeError: an engine refused, with its name.
        """
        active = dict(self._engines.active)
        calls = (self._engines.control(name, use, method, *args) for name, use in active.items())
        answers: dict[str, Any] = {}
        failure: BaseException | None = None
        for (name, use), answer in zip(
            active.items(), await asyncio.gather(*calls, return_exceptions=True), strict=True
        ):
            if isinstance(answer, EngineDeadError):
                self._engines.lose(name, use, answer)
            elif isinstance(answer, TwinkleServeError):
                failure = type(answer)(f"{name}: {answer}")
            elif isinstance(answer, BaseException):
                failure = EngineError(f"{name} failed at {method}: {answer!r}")
            else:
                answers[name] = answer
        if failure is not None:
            raise failure
        return answers
