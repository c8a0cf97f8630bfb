"""Between messages and token ids."""

from twinkle_serve.template.template import Template

__all__ = ["Template"]
