"""The pages of the documentation, and the fenced blocks in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))

IN_PROCESS = "in-process"
SERVICE = "service"
HTTP = "http"

_FENCE = re.compile(r"(?:^<!-- run: ([\w-]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    runs: str
    """Where it is run, by the comment before it: IN_PROCESS, SERVICE, HTTP, or "" for nowhere."""
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start(3)) + 1
        runs = match[1] or ""
        assert runs in ("", IN_PROCESS, SERVICE, HTTP), f"{page.name}:{line}: run: {runs}"
        found.append(Block(page, line, match[2], runs, match[3]))
    return found


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))
