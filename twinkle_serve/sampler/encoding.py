"""A sampler's template, used without sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from twinkle_serve import hub
from twinkle_serve.data_format.sample_request import TemplateChoice
from twinkle_serve.data_format.status import SamplerStatus
from twinkle_serve.errors import TemplateError, TwinkleServeError

if TYPE_CHECKING:
    from twinkle_serve.data_format import InputFeature, Trajectory
    from twinkle_serve.mesh import DeviceMesh
    from twinkle_serve.template import Template


class EncodingSampler:
    """The part of a sampler that needs only its template."""

    device_mesh: DeviceMesh | None = None
    """The devices of its engines; None of a sampler that another process has made."""

    @property
    def template(self) -> Template | None:
        """How messages become tokens; None until it is set."""
        return self.__dict__.get("_set_template")

    @template.setter
    def template(self, template: Template | None) -> None:
        self.__dict__["_set_template"] = template

    def set_template(self, template_cls: Template | type[Template] | str, **kwargs: Any) -> None:
        """Sets how messages become tokens.

        Args:
            template_cls: a registered name, a Template class or a Template.
            kwargs: arguments of the class; `model_id` names the model, by default the sampler's own `model_id`.

        Raises:
            TemplateError: no such template, or invalid arguments.
            ModelNotFoundError: the model has no tokenizer.
        """
        from twinkle_serve.template import Template, resolve_template

        model = kwargs.pop("model_id", None) or getattr(self, "model_id", None)
        if isinstance(template_cls, Template):
            self.template = resolve_template(template_cls, "", **kwargs)
        elif model is None:
            raise TemplateError(f"set_template of {type(self).__name__} needs model_id=…, or a Template.")
        else:
            self.template = resolve_template(template_cls, hub.resolve(str(model), weights=False), **kwargs)

    def encode_trajectory(
        self, trajectory: Trajectory, adapter_name: str = "", add_generation_prompt: bool = True
    ) -> InputFeature:
        """Encodes a conversation as an InputFeature, which can be sampled from.

        Args:
            trajectory: the conversation; it is not changed.
            adapter_name: no adapter has a template of its own, so it makes no difference.
            add_generation_prompt: whether to end at the beginning of the assistant's turn, or after the last message.

        Raises:
            TemplateError: no template is set.
            PromptError: as `sample`.
        """
        feature = self._required_template.encode_trajectory(trajectory, add_generation_prompt)
        return cast("InputFeature", {key: value for key, value in feature.items() if key != "labels"})

    def decode_response(self, token_ids: Sequence[int], adapter_name: str = "") -> str:
        """Decodes tokens, special tokens kept. Raises TemplateError without a template."""
        return self._required_template.decode(token_ids)

    @property
    def _required_template(self) -> Template:
        template = self.template
        if template is None:
            raise TemplateError(f"{type(self).__name__} has no template. Call set_template() first.")
        return template

    # For subclasses that are written for Twinkle's Sampler.

    @staticmethod
    def _not_encoded(inputs: Mapping[str, Any]) -> bool:
        return "input_ids" not in inputs and "input_embedding" not in inputs

    def _is_trajectory(self, inputs: Any) -> bool:
        first = next(iter(inputs), None) if isinstance(inputs, list) else inputs
        return isinstance(first, Mapping) and self._not_encoded(first)

    def _normalize_inputs(self, inputs: Any) -> list[Any]:
        return [inputs] if isinstance(inputs, Mapping) else list(inputs)


class LocalTemplate:
    """A template that the router uses, built in this process on first use."""

    def __init__(self) -> None:
        self._built: Template | None = None

    def get(self, choice: TemplateChoice, status: Callable[[], SamplerStatus]) -> Template:
        """Returns the template of a choice, always the same object.

        Args:
            choice: as in a SampleRequest; None for the template of the sampler's config.
            status: returns the sampler's status.

        Raises:
            ModelNotFoundError: the model has no tokenizer, or is not here.
        """
        if self._built is None:
            self._built = self._build(choice, status)
        return self._built

    def find(self, choice: TemplateChoice, status: Callable[[], SamplerStatus]) -> Template | None:
        """As `get`, without a download. None if the model's files are not here, or the sampler does not answer."""
        if self._built is None:
            try:
                self._built = self._build(choice, status, download=False)
            except TwinkleServeError:
                return None
        return self._built

    def _build(self, choice: TemplateChoice, status: Callable[[], SamplerStatus], *, download: bool = True) -> Template:
        from twinkle_serve.template import Template, resolve_template
        from twinkle_serve.template.packing import unpack_template

        template: Any
        if choice is None:
            arguments: dict[str, Any] = dict(status()["template"])
            template = arguments.pop("name")
        else:
            template, arguments = unpack_template(choice)
            if isinstance(template, Template):
                return template
        model = arguments.pop("model_id", None) or status()["model_id"]
        return resolve_template(template, hub.resolve(str(model), weights=False, download=download), **arguments)
