"""The extras of this package: what the client does without, and the error where a feature needs it."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from twinkle_serve.errors import ConfigError


def require_extra(feature: str, extra: str, *modules: str) -> None:
    """Checks that an extra is installed. Imports nothing.

    Args:
        feature: what needs it.
        extra: its name in pyproject.toml.
        modules: those of its modules that the feature imports.

    Raises:
        ConfigError: a module is missing.
    """
    if missing := [module for module in modules if module not in sys.modules and not find_spec(module)]:
        raise ConfigError(
            f"{feature} needs {', '.join(missing)}, which the {extra} extra brings: "
            f"pip install 'twinkle-serve[{extra}]'."
        )
