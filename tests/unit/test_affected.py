"""Which nightly tests `scripts/test --nightly --affected` runs."""

from __future__ import annotations

import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.support.affected import (
    ALL,
    CHAOS,
    CLIENT,
    RULES,
    SAMPLERS,
    SCRIPTS,
    UNDER_FIRE,
    changed_paths,
    nightly_tests,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("paths", "tests"),
    [
        ([], frozenset()),
        (["docs/api.md", "README.md", "tests/unit/test_hub.py"], frozenset()),
        (["benchmarks/chaos/run.py"], {CHAOS}),
        ([UNDER_FIRE, "examples/grpo.py"], {UNDER_FIRE, SCRIPTS}),
        (["twinkle_serve/template/registry.py"], {CLIENT, *SAMPLERS}),
        (["twinkle_serve/routing/router.py"], ALL),
        (["docs/api.md", "requirements/cpu.txt"], ALL),
        (["twinkle_serve/no/such/module.py"], ALL),
    ],
)
def test_changed_paths_select_the_tests_that_guard_them(paths: list[str], tests: set[str]) -> None:
    """A path that no rule names may break everything."""
    assert nightly_tests(paths) == tests


def test_tests_and_rules_name_what_there_is() -> None:
    """No rule is left over from a file that has moved."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = listed.stdout.splitlines()
    assert set(files) >= ALL
    for pattern, _ in RULES:
        assert any(fnmatch(file, pattern) for file in files), pattern


def test_changes_are_those_since_a_revision_and_new_files(tmp_path: Path) -> None:
    """Committed, in the working tree, and untracked; both names of a file that was moved."""

    def git(*command: str) -> None:
        identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.com")
        subprocess.run(["git", *identity, *command], cwd=tmp_path, capture_output=True, check=True)

    git("init", "--initial-branch=main")
    for name in ("kept.py", "moved.py", "changed.py"):
        (tmp_path / name).write_text(name)
    git("add", ".")
    git("commit", "--message=one")
    git("mv", "moved.py", "there.py")
    git("commit", "--message=two")
    (tmp_path / "changed.py").write_text("changed")
    (tmp_path / "new.py").write_text("new")
    expected = {"moved.py", "there.py", "changed.py", "new.py"}
    assert set(changed_paths(tmp_path, None)) == expected, "without origin/main: since HEAD~"
    assert set(changed_paths(tmp_path, "HEAD")) == {"changed.py", "new.py"}
