"""Tables, lines of blocks and units of `twinkle-serve`, also on narrow terminals; its examples on the page of docs."""

from __future__ import annotations

import io
import shlex
from typing import Any

import pytest
import typer
from rich.console import Console

from tests.support.docs import PAGES, blocks_of
from twinkle_serve.cli import tables
from twinkle_serve.cli.app import app
from twinkle_serve.cli.commands import status, top
from twinkle_serve.cli.load import run_load
from twinkle_serve.cli.tables import Column, sparkline
from twinkle_serve.errors import ServiceError

ENGINE = {
    **{"state": "ready", "sequences": 130, "weights": "step-1000", "adapters": ["my_lora@12"], "engine": "vllm"},
    **{"device": "cuda", "max_num_seqs": 256, "batch_fill": 0.51, "kv_cache": 0.42, "prefix_hits": 0.9},
    **{
        "track": "main",
        "preemptions": 3,
        "tokens_per_s": 12345.6,
        "last_failure": "EngineDeadError: " + "it was killed " * 8,
    },
}
STATUS: Any = {
    **{"model_id": "org/a-model-7b", "weights": "step-1000", "paused": True, "asleep": False, "requests": 3},
    **{"groups_waiting": 12, "adapters": {"my_lora": "my_lora@12"}, "adapter_versions": {"my_lora": ["my_lora@12"]}},
    "engines": {f"engine-dp{i}": ENGINE for i in range(3)},
    "tracks": {"main": "step-1000"},
}
TRACKS: Any = {**STATUS, "tracks": {"main": "step-1000", "trial": "step-2000"}}
POINT = {
    **{"time": 0.0, "tokens_per_s": 1000.0, "prompt_tokens_per_s": 50.0, "samples_per_s": 3.5, "calls": 2},
    **{"failed_calls": 0, "running_calls": 4, "sequences": 64, "waiting": 12, "call_s": [0.5, 90.0], "queued_s": None},
    **{"staleness": 0.25, "engines_ready": 2, "weights": "step-1000"},
}
REPORT: Any = {
    **{"now": 5.0, "period_s": 5.0, "points": [{**POINT, "tokens_per_s": 100.0 * i} for i in range(700)]},
    "events": [{"time": 1.0, "kind": "engine lost", "engine": "engine-dp0", "text": "killed, and more of it " * 9}],
}
CALL = {
    **{
        "id": "0123456789abcdef0123",
        "caller": "trainer-of-a-long-name",
        "track": "main",
        "adapter": "my_lora@12",
        "age_s": 7200.0,
    },
    **{"left_s": None, "prompts": 512, "samples": 4096, "samples_done": 1234},
}


def drawn(renderable: Any, width: int) -> list[str]:
    """Lines on a terminal of that width."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_everything_fits_the_terminal(width: int) -> None:
    """Names and numbers are never cut: whole columns are left out instead, the least important first."""
    lines = drawn(status.report(STATUS, width), width)
    assert all(len(line) <= width for line in lines)
    assert sum(line.startswith("engine-dp1") for line in lines) == 2  # its state, and its failure
    (head,) = [line for line in lines if line.startswith("engine ")]
    assert "state" in head and "running" in head and "tokens/s" in head
    assert "…" not in "\n".join(lines)
    lines = drawn(top.screen(REPORT, [CALL] * 12, "", width), width)
    assert all(len(line) <= width for line in lines)
    assert any(line.startswith("tokens/s") and "69,900" in line for line in lines)
    assert any("1234/4096" in line for line in lines) and any("and 2 more" in line for line in lines)


def test_tracks_are_shown_where_there_are_several() -> None:
    """With the weights of each, and a column."""
    lines = drawn(status.report(TRACKS, 200), 200)
    assert "weights main step-1000, trial step-2000" in lines[0]
    assert any(line.split()[:2] == ["engine", "track"] for line in lines)
    assert not any("track" in line for line in drawn(status.report(STATUS, 200), 200))


def test_columns_are_left_out_by_rank() -> None:
    columns = [Column("a" * 10, str), Column("b" * 10, str, 2), Column("c" * 10, str, 1)]
    titles = {width: drawn(tables.table(columns, ["x"], width), width)[0].split() for width in (34, 33, 22, 10)}
    assert [len(found) for found in titles.values()] == [3, 2, 2, 1]
    assert titles[33] == ["a" * 10, "c" * 10]


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 5, ""),
        ([0.0, 0.0], 5, "▁▁"),
        ([0.0, 3.5, 7.0], 5, "▁▅█"),
        ([1.0, None, 1.0], 5, "█ █"),
        ([0.0, 0.0, 8.0, 8.0], 2, "▁█"),
        ([8.0, 0.0, 0.0, 8.0, 8.0], 3, "█▁█"),
    ],
)
def test_sparkline_shows_means_of_neighbours(values: list[float | None], width: int, line: str) -> None:
    """The newest at the right; the highest fills the line's height."""
    assert sparkline(values, width) == line


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (tables.seconds(0.0314), "31 ms"),
        (tables.seconds(12.34), "12.3 s"),
        (tables.seconds(3600), "60 min"),
        (tables.seconds(None), "–"),
        (tables.size(3_300_000), "3.1 MiB"),
        (tables.number(3.55), "3.5"),
        (tables.number(12345.6), "12,346"),
        (tables.percent(0.512), "51%"),
        (tables.clipped("a\n b" * 9, 5), "a ba…"),
        (tables.printable("a\x1b[31m\n"), "a\\x1b[31m\n"),
    ],
)
def test_units(found: str, text: str) -> None:
    assert found == text


def test_commands_of_the_docs_parse() -> None:
    """Every line that begins with `twinkle-serve`, on every page: the command, its options and their types."""
    root = typer.main.get_command(app)
    count = 0
    for page in PAGES:
        for block in blocks_of(page):
            for line in block.code.splitlines() if block.language in ("console", "bash") else ():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if not words or words[0] != "twinkle-serve" or words[1].startswith("--"):
                    continue
                command, rest = root, words[1:]
                while hasattr(command, "commands"):
                    command = command.commands[rest.pop(0)]
                command.make_context("x", rest)
                count += 1
    assert count >= 10


class Failing:
    """A client that fails at chosen calls."""

    def __init__(self, succeeds: int) -> None:
        self._left = succeeds

    def sample(self, *_: object) -> Any:
        if not self._left:
            raise ServiceError("gone")
        self._left -= 1

        class Response:
            columns = type("Columns", (), {"tokens": [1, 2], "__len__": lambda self: 1})()
            prompts = ([1, 2, 3],)

        return Response()


def test_load_counts_failed_calls_apart() -> None:
    """Their time is in no percentile."""
    measured = run_load(Failing(3), lambda i: [], None, concurrency=1, seconds=60, max_calls=5)  # type: ignore[arg-type]
    assert (len(measured.call_s), measured.tokens, measured.prompt_tokens) == (3, 6, 9)
    assert measured.errors == ["ServiceError: gone"] * 2
    assert measured.plain["first_error"] == "ServiceError: gone"


def test_load_raises_where_nothing_works() -> None:
    with pytest.raises(ServiceError, match="gone"):
        run_load(Failing(0), lambda i: [], None, concurrency=4, seconds=60)  # type: ignore[arg-type]
