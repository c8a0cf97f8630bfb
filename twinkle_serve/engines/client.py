"""The interface of an engine as its router sees it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Protocol

from twinkle_serve.data_format.adapters import AdapterArgument, AdapterVersion
from twinkle_serve.data_format.groups import Attempt, EngineInfo, Group, Session, TextDelta
from twinkle_serve.data_format.structured_outputs import StructuredOutputs
from twinkle_serve.data_format.weights import ModelSpec, PauseMode, TransferStep, WeightsVersion
from twinkle_serve.engines.group_runner import Finished


class EngineClient(Protocol):
    """One engine, in this process (`engines.server.EngineServer`) or behind a Serve handle.

    Every call raises EngineDeadError where the engine's process or its sampling core is gone, and any other
    TwinkleServeError that the engine raises.
    """

    async def describe(self, router: str) -> EngineInfo:
        """Returns the engine's state, and renews the lease of this router and of a pause.

        An engine aborts the groups of a router that has called none of these methods for ROUTER_LEASE_S.
        """
        ...

    async def submit(self, session: Session, groups: Sequence[Group], more: bool = False) -> None:
        """Starts sampling a chunk; its samples arrive in `results` of the same session.

        Args:
            more: whether further groups wait at the router for places.

        Raises:
            EngineDeadError: the session belongs to another process, or is over.
        """

    def results(self, session: Session) -> AsyncGenerator[Finished, None]:
        """Yields samples of submitted groups as they end, until the engine has been idle for LINGER_S.

        Every sample is in one item, unless its group failed or was aborted. One reader at a time; closing the iterator
        aborts whatever still runs.
        """
        ...

    def stream(self, session: Session, group: Group) -> AsyncGenerator[TextDelta, None]:
        """Samples a group of one sample and yields its text as it arrives. Closing the iterator aborts the sample."""
        ...

    async def abort(self, session: Session, attempts: Iterable[Attempt]) -> None:
        """Aborts groups that still run. They appear in no item of `results`."""

    async def check_structured(self, structured: StructuredOutputs) -> None:
        """Checks structured outputs; see `engines.protocol.Engine.check_structured`."""

    async def load_adapter(self, version: AdapterVersion, files: AdapterArgument | None = None) -> None:
        """Checks an adapter version against the model and loads it. Idempotent.

        Args:
            files: of the version; None, or what cannot be had any more: the engine fetches them from the store.

        Raises:
            AdapterError: LoRA is off, the rank is too large, or the adapter is not of this model.
        """

    async def drop_adapter(self, version: AdapterVersion) -> None:
        """Unloads a version: at once for new groups, in the engine when its last group has ended. Idempotent."""

    async def keep_adapters(self, ids: Sequence[int]) -> None:
        """Drops all adapter versions but these: whatever an earlier router had loaded."""

    async def model_spec(self) -> ModelSpec:
        """Returns the names, shapes and dtypes of the model's weights; see `read_model_spec`."""
        ...

    async def prepare_weights(self, version: WeightsVersion) -> None:
        """Fetches the first buckets of a weights version, which `load_weights` then has at once. The engine may sample
        meanwhile."""

    async def load_weights(self, version: WeightsVersion) -> str:
        """Fetches a weights version from the store and loads it; the engine must be paused. Returns a checksum.

        If it raises, the engine holds no version until the next load succeeds.
        """
        ...

    async def transfer_weights(self, step: TransferStep) -> None:
        """Makes a call by which the engine takes weights from a trainer itself; the engine must be paused.

        From `start` on it holds no version, until `finish_transfer` or the next load succeeds.

        Raises:
            WeightsError: the engine refuses it, or the step belongs to another transfer than the last `start`.
            UnsupportedError: it takes weights from the store alone.
        """

    async def finish_transfer(self, upload: int, version: WeightsVersion, digests: Mapping[str, str]) -> str:
        """Ends a transfer: the engine holds the version. Returns a checksum, as `load_weights` would.

        Args:
            digests: of the weights of the version.

        Raises:
            WeightsError: weights that came are not those of the version.
        """
        ...

    async def pause(self, mode: PauseMode) -> None:
        """Stops sampling until `resume`, or until no router has called `describe` for ENGINE_PAUSE_LEASE_S."""

    async def resume(self) -> None:
        """Ends a pause. Idempotent."""

    async def reset_prefix_cache(self) -> None:
        """Drops the cached keys and values of earlier prompts."""

    async def sleep(self, level: int) -> None:
        """Frees device memory; see `engines.protocol.Engine.sleep`."""

    async def wake_up(self, tags: Sequence[str] | None) -> None:
        """Ends `sleep`; see `engines.protocol.Engine.wake_up`."""

    async def retire(self, incarnation: str, reason: str) -> None:
        """Makes the health checks of this incarnation fail, so that Serve replaces its process."""
