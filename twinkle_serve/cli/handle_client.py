"""A service on a Ray cluster, called by handle."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from twinkle_serve.adapters import read_adapter
from twinkle_serve.checkpoint import named_tensors
from twinkle_serve.cli.client import Client, Sampling, Target
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.status import SamplerStatus
from twinkle_serve.data_format.telemetry import CallInfo, TelemetryReport
from twinkle_serve.data_format.weights import PauseMode
from twinkle_serve.gateway.native.answers import dumps, prompts_of
from twinkle_serve.sampler.base import RunningSampler

CONNECT_S = 10.0
"""How long to wait for an application that is starting."""


class HandleClient(Client):
    """Calls a RunningSampler."""

    def __init__(self, target: Target, sampler: RunningSampler | None = None) -> None:
        """
        Args:
            target: with the name of the application and the address of the cluster.
            sampler: instead of that application.
        """
        if sampler is None:
            from twinkle_serve.sampler.connect import connect

            assert target.service is not None
            sampler = connect(target.service, address=target.address, timeout_s=CONNECT_S)
        self._sampler = sampler

    def status(self) -> SamplerStatus:
        return self._sampler.status()

    def telemetry(self, since: float = 0.0) -> TelemetryReport:
        return self._sampler.telemetry(since)

    def calls(self) -> list[CallInfo]:
        return self._sampler.calls()

    def sample_prompts(self, inputs: Sequence[Mapping[str, Any]], sampling: Sampling) -> Iterator[dict[str, Any]]:
        arguments = _arguments(inputs, sampling)
        with contextlib.closing(self._sampler.sample_iter(**arguments)) as responses:
            for response in responses:
                for prompt in prompts_of(response):
                    yield json.loads(dumps(prompt))

    def sample(self, inputs: Sequence[Mapping[str, Any]], sampling: Sampling) -> SampleResponse:
        return self._sampler.sample(**_arguments(inputs, sampling))

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
        return self._sampler.score(
            inputs, adapter_name, adapter_path, top_logprobs=top_logprobs, use_base_model=use_base_model, track=track
        )

    def decode(self, token_ids: list[list[int]]) -> list[str]:
        return self._sampler.decode(token_ids)

    def conversation(self, sampling: Sampling, session: str | None, system: str | None) -> HandleConversation:
        if session is not None:
            from twinkle_serve.cli.exits import CommandError

            raise CommandError(
                f"--session {session} needs a gateway, which keeps the turns of sessions. Give --url instead of "
                "--service, or leave --session out."
            )
        return HandleConversation(self._sampler, sampling, system)

    def add_adapter(self, name: str, directory: Path) -> str:
        return self._sampler.add_adapter_to_model(name, read_adapter(directory))

    def remove_adapter(self, name: str) -> None:
        self._sampler.remove_adapter(name)

    def push_weights(
        self, directory: Path, version: str, mode: PauseMode, track: str, timeout_s: float, sent: Callable[[int], None]
    ) -> str:
        def tensors() -> Iterator[tuple[str, Any]]:
            for name, tensor in named_tensors(directory):
                yield name, tensor
                sent(tensor.nbytes)

        return self._sampler.update_weights(tensors(), version, mode, track=track, timeout_s=timeout_s)

    def use_weights(self, version: str, mode: PauseMode, track: str, timeout_s: float) -> str:
        return self._sampler.use_weights(version, mode=mode, track=track, timeout_s=timeout_s)

    def drain_engine(self, name: str, timeout_s: float) -> None:
        self._sampler.drain_engine(name, timeout_s=timeout_s)

    def undrain_engine(self, name: str) -> None:
        self._sampler.undrain_engine(name)

    def restart_engine(self, name: str, timeout_s: float) -> None:
        self._sampler.restart_engine(name, drain_timeout_s=timeout_s)

    def sessions(self) -> list[dict[str, Any]]:
        return [asdict(info) for info in self._sampler.sessions()]

    def trajectory(self, session: str) -> dict[str, Any]:
        return self._sampler.session(session).trajectory()

    def features(self, session: str, *, shared_tokens_once: bool) -> list[dict[str, Any]]:
        made = self._sampler.session(session).features(shared_tokens_once=shared_tokens_once)
        return cast("list[dict[str, Any]]", made)


class HandleConversation:
    """A conversation that this process keeps, token by token."""

    def __init__(self, sampler: RunningSampler, sampling: Sampling, system: str | None) -> None:
        self._sampler, self._sampling = sampler, sampling
        self._begun: dict[str, Any] = {"messages": [] if system is None else [{"role": "system", "content": system}]}
        """The conversation so far: a trajectory, then an input feature."""

    @property
    def session(self) -> str | None:
        return None

    def send(self, text: str) -> Iterator[str]:
        messages = [*self._begun["messages"], {"role": "user", "content": text}]
        arguments = _arguments([{**self._begun, "messages": messages}], self._sampling)
        with contextlib.closing(cast(Any, self._sampler.sample_updates(**arguments))) as items:
            for item in items:
                if isinstance(item, SampleResponse):
                    self._begun = cast("dict[str, Any]", item.sequences[0].new_input_feature)
                elif isinstance(item, list):
                    yield from (update.text for update in item if update.text)


def _arguments(inputs: Sequence[Mapping[str, Any]], sampling: Sampling) -> dict[str, Any]:
    """Returns the arguments of a call that samples."""
    return {
        "inputs": list(inputs),
        "sampling_params": dict(sampling.params),
        "adapter_name": sampling.adapter,
        "num_samples": sampling.num_samples,
        "timeout_s": sampling.timeout_s,
    }
