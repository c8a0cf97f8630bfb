"""Builds and caches the templates of calls."""

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
"""A registered name, the result of `pack_template`, or None for the config's template."""

MAX_TEMPLATES = 16
"""Templates cached by a router; each holds a tokenizer."""


def pack_template(template: str | type[Template] | Template, arguments: dict[str, Any]) -> bytes:
    """Pickles a template, to be sent with every call: the router keeps no state for a caller that could be lost."""
    try:
        packed: bytes = cloudpickle.dumps((template, arguments))
    except Exception as error:  # whatever a user's class holds
        raise TemplateError(f"template {template!r} cannot be sent to the service: {error}") from error
    return packed


def _unpack(choice: str | bytes) -> tuple[Any, dict[str, Any]]:
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
    """Builds each template once. Not thread-safe."""

    def __init__(self, model: Path, args: ServiceArgs) -> None:
        """
        Raises:
            ModelNotFoundError: the model has no tokenizer.
            TemplateError: `args.template` cannot be built.
        """
        self._model = model
        self._trust_remote_code = args.trust_remote_code
        options = args.template.model_dump(exclude={"name"})
        self._default = resolve_template(args.template.name, model, trust_remote_code=args.trust_remote_code, **options)
        self._built: OrderedDict[str | bytes, Template] = OrderedDict()

    def has(self, choice: TemplateChoice) -> bool:
        """Whether the template is built."""
        return choice is None or choice in self._built

    def fetch(self, choice: str | bytes) -> None:
        """Downloads the files that a template needs from a hub, if any. Thread-safe.

        Raises:
            ModelNotFoundError: the `model_id` of its arguments does not exist.
        """
        _, arguments = _unpack(choice)
        if "model_id" in arguments:
            hub.resolve(arguments["model_id"], weights=False)

    def get(self, choice: TemplateChoice) -> Template:
        """Returns the template of a call.

        Raises:
            TemplateError: unknown template or invalid arguments.
            ModelNotFoundError: the `model_id` of its arguments does not exist.
        """
        if choice is None:
            return self._default
        if (built := self._built.get(choice)) is None:
            template, arguments = _unpack(choice)
            model = self._model
            if "model_id" in arguments and not isinstance(template, Template):
                model = hub.resolve(arguments.pop("model_id"), weights=False)
            if arguments.pop("trust_remote_code", False) and not self._trust_remote_code:
                raise TemplateError("trust_remote_code is off in the config of this sampler. Set it there.")
            built = resolve_template(template, model, trust_remote_code=self._trust_remote_code, **arguments)
            self._built[choice] = built
            while len(self._built) > MAX_TEMPLATES:
                self._built.popitem(last=False)
        self._built.move_to_end(choice)
        return built
