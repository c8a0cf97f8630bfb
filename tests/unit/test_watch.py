"""What the launcher says of applications that were ready: on states that Serve has been in."""

from __future__ import annotations

from graphs.observer import Snapshot
from graphs.watch import SILENT_S, Watch
from tests.support.serve_states import application

HEALTHY = {"engine_dp0": "HEALTHY", "engine_dp1": "HEALTHY", "router": "HEALTHY"}
SICK = "A replica's health check failed. This deployment will be UNHEALTHY until the replica recovers."


def at(time_s: float, status: str = "RUNNING", deployed_at: float = 5.0, used: bool = True, **states: str) -> Snapshot:
    messages = {name.replace("_", "-"): SICK for name, state in states.items() if state == "UNHEALTHY"}
    state = application(status, deployed_at, messages, **{**HEALTHY, **states})
    return Snapshot({"sampler": state}, in_use={"sampler"} if used else set(), taken_at=time_s)


def watch() -> Watch:
    return Watch({"sampler": True}, at(0.0))


def test_watch_says_nothing_while_nothing_happens() -> None:
    """However often it looks."""
    watching = watch()
    assert [watching.update(at(float(i))) for i in range(1, 4)] == [[], [], []]


def test_watch_says_which_deployment_is_unhealthy_and_when_it_is_healthy_again() -> None:
    """One line each; another deployment that fails meanwhile is named too."""
    watching = watch()
    first = at(10.0, "UNHEALTHY", engine_dp0="UNHEALTHY", used=False)
    assert watching.update(first) == ["sampler is unhealthy: engine-dp0 (A replica's health check failed)"]
    assert watching.update(first) == []
    both = at(12.0, "UNHEALTHY", engine_dp0="UNHEALTHY", router="UNHEALTHY", used=False)
    assert watching.update(both) == ["sampler is unhealthy: router (A replica's health check failed)"]
    assert watching.update(at(20.0, used=False)) == []
    assert watching.update(at(25.0)) == ["sampler is healthy again after 15 s."]


def test_watch_says_when_an_application_is_replaced() -> None:
    """And when it can be used again."""
    watching = watch()
    (line,) = watching.update(at(10.0, "DEPLOYING", 9.0, used=False, router="UPDATING"))
    assert line.startswith("sampler was deployed again")
    assert watching.update(at(12.0, "DEPLOYING", 9.0, used=False, router="UPDATING")) == []
    assert watching.update(at(30.0, "RUNNING", 9.0)) == ["sampler is ready again after 20 s."]


def test_watch_says_when_a_replacement_fails() -> None:
    """With the reason; and goes on watching."""
    watching = watch()
    watching.update(at(10.0, "DEPLOYING", 9.0, used=False))
    failed = at(12.0, "DEPLOY_FAILED", 9.0, used=False)
    failed.applications[
        "sampler"
    ].message = "Traceback (most recent call last):\ntwinkle_serve.errors.MeshError: too large."
    assert watching.update(failed) == ["sampler failed to deploy. MeshError: too large."]
    assert watching.update(failed) == []
    assert len(watching.update(at(20.0, "DEPLOYING", 19.0, used=False))) == 1
    assert watching.update(at(23.0, "RUNNING", 19.0)) == ["sampler is ready again after 3 s."]


def test_watch_says_when_an_application_is_deleted() -> None:
    """Once; and when it is there again."""
    watching = watch()
    (line,) = watching.update(at(10.0, "DELETING", used=False))
    assert line.startswith("sampler was deleted")
    assert watching.update(Snapshot({}, taken_at=11.0)) == []
    assert len(watching.update(at(20.0, "DEPLOYING", 19.0, used=False))) == 1
    assert watching.update(at(24.0, "RUNNING", 19.0)) == ["sampler is ready again after 4 s."]


def test_watch_says_when_serve_does_not_answer() -> None:
    """Not for the seconds that Serve takes to replace its own controller."""
    watching = watch()
    assert watching.silence(SILENT_S - 1) == []
    assert len(watching.silence(SILENT_S + 1)) == 1
    assert watching.silence(SILENT_S + 2) == []
    assert watching.update(at(40.0)) == ["Serve answers again."]
