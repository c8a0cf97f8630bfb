"""Adapters named by a path in a call: read again when the files are others, whatever their size and time say."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.eventually import wait_until
from tests.support.lora import save_adapter
from twinkle_serve.adapters import CONFIG, WEIGHTS, read_adapter
from twinkle_serve.config import ServiceArgs
from twinkle_serve.errors import AdapterError
from twinkle_serve.routing import adapters as routing_adapters
from twinkle_serve.routing.adapters import Directory, read_directory
from twinkle_serve.sampler import RunningSampler
from twinkle_serve.sampler.local import LocalClient

QUESTION = {"messages": [{"role": "user", "content": "12+34="}]}
PARAMS = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
FILES = (CONFIG, WEIGHTS)


@pytest.fixture(scope="module")
def sampler() -> Iterator[RunningSampler]:
    sampler = RunningSampler(LocalClient(ServiceArgs.model_validate({"model_id": "demo", "engine": "fake"})))
    yield sampler
    sampler.shutdown()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters with files of the same sizes and times."""
    directory = tmp_path_factory.mktemp("adapters")
    made = [save_adapter(directory / str(i), seed=i) for i in range(2)]
    for path in made:
        for name in FILES:
            os.utime(path / name, ns=(1_700_000_000_000_000_000,) * 2)
    assert len({(path / WEIGHTS).stat().st_size for path in made}) == 1
    return made


def copy_with_times(new: Path, path: Path) -> None:
    for name in FILES:
        subprocess.run(["cp", "-p", new / name, path / name], check=True)


def rename_over(new: Path, path: Path) -> None:
    """As rsync does."""
    for name in FILES:
        shutil.copy2(new / name, path / f".{name}")
        (path / f".{name}").rename(path / name)


def write_in_place(new: Path, path: Path) -> None:
    """The inodes stay too."""
    for name in FILES:
        stat = (path / name).stat()
        (path / name).write_bytes((new / name).read_bytes())
        os.utime(path / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def swap_directories(new: Path, path: Path) -> None:
    shutil.copytree(new, path.with_name("next"))
    path.rename(path.with_name("last"))
    path.with_name("next").rename(path)


REPLACEMENTS = [copy_with_times, rename_over, write_in_place, swap_directories]


def answer(sampler: RunningSampler, path: Path) -> tuple[str, list[int]]:
    """The version that answers, and its tokens."""
    sequence = sampler.sample(QUESTION, PARAMS, adapter_path=str(path)).sequences[0]
    return sequence.adapter.rpartition("@")[2], sequence.tokens


@pytest.mark.parametrize("replace", REPLACEMENTS)
@pytest.mark.parametrize("settled", [True, False])
def test_files_of_the_same_size_and_time_are_read_when_they_are_others(
    sampler: RunningSampler, adapters: list[Path], tmp_path: Path, replace: Callable[[Path, Path], Any], settled: bool
) -> None:
    """At once, and after the times of the file system have moved on."""
    path = tmp_path / "policy"
    shutil.copytree(adapters[0], path)
    wanted = [answer(sampler, adapter)[1] for adapter in adapters]
    if settled:
        wait_until(lambda: Directory.at(str(path)).settled, "the times have moved on")
    assert answer(sampler, path) == answer(sampler, path) == ("1", wanted[0])
    replace(adapters[1], path)
    assert answer(sampler, path) == answer(sampler, path) == ("2", wanted[1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loop", "no directory at"),
        ("a\0b", "no directory at"),
        ("a" * 300, "cannot be read: .*name too long"),
        ("no file", "cannot be read: .*Input/output error"),
        ("~no-such-user/adapter", "must be a path"),
    ],
)
def test_path_that_cannot_be_read_is_an_adapter_error(
    sampler: RunningSampler,
    adapters: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    message: str,
) -> None:
    """Whichever way the operating system says it; the next call works."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    shutil.copytree(adapters[0], tmp_path / "no file")

    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    path = name if name.startswith("~") else str(tmp_path / name)
    with monkeypatch.context() as patch, pytest.raises(AdapterError, match=message):
        patch.setattr(Path, "read_bytes", fail)
        sampler.sample(QUESTION, PARAMS, adapter_path=path)
    with pytest.raises(AdapterError, match=message), monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        sampler.add_adapter_to_model("policy", path)
    assert answer(sampler, adapters[0])[1]


@pytest.mark.parametrize("of_files", [True, False])
def test_link_that_moved_is_followed(
    sampler: RunningSampler, adapters: list[Path], tmp_path: Path, of_files: bool
) -> None:
    """Of the directory, as `latest` is, or of its files."""
    path = tmp_path / "latest"

    def point_to(adapter: Path) -> None:
        if of_files:
            path.mkdir(exist_ok=True)
        for link, target in [(path / n, adapter / n) for n in FILES] if of_files else [(path, adapter)]:
            link.unlink(missing_ok=True)
            link.symlink_to(target)

    point_to(adapters[0])
    first = answer(sampler, path)
    point_to(adapters[1])
    second = answer(sampler, path)
    assert (first[0], second[0]) == ("1", "2") and first[1] != second[1] == answer(sampler, adapters[1])[1]


def test_same_content_stays_the_same_version(sampler: RunningSampler, adapters: list[Path], tmp_path: Path) -> None:
    """Touched, copied over or linked anew: it is read once, and nothing is loaded again."""
    path = tmp_path / "policy"
    shutil.copytree(adapters[0], path)
    assert answer(sampler, path)[0] == "1"
    (path / WEIGHTS).touch()
    assert answer(sampler, path)[0] == "1"
    rename_over(adapters[0], path)
    assert answer(sampler, path)[0] == "1"


def test_files_that_did_not_change_are_not_read_again(
    sampler: RunningSampler, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the times of the file system tell a change."""
    wait_until(lambda: Directory.at(str(adapters[0])).settled, "the times have moved on")
    answer(sampler, adapters[0])

    def refuse(path: str) -> None:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr(routing_adapters, "read_adapter", refuse)
    assert answer(sampler, adapters[0])[1]


def test_directory_that_changes_while_it_is_read_is_read_again(
    adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that config and weights are of one adapter; one that changes for ever is an error."""
    path = tmp_path / "policy"
    shutil.copytree(adapters[0], path)
    pending = [adapters[1]]

    def read(name: str) -> Any:
        files = read_adapter(name)
        if pending:
            rename_over(pending.pop(), path)
        return files

    monkeypatch.setattr(routing_adapters, "read_adapter", read)
    assert read_directory(str(path))[0] == read_adapter(adapters[1])
    pending += adapters * 5
    with pytest.raises(AdapterError, match="change while they are read"):
        read_directory(str(path))
