"""The models and weights that Tinker's clients can name."""

from __future__ import annotations

from typing import Any

from twinkle_serve.data_format.status import SamplerStatus
from twinkle_serve.errors import TwinkleServeError, unknown_name
from twinkle_serve.gateway.context import GatewayContext
from twinkle_serve.gateway.errors import InvalidRequestError, UnknownModelError
from twinkle_serve.gateway.samplers import Sampler
from twinkle_serve.gateway.tinker.bodies import CreateSamplingSession
from twinkle_serve.gateway.tinker.ids import SamplingSession

SCHEME = "tinker://"
HUBS = ("ms://", "hf://")


class TinkerModels:
    """Finds samplers and adapter versions."""

    def __init__(self, context: GatewayContext) -> None:
        self._samplers = context.samplers
        self._base_models = context.args.base_models

    async def session(self, body: CreateSamplingSession) -> SamplingSession:
        """Makes a sampling session, fixed to the version that its model's name means now.

        Raises:
            UnknownModelError: no such model or adapter.
            InvalidRequestError: neither `base_model` nor `model_path` is given, or they contradict each other.
        """
        sampler, adapter = None, ""
        if body.model_path is not None:
            sampler, adapter = await self.of_path(body.model_path)
        if body.base_model is not None:
            named = await self.of_base_model(body.base_model)
            if sampler is not None and named.application != sampler.application:
                raise InvalidRequestError(
                    f"model_path={body.model_path!r} is of the sampler {sampler.name!r}, and "
                    f"base_model={body.base_model!r} means {named.name!r}. Leave base_model out.",
                    "base_model",
                )
            sampler = sampler or named
        if sampler is None:
            raise InvalidRequestError("neither base_model nor model_path is given. Give one.", "base_model")
        return SamplingSession(sampler.name, adapter, body.session_id, body.sampling_session_seq_id)

    def sampler(self, session: SamplingSession) -> Sampler:
        """Returns the sampler of a session. Raises UnknownModelError if the config has it no more."""
        return self._samplers.named(session.sampler)

    async def of_path(self, path: str) -> tuple[Sampler, str]:
        """Returns the sampler and the adapter version of `tinker://sampler/adapter` or `…/adapter@version`.

        Raises:
            UnknownModelError: there is no such sampler, adapter or version.
        """
        rest = path.removeprefix(SCHEME)
        known = self._samplers.by_name
        name = max((name for name in known if rest == name or rest.startswith(f"{name}/")), key=len, default=None)
        if name is None or not path.startswith(SCHEME):
            paths = [f"{SCHEME}{name}/<adapter>" for name in known]
            raise UnknownModelError(f"unknown model path {path!r}. Known: {', '.join(paths)}.", "model_path")
        sampler, adapter = known[name], rest.removeprefix(name).removeprefix("/")
        if not adapter:
            return sampler, ""
        status = await sampler.status()
        labels = [label for versions in status["adapter_versions"].values() for label in versions]
        label = status["adapters"].get(adapter, adapter)
        if label not in labels:
            raise UnknownModelError(
                unknown_name("adapter", adapter, {*status["adapters"], *labels}) + ".", "model_path"
            )
        return sampler, label

    async def of_base_model(self, name: str) -> Sampler:
        """Returns the sampler that answers to the name of a base model.

        Raises:
            UnknownModelError: there is none.
            TwinkleServeError: a sampler that may be it does not answer.
        """
        if (sampler := self._samplers.by_name.get(self._base_models.get(name, name))) is not None:
            return sampler
        known: set[str] = {*self._base_models, *self._samplers.by_name}
        unreachable: TwinkleServeError | None = None
        for sampler in self._samplers.by_name.values():
            try:
                model = hub_name((await sampler.status())["model_id"])
            except TwinkleServeError as error:
                unreachable = error
                continue
            if model == name:
                return sampler
            known |= {model} if model else set()
        if unreachable is not None:
            raise unreachable
        raise UnknownModelError(unknown_name("base model", name, known) + ".", "base_model")

    async def base_model(self, sampler: Sampler) -> str:
        """Returns the name by which a sampler's model is told to clients, which load its tokenizer by it."""
        for name, sampler_name in self._base_models.items():
            if self._samplers.by_name[sampler_name].application == sampler.application:
                return name
        return hub_name((await sampler.status())["model_id"]) or sampler.name

    async def supported(self) -> list[dict[str, Any]]:
        """Returns the models of `get_server_capabilities`. Raises TwinkleServeError if no sampler answers."""
        models: dict[str, dict[str, Any]] = {}
        failure: TwinkleServeError | None = None
        for sampler in self._samplers.by_name.values():
            try:
                status = await sampler.status()
            except TwinkleServeError as error:
                failure = error
                continue
            names = [name for name, sampler_name in self._base_models.items() if sampler_name == sampler.name]
            for name in names or [hub_name(status["model_id"]) or sampler.name]:
                models[name] = {"model_name": name, "trainable": False, **_state_of(status)}
        if not models and failure is not None:
            raise failure
        return list(models.values())


def _state_of(status: SamplerStatus) -> dict[str, Any]:
    engines = status["engines"].values()
    lengths = [engine["max_model_len"] for engine in engines if "max_model_len" in engine]
    ready = any(engine["state"] == "ready" for engine in engines)
    return {"max_context_length": min(lengths, default=None), "sampleable": ready and not status["asleep"]}


def hub_name(model_id: str) -> str:
    """Returns `org/name` of a model on a hub; "" for other models."""
    for prefix in HUBS:
        model_id = model_id.removeprefix(prefix)
    return model_id if model_id.count("/") == 1 and not model_id.startswith(("/", ".", "~")) else ""
