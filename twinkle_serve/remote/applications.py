"""Who has deployed an application of Serve, and who may replace or delete it."""

from __future__ import annotations

import getpass
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray._private.state import jobs
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.serve.context import _get_global_client
from ray.serve.schema import APIType

from twinkle_serve.errors import NotOwnerError

NAMESPACE = b"twinkle_serve"


@dataclass(frozen=True, slots=True)
class Owner:
    """What has deployed an application."""

    job: str | None
    """Ray's id of its job; None for the command `serve` and for `scripts/serve`."""
    text: str
    """For messages."""

    @property
    def lives(self) -> bool:
        """Whether it is another job that runs, or `serve`, whose applications are there until they are deleted."""
        return self.job is None or (self.job != own_job() and job_runs(self.job))


def job_runs(job: str) -> bool:
    """Whether the driver of a job runs."""
    return any(entry["JobID"] == job and not entry["IsDead"] for entry in jobs())


def own_job() -> str:
    """Returns Ray's id of the job of this process."""
    job: str = ray.get_runtime_context().get_job_id()
    return job


def require_own(name: str, verb: str, remedy: str) -> None:
    """Refuses to replace or delete an application of another job that runs, or one of `serve`.

    Args:
        verb: replaced or deleted.
        remedy: what the caller can do instead.

    Raises:
        NotOwnerError
    """
    owner = owner_of(name)
    if owner is not None and owner.lives:
        raise NotOwnerError(f"application {name!r} was deployed by {owner.text}, and would be {verb}. {remedy}")


def owner_of(name: str) -> Owner | None:
    """Returns what has deployed an application; None if there is none of that name."""
    client = _get_global_client(raise_if_no_controller_running=False)
    application = None if client is None else client.get_serve_details()["applications"].get(name)
    if application is None:
        return None
    since = application["last_deployed_time_s"]
    if application["source"] == APIType.DECLARATIVE:
        return Owner(None, f"`serve` or scripts/serve at {_clock(since)}")
    recorded = _read("owner", name)
    if recorded is not None and recorded["deployed"] == since:  # else another has deployed it since
        return Owner(recorded["job"], f"{_text(recorded)} at {_clock(since)}")
    # By `serve.run`. Deployments that it found unchanged name the job before it, so all of them count.
    deployers = set()
    for part in application["deployments"]:
        with suppress(RayError):  # it was deleted meanwhile
            deployers.add(client.get_deployment_info(part, name)[0].deployer_job_id)
    entries = [entry for entry in jobs() if entry["JobID"] in deployers]
    last = max(entries, key=lambda entry: entry["StartTime"], default=None)
    if last is None:
        return None
    about = f"pid {last['DriverPid']} on {last['DriverIPAddress']} ({last['Entrypoint']})"
    return Owner(last["JobID"], f"job {last['JobID']}, {about}, at {_clock(since)}")


@contextmanager
def deploying(name: str) -> Iterator[None]:
    """Keeps others from deploying an application of this name meanwhile, then records this job as its owner.

    Raises:
        NotOwnerError: another process is deploying it.
    """
    while _internal_kv_put(_key("claim", name), json.dumps(_this_process()), overwrite=False, namespace=NAMESPACE):
        other = _read("claim", name)
        if other is not None and job_runs(other["job"]):
            raise NotOwnerError(
                f"application {name!r} is being deployed by {_text(other)}. Use another name, or wait for it."
            )
        _internal_kv_del(_key("claim", name), namespace=NAMESPACE)  # it died on the way
    try:
        yield
        if (application := serve.status().applications.get(name)) is not None:
            record = {**_this_process(), "deployed": application.last_deployed_time_s}
            _internal_kv_put(_key("owner", name), json.dumps(record), namespace=NAMESPACE)
    finally:
        _internal_kv_del(_key("claim", name), namespace=NAMESPACE)


def _this_process() -> dict[str, Any]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a uid without a name
        user = str(os.getuid())
    command = shlex.join(sys.orig_argv)
    return {"job": own_job(), "user": user, "host": socket.gethostname(), "pid": os.getpid(), "command": command}


def _text(process: dict[str, Any]) -> str:
    return "job {job}, {user}@{host}, pid {pid} ({command})".format(**process)


def _read(kind: str, name: str) -> dict[str, Any] | None:
    value = _internal_kv_get(_key(kind, name), namespace=NAMESPACE)
    record: dict[str, Any] | None = None if value is None else json.loads(value)
    return record


def _key(kind: str, name: str) -> str:
    return json.dumps([kind, name])


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
