"""Builds and caches the templates of calls."""

from __future__ import annotations

from pathlib import Path

from cachetools import LRUCache

from twinkle_serve import hub
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format.sample_request import TemplateChoice
from twinkle_serve.errors import TemplateError
from twinkle_serve.template import Template, resolve_template
from twinkle_serve.template.packing import unpack_template

MAX_TEMPLATES = 16
"""Templates cached by a router; each holds a tokenizer."""


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
        if not hub.is_path(args.model_id) and args.model_id != "demo":
            self._default.hub_model = (args.model_id, args.revision)
        self._built: LRUCache[str | bytes, Template] = LRUCache(MAX_TEMPLATES)

    def has(self, choice: TemplateChoice) -> bool:
        """Whether the template is built."""
        return choice is None or choice in self._built

    def fetch(self, choice: str | bytes) -> None:
        """Downloads the files that a template needs from a hub, if any. Thread-safe.

        Raises:
            ModelNotFoundError: the `model_id` of its arguments does not exist.
        """
        _, arguments = unpack_template(choice)
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
            template, arguments = unpack_template(choice)
            model = self._model
            if "model_id" in arguments and not isinstance(template, Template):
                model = hub.resolve(arguments.pop("model_id"), weights=False)
            if arguments.pop("trust_remote_code", False) and not self._trust_remote_code:
                raise TemplateError("trust_remote_code is off in the config of this sampler. Set it there.")
            built = resolve_template(template, model, trust_remote_code=self._trust_remote_code, **arguments)
            self._built[choice] = built
        return built
