"""What of a service's output is shown on the launcher's terminal, and what goes to its log file."""

from __future__ import annotations

import io
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from deployments.log_config import REQUEST_FAILED, OneLineErrors, log_to_serve, quiet
from graphs.cluster import LaunchError, join_or_start
from graphs.ready import calls
from graphs.replica_messages import ReplicaMessages
from twinkle_serve.errors import ConfigError, PromptError, SamplingParamsError, TwinkleServeError

ROOT = Path(__file__).parents[2]
ROUTER = "(ServeReplica:sampler:router pid=28416) "

RECORDED = f"""\
2026-11-28 01:39:07,661	WARNING authentication_token_setup.py:85 -- Token authentication is enabled.
(ServeController pid=28142) WARNING 2026-11-28 01:39:28,889 controller 28142 -- Actor for Replica crashed.
(ServeReplica:sampler:engine-dp0 pid=16574) Triton is installed, but doesn't include CPU backend. Disabling Triton.
{ROUTER}WARNING 2026-11-28 01:39:30,299 sampler_router jo760g47 -- engine-dp0 is lost with 0 groups
{ROUTER}FutureWarning: `torch.distributed.reduce_op` is deprecated
{ROUTER}INFO 2026-11-28 01:39:31,299 sampler_router jo760g47 -- nothing
{ROUTER}WARNING 2026-11-28 01:39:32,299 sampler_router jo760g47 9a3e-4d -- call failed: PromptError: too long.
{ROUTER}ERROR 2026-11-28 01:39:33,299 sampler_router jo760g47 9a3e-4d -- Request failed.
{ROUTER}Traceback (most recent call last):
(ServeReplica:other:router pid=3) unrelated
{ROUTER}  File "router.py", line 109, in sample
{ROUTER}    return await self._router.sample(
{ROUTER}KeyError: 'a'
{ROUTER}
{ROUTER}During handling of the above exception, another exception occurred:
{ROUTER}
{ROUTER}Traceback (most recent call last):
{ROUTER}  File "router.py", line 110, in sample
{ROUTER}TypeError: no
{ROUTER}Loading safetensors checkpoint shards: 100%
(ServeReplica:b:engine-dp1 pid=7, ip=10.0.0.2) WARNING 2026-11-28 01:39:40,1 b_engine-dp1 x -- cached copy used
"""


def test_terminal_shows_warnings_and_tracebacks_of_replicas_alone() -> None:
    """None of what libraries print, nor of Serve's own processes."""
    messages = ReplicaMessages()
    shown = [message for line in RECORDED.splitlines() if (message := messages.of(line)) is not None]
    assert shown == [
        "01:39:30  sampler router  engine-dp0 is lost with 0 groups",
        "01:39:32  sampler router  call failed: PromptError: too long.",
        "01:39:33  sampler router  error: Request failed.",
        "    Traceback (most recent call last):",
        '      File "router.py", line 109, in sample',
        "        return await self._router.sample(",
        "    KeyError: 'a'",
        "    During handling of the above exception, another exception occurred:",
        "    Traceback (most recent call last):",
        '      File "router.py", line 110, in sample',
        "    TypeError: no",
        "01:39:40  b engine-dp1  cached copy used",
    ]


@pytest.fixture
def serve_log() -> Iterator[io.StringIO]:
    """Where Serve's logger writes, as in a replica, until the test ends."""
    logger = logging.getLogger("ray.serve")
    kept = logger.handlers[:], logger.filters[:], logger.level
    ours = [logging.getLogger(name) for name in ("twinkle_serve", "deployments")]
    parents = [logger.parent for logger in ours]
    out = io.StringIO()
    logger.handlers, logger.filters = [logging.StreamHandler(out)], []
    logger.setLevel("WARNING")
    yield out
    logger.handlers, logger.filters = kept[:2]
    logger.setLevel(kept[2])
    for mine, parent in zip(ours, parents, strict=True):
        mine.parent = parent


def log_failed_request(error: Exception) -> None:
    """As Serve does."""
    try:
        raise error
    except Exception:
        logging.getLogger("ray.serve").exception(REQUEST_FAILED)


def test_refused_call_is_logged_in_one_line(serve_log: io.StringIO) -> None:
    """Its type and message, whatever line breaks the message has; also when another process raised it."""
    log_to_serve(refusals=True)
    log_to_serve(refusals=True)
    log_failed_request(PromptError("too long:\n  9 tokens"))
    remote = RayTaskError("sample", "Traceback …\n" * 9, SamplingParamsError("temperature must be …"))
    log_failed_request(remote.as_instanceof_cause())
    assert serve_log.getvalue().splitlines() == [
        "call failed: PromptError: too long: 9 tokens",
        "call failed: SamplingParamsError: temperature must be …",
    ]


def test_refusal_is_a_warning_and_a_bug_stays_an_error(serve_log: io.StringIO) -> None:
    """With its traceback."""
    logging.getLogger("ray.serve").handlers[0].setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    log_to_serve(refusals=True)
    log_failed_request(TwinkleServeError("no"))
    log_failed_request(KeyError("a bug"))
    first, second, third, *_, last = serve_log.getvalue().splitlines()
    assert [first, second] == ["WARNING call failed: TwinkleServeError: no", "ERROR Request failed."]
    assert third.startswith("Traceback") and last == "KeyError: 'a bug'"


def test_router_alone_logs_refusals(serve_log: io.StringIO) -> None:
    """It is the only caller of engines and store, so that each refusal is one line of the service; bugs are logged."""
    log_to_serve(refusals=False)
    log_failed_request(PromptError("too long"))
    assert serve_log.getvalue() == ""
    log_failed_request(KeyError("a bug"))
    assert "KeyError" in serve_log.getvalue()


def test_loggers_of_the_package_write_where_serve_does(serve_log: io.StringIO) -> None:
    """Those of modules that are loaded later too; from INFO on, where Serve's own begin at WARNING."""
    log_to_serve(refusals=True)
    logging.getLogger("twinkle_serve.hub").warning("a copy of the cache")
    logging.getLogger("deployments.a_module_of_later").info("the line of each 10 s")
    logging.getLogger("deployments.a_module_of_later").debug("nothing")
    assert serve_log.getvalue() == "a copy of the cache\nthe line of each 10 s\n"
    assert sum(isinstance(f, OneLineErrors) for f in logging.getLogger("ray.serve").filters) == 1


REDIRECTED = """
import os, subprocess, sys
from graphs.output_log import OutputLog
with OutputLog() as log:
    print("chatter")
    print("warning", file=sys.stderr)
    subprocess.run(["sh", "-c", "echo of a child; printf 'half a '"])
    print("shown", file=log.stdout)
    lines = log.new_lines()
    print("line")
    lines += ["--", *log.new_lines(), "--", *log.new_lines()]
print("after", log.path, lines)
"""


def test_output_goes_to_the_log_and_the_terminal_stays_the_launchers(tmp_path: Path) -> None:
    """That of child processes too; until the log is closed."""
    code = [sys.executable, "-c", REDIRECTED]
    directory = tmp_path / "new"
    env = {"RAY_TMPDIR": str(directory), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(code, env=env, capture_output=True, text=True, timeout=60, check=True)
    (log,) = directory.iterdir()
    lines = ["chatter", "warning", "of a child", "--", "half a line", "--"]
    assert done.stdout == f"shown\nafter {log} {lines}\n" and done.stderr == ""
    assert log.read_text() == "chatter\nwarning\nof a child\nhalf a line\n"


def test_address_where_nothing_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would try it for minutes."""
    with socket.socket() as bound:  # and nobody listens
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(LaunchError, match=f"no Ray cluster at RAY_ADDRESS={address}: .*refused. Start it"):
            join_or_start(["sampler"])


def test_calls_are_python_that_can_be_pasted() -> None:
    """Without indentation, whatever the application's name."""
    lines = calls('my "own"', '{"input_ids": [1, 2, 3]}')
    assert all(line == line.lstrip() for line in lines)
    compile("\n".join(lines), "calls", "exec")


def test_encoding_of_logs_is_json_or_text() -> None:
    """Of the environment variable TWINKLE_SERVE_LOG_ENCODING, in either case."""
    assert [quiet(text).encoding for text in ("json", "JSON", "text")] == ["JSON", "JSON", "TEXT"]
    with pytest.raises(ConfigError, match="must be JSON or TEXT, got 'xml'"):
        quiet("xml")
