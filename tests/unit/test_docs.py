"""README and docs agree with the code: links, files, commands, configs, names, and every block of Python."""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import twinkle_serve
from graphs.config_file import check_config_file
from tests.support.docs import IN_PROCESS, PAGES, ROOT, Block, blocks_of, prose_of
from twinkle_serve import conventions, errors, remote, sampler
from twinkle_serve.data_format import tool_calls

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PRODUCT = [path for name in ("graphs", "deployments", "twinkle_serve") for path in (ROOT / name).rglob("*.py")]

SUBSTITUTES = {
    "ms://Qwen/Qwen2.5-7B-Instruct": "demo",
    "DeviceMesh.from_sizes(dp_size=4)": "DeviceMesh.from_sizes()",
    'initialize("ray", ': 'initialize("local", ',
    "max_tokens=512": "max_tokens=4",
}
"""Literal on a page, literal here, where an example names what this machine lacks."""

TOOLS = {"mkdocs", "ray", "serve", "twinkle-serve"}
"""First words of commands that are not files of the repository."""


def of_language(*languages: str) -> list[Any]:
    return [pytest.param(block, id=str(block)) for block in BLOCKS if block.language in languages]


def spans() -> Iterator[tuple[Path, str]]:
    """Code in the prose of every page."""
    for page in PAGES:
        for span in re.findall(r"`([^`\n]+)`", prose_of(page)):
            yield page, span


def commands() -> Iterator[tuple[Path, list[str]]]:
    """Commands of every page: lines of shell blocks, and code in prose that begins with a script or an example."""
    for block in BLOCKS:
        for line in block.code.splitlines():
            if block.language == "bash" or (block.language == "console" and line.startswith("$ ")):
                yield block.page, line.removeprefix("$ ").partition("#")[0].split()
    for page, span in spans():
        if span.startswith(("scripts/", "examples/")):
            yield page, span.split()


def anchors_of(path: Path) -> set[str]:
    """Of the headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", prose_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links name files that exist, and headings that these have."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@pytest.mark.parametrize("block", of_language("python"))
def test_python_compiles(block: Block) -> None:
    """Also with a top-level await."""
    compile(block.code, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("block", [pytest.param(block, id=str(block)) for block in BLOCKS if block.runs == IN_PROCESS])
def test_example_runs(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the fake engine, with only the literals of SUBSTITUTES replaced."""
    for kind in (sampler.TorchSampler, sampler.vLLMSampler):
        monkeypatch.setattr(kind, "engine", "fake")
    monkeypatch.setattr(tool_calls, "TOOL_PARSERS", dict(tool_calls.TOOL_PARSERS))
    code = block.code
    for literal, substitute in SUBSTITUTES.items():
        code = code.replace(literal, substitute)
    modules, finders = set(sys.modules), list(sys.meta_path)
    names: dict[str, Any] = {"__name__": "__main__"}  # cloudpickle takes its classes by value
    try:
        exec(compile(code, str(block), "exec"), names)
    finally:
        for value in names.values():
            if isinstance(value, sampler.RunningSampler):
                value.shutdown()
        remote.shutdown()
        for name in set(sys.modules) - modules:  # of as_twinkle
            if name.split(".")[0] == "twinkle" or name == "twinkle_serve.as_twinkle":
                del sys.modules[name]
        sys.meta_path[:] = finders
        conventions.follow_twinkle(False)


@pytest.mark.parametrize("block", of_language("yaml"))
def test_yaml_is_a_config(block: Block, tmp_path: Path) -> None:
    """Down to the arguments of the engine; of a RayService, the config in it."""
    path = tmp_path / "config.yaml"
    path.write_text(block.code)
    if (given := yaml.safe_load(block.code)).get("kind") == "RayService":
        keys = tmp_path / "keys"
        keys.write_text("agents:sample:secret-of-the-agents\n")
        keys.chmod(0o600)
        path.write_text(given["spec"]["serveConfigV2"].replace("/keys/keys", str(keys)))
    assert check_config_file(path)


def test_commands_name_files_and_options_that_exist() -> None:
    """Scripts, examples, benchmarks, and their options."""
    for page, words in commands():
        command = " ".join(words)
        while "=" in words[0]:  # an environment variable
            words = words[1:]
        first = words[1] if words[0] == ".venv/bin/python" else words[0]
        assert first in TOOLS or (ROOT / first).is_file(), f"{page.name}: {command}"
        sources = [ROOT / first] if first not in TOOLS else []
        if first == "scripts/bench" and len(words) > 1 and words[1] != "NAME":
            found = [ROOT / "benchmarks" / f"{words[1]}.py", *(ROOT / "benchmarks" / words[1]).glob("*.py")]
            sources = [path for path in found if path.is_file()]
            assert sources, f"{page.name}: {command}"
        if first == "scripts/chaos":
            sources = list((ROOT / "benchmarks" / "chaos").glob("*.py"))
        if first not in TOOLS and first not in ("scripts/test", "scripts/lock"):  # which hand their options on
            text = "".join(path.read_text(encoding="utf-8") for path in sources)
            for option in (word for word in words if word.startswith("--")):
                assert f'"{option}"' in text or f"{option})" in text, f"{page.name}: {command}: {option}"


def test_files_named_in_prose_exist() -> None:
    """`routing/seeds.py:prompt_seed` is a file with that name in it, in the repository or in twinkle_serve/."""
    roots = (ROOT, ROOT / "twinkle_serve", ROOT / "benchmarks" / "results", ROOT / "tests" / "integration")
    for page, span in spans():
        match = re.fullmatch(r"([\w./-]+\.(?:py|json|png|yaml|md|txt))(?::([\w.]+))?", span)
        if match is None or "NAME" in span:
            continue
        found = [root / match[1] for root in roots if (root / match[1]).is_file()]
        assert found, f"{page.name}: no file {span}"
        if match[2]:
            names = match[2].split(".")
            text = found[0].read_text(encoding="utf-8")
            assert all(re.search(rf"\b{name}\b", text) for name in names), f"{page.name}: {span}"


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_classes_named_on_a_page_exist(page: str) -> None:
    """In prose and in the trace of a call; their members, as far as their names are anywhere in the product."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in PRODUCT)
    named = re.findall(r"`([A-Z]\w*[a-z]\w*(?:\.\w+)*)`", prose_of(ROOT / page))
    for block in blocks_of(ROOT / page):
        named += re.findall(r"\b[A-Z]\w+\.\w+", block.code) if block.language == "text" else []
    for span in set(named) - {"AsyncLLM.generate"}:  # vLLM's
        kind, *members = span.split(".")
        assert re.search(rf"\bclass {kind}\b|^{kind}(: TypeAlias)? = ", text, re.MULTILINE), span
        assert all(re.search(rf"\b{member}\b", text) for member in members), span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_errors_named_on_a_page_exist(page: Path) -> None:
    """A renamed error does not live on in prose."""
    known = {*vars(errors), "RayTaskError", *dir(builtins)}
    assert set(re.findall(r"\b[A-Z]\w+Error\b", page.read_text(encoding="utf-8"))) <= known


def test_public_names_are_in_the_reference() -> None:
    """What the package, its samplers and its groups hand out has an entry; mkdocs says whether that leads to code."""
    entries = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        entries |= {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)}
    public = {*twinkle_serve.__all__, *sampler.__all__, *remote.__all__}
    # An alias, the root of the tree of errors, and a function that code written for Twinkle imports.
    assert public - {"VLLMSampler", "TwinkleServeError", "get_logger"} <= entries


def test_every_result_file_is_explained() -> None:
    """benchmarks/README.md says which command wrote a file, and what is in it."""
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks" / "results").iterdir():
        assert f"`{path.name}`" in page, path.name
