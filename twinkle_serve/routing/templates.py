"""Which template a call is rendered with."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any, TypeAlias

import cloudpickle

from twinkle_serve import hub
from twinkle_serve.config import ServiceArgs
from twinkle_serve.errors import TemplateError
from twinkle_serve.template import Template, resolve_template

TemplateChoice: TypeAlias = str | bytes | None
"""A registered name, what `pack_template` made of something else, or None for the config's."""

MAX_TEMPLATES = 16
"""Templates that a router keeps built: each holds a tokenizer."""


def pack_template(template: str | type[Template] | Template, arguments: dict[str, Any]) -> bytes:
    """A template as a call carries it: the router keeps no state for a caller, so none is lost with it."""
    try:
        packed: bytes = cloudpickle.dumps((template, arguments))
    except Exception as error:  # whatever a user's class holds
        raise TemplateError(f"template {template!r} cannot be sent to the service: {error}") from error
    return packed


def _unpacked(choice: str | bytes) -> tuple[Any, dict[str, Any]]:
    if isinstance(choice, str):
        return choice, {}
    try:
        template, arguments = cloudpickle.loads(choice)
    except Exception as error:  # whatever a user's class needs
        raise TemplateError(
            f"the template cannot be loaded here: {type(error).__name__}: {error}. Its module must be importable on "
            "the service's nodes, or the class defined in the caller's own script."
        ) from error
    return template, dict(arguments)


class TemplateCache:
    """Templates, built once each. Not for use from several threads."""

    def __init__(self, model: Path, args: ServiceArgs) -> None:
        """
        Raises:
            ModelNotFoundError: the model has no tokenizer.
            TemplateError: `args.template` cannot be built.
        """
        self._model = model
        self._trust_remote_code = args.trust_remote_code
        own = args.template.model_dump(exclude={"name"})
        self._default = resolve_template(args.template.name, model, trust_remote_code=args.trust_remote_code, **own)
        self._built: OrderedDict[str | bytes, Template] = OrderedDict()

    def has(self, choice: TemplateChoice) -> bool:
        """Whether `get` has nothing to do."""
        return choice is None or choice in self._built

    def fetch(self, choice: str | bytes) -> None:
        """Downloads what a template needs, if it is on a hub. May be called from any thread.

        Raises:
            ModelNotFoundError: `model_id` of its arguments is nowhere.
        """
        _, arguments = _unpacked(choice)
        if "model_id" in arguments:
            hub.resolve(arguments["model_id"], weights=False)

    def get(self, choice: TemplateChoice) -> Template:
        """The template of a call.

        Raises:
            TemplateError: no such template, or arguments that it does not take.
            ModelNotFoundError: `model_id` of its arguments is nowhere.
        """
        if choice is None:
            return self._default
        if (known := self._built.get(choice)) is None:
            template, arguments = _unpacked(choice)
            model = self._model
            if "model_id" in arguments and not isinstance(template, Template):
                model = hub.resolve(arguments.pop("model_id"), weights=False)
            if arguments.pop("trust_remote_code", False) and not self._trust_remote_code:
                raise TemplateError("trust_remote_code is off in the config of this sampler. Set it there.")
            known = resolve_template(template, model, trust_remote_code=self._trust_remote_code, **arguments)
            self._built[choice] = known
            while len(self._built) > MAX_TEMPLATES:
                self._built.popitem(last=False)
        self._built.move_to_end(choice)
        return known
