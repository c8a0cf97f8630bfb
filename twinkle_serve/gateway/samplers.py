"""The samplers behind the gateway, and the models that clients see."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cachetools import LRUCache

from twinkle_serve import timing
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.data_format.sample_updates import UpdatesItem
from twinkle_serve.data_format.status import SamplerStatus
from twinkle_serve.errors import TwinkleServeError, unknown_name
from twinkle_serve.gateway.errors import UnknownModelError
from twinkle_serve.gateway.public import shown_model
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.router_client import RouterClient
from twinkle_serve.sessions import SessionsAPI
from twinkle_serve.traces import current_traceparent
from twinkle_serve.vllm_parsers.names import VLLM

MAX_TEXTS = 500_000
"""Texts of tokens that are kept for each sampler; a vocabulary has up to 300,000."""


class Connect(Protocol):
    """Reaches the applications of samplers. Raises ServiceNotReadyError while there is none of that name."""

    def router(self, application: str) -> RouterClient:
        """Returns the client of an application's router."""
        ...

    def sessions(self, application: str) -> SessionsAPI:
        """Returns the client of an application's sessions."""
        ...


class Sampler:
    """One sampler, by the name under which clients see it."""

    def __init__(self, name: str, application: str, connect: Connect) -> None:
        self.name, self.application = name, application
        self._connect = connect
        self._texts: LRUCache[int, str] = LRUCache(MAX_TEXTS)
        self._asked = False
        """Whether its state was asked for."""

    @property
    def client(self) -> RouterClient:
        """Reaches its router. Raises ServiceNotReadyError."""
        return self._connect.router(self.application)

    @property
    def sessions(self) -> SessionsAPI:
        """Reaches its sessions. Raises ServiceNotReadyError."""
        return self._connect.sessions(self.application)

    async def status(self) -> SamplerStatus:
        """Returns its state. Raises TwinkleServeError if its router does not answer.

        The first call has a thread import vLLM if the sampler's template has parsers of it, before they are needed.
        """
        status = await self.client.call(timing.ROUTER_GRACE_S, RouterAPI.status)
        if not self._asked:
            self._asked = True
            parsers = (status["template"].get("tool_parser"), status["template"].get("reasoning_parser"))
            if any(str(name).startswith(VLLM) for name in parsers):
                threading.Thread(target=_import_vllm, name="vllm parsers", daemon=True).start()
        return status

    async def token_texts(self, ids: Iterable[int]) -> Mapping[int, str]:
        """Returns the text of each token by itself; a part of a character is U+FFFD."""
        wanted = set(ids)
        if missing := [token for token in wanted if token not in self._texts]:
            lists = [[token] for token in missing]
            texts = await self.client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.decode, lists)
            self._texts.update(zip(missing, texts, strict=True))
        return {token: self._texts[token] for token in wanted}

    async def encode(self, prompt: Mapping[str, Any]) -> list[int]:
        """Returns the token ids of an input."""
        lists = await self.client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.encode, [dict(prompt)])
        return list(lists[0])

    async def count_tokens(self, prompt: Mapping[str, Any], continue_final_message: bool | None) -> int:
        """Returns the number of tokens of an input, as a call makes it its prompt."""
        counts = await self.client.call(
            timing.ANSWER_TIMEOUT_S,
            RouterAPI.count_tokens,
            [dict(prompt)],
            continue_final_message=continue_final_message,
        )
        return counts[0]

    async def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, special tokens kept."""
        if not len(ids):
            return ""
        text = await self.client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.decode, list(ids))
        assert isinstance(text, str)
        return text


def _import_vllm() -> None:
    with contextlib.suppress(Exception):  # the first reply that needs it raises
        importlib.import_module("vllm.tool_parsers")


@dataclass(frozen=True, slots=True)
class Target:
    """The sampler and weights that a request's `model` means."""

    model: str
    """As the client wrote it."""
    sampler: Sampler
    adapter_name: str = ""
    """`name`, `name@version`, or "" for the model's own weights."""

    def request(self, inputs: Any, params: Mapping[str, Any], caller: str, **options: Any) -> SampleRequest:
        """Makes a request of inputs, which the gateway owns."""
        prepared = self.sampler.client.prepare(
            SampleRequest(
                inputs=inputs,
                sampling_params=params,
                adapter_name=self.adapter_name,
                traceparent=current_traceparent(),
                **options,
            )
        )
        return replace(prepared, caller=caller) if caller else prepared

    async def run(self, request: SampleRequest) -> SampleResponse:
        """See `RouterAPI.run`."""
        return await self.sampler.client.run(request)

    def run_iter(self, request: SampleRequest) -> AsyncGenerator[SampleResponse, None]:
        """See `RouterAPI.run_iter`."""
        return self.sampler.client.run_iter(request)

    def run_updates(self, request: SampleRequest) -> AsyncGenerator[UpdatesItem, None]:
        """See `RouterAPI.run_updates`."""
        return self.sampler.client.run_updates(request)


@dataclass(frozen=True, slots=True)
class Model:
    """A model that clients can name."""

    id: str
    sampler: str
    root: str
    """The model that the sampler was started with."""
    parent: str | None = None
    """Of an adapter, its sampler; of a version, its adapter."""
    max_model_len: int | None = None


class Samplers:
    """All samplers of a gateway."""

    def __init__(self, applications: Mapping[str, str], connect: Connect) -> None:
        """
        Args:
            applications: by the names under which clients see them.
        """
        self.by_name = {name: Sampler(name, application, connect) for name, application in applications.items()}

    @property
    def first(self) -> Sampler:
        return next(iter(self.by_name.values()))

    def named(self, name: str | None) -> Sampler:
        """Returns a sampler; None means the first one. Raises UnknownModelError."""
        if name is None:
            return self.first
        if name not in self.by_name:
            raise UnknownModelError(unknown_name("sampler", name, self.by_name) + ".", "sampler")
        return self.by_name[name]

    async def target(self, model: str | None) -> Target:
        """Finds the sampler and weights of a model's name: that of a sampler, `adapter`, `adapter@version`, or one of
        these behind `sampler/`. None means the first sampler.

        The router refuses an unknown version when it is called with it.

        Raises:
            UnknownModelError: there is none.
        """
        if model is None:
            return Target(self.first.name, self.first)
        if model in self.by_name:
            return Target(model, self.by_name[model])
        for name, sampler in self.by_name.items():
            if model.startswith(f"{name}/"):
                return Target(model, sampler, model.removeprefix(f"{name}/"))
        applications = {sampler.application: sampler for sampler in self.by_name.values()}
        if len(applications) == 1:
            return Target(model, self.first, model)
        known: set[str] = set(self.by_name)
        for sampler in applications.values():
            names = await _adapters(sampler)
            if model in names or model.partition("@")[0] in names:
                return Target(model, sampler, model)
            known |= names
        raise UnknownModelError(unknown_name("model", model, known) + ".", "model")

    async def models(self) -> list[Model]:
        """Returns every sampler, adapter and version of the samplers that answer."""
        models: list[Model] = []
        for name, sampler in self.by_name.items():
            try:
                status = await sampler.status()
            except TwinkleServeError:
                models.append(Model(name, name, ""))
                continue
            lengths = [engine["max_model_len"] for engine in status["engines"].values() if "max_model_len" in engine]
            root, length = shown_model(status["model_id"]), min(lengths, default=None)
            models.append(Model(name, name, root, max_model_len=length))
            for adapter, labels in status["adapter_versions"].items():
                models.append(Model(adapter, name, root, name, length))
                models += [Model(label, name, root, adapter, length) for label in labels]
        return list({model.id: model for model in reversed(models)}.values())[::-1]


async def _adapters(sampler: Sampler) -> set[str]:
    try:
        return set((await sampler.status())["adapters"])
    except TwinkleServeError:
        return set()
