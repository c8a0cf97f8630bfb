"""Templates as a call carries them."""

from __future__ import annotations

from typing import Any

import cloudpickle

from twinkle_serve.errors import TemplateError
from twinkle_serve.template.template import Template


def pack_template(template: str | type[Template] | Template, arguments: dict[str, Any]) -> bytes:
    """Pickles a template, to be sent with every call: the router keeps no state for a caller that could be lost.

    Raises:
        TemplateError: it cannot be pickled.
    """
    try:
        packed: bytes = cloudpickle.dumps((template, arguments))
    except Exception as error:  # whatever a user's class holds
        raise TemplateError(f"template {template!r} cannot be sent to the service: {error}") from error
    return packed


def unpack_template(choice: str | bytes) -> tuple[Any, dict[str, Any]]:
    """Returns a template, or its name, and its arguments.

    Raises:
        TemplateError: it cannot be unpickled here.
    """
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
