"""`serve run CONFIG`, with two differences: a config that cannot work ends it, and it says when the service is ready.

    python -m graphs.run serve_config.yaml

By itself `serve run` ignores misspelt keys, and goes on waiting when an application has failed. Exit codes: 0 after
Ctrl-C, 1 when an application failed to start, 2 when the config is wrong.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

from graphs.config_file import check_config_file
from twinkle_serve.errors import TwinkleServeError

FAILED = 1
BAD_CONFIG = 2


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m graphs.run CONFIG")
    path = Path(sys.argv[1])
    try:
        names = check_config_file(path)
    except TwinkleServeError as error:
        print(f"{path}: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(BAD_CONFIG)
    # A plain kill means what Ctrl-C means; and a shell starts what it puts in the background with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)

    import ray
    from ray.serve.scripts import cli

    watcher = _Watcher(names)
    with contextlib.suppress(KeyboardInterrupt):
        watcher.dashboard_url = _join_or_start(path, names)
        watcher.start()
        with contextlib.suppress(SystemExit):  # how `serve run` ends after Ctrl-C
            cli(["run", str(path)], standalone_mode=False)
    ray.shutdown()
    sys.exit(FAILED if watcher.failed else 0)


def _join_or_start(path: Path, names: list[str]) -> str:
    """Joins the cluster of RAY_ADDRESS, or starts one of our own. Returns the dashboard's address."""
    import ray
    from ray import serve

    address = os.environ.get("RAY_ADDRESS") or "local"
    context = ray.init(address=address, namespace="serve")
    others = set(serve.status().applications) - set(names) if address != "local" else set()
    if others:
        print(
            f"{path}: ConfigError: {address} serves {', '.join(sorted(others))} too, and `serve run` deletes what its "
            "config does not name. Name them in the config, or unset RAY_ADDRESS.",
            file=sys.stderr,
        )
        sys.exit(BAD_CONFIG)
    return str(context.dashboard_url)


class _Watcher(threading.Thread):
    """Follows the applications; says when all run, and stops the main thread when one has failed."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(daemon=True)
        self._names = names
        self.dashboard_url = ""
        self.failed = False

    def run(self) -> None:
        from ray import serve

        from twinkle_serve.client import failure_reason

        started = time.monotonic()
        waiting = set(self._names)
        while waiting:
            time.sleep(0.5)
            applications = serve.status().applications
            for name in sorted(waiting & set(applications)):
                if applications[name].status == "RUNNING":
                    waiting.discard(name)
                elif applications[name].status == "DEPLOY_FAILED":
                    self.failed = True
                    print(
                        f"\n{name} failed to start. {failure_reason(applications[name])}\n", file=sys.stderr, flush=True
                    )
                    _thread.interrupt_main()
                    return
        print(
            f"\nReady after {time.monotonic() - started:.0f} s: {', '.join(self._names)}\n"
            f"  sample     .venv/bin/python examples/sample.py\n"
            f"  dashboard  http://{self.dashboard_url}/#/serve, with the token of: .venv/bin/ray get-auth-token\n"
            f"  stop       Ctrl-C\n",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
