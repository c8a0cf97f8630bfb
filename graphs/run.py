"""`serve run CONFIG`, with two differences: a config that cannot work ends it, and it says when the service is ready.

    python -m graphs.run serve_config.yaml

By itself `serve run` ignores misspelt keys, and goes on waiting when an application has failed. Exit codes: 0 after
Ctrl-C, 1 when an application or Serve itself failed, 2 when the config is wrong.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from graphs.config_file import check_config_file
from twinkle_serve.errors import ConfigError, TwinkleServeError

FAILED = 1
BAD_CONFIG = 2


def main(config: Annotated[Path, typer.Argument(help="A Ray Serve config, such as serve_config.yaml.")]) -> None:
    """Serves the applications of CONFIG until Ctrl-C."""
    try:
        applications = check_config_file(config)
        stopped = _Stopped()
        watcher = _Watcher(applications)
        with contextlib.suppress(KeyboardInterrupt):
            watcher.dashboard_url = _join_or_start(list(applications))
            stopped.install()  # ray.init puts a handler of its own in place
            watcher.start()
            _serve_run(config, watcher)
    except TwinkleServeError as error:
        print(f"{config}: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(BAD_CONFIG)
    sys.exit(0 if stopped.by_user and not watcher.failed else FAILED)


class _Stopped:
    """Whether somebody wants the service to stop: Ctrl-C, or a plain kill, which means the same."""

    def __init__(self) -> None:
        self.by_user = False
        self.install()

    def install(self) -> None:
        # A shell starts what it puts in the background with SIGINT ignored, hence both.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, *_: Any) -> None:
        self.by_user = True
        raise KeyboardInterrupt


def _join_or_start(names: list[str]) -> str:
    """Joins the cluster of RAY_ADDRESS, or starts one of our own. Returns the dashboard's address.

    Raises:
        ConfigError: the cluster serves applications that the config does not name.
    """
    import ray
    from ray import serve

    address = os.environ.get("RAY_ADDRESS") or "local"
    context = ray.init(address=address, namespace="serve")
    others = set(serve.status().applications) - set(names) if address != "local" else set()
    if others:
        raise ConfigError(
            f"the cluster at {address} serves {', '.join(sorted(others))} too, and `serve run` deletes what its config "
            "does not name. Name them in it, or unset RAY_ADDRESS."
        )
    return str(context.dashboard_url)


def _serve_run(config: Path, watcher: _Watcher) -> None:
    """Returns when it has been stopped and Serve is down."""
    import click
    import ray
    from ray.serve.scripts import cli

    try:
        # How `serve run` ends, whatever ended it; Abort is Ctrl-C outside of its loop.
        with contextlib.suppress(SystemExit, click.exceptions.Abort):
            cli(["run", str(config)], standalone_mode=False)
    finally:
        watcher.stop()  # or it would join, or start, another cluster
        ray.shutdown()


class _Watcher(threading.Thread):
    """Follows the applications; says when all run and their engines are in use, and stops the main thread when one has
    failed."""

    def __init__(self, applications: dict[str, bool]) -> None:
        """
        Args:
            applications: by name, whether each is a sampler.
        """
        super().__init__(daemon=True)
        self._applications = applications
        self.dashboard_url = ""
        self.failed = False
        self._end = threading.Event()

    def stop(self) -> None:
        self._end.set()
        self.join(timeout=10)

    def run(self) -> None:
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        from twinkle_serve.sampler.connect import failure_reason

        started = time.time()
        waiting = set(self._applications)
        while waiting:
            if self._end.wait(0.5):
                return
            try:
                applications = serve.status().applications
            except (RayError, RayServeException):
                continue
            for name in sorted(waiting & set(applications)):
                if applications[name].last_deployed_time_s < started - 1:
                    continue  # left from before, on a cluster that we joined
                if applications[name].status == "RUNNING":
                    if not self._applications[name] or _engines_are_in_use(name):
                        waiting.discard(name)
                elif applications[name].status == "DEPLOY_FAILED":
                    self.failed = True
                    reason = failure_reason(applications[name])
                    print(f"\n{name} failed to start. {reason}\n", file=sys.stderr, flush=True)
                    os.kill(os.getpid(), signal.SIGINT)  # wakes the main thread from its sleep
                    return
        print(
            f"\nReady after {time.time() - started:.0f} s: {', '.join(self._applications)}\n"
            f"  sample     .venv/bin/python examples/sample.py\n"
            f"  dashboard  http://{self.dashboard_url}/#/serve, with the token of: .venv/bin/ray get-auth-token\n"
            f"  stop       Ctrl-C\n",
            flush=True,
        )


def _engines_are_in_use(name: str) -> bool:
    """Whether the router of a running application uses all its engines: Serve counts it as running before."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from twinkle_serve.sampler.client import ServiceClient
    from twinkle_serve.sampler.connect import wait_for_engines

    try:
        wait_for_engines(ServiceClient(serve.get_app_handle(name), name), timeout_s=0)
    except (RayError, RayServeException, TwinkleServeError):
        return False
    return True


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
