"""Templates: messages to token ids and back."""

from twinkle_serve.template.registry import TEMPLATES, resolve_template
from twinkle_serve.template.template import Template

__all__ = ["TEMPLATES", "Template", "resolve_template"]


def __getattr__(name: str) -> type[Template]:
    """Looks up registered templates, so that `from twinkle_serve.template import Qwen3Template` works."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
