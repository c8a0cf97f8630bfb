"""docs/api.md against the code, both ways; links and code of the pages that are written for callers."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import inspect
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import twinkle_serve
from twinkle_serve import errors
from twinkle_serve.data_format.sampling_params import UNSET

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("api.md", "migrating.md")

SECTIONS = {
    "Sampler": "twinkle_serve:Sampler",
    "RunningSampler": "twinkle_serve.sampler:RunningSampler",
    "Rollouts": "twinkle_serve.sampler:Rollouts",
    "AsyncRollouts": "twinkle_serve.sampler:AsyncRollouts",
    "Pause": "twinkle_serve.sampler:Pause",
    "vLLMSampler": "twinkle_serve:vLLMSampler",
    "TorchSampler": "twinkle_serve:TorchSampler",
    "Verification": "twinkle_serve.sampler:Verification",
    "SamplingParams": "twinkle_serve:SamplingParams",
    "Trajectory": "twinkle_serve:Trajectory",
    "InputFeature": "twinkle_serve:InputFeature",
    "SampleResponse": "twinkle_serve:SampleResponse",
    "SampledSequence": "twinkle_serve:SampledSequence",
    "Template": "twinkle_serve:Template",
    "twinkle_serve.data_format.messages.MessageParser": "twinkle_serve.data_format.messages:MessageParser",
    "twinkle_serve.template": "twinkle_serve.template:",
    "twinkle_serve.data_format.tool_calls": "twinkle_serve.data_format.tool_calls:",
    "twinkle_serve.data_format.tool_calls.ToolParser": "twinkle_serve.data_format.tool_calls:ToolParser",
    "twinkle_serve.data_format.tool_calls.ToolCall": "twinkle_serve.data_format.tool_calls:ToolCall",
    "DeviceMesh": "twinkle_serve:DeviceMesh",
    "DeviceGroup": "twinkle_serve:DeviceGroup",
    "twinkle_serve.remote": "twinkle_serve.remote:",
    "twinkle_serve.remote.GroupDevices": "twinkle_serve.remote:GroupDevices",
    "twinkle_serve.remote.Device": "twinkle_serve.remote:Device",
    "remote_class": "twinkle_serve:remote_class",
    "remote_function": "twinkle_serve:remote_function",
    "twinkle_serve.remote.LazyResult": "twinkle_serve.remote:LazyResult",
}
"""What a heading of the page is about: module:name, or a module."""

RAY_SECTIONS = {
    "connect": "twinkle_serve:connect",
    "RunningSampler": "twinkle_serve:RunningSampler",
    "serve.get_app_handle(name)": "deployments.router:Router.func_or_class",
}
"""As above; importing these loads Ray."""

PROSE = {"as_twinkle"}
"""Headings with code that are about nothing that has members."""

NOT_FOR_CALLERS = {"session"}
"""The state of `twinkle_serve.remote`: an object of other modules of the package."""

ENTRY_TABLES = {"field", "key", "property", "attribute", "name"}
"""Tables, by the head of their first column, whose rows are entries. `argument` and `method` explain signatures."""


@dataclasses.dataclass
class Section:
    """What the page says under one heading."""

    title: str
    about: list[str]
    """Code in the heading."""
    text: str = ""
    """All of it."""
    stubs: list[ast.FunctionDef | ast.AsyncFunctionDef] = dataclasses.field(default_factory=list)
    rows: list[tuple[str, list[str]]] = dataclasses.field(default_factory=list)
    """(head of the first column, cells) of every row of a table."""
    defaults: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of the tables that have a column for them."""
    arguments: list[tuple[ast.FunctionDef | ast.AsyncFunctionDef, list[str]]] = dataclasses.field(default_factory=list)
    """Tables of arguments, with the signature that they follow."""

    def entries(self) -> set[str]:
        """Names of what the section has signatures or rows for."""
        rows = {cells[0] for head, cells in self.rows if head in ENTRY_TABLES}
        return rows | {stub.name for stub in self.stubs if stub.name not in self.about}

    def explained(self) -> set[str]:
        return {cells[0] for head, cells in self.rows if head == "method"}


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, code) of each fenced block."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


def signatures_of(code: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions of a block whose bodies are `...` alone; none where it is an example."""
    body = ast.parse(code).body
    stubs = [item for item in body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))]
    whole = len(stubs) == len(body) and all(ast.unparse(stub.body[0]) == "..." for stub in stubs)
    return stubs if whole else []


def parse_sections(text: str) -> list[Section]:
    found: list[Section] = []
    for part in re.split(r"^(?=##? )", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        section = Section(title.lstrip("# "), re.findall(r"`([^`]+)`", title), body)
        found.append(section)
        for piece in re.split(r"(^```python\n.*?^```$)", body, flags=re.MULTILINE | re.DOTALL):
            if piece.startswith("```python"):
                section.stubs += signatures_of(piece.removeprefix("```python\n").removesuffix("```"))
            else:
                _read_tables(section, piece)
    return found


def _read_tables(section: Section, text: str) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        lines = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in table.splitlines()]
        head = [cell.strip() for cell in lines[0]]
        rows = [[cell.strip().strip("`") for cell in line] for line in lines[2:]]
        section.rows += [(head[0], row) for row in rows]
        if "default" in head:
            section.defaults |= {row[0]: row[head.index("default")] for row in rows}
        if head[0] == "argument":
            section.arguments.append((section.stubs[0 if len(section.about) > 1 else -1], [row[0] for row in rows]))


@functools.cache
def sections() -> dict[str, Section]:
    """Sections of the page by each name that their heading is about."""
    return {name: section for section in parse_sections(page("api.md")) for name in section.about}


def load(place: str) -> Any:
    module, _, path = place.partition(":")
    return functools.reduce(getattr, filter(None, path.split(".")), import_module(module))


def public_names(thing: Any) -> set[str]:
    """What callers may use of a class, its private bases included, or of a module."""
    if isinstance(thing, types.ModuleType):
        own = getattr(thing, "__all__", None)
        if own is None:
            made = {name for name, value in vars(thing).items() if getattr(value, "__module__", "") == thing.__name__}
            own = made | {name for name in vars(thing) if name.isupper()}
        return {name for name in own if not name.startswith("_")} - {code.rpartition(".")[2] for code in sections()}
    if not inspect.isclass(thing):
        return set()
    kinds = [thing, *(base for base in thing.__bases__ if base.__name__.startswith("_"))]
    names = {name for kind in kinds for name in (*vars(kind), *vars(kind).get("__annotations__", ()))}
    return {name for name in names if not name.startswith("_")}


def missing_entries(thing: Any, section: Section) -> set[str]:
    """Public names that the page has no entry for."""
    return public_names(thing) - section.entries() - NOT_FOR_CALLERS


def problems(name: str, place: str) -> list[str]:
    """All in which a section and the code disagree."""
    section, thing = sections()[name], load(place)
    found = [f"{name}.{entry} has no entry" for entry in sorted(missing_entries(thing, section))]
    found += [f"{name}.{entry} is not in the code" for entry in sorted(section.entries()) if not has(thing, entry)]
    found += [
        f"{name} explains {row}, of which it shows no signature" for row in section.explained() - stub_names(name)
    ]
    for stub in section.stubs:
        if stub.name in section.about and stub.name != name:
            continue
        code = thing if stub.name == name else getattr(thing, stub.name, None)
        if code is not None:
            found += signature_problems(stub, code, is_class=inspect.isclass(thing) and stub.name != name)
    for stub, names in section.arguments:
        if names != parameters_of(stub):
            found.append(f"{stub.name} has the arguments {parameters_of(stub)}, its table {names}")
    if dataclasses.is_dataclass(thing):
        found += default_problems(thing, section)
    found += error_problems(name, thing)
    return found


def error_problems(name: str, thing: Any) -> list[str]:
    """Errors that the docstrings of a section's members name under `Raises`, and the section does not."""
    members = [getattr(thing, stub.name, thing) for stub in sections()[name].stubs]
    if inspect.isclass(thing):
        members += [thing, thing.__init__]
    raised = {error for member in members for error in errors_raised(member)}
    # "as `sample`" stands for those of another call.
    return [f"{name} does not name {error}" for error in sorted(raised) if error not in sections()[name].text]


def errors_raised(member: Any) -> set[str]:
    _, _, section = (inspect.getdoc(member) or "").partition("Raises:\n")
    own = section.partition("\n\n")[0]
    return set(re.findall(r"\b[A-Z]\w+Error\b", own))


def stub_names(name: str) -> set[str]:
    return {stub.name for stub in sections()[name].stubs}


def has(thing: Any, entry: str) -> bool:
    return hasattr(thing, entry) or any(entry in getattr(kind, "__annotations__", ()) for kind in mro(thing))


def mro(thing: Any) -> tuple[type, ...]:
    return (*getattr(thing, "__mro__", ()), thing)


def parameters_of(stub: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = stub.args
    starred = [arg for arg in (given.vararg, given.kwarg) if arg is not None]
    return [arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs, *starred)]


def signature_problems(stub: ast.FunctionDef | ast.AsyncFunctionDef, code: Any, is_class: bool) -> list[str]:
    """Names, kinds and defaults of the parameters, what is returned, and whether it is awaited."""
    signature = inspect.signature(code)
    parameters = list(signature.parameters.values())
    if is_class and not inspect.ismethod(code) and parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    wanted = inspect.Signature([parameter.replace(annotation=parameter.empty) for parameter in parameters])
    written = signature_written(stub)
    found = [f"{stub.name}{written} is {stub.name}{wanted}"] if written != wanted else []
    kinds = [(type(a.default), type(b.default)) for a, b in zip(written.parameters.values(), parameters, strict=False)]
    if any(a is not b for a, b in kinds):
        found.append(f"{stub.name}: defaults are of other types")
    if inspect.iscoroutinefunction(code) != isinstance(stub, ast.AsyncFunctionDef):
        found.append(f"{stub.name}: async on one side alone")
    returned = str(signature.return_annotation)
    if stub.returns is None or ast.unparse(stub.returns) != ast.unparse(ast.parse(returned)):
        found.append(f"{stub.name} returns {returned}")
    return found


def signature_written(stub: ast.FunctionDef | ast.AsyncFunctionDef) -> inspect.Signature:
    """The signature of a stub, made by Python itself."""
    made: dict[str, Any] = {"UNSET": UNSET}
    bare = ast.FunctionDef(stub.name, stub.args, stub.body, [], lineno=1, col_offset=0)
    exec(compile(ast.fix_missing_locations(ast.Module([bare], [])), "docs/api.md", "exec"), made)
    return inspect.signature(made[stub.name])


def default_problems(kind: Any, section: Section) -> list[str]:
    found = []
    for field in dataclasses.fields(kind):
        expected = "" if field.default is dataclasses.MISSING else repr(field.default).replace("'", '"')
        if isinstance(field.default_factory, type):
            expected = f"{field.default_factory.__name__}()"
        if (written := section.defaults.get(field.name)) != expected:
            found.append(f"{kind.__name__}.{field.name} is {expected or 'required'} by default, the page has {written}")
    return found


def error_classes() -> dict[str, type[Exception]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.TwinkleServeError)
    }


@pytest.mark.parametrize(("name", "place"), SECTIONS.items(), ids=SECTIONS)
def test_section_agrees_with_the_code(name: str, place: str) -> None:
    """Each public member has an entry, each entry a member; signatures, defaults and arguments are the code's."""
    assert not problems(name, place)


def test_sections_of_the_service_agree_with_the_code() -> None:
    """What is called by Ray: connect, RunningSampler, and the methods of the ingress."""
    assert not [problem for name, place in RAY_SECTIONS.items() for problem in problems(name, place)]


def test_page_has_no_section_about_something_unknown() -> None:
    """A heading that names code is one that is compared with the code."""
    assert set(sections()) - PROSE == {*SECTIONS, *RAY_SECTIONS}


@pytest.mark.parametrize("name", twinkle_serve.__all__)
def test_public_name_has_an_entry(name: str) -> None:
    """All that `twinkle_serve` hands out is on the page."""
    entries = {entry for section in sections().values() for entry in section.entries()}
    if name == "VLLMSampler":
        assert twinkle_serve.VLLMSampler is twinkle_serve.vLLMSampler
    elif name != "TwinkleServeError":  # in the tree of errors
        assert name in entries | set(sections())


@pytest.mark.parametrize("kind", ["method", "property", "field"])
def test_check_fails_when_a_member_is_added_without_an_entry(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps the page whole is itself seen to work."""
    sampler = load(SECTIONS["RunningSampler"])
    if kind == "field":
        monkeypatch.setattr(sampler, "__annotations__", {"brand_new": "int"}, raising=False)
    else:
        made: Any = (lambda self: None) if kind == "method" else property(lambda self: None)
        monkeypatch.setattr(sampler, "brand_new", made, raising=False)
    assert "RunningSampler.brand_new has no entry" in problems("RunningSampler", SECTIONS["RunningSampler"])


def test_check_fails_when_an_error_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a docstring says is raised stands on the page, in the section of the call."""
    sampler = load(SECTIONS["RunningSampler"])
    assert {"PromptError", "DeadlineError"} <= errors_raised(sampler.sample)
    monkeypatch.setattr(sampler.reset_prefix_cache, "__doc__", "Resets.\n\nRaises:\n    WorkerError: now and then.\n")
    assert "RunningSampler does not name WorkerError" in problems("RunningSampler", SECTIONS["RunningSampler"])


def test_check_fails_when_a_default_or_a_parameter_differs() -> None:
    """1 is not 1.0, and an argument by name is not one by place."""

    def code(first: int, *, second: float = 1.0) -> None: ...

    def seen(stub: str) -> list[str]:
        return signature_problems(signatures_of(stub)[0], code, is_class=False)

    assert not seen("def code(first, *, second=1.0) -> None: ...")
    assert seen("def code(first, *, second=1) -> None: ...")
    assert seen("def code(first, second=1.0) -> None: ...")
    assert seen("def code(first, *, other=1.0) -> None: ...")
    assert seen("async def code(first, *, second=1.0) -> None: ...")
    assert seen("def code(first, *, second=1.0) -> int: ...")


def test_tree_of_errors_is_that_of_the_code() -> None:
    """Every error has a row, under the error that it is a kind of."""
    tree = next(section for section in parse_sections(page("api.md")) if section.title == "Errors")
    rows = {cells[0]: cells[1] for head, cells in tree.rows if head == "error"}
    assert rows == {name: kind.__bases__[0].__name__ for name, kind in error_classes().items()}


@pytest.mark.parametrize("name", PAGES)
def test_page_names_only_errors_that_exist(name: str) -> None:
    """A renamed error does not live on in prose."""
    known = {*error_classes(), "RayTaskError", *(error for error in dir(builtins) if error.endswith("Error"))}
    assert set(re.findall(r"\b[A-Z]\w+Error\b", page(name))) <= known


@pytest.mark.parametrize("name", PAGES)
def test_page_links_lead_somewhere(name: str) -> None:
    """Relative links name files that exist, and headings that these have."""
    prose = re.sub(r"^```.*?^```$", "", page(name), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (DOCS / path).resolve() if path else DOCS / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


SUBSTITUTES = {
    'model_id="ms://Qwen/Qwen2.5-7B-Instruct"': 'model_id="demo"',
    "device_mesh=DeviceMesh.from_sizes(dp_size=4)": "device_mesh=DeviceMesh.from_sizes()",
    'initialize("ray", ': 'initialize("local", ',
    "vLLMSampler": "TorchSampler",
    "max_tokens=512": "max_tokens=4",
}
"""Literal on a page, literal here, where an example names what this test has not."""


@pytest.mark.parametrize(("name", "which"), [("api.md", "12+34="), ("migrating.md", "import twinkle_serve.as_twinkle")])
def test_example_of_a_page_runs(name: str, which: str) -> None:
    """In a process of its own, with nothing but the literals of the table replaced."""
    (code,) = [code for language, code in blocks(page(name)) if language == "python" and which in code]
    for literal, substitute in SUBSTITUTES.items():
        code = code.replace(literal, substitute)
    script = "if True:\n" + textwrap.indent(code, "    ")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", outside, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_page_python_compiles(name: str) -> None:
    """Each block of Python is Python."""
    codes = [code for language, code in blocks(page(name)) if language == "python"]
    assert codes
    check: Callable[[str], object] = functools.partial(compile, filename=name, mode="exec")
    for code in codes:
        check(code, flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)  # type: ignore[call-arg]
