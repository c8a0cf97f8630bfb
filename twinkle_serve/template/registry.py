"""Templates by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path

from twinkle_serve.errors import TemplateError, unknown_name
from twinkle_serve.template.template import Template

TEMPLATES: dict[str, type[Template]] = {
    "Template": Template,
    # Twinkle's names for models whose own chat template is sufficient for text.
    "QwenTemplate": Template,
    "Qwen3Template": Template,
    "Qwen3_5Template": Template,
    "Gemma4Template": Template,
}
"""Templates by the name that a call or a config gives. Others are passed as a class or an instance."""

NOT_SUPPORTED = {
    "DeepseekV4Template": "renders DeepSeek V4's messages with its own code. Pass input_ids, or a subclass of Template "
    "that overrides render",
    "Qwen3VLTemplate": "is for images and videos: this service samples from text only",
}
"""Twinkle's unsupported templates, and the reason."""

ALIASES = {"default_system": "system"}
"""Twinkle's names of arguments to the names here."""


def resolve_template(
    template: str | type[Template] | Template,
    model: str | Path,
    *,
    trust_remote_code: bool = False,
    **arguments: object,
) -> Template:
    """Makes a template from its name or class; returns an instance unchanged.

    Args:
        template: name in TEMPLATES, subclass of Template, or instance.
        model: directory of the model, for a name or a class.
        trust_remote_code: run code that comes with the tokenizer, if the class has that parameter.
        **arguments: keyword arguments of the template's class; none for an instance.

    Raises:
        TemplateError: unknown or unsupported template, or an argument that it does not accept.
        ModelNotFoundError: the model has no tokenizer.
    """
    if isinstance(template, Template):
        if arguments:
            raise TemplateError(
                f"{', '.join(sorted(arguments))} cannot be set on an existing template. Give the class "
                f"{type(template).__name__}, or pass them when you make the instance."
            )
        return template
    kind = TEMPLATES.get(template) if isinstance(template, str) else template
    if kind is None:
        if template in NOT_SUPPORTED:
            raise TemplateError(f"{template} {NOT_SUPPORTED[str(template)]}.")
        raise TemplateError(f"{unknown_name('template', template, TEMPLATES)}. Or give a class or an instance.")
    if not (isinstance(kind, type) and issubclass(kind, Template)):
        raise TemplateError(f"template must be a name, a subclass of Template or an instance, got {template!r}.")
    checked = _check_arguments(kind, arguments)
    if trust_remote_code and "trust_remote_code" in inspect.signature(kind).parameters:
        checked["trust_remote_code"] = True
    try:
        inspect.signature(kind).bind(model, **checked)
    except TypeError as error:
        raise TemplateError(f"{kind.__name__} cannot be made: {error}. Give its arguments with its name.") from None
    make: Callable[..., Template] = kind
    return make(model, **checked)


def _check_arguments(kind: type[Template], arguments: Mapping[str, object]) -> dict[str, object]:
    parameters = inspect.signature(kind).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        accepted = parameters | inspect.signature(Template).parameters
    else:
        accepted = dict(parameters)
    accepted = {name: p for name, p in accepted.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    for name in ("model", "model_id"):
        accepted.pop(name, None)
    clean: dict[str, object] = {}
    for key, value in arguments.items():
        name = ALIASES.get(key, key)
        if name not in accepted:
            raise TemplateError(f"{unknown_name(f'argument of {kind.__name__}', key, {*accepted, *ALIASES})}.")
        if name in clean:
            raise TemplateError(f"{name} is given twice, as {name} and under another name. Give it once.")
        clean[name] = value
    return clean
