"""Adds, removes, drains and restarts engines of a router. Free of Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

from twinkle_serve import timing
from twinkle_serve.engines.client import EngineClient
from twinkle_serve.errors import DeadlineError, EngineDeadError, UnsupportedError
from twinkle_serve.routing.membership import EngineMembership


class EngineLifecycle:
    """Changes which engines belong to the service, and which of them get groups."""

    def __init__(self, engines: EngineMembership) -> None:
        self._engines = engines

    def set_engines(self, clients: Mapping[str, EngineClient], tracks: Mapping[str, str]) -> None:
        """Sets the engines of the service. New ones are used once they are ready; known ones keep their client, unless
        they are in another track now: those are removed, and new.

        Args:
            tracks: the track of each engine, by name.

        Guarantees:
            A removed engine gets no new groups and may finish its own for REMOVED_ENGINE_GRACE_S. The rest is sampled
                elsewhere, with the same seeds, and does not count as lost with an engine.
        Does not guarantee:
            That a text stream survives the removal, once it has begun.
        """
        engines = self._engines
        for name, client in clients.items():
            # Another process will answer to its name.
            if (leaving := engines.leaving.get(name)) is not None:
                leaving.cancel()
                self._remove(name)
            elif name in engines.clients and engines.tracks.of(name).name != tracks[name]:
                engines.followers.pop(name).cancel()
                self._remove(name)
            if name not in engines.clients:
                engines.tracks.names_of_engines[name] = tracks[name]
                engines.clients[name] = client
                engines.states[name] = "starting"
                engines.follow(name)
        for name in engines.clients.keys() - clients.keys() - engines.leaving.keys():
            # It is out of reach but for running calls: a probe without answer would count it as lost.
            engines.followers.pop(name).cancel()
            self._cordon(name)
            engines.leaving[name] = engines.spawn(self._leave(name))

    async def _leave(self, name: str) -> None:
        await self._empty(name, timing.REMOVED_ENGINE_GRACE_S)
        self._remove(name)
        await self._engines.notify()  # `restart` may wait for it

    def _remove(self, name: str) -> None:
        engines = self._engines
        if (engine := engines.active.get(name)) is not None:
            engines.release(engine)
        engines.leaving.pop(name, None)
        del engines.clients[name], engines.states[name]
        engines.failed_loads.pop(name, None)
        engines.cordoned.discard(name)

    async def drain(self, name: str, timeout_s: float) -> None:
        """Gives an engine no new groups, and returns when it has none left; it stays out of use until `undrain`.

        Guarantees:
            Groups that are unfinished after `timeout_s` are sampled elsewhere, as in `set_engines`.
            The engine is drained even if the call is cancelled.

        Raises:
            RequestError: no such engine.
            UnsupportedError: the only engine is in this process.
        """
        self._require_engine(name)
        self._cordon(name)
        await asyncio.shield(self._engines.spawn(self._empty(name, timeout_s)))

    async def undrain(self, name: str) -> None:
        """Ends `drain`: the engine is used as soon as it has caught up. Idempotent.

        Raises:
            RequestError: no such engine.
            UnsupportedError: the only engine is in this process.
        """
        self._require_engine(name)
        self._engines.cordoned.discard(name)
        self._engines.listener.engine_opens(name)
        await self._engines.notify()

    async def restart(self, name: str, drain_timeout_s: float, timeout_s: float) -> None:
        """Drains an engine, has its process replaced, and returns when the new one is in use.

        Raises:
            RequestError: no such engine, or it was removed from the service meanwhile.
            UnsupportedError: the only engine is in this process.
            DeadlineError: it was not in use again within `timeout_s`. It will be as soon as it can.
        """
        engines = self._engines
        self._require_engine(name)
        try:
            async with asyncio.timeout(timeout_s):
                engine = engines.active.get(name)
                try:
                    await self.drain(name, drain_timeout_s)
                    with contextlib.suppress(EngineDeadError):  # it is being replaced already
                        info = engine.info if engine is not None else await engines.describe(name)
                        await engines.clients[name].retire(info.incarnation, "restart_engine was called")
                finally:
                    await self.undrain(name)
                async with engines.changed:
                    await engines.changed.wait_for(lambda: name in engines.active or name not in engines.clients)
        except TimeoutError:
            raise DeadlineError(
                f"{name} was not in use again within {timeout_s:g} s; it is used as soon as it can be. "
                "Raise timeout_s, or see its state in status()."
            ) from None
        self._require_engine(name)

    def _require_engine(self, name: str) -> None:
        engines = self._engines
        if not engines.engines_return:
            raise UnsupportedError(
                "the only engine is in this process, and goes with the sampler. Make another sampler, or serve one."
            )
        engines.require_name(name)

    def _cordon(self, name: str) -> None:
        self._engines.cordoned.add(name)
        self._engines.listener.engine_closes(name)

    async def _empty(self, name: str, timeout_s: float) -> None:
        """Ends the use of a cordoned engine when it has finished its groups, or after `timeout_s`."""
        if (engine := self._engines.active.get(name)) is None:
            return
        engine.idle.clear()
        self._engines.mark_idle()
        with contextlib.suppress(TimeoutError, EngineDeadError):  # if it dies, its groups are elsewhere already
            async with asyncio.timeout(timeout_s):
                await engine.unless_lost(engine.idle.wait())
        if name in self._engines.cordoned:
            self._engines.release(engine)
