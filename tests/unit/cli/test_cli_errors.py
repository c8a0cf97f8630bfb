"""Exit codes of `twinkle-serve`, and its errors: one line each."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.support.command_line import fails, json_of, run, succeeds
from tests.support.docs import ROOT
from tests.support.eventually import wait_until
from tests.support.gateway_app import GatewayUnderTest, gateway_app
from twinkle_serve.cli import exits, http, main, options
from twinkle_serve.cli.app import app
from twinkle_serve.errors import (
    ConfigError,
    DeadlineError,
    PromptError,
    QueueFullError,
    ServiceError,
    ServiceNotReadyError,
)
from twinkle_serve.gateway.keys import Caller

ADMIN, SAMPLE = "an-admin-key-of-24-bytes", "a-sample-key-of-24-bytes"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayUnderTest]:
    """With keys, two samplers of which one is starting, and slow tokens."""
    keys = {ADMIN: Caller("trainer", "admin"), SAMPLE: Caller("eval", "sample")}
    samplers = {"actor": "one", "critic": "two"}
    with gateway_app(keys=keys, samplers=samplers, starting=("two",), engine_args={"token_latency_s": 0.01}) as made:
        yield made


@pytest.fixture(scope="module")
def url(gateway: GatewayUnderTest) -> Iterator[str]:
    with gateway.served() as served:
        yield served


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("status", "--nonsense"),
        ("sample",),
        ("sample", "x", "--max-tokens", "many"),
        ("sample", "x", "-n", "0"),
        ("sample", "x", "--param", "top_k"),
        ("sample", "x", "--param", "top_k=x"),
        ("sample", "x", "--seed", "1", "--param", "seed=2"),
        ("sample", "--file", "/no/such/file"),
        ("adapters", "add", "name"),
        ("adapters", "nonsense"),
        ("engines", "drain"),
        ("weights", "push"),
        ("doctor", "/no/such/config"),
        ("status", "--url", "ftp://host"),
        ("status", "--url", NOWHERE, "--service", "sampler"),
        ("status", "--address", "127.0.0.1:1"),
        ("status", "--service", "sampler", "--sampler", "actor"),
        ("status", "--watch", "--interval", "0"),
        ("verify", "--tolerance", "-1"),
        ("sessions", "export", "x", "--format", "nonsense"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_and_2(arguments: tuple[str, ...]) -> None:
    """Before anything is sent."""
    fails(exits.USAGE, *arguments)


@pytest.mark.parametrize("line", ["{", '{"prompt": "x"}', '"x'])
def test_invalid_lines_of_a_file_are_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"1+1=\n{line}\n")
    assert f"{file}, line 2" in fails(exits.USAGE, "sample", "--file", str(file))


@pytest.mark.parametrize(
    "arguments",
    [("status",), ("sample", "x"), ("chat",), ("top",), ("bench",), ("adapters", "list"), ("sessions", "list")],
    ids=" ".join,
)
def test_an_unreachable_gateway_is_3(arguments: tuple[str, ...]) -> None:
    """The line has the URL and what to do."""
    result = run(*arguments, "--url", NOWHERE, stdin="hello\n")
    assert result.exit_code == exits.UNREACHABLE
    (line,) = result.stderr.splitlines()
    assert NOWHERE in line and "Connection refused" in line and "twinkle-serve up" in line


def test_the_url_may_be_in_the_environment_and_end_with_v1(url: str) -> None:
    """As clients of OpenAI have it."""
    result = run("status", "--json", TWINKLE_SERVE_URL=f"{url}/v1/", TWINKLE_SERVE_KEY=SAMPLE)
    assert result.exit_code == 0, result.stderr


def test_something_else_than_a_gateway_is_said(tmp_path: Path) -> None:
    """A server that answers, but not with this service's JSON."""
    import http.server
    import threading

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        result = run("status", "--url", f"http://127.0.0.1:{server.server_address[1]}")
    finally:
        server.shutdown()
        server.server_close()
    assert result.exit_code == exits.UNREACHABLE and "Is it a gateway?" in result.stderr


def test_a_sampler_that_starts_is_3(url: str) -> None:
    line = fails(exits.UNREACHABLE, "status", "--url", url, "--key", ADMIN, "--sampler", "critic")
    assert "starting" in line
    assert json_of("status", "--url", url, "--key", ADMIN, "--sampler", "actor")["engines"]


def test_a_status_without_a_ready_engine_is_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is printed all the same."""
    status = {
        **{"model_id": "m", "weights": "w", "paused": False, "asleep": False, "requests": 0, "groups_waiting": 0},
        **{"adapters": {}, "adapter_versions": {}, "tracks": {"main": "w"}},
        "engines": {"engine-dp0": {"state": "dead", "track": "main", "sequences": 0, "last_failure": "killed"}},
    }
    monkeypatch.setattr("twinkle_serve.cli.gateway_client.GatewayClient.status", lambda self: status)
    result = run("status")
    assert result.exit_code == exits.UNREACHABLE
    assert "0 of 1 engines ready" in result.stdout and "killed" in result.stdout


def test_keys_are_needed_known_and_of_the_right_scope(url: str) -> None:
    """401 and 403 are refusals, 1, and the line says how to give another key."""
    for arguments in (("status",), ("status", "--key", "x" * 20), ("sessions", "list", "--key", SAMPLE)):
        assert "--key or TWINKLE_SERVE_KEY" in fails(exits.FAILED, *arguments, "--url", url)
    assert succeeds("sessions", "list", "--key", ADMIN, "--url", url)
    assert "calls: " in succeeds("top", "--key", SAMPLE, "--url", url)
    assert json_of("top", "--key", SAMPLE, "--url", url)["calls"] is None


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("sample", "x", "-p", "nonsense=1"), "SamplingParamsError"),
        (("sample", "x", "--adapter", "nobody"), "AdapterError"),
        (("sample", "x", "--max-tokens", "900", "-p", "ignore_eos=true", "--timeout", "0.05"), "DeadlineError"),
        (("engines", "drain", "nobody"), "Error"),
        (("chat", "--adapter", "nobody"), "Error"),
    ],
)
def test_refusals_are_1_with_the_type_of_the_error(url: str, arguments: tuple[str, ...], kind: str) -> None:
    """As a call from Python raises it."""
    result = run(*arguments, "--url", url, "--key", ADMIN, stdin="hello\n")
    assert result.exit_code == exits.FAILED
    (line,) = result.stderr.splitlines()
    assert kind in line


def test_ctrl_c_is_130_and_the_call_ends(gateway: GatewayUnderTest, url: str) -> None:
    """One line on stderr; the service is free."""
    command = [sys.executable, "-m", "twinkle_serve.cli", "sample", "x", "--max-tokens", "900", "-p", "ignore_eos=true"]
    environment = {**os.environ, "TWINKLE_SERVE_KEY": ADMIN, "TWINKLE_SERVE_URL": url}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: not gateway.is_idle(), "the call runs")
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (exits.INTERRUPTED, "", "twinkle-serve: interrupted.\n")
    wait_until(gateway.is_idle, "the call has ended")


@pytest.mark.parametrize(
    "arguments", [("status", "--watch"), ("top",), ("sample", "x"), ("chat",), ("doctor",), ("bench",)], ids=" ".join
)
def test_ctrl_c_in_any_command_is_130(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(options, "open_client", interrupted)
    monkeypatch.setattr("twinkle_serve.cli.checks.machine", interrupted)
    assert fails(exits.INTERRUPTED, *arguments) == "twinkle-serve: interrupted."


def test_a_bug_is_one_line_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(options, "open_client", bug)
    assert "a bug: KeyError: 'x'. Set TWINKLE_SERVE_DEBUG=1" in fails(exits.FAILED, "status")
    monkeypatch.setenv("TWINKLE_SERVE_DEBUG", "1")
    assert isinstance(run("status").exception, KeyError)


def test_exit_codes_by_error() -> None:
    codes = {PromptError: 1, ConfigError: 1, ServiceError: 3, ServiceNotReadyError: 3, exits.CommandError: 2}
    assert {kind: exits.exit_code(kind("x")) for kind in codes} == codes


@pytest.mark.parametrize(
    ("kind", "status", "expected"),
    [
        ("PromptError", 400, PromptError),
        ("QueueFullError", 429, QueueFullError),
        ("DeadlineError", 504, DeadlineError),
        ("UnavailableError", 503, ServiceNotReadyError),
        ("InternalError", 500, ServiceError),
        ("one_line", 500, ServiceError),
    ],
)
def test_errors_of_a_gateway_are_those_of_a_handle(kind: str, status: int, expected: type[Exception]) -> None:
    assert type(http.named_error(kind, "x", status)) is expected


def test_without_the_server_extra_the_remedy_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program is there with the client's dependencies alone, which lack typer."""
    monkeypatch.setattr("twinkle_serve.extras.find_spec", lambda module: None)
    monkeypatch.delitem(sys.modules, "typer")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == exits.USAGE
    assert "pip install 'twinkle-serve[server]'" in capsys.readouterr().err


def test_up_runs_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its arguments, and with its exit code."""
    import graphs.run

    given: list[object] = []

    def launch(*arguments: object) -> None:
        given.append(arguments)
        raise SystemExit(2)

    monkeypatch.setattr(graphs.run, "main", launch)
    assert run("up").exit_code == run("up", "x.yaml", "--replace", "--since", "1.5").exit_code == 2
    assert given == [(Path("serve_config.yaml"), False, None), (Path("x.yaml"), True, 1.5)]


def test_help_of_every_command_has_an_example_that_parses() -> None:
    """And a sentence for each option."""
    from twinkle_serve.cli.app import Commands

    root = typer.main.get_command(app)
    assert isinstance(root, Commands)
    for path, command in _leaves(root, ()):
        text = succeeds(*path, "--help")
        (example,) = re.findall(r"Example: twinkle-serve ((?:.|\n)+)", text)
        words = [word.strip("'") for word in example.split()]
        assert tuple(words[: len(path)]) == path
        command.make_context("x", words[len(path) :])
        for parameter in command.params:
            assert getattr(parameter, "help", "") or parameter.name == "help", (path, parameter.name)


def _leaves(group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _leaves(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_command_that_prints_results_has_json() -> None:
    """All but `up`, which is the service."""
    for path, command in _leaves(typer.main.get_command(app), ()):
        names = {option for parameter in command.params for option in parameter.opts}
        assert "--json" in names or path == ("up",), path


def test_help_imports_nothing_heavy() -> None:
    """So that it and the completion of shells are quick."""
    code = (
        "import sys\nfrom twinkle_serve.cli.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('ray', 'torch', 'vllm', 'transformers', 'numpy', 'pydantic', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_completion_knows_the_commands() -> None:
    """Typer's own, for bash."""
    environment = {"_TWINKLE_SERVE_COMPLETE": "complete_bash", "COMP_WORDS": "twinkle-serve s", "COMP_CWORD": "1"}
    assert set(run(**environment).stdout.split()) == {"status", "sample", "score", "sessions"}
