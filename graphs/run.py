"""Serves a config, as `serve run` does, for a person to read.

    twinkle-serve up serve_config.yaml

Refuses an invalid config, shows each step of the start, and reports changes of the applications. The output of
Ray, Serve and the engines goes to a log file. Exit codes: 0 after Ctrl-C, 1 when an application, Ray or Serve
failed, 2 when the config is wrong.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated

import typer

from graphs.cluster import (
    Cluster,
    LaunchError,
    dead_process,
    gateway_urls,
    join_or_start,
    shut_down,
    start_serve,
    submit,
)
from graphs.config_file import ConfigFile, check_config_file
from graphs.observer import Observer, Snapshot, look
from graphs.output_log import OutputLog
from graphs.ready import ready_text
from graphs.replica_messages import ReplicaMessages
from graphs.startup import StartUp, is_new
from graphs.startup_display import Display, clock, display_for, duration
from graphs.watch import Watch, reason
from twinkle_serve.errors import TwinkleServeError

FAILED = 1
BAD_CONFIG = 2

TURN_S = 0.2
"""Period of the launcher's loop."""
WATCH_PERIOD_S = 1.0
"""Shorter than any replacement by Serve, so that none is missed."""

RAY_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_COLOR_PREFIX": "0", "RAY_DEDUP_LOGS": "0"}
"""Makes the log complete and readable."""


def main(
    config: Annotated[Path, typer.Argument(help="A Ray Serve config.")] = Path("serve_config.yaml"),
    replace: Annotated[bool, typer.Option("--replace", help="Replace applications of others on RAY_ADDRESS.")] = False,
    since: Annotated[float | None, typer.Option(hidden=True, help="When it was started, s since the epoch.")] = None,
) -> None:
    """Serves the applications of CONFIG until Ctrl-C."""
    started = time.monotonic() - (0.0 if since is None else max(0.0, time.time() - since))
    os.environ.update(RAY_SETTINGS | os.environ)  # before anything imports Ray
    stop_on_signals()
    try:
        checked = check_config_file(config)
    except TwinkleServeError as error:
        print(f"{config}: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(BAD_CONFIG)
    except KeyboardInterrupt:
        sys.exit(0)
    with OutputLog() as log:
        code = Launcher(config, checked, log, started, replace=replace).run()
    sys.exit(code)


def stop_on_signals() -> None:
    """Makes Ctrl-C and a plain kill raise KeyboardInterrupt; background processes of a shell ignore SIGINT."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise_interrupt)


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class Launcher:
    """Starts, follows and ends the applications of one config."""

    def __init__(
        self, path: Path, config: ConfigFile, log: OutputLog, started: float, *, replace: bool = False
    ) -> None:
        """
        Args:
            started: when the user has started it, monotonic.
            replace: replace applications of the same names on a cluster that it joins, even if others deployed them.
        """
        self._replace = replace
        self._path, self._config, self._log, self._started = path, config, log, started
        self._display: Display = display_for(log.stdout)
        self._messages = ReplicaMessages()
        self._samplers = {name: name in config.samplers for name in config.applications}
        self._observer = Observer(config.samplers)
        self._deployed: set[str] = set()
        """Applications that may be this launcher's. Those of others must outlive it."""
        self._started_serve = False

    def run(self) -> int:
        """Returns the exit code, once everything that was started has ended."""
        code = FAILED
        try:
            cluster, ready = self._start()
            urls = gateway_urls(self._config.schema)
            text = ready_text(self._config.samplers, cluster, self._path, self._log.path, urls)
            names = ", ".join(self._config.applications)
            self._display.say(f"\nReady after {duration(time.monotonic() - self._started)}: {names}\n", "bold green")
            self._display.say(text)
            self._watch(ready)
        except KeyboardInterrupt:
            code = 0
        except TwinkleServeError as error:
            code = FAILED if isinstance(error, LaunchError) else BAD_CONFIG
            kind = "" if isinstance(error, LaunchError) else f"{type(error).__name__}: "
            self._complain(f"{self._path}: {kind}{error}")
        except Exception:
            self._complain(traceback.format_exc())
        finally:
            self._end()
        return code

    def _complain(self, text: str) -> None:
        print(f"\n{text}\nLog: {self._log.path}\n", file=self._log.stderr, flush=True)

    def _start(self) -> tuple[Cluster, Snapshot]:
        """Returns when all applications are ready.

        Raises:
            LaunchError: Ray, Serve or an application failed.
            ConfigError: as `join_or_start`.
        """
        display = self._display
        start_up = StartUp(self._samplers, display.changed)
        display.say(f"Serving {self._path}. Log: {self._log.path}")
        display.show(start_up.steps)
        with display:
            step = start_up.begin("Ray")
            try:
                cluster = join_or_start(self._config.applications, replace=self._replace)
                stop_on_signals()  # ray.init puts a handler of its own in place
                start_up.end(step)
                step = start_up.begin("Serve")
                self._started_serve = start_serve(self._config.schema)
                before = look(self._config.samplers, {})
                self._deployed = set(self._config.applications) - before.applications.keys()
                submit(self._config.schema)
                self._deployed = set(self._config.applications)
            except TwinkleServeError:
                start_up.end(step, "failed")
                raise
            start_up.end(step)
            self._observer.start()
            return cluster, self._until_ready(start_up, before)

    def _until_ready(self, start_up: StartUp, before: Snapshot) -> Snapshot:
        seen = before
        while True:
            self._turn()
            snapshot = self._observer.latest
            if snapshot is None or snapshot is seen:
                continue
            seen = snapshot
            start_up.update(before, snapshot)
            new = {n: a for n, a in snapshot.applications.items() if n in self._samplers and is_new(n, a, before)}
            for name, application in new.items():
                if application.status == "DEPLOY_FAILED":
                    raise LaunchError(f"{name} failed to start. {reason(application)}")
            ready = [
                n for n, a in new.items() if a.status == "RUNNING" and (n in snapshot.in_use or not self._samplers[n])
            ]
            if len(ready) == len(self._samplers):
                return snapshot

    def _watch(self, ready: Snapshot) -> None:
        """Reports events until Ctrl-C.

        Raises:
            LaunchError: Ray has ended.
        """
        self._observer.period_s = WATCH_PERIOD_S
        watch, seen = Watch(self._samplers, ready), ready
        while True:
            self._turn()
            snapshot = self._observer.latest
            assert snapshot is not None
            lines = watch.silence(time.monotonic() - snapshot.taken_at)
            if snapshot is not seen:
                lines, seen = watch.update(snapshot), snapshot
            for line in lines:
                self._display.say(f"{clock()}  {line}")

    def _turn(self) -> None:
        """Waits, then shows new log records of replicas.

        Raises:
            LaunchError: Ray has ended.
        """
        time.sleep(TURN_S)
        if (process := dead_process()) is not None:
            raise LaunchError(f"Ray's {process} has ended, and the service with it. Start it again.")
        for line in self._log.new_lines():
            if (message := self._messages.of(line)) is not None:
                self._display.say(message)

    def _end(self) -> None:
        began = time.monotonic()
        try:
            self._display.say(f"\n{clock()}  Stopping.")
            self._observer.stop()
            shut_down(self._deployed, ends_serve=self._started_serve)
            self._display.say(f"{clock()}  Stopped after {duration(time.monotonic() - began)}.")
        except KeyboardInterrupt:
            self._display.say(f"{clock()}  Stopped at once: asked for twice.")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
