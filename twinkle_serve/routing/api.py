"""The interface of a router as its callers see it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol, Unpack

from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.adapters import AdapterFiles
from twinkle_serve.data_format.futures import Completions, FutureResult, Submission
from twinkle_serve.data_format.sample_request import EncodeOptions, Inputs, SampleRequest, TemplateChoice
from twinkle_serve.data_format.sample_updates import UpdatesItem
from twinkle_serve.data_format.samples import StopReason
from twinkle_serve.data_format.status import SamplerStatus
from twinkle_serve.data_format.telemetry import CallInfo, TelemetryReport
from twinkle_serve.data_format.token_lists import TokenLists
from twinkle_serve.data_format.weights import BucketArgument, PauseMode, TransferCall, TransferOffer, TransferPlan
from twinkle_serve.sessions import SessionInfo, SessionRecord


class RouterAPI(Protocol):
    """A router, in this process (`routing.router.Router`) or behind a Serve handle."""

    async def run(self, request: SampleRequest) -> SampleResponse:
        """Samples each input of a request.

        Raises:
            RequestError: the request cannot be served.
            DeadlineError: it took longer than its timeout_s; with the response to the prompts that were complete.
            EngineError: engines failed.
        """
        ...

    def run_iter(self, request: SampleRequest) -> AsyncGenerator[SampleResponse, None]:
        """As `run`, but yields responses over prompts as they finish: each prompt once, in any order.

        Its DeadlineError has no response.
        """
        ...

    def run_updates(self, request: SampleRequest) -> AsyncGenerator[UpdatesItem, None]:
        """As `run_iter`, but also yields new tokens while samples run.

        The first item is a CallBegun. Then come lists of SampleUpdate, at most one of each sample in a list; and a
        SampleResponse over prompts that are complete, after the updates of their samples. The text of updates is as
        `update_text` of the request says.

        Guarantees:
            The updates of a sample, joined, are the sample, and the last one has its stop reason. It comes when the
                sample has ended, whether or not its prompt is complete.
            New tokens of a sample come about every 20 ms, or less often where many samples of its engine are reported;
                the first ones within a few milliseconds.
            A sample whose engine ends goes on: one that can be resumed from its tokens; a seeded or greedy one from
                its start, without the tokens that were yielded before.
            Updates of a slow reader are joined and not dropped.

        Raises:
            EngineDeadError: the engine of a sample ended after tokens of it were yielded, and the sample is neither
                resumable nor seeded nor greedy, or has other tokens when it is sampled again.
            Otherwise as `run_iter`.
        """
        ...

    def run_stream(self, request: SampleRequest) -> AsyncGenerator[tuple[str, StopReason | None], None]:
        """Samples one prompt once and yields (text, finish_reason); finish_reason is None until the last item.

        Closing the iterator aborts the sample. If its engine dies before the first text, another one takes over;
        afterwards it raises EngineDeadError.
        """
        ...

    async def cancel(self, request_id: str, inputs: Sequence[int] | None = None) -> int:
        """Drops prompts of a call, by index, or all that are not complete. Returns how many were not complete.

        The call continues without them. A call that is over or unknown has none.
        """
        ...

    async def renew(self, request_ids: Sequence[str], lease_s: float) -> None:
        """Extends the leases of calls by `lease_s` from now."""

    async def submit(self, submission: Submission) -> int:
        """Starts a call whose result is collected later. Idempotent: the same id runs once while its result is kept.

        Errors of the call itself are results. See `Futures.submit`.

        Returns:
            The router's incarnation; futures end with it.

        Raises:
            QueueFullError: the queue is full, or too many results wait to be collected.
            LeaseExpiredError: the session was ended.
        """
        ...

    async def incarnation(self) -> int:
        """Returns a number that differs for each process of the router."""
        ...

    async def collect(self, ids: Sequence[str], wait_s: float) -> list[FutureResult]:
        """Returns the states of futures, in order; waits until one of them is not pending.

        Args:
            wait_s: how long to wait at most; at most 30 s.
        """
        ...

    async def completions(self, group: str, after: int, wait_s: float) -> Completions:
        """Returns the ends of a group's calls after a position; waits for the first one.

        Args:
            after: cursor of the last answer, which confirms it; 0, or the cursor of another router: from the beginning.
            wait_s: as of `collect`.
        """
        ...

    async def report_lost(self, incarnation: int, group: str, ids: Sequence[str]) -> None:
        """Reports futures as failed in `completions` if another incarnation had taken them, and they are unknown."""

    async def forget(self, ids: Sequence[str]) -> None:
        """Cancels calls and drops their results; unknown ids are ignored."""

    async def renew_futures(self, session: str) -> bool:
        """Extends the lease of a session's calls. Returns False if the session was ended."""
        ...

    async def end_futures(self, session: str) -> None:
        """Cancels the calls of a session, drops its results and refuses further calls. Idempotent."""

    async def add_adapter(self, name: str, source: AdapterFiles | str) -> str:
        """Loads an adapter on every engine, then makes its name mean it. Returns `name@version`.

        Guarantees:
            Either all engines in use load it, or none keeps it. Until the call returns, and if it raises, the name
                keeps its meaning.

        Args:
            source: a directory on the router's node, or the files themselves.

        Raises:
            AdapterError: unreadable, not of this model, too large, or LoRA is off.
        """
        ...

    async def remove_adapter(self, name: str) -> None:
        """Removes an adapter name. Requests that were admitted with it finish on it.

        Raises:
            AdapterError: no such adapter.
            StoreError: the store cannot be reached or written; the name keeps its meaning.
        """

    async def check_template(self, template: TemplateChoice) -> None:
        """Builds a template, so that errors show before it is used. Raises TemplateError."""

    async def encode(self, inputs: Inputs, **options: Unpack[EncodeOptions]) -> TokenLists:
        """Returns the token ids of each input, as `run` makes them its prompts. Needs no engine.

        Returns:
            A list for each input, empty for one that `truncation_strategy="delete"` leaves out.

        Raises:
            PromptError: an input is invalid or too long for the template, or all are left out.
            TemplateError: no such template.
        """
        ...

    async def count_tokens(self, inputs: Inputs, **options: Unpack[EncodeOptions]) -> list[int]:
        """Returns the number of tokens of each input. Arguments and errors as of `encode`."""
        ...

    async def decode(
        self, token_ids: object, *, template: TemplateChoice = None, skip_special_tokens: bool = False
    ) -> str | list[str]:
        """Returns the text of token ids, or the texts of several lists of them. Needs no engine.

        Args:
            token_ids: a list of ids or a list of such lists, as lists, arrays or TokenLists.

        Raises:
            PromptError: it is neither, or an id is not in the vocabulary.
            TemplateError: no such template.
        """
        ...

    async def begin_weights(
        self, label: str, mode: PauseMode, durable: bool = True, track: str = "", direct: bool = False
    ) -> int:
        """Starts an update of a track's weights, "": of the first one. Returns the id of the upload. See
        `WeightUpdates.begin`.

        Raises:
            RequestError: unknown mode or track, or the engines sleep.
        """
        ...

    async def append_weights(self, upload: int, index: int, bucket: BucketArgument) -> None:
        """Stores the next bucket of an update. See `WeightUpdates.append`."""

    async def publish_weights(
        self, upload: int, mode: PauseMode, timeout_s: float, plan: TransferPlan | None = None
    ) -> str:
        """Loads an update on all engines of its track or on none. Returns its label. See `WeightUpdates.publish`."""
        ...

    async def offer_weights(self, kind: str, track: str = "") -> TransferOffer:
        """Returns the engines of a track that take weights from a trainer itself. See `WeightUpdates.offer`."""
        ...

    async def transfer_weights(self, upload: int, call: TransferCall, info: Any = None) -> None:
        """Makes a trainer's call to all engines while they are paused. See `WeightUpdates.transfer`."""

    async def use_weights(self, label: str, mode: PauseMode, timeout_s: float, track: str = "") -> str:
        """Loads a kept version on all engines of a track or on none. Returns its label. See `WeightUpdates.use`."""
        ...

    async def weights_buckets(self, label: str) -> list[str]:
        """Returns the checksums of the buckets of a kept version. Raises WeightsError if it is not kept."""
        ...

    async def abandon_weights(self, upload: int, reason: str = "the trainer gave the update up.") -> None:
        """Gives an update up. Idempotent. See `WeightUpdates.abandon`."""

    async def pause(self, mode: PauseMode, lease_s: float) -> int:
        """Pauses all engines. Returns the id of the pause. See `CallerPauses.pause`."""
        ...

    async def renew_pause(self, pause: int, lease_s: float) -> None:
        """Extends the lease of a pause. See `CallerPauses.renew`."""

    async def resume(self, pause: int) -> None:
        """Ends a pause. See `CallerPauses.resume`."""

    async def read_sessions(self, sessions: Sequence[str]) -> list[SessionRecord]:
        """Returns sessions with all their turns, in order. See `SessionsAPI.read_session`.

        Raises:
            UnsupportedError: the sampler is not a service. So do the other calls about sessions.
        """
        ...

    async def list_sessions(self) -> list[SessionInfo]:
        """Returns the sessions, the least recently used one first."""
        ...

    async def end_sessions(self, sessions: Sequence[str]) -> list[bool]:
        """Ends sessions for good. Returns whether there was each. See `SessionsAPI.end_session`."""
        ...

    async def telemetry(self, since: float = 0.0) -> TelemetryReport:
        """Returns the history of the last hour: points and events after a time, seconds since 1970."""
        ...

    async def calls(self) -> list[CallInfo]:
        """Returns the running calls, the oldest first."""
        ...

    async def state_keys(self) -> list[str]:
        """Returns the names of the model's weights, as in its checkpoint."""
        ...

    async def reset_prefix_cache(self) -> None:
        """Drops the cached keys and values of earlier prompts on every engine."""

    async def sleep(self, level: int = 1) -> None:
        """Frees the engines' device memory until `wake_up`; calls are refused meanwhile.

        Raises:
            RequestError: requests are running.
            UnsupportedError: not available for these engines.
        """

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Ends `sleep`; with `tags`, of "weights" and "kv_cache", wakes only these."""

    async def drain_engine(self, name: str, timeout_s: float) -> None:
        """Gives an engine no new groups, and returns when it has none. See `EngineLifecycle.drain`."""

    async def undrain_engine(self, name: str) -> None:
        """Ends `drain_engine`. See `EngineLifecycle.undrain`."""

    async def restart_engine(self, name: str, drain_timeout_s: float, timeout_s: float) -> None:
        """Drains an engine and has its process replaced. See `EngineLifecycle.restart`."""

    async def status(self) -> SamplerStatus:
        """Returns the state of engines, adapters and queues, as plain values."""
        ...

    async def purge(self) -> None:
        """Drops adapters, weights and sessions, unless the config has a state_dir. Called before deletion."""
