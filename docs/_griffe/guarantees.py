"""Shows the lines of `Guarantees:` and `Does not guarantee:` in docstrings as lists."""

from __future__ import annotations

import inspect
from typing import Any

import griffe

TITLES = ("Guarantees:", "Does not guarantee:")


class Guarantees(griffe.Extension):
    """Puts a bullet before each guarantee; lines that are indented further continue one."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None and any(title in obj.docstring.value for title in TITLES):
            obj.docstring.value = as_lists(inspect.cleandoc(obj.docstring.value))


def as_lists(text: str) -> str:
    """The text of a docstring with bullets before its guarantees."""
    lines, inside = [], False
    for line in text.splitlines():
        if line in TITLES:
            inside = True
            lines.append("")  # a section begins after an empty line
        elif inside and line and not line.startswith(" "):
            inside = False
        elif inside and line.startswith("    ") and line[4:5] not in ("", " ", "-"):
            line = f"    - {line[4:]}"
        lines.append(line)
    return "\n".join(lines)
