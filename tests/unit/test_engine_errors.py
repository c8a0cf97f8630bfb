"""Ray's errors of an engine's process, as the log, the status and the console show them."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from deployments.handles import engine_errors
from twinkle_serve.errors import EngineDeadError

HEAD = """The actor died unexpectedly before finishing this task.
\tclass_name: ServeReplica:sampler:engine-dp1
\tactor_id: 57daf71120ed0ecbfea0959701000000
\tpid: 18096
\tname: SERVE_REPLICA::sampler#engine-dp1#mz009w4t
\tnamespace: serve
\tip: 192.0.2.7
"""
CAUSE = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: …"


def death(text: str) -> ActorDiedError:
    error = ActorDiedError()
    error.error_msg = text
    return error


def message(raised: Exception) -> str:
    with pytest.raises(EngineDeadError) as info, engine_errors():
        raise raised
    return str(info.value)


def test_a_death_names_the_process() -> None:
    """In one line, without Ray's ids."""
    assert message(death(HEAD)) == "its process (pid 18096, ip 192.0.2.7) ended unexpectedly"
    assert message(death(HEAD + CAUSE)) == "its process (pid 18096, ip 192.0.2.7) ended unexpectedly"
    assert message(ActorDiedError()) == "its process ended unexpectedly"


def test_a_cause_that_ray_knows_is_kept() -> None:
    """Where it says more than the death itself."""
    killed = HEAD + "The actor is dead because it was killed by `ray.kill`."
    assert message(death(killed)) == "its process (pid 18096, ip 192.0.2.7) ended: it was killed by `ray.kill`"


def test_other_errors_are_one_line() -> None:
    """Their type and text."""
    error = ActorUnavailableError("no\n  answer", None)
    assert "\n" not in message(error)
    assert message(error).startswith("ActorUnavailableError: ")
