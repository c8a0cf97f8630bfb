"""Checks that an optional extra of this package is installed, where a feature needs it."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from twinkle_serve.errors import ConfigError


def require_extra(feature: str, extra: str, *modules: str) -> None:
    """Checks that an extra is installed. Imports nothing.

    Args:
        feature: the start of the error message.
        extra: its name in pyproject.toml.
        modules: the modules of the extra that the feature imports.

    Raises:
        ConfigError: a module is missing.
    """
    if missing := [module for module in modules if module not in sys.modules and not find_spec(module)]:
        raise ConfigError(
            f"{feature} needs {', '.join(missing)}, which the {extra} extra brings: "
            f"pip install 'twinkle-serve[{extra}]'."
        )
