"""The service as commands see it, and how they reach it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from twinkle_serve.cli.exits import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from twinkle_serve.data_format import SampleResponse
    from twinkle_serve.data_format.status import SamplerStatus
    from twinkle_serve.data_format.telemetry import CallInfo, TelemetryReport
    from twinkle_serve.data_format.weights import PauseMode

DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class Target:
    """Options that name a service."""

    url: str | None = None
    key: str | None = field(default=None, repr=False)
    sampler: str | None = None
    service: str | None = None
    address: str | None = None

    @property
    def by_handle(self) -> bool:
        """Whether the service is called by handle."""
        return self.service is not None

    @property
    def gateway_url(self) -> str:
        """URL of the gateway, without a slash at the end."""
        return (self.url or DEFAULT_URL).rstrip("/").removesuffix("/v1")

    def check(self) -> None:
        """Raises CommandError for options that contradict each other."""
        if self.url is not None and self.service is not None:
            raise CommandError(
                f"--url {self.url} and --service {self.service} name two services. Give one of them; of a gateway "
                "with several samplers, --sampler chooses one."
            )
        if self.service is None and self.address is not None:
            raise CommandError(f"--address {self.address} is of a Ray cluster and needs --service NAME.")
        if self.service is not None and self.sampler is not None:
            raise CommandError(f"--sampler {self.sampler} is of a gateway. With --service leave it out.")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise CommandError(f"--url must begin with http:// or https://, got {self.url!r}.")

    def __str__(self) -> str:
        return f"service {self.service!r}" if self.by_handle else self.gateway_url


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How prompts are sampled."""

    params: Mapping[str, Any]
    """Sampling parameters."""
    num_samples: int = 1
    adapter: str = ""
    """`name` or `name@version`; "" for the model's own weights."""
    timeout_s: float | None = None
    """Deadline of a call; None: the service's own."""


class Conversation(Protocol):
    """A conversation with the model, in which each turn continues the tokens of the one before."""

    @property
    def session(self) -> str | None:
        """Id of the session that keeps it; None if none does."""
        ...

    def send(self, text: str) -> Iterator[str]:
        """Sends a message, and yields the parts of the reply as they are sampled.

        A reply that is not read to its end is no part of the conversation.
        """
        ...


class Client(Protocol):
    """A running service. Each call raises a TwinkleServeError if it is refused or fails."""

    def status(self) -> SamplerStatus:
        """See `RunningSampler.status`."""
        ...

    def telemetry(self, since: float = 0.0) -> TelemetryReport:
        """See `RunningSampler.telemetry`."""
        ...

    def calls(self) -> list[CallInfo]:
        """Returns the running calls, the oldest first."""
        ...

    def sample_prompts(self, inputs: Sequence[Mapping[str, Any]], sampling: Sampling) -> Iterator[dict[str, Any]]:
        """Yields each prompt with its samples as it finishes, in the form of `POST /sample`."""
        ...

    def sample(self, inputs: Sequence[Mapping[str, Any]], sampling: Sampling) -> SampleResponse:
        """Returns the samples of all prompts."""
        ...

    def score(
        self,
        inputs: Any,
        adapter_name: str = "",
        adapter_path: str | None = None,
        *,
        top_logprobs: int = 0,
        use_base_model: bool = False,
        track: str = "",
    ) -> SampleResponse:
        """See `RunningSampler.score`."""
        ...

    def decode(self, token_ids: list[list[int]]) -> list[str]:
        """Returns the text of each list of token ids."""
        ...

    def conversation(self, sampling: Sampling, session: str | None, system: str | None) -> Conversation:
        """Begins a conversation.

        Args:
            session: id of its session; None: a new one.
            system: text of a system message.
        """
        ...

    def add_adapter(self, name: str, directory: Path) -> str:
        """Adds the adapter in a directory of this machine. Returns `name@version`."""
        ...

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter."""
        ...

    def use_weights(self, version: str, mode: PauseMode, track: str, timeout_s: float) -> str:
        """Makes weights current again that the service has kept. Returns the version."""
        ...

    def push_weights(
        self, directory: Path, version: str, mode: PauseMode, track: str, timeout_s: float, sent: Callable[[int], None]
    ) -> str:
        """Replaces the model's weights by those in a directory of this machine. Returns the version.

        Args:
            track: the one that gets them; "": the first.
            sent: called with the bytes of each tensor as it is sent.
        """
        ...

    def drain_engine(self, name: str, timeout_s: float) -> None:
        """See `RunningSampler.drain_engine`."""
        ...

    def undrain_engine(self, name: str) -> None:
        """See `RunningSampler.undrain_engine`."""
        ...

    def restart_engine(self, name: str, timeout_s: float) -> None:
        """See `RunningSampler.restart_engine`.

        Args:
            timeout_s: how long it may finish its samples.
        """
        ...

    def sessions(self) -> list[dict[str, Any]]:
        """Returns id, `created`, `expires` and `size_bytes` of each session, the least recently used one first."""
        ...

    def trajectory(self, session: str) -> dict[str, Any]:
        """Returns the turns of a session; see `twinkle_serve.sessions.trajectory`."""
        ...

    def features(self, session: str, *, shared_tokens_once: bool) -> list[dict[str, Any]]:
        """Returns the paths of a session as training inputs; see `twinkle_serve.sessions.features`."""
        ...


def open_client(target: Target) -> Client:
    """Returns a client of a service. One by handle joins the Ray cluster; one of a gateway sends nothing yet.

    Raises:
        ServiceNotReadyError: no cluster, no such application, or one that is not up.
    """
    if target.by_handle:
        from twinkle_serve.cli.handle_client import HandleClient

        return HandleClient(target)
    from twinkle_serve.cli.gateway_client import GatewayClient

    return GatewayClient(target)
