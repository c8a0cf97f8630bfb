"""The start of a service, as the launcher shows it: on states that Serve has been in."""

from __future__ import annotations

import io

from rich.console import Console
from rich.spinner import Spinner

from deployments.progress import StartProgress
from graphs.observer import Snapshot
from graphs.startup import StartUp, Step
from graphs.startup_display import LiveDisplay, PlainDisplay, block, display_for, duration
from tests.support.serve_states import application

NOTHING = Snapshot({}, taken_at=0.0)
NO_ROOM = (
    "Deployment 'engine-dp1' in application 'sampler' has 1 replicas that have taken more than 30s to be scheduled. "
    "This may be due to waiting for the cluster to auto-scale or for a runtime environment to be installed."
)


def stages(*begun: tuple[str, float]) -> StartProgress:
    return StartProgress(begun)


def seen(start_up: StartUp) -> dict[str, str]:
    return {step.name: step.stage for step in start_up.steps}


def test_engine_shows_the_stages_that_it_has_reported() -> None:
    """Durations are by the engine's clock, which may differ from the launcher's."""
    start_up = StartUp({"sampler": True})
    busy = application("DEPLOYING", store="HEALTHY", engine_dp0="UPDATING", router="UPDATING")
    start_up.update(NOTHING, Snapshot({"sampler": busy}, taken_at=10.0))
    engine = next(step for step in start_up.steps if step.name == "engine-dp0")
    assert engine.stage == "starting"
    key = ("sampler", "engine-dp0")
    start_up.update(NOTHING, Snapshot({"sampler": busy}, progress={key: stages(("importing", 900.0))}, taken_at=13.0))
    assert engine.stage == "importing" and engine.earlier == [("starting", 3.0)]
    late = stages(("importing", 900.0), ("loading", 924.0), ("warming", 960.5))
    start_up.update(NOTHING, Snapshot({"sampler": busy}, progress={key: late}, taken_at=75.0))
    assert engine.stage == "warming"
    assert engine.earlier == [("starting", 3.0), ("importing", 24.0), ("loading", 36.5)]
    done = application("RUNNING", store="HEALTHY", engine_dp0="HEALTHY", router="HEALTHY")
    start_up.update(NOTHING, Snapshot({"sampler": done}, in_use={"sampler"}, taken_at=77.0))
    assert engine.outcome == "ready" and engine.seconds(1000.0) == 67.0
    assert engine.earlier[-1] == ("warming", 2.0)


def test_stages_between_two_looks_are_measured_too() -> None:
    """By the engine: a fast one may be ready when the launcher first looks."""
    start_up = StartUp({"sampler": True})
    done = application("RUNNING", engine_dp0="HEALTHY")
    begun = stages(("importing", 50.0), ("loading", 51.0), ("warming", 53.0), ("ready", 53.5))
    progress = {("sampler", "engine-dp0"): begun}
    start_up.update(NOTHING, Snapshot({"sampler": done}, progress=progress, taken_at=10.0))
    engine = start_up.steps[-1]
    assert engine.outcome == "ready"
    assert engine.earlier == [("importing", 1.0), ("loading", 2.0), ("warming", 0.5)]


def test_engine_that_has_reported_its_end_is_ready_once() -> None:
    """When Serve says so too."""
    out = io.StringIO()
    start_up = StartUp({"sampler": True}, PlainDisplay(out).changed)
    busy, done = application("DEPLOYING", engine_dp0="UPDATING"), application("RUNNING", engine_dp0="HEALTHY")
    progress = {("sampler", "engine-dp0"): stages(("loading", 1.0), ("ready", 9.0))}
    start_up.update(NOTHING, Snapshot({"sampler": busy}, taken_at=1.0))
    start_up.update(NOTHING, Snapshot({"sampler": busy}, progress=progress, taken_at=10.0))
    start_up.update(NOTHING, Snapshot({"sampler": done}, progress=progress, taken_at=11.0))
    lines = [line.split("  ", 1)[1] for line in out.getvalue().splitlines() if "engine-dp0" in line]
    assert lines == [
        "sampler engine-dp0: starting",
        "sampler engine-dp0: ready after 10 s (starting 9.0 s · loading 8.0 s)",
    ]


def test_steps_are_in_the_order_in_which_they_depend_on_each_other() -> None:
    """Whatever order Serve has them in, and with ten engines or more."""
    start_up = StartUp({"sampler": True})
    state = application(
        "DEPLOYING",
        router="UPDATING",
        engine_dp10="UPDATING",
        engine_dp2="UPDATING",
        engine_dp0="UPDATING",
        store="UPDATING",
    )
    start_up.update(NOTHING, Snapshot({"sampler": application("DEPLOYING")}, taken_at=1.0))
    start_up.update(NOTHING, Snapshot({"sampler": state}, taken_at=2.0))
    names = [step.name for step in start_up.steps]
    assert names == ["sampler", "store", "engine-dp0", "engine-dp2", "engine-dp10", "router"]
    assert start_up.steps[0].stage == "built"


def test_router_is_not_ready_before_it_uses_all_engines() -> None:
    """Serve counts it as healthy before that."""
    start_up = StartUp({"sampler": True})
    state = application("RUNNING", engine_dp0="HEALTHY", router="HEALTHY")
    start_up.update(NOTHING, Snapshot({"sampler": state}, taken_at=1.0))
    assert seen(start_up)["router"] == "waiting for the engines"
    start_up.update(NOTHING, Snapshot({"sampler": state}, in_use={"sampler"}, taken_at=2.0))
    assert seen(start_up)["router"] == "ready"


def test_deployments_of_other_applications_are_ready_when_serve_says_so() -> None:
    """One named router, too."""
    start_up = StartUp({"other": False})
    start_up.update(NOTHING, Snapshot({"other": application("RUNNING", router="HEALTHY")}, taken_at=1.0))
    assert seen(start_up) == {"other": "built", "router": "ready"}


def test_application_from_before_says_nothing() -> None:
    """Nor does what its engines reported then: on a cluster that was joined."""
    key = ("sampler", "engine-dp0")
    old = stages(("warming", 100.0))
    before = Snapshot({"sampler": application("RUNNING", 3.0, engine_dp0="HEALTHY")}, progress={key: old}, taken_at=0.0)
    start_up = StartUp({"sampler": True})
    start_up.update(before, before)
    assert not start_up.steps
    busy = application("DEPLOYING", 9.0, engine_dp0="UPDATING")
    start_up.update(before, Snapshot({"sampler": busy}, progress={key: old}, taken_at=1.0))
    assert seen(start_up)["engine-dp0"] == "starting"


def test_engine_without_room_says_so() -> None:
    """Not that it is loading."""
    start_up = StartUp({"sampler": True})
    state = application("DEPLOYING", messages={"engine-dp1": NO_ROOM}, engine_dp0="UPDATING", engine_dp1="UPDATING")
    start_up.update(NOTHING, Snapshot({"sampler": state}, taken_at=1.0))
    assert seen(start_up)["engine-dp1"] == "waiting for room on the cluster"
    assert seen(start_up)["engine-dp0"] == "starting"


def test_failed_deployment_is_marked() -> None:
    """And what was built stays built."""
    start_up = StartUp({"sampler": True})
    state = application("DEPLOY_FAILED", engine_dp0="DEPLOY_FAILED", store="HEALTHY")
    start_up.update(NOTHING, Snapshot({"sampler": state}, taken_at=1.0))
    assert {step.name: step.outcome for step in start_up.steps} == {
        "sampler": "ready",
        "store": "ready",
        "engine-dp0": "failed",
    }


def test_application_that_is_not_built_is_marked() -> None:
    """One whose mesh does not fit, for instance: it never has deployments."""
    start_up = StartUp({"sampler": True})
    start_up.update(NOTHING, Snapshot({"sampler": application("DEPLOY_FAILED")}, taken_at=1.0))
    assert [step.outcome for step in start_up.steps] == ["failed"]


def test_plain_display_has_a_line_for_each_change() -> None:
    """With the stages that are over; nothing of it moves the cursor."""
    out = io.StringIO()
    start_up = StartUp({"sampler": True}, PlainDisplay(out).changed)
    busy = application("DEPLOYING", engine_dp0="UPDATING")
    start_up.update(NOTHING, Snapshot({"sampler": busy}, taken_at=10.0))
    key = ("sampler", "engine-dp0")
    for at, begun in ((12.0, [("importing", 1.0)]), (30.0, [("importing", 1.0), ("loading", 19.0)])):
        start_up.update(NOTHING, Snapshot({"sampler": busy}, progress={key: stages(*begun)}, taken_at=at))
    start_up.update(NOTHING, Snapshot({"sampler": application("RUNNING", engine_dp0="HEALTHY")}, taken_at=80.0))
    lines = [line.split("  ", 1)[1] for line in out.getvalue().splitlines()]
    assert lines == [
        "sampler: building",
        "sampler: built after 0.0 s",
        "sampler engine-dp0: starting",
        "sampler engine-dp0: importing (starting 2.0 s)",
        "sampler engine-dp0: loading (starting 2.0 s · importing 18 s)",
        "sampler engine-dp0: ready after 70 s (starting 2.0 s · importing 18 s · loading 50 s)",
    ]
    assert "\x1b" not in out.getvalue()


def drawn(steps: list[Step], now: float, width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        console.print(block(steps, now, Spinner("dots")))
    return [line.rstrip() for line in capture.get().splitlines()]


def engine(i: int, stage: str, outcome: str = "running") -> Step:
    return Step(f"engine-dp{i}", "sampler", stage, 0.0, 0.0, [("starting", 2.0)], outcome=outcome)  # type: ignore[arg-type]


def test_block_has_a_line_for_each_step() -> None:
    """Its mark, stage, time and the stages that are over."""
    steps = [Step("Ray", began=0.0, stage_began=0.0), engine(0, "loading")]
    steps[0].end("ready", 5.9)
    first, second = drawn(steps, 40.0)
    assert first.split() == ["✓", "Ray", "ready", "5.9", "s"]
    assert second.split()[1:] == ["sampler", "engine-dp0", "loading", "40", "s", "starting", "2.0", "s"]


def test_block_folds_many_engines_into_one_line() -> None:
    """64 of them would not fit on a terminal."""
    steps = [engine(i, "ready", "ready") for i in range(3)] + [engine(i, "importing") for i in range(3, 64)]
    (line,) = drawn(steps, 40.0)
    assert line.split()[1:] == ["sampler", "engines", "3", "of", "64", "ready", "40", "s", "61", "importing"]


def test_block_fits_a_narrow_terminal() -> None:
    """Cut off, not wrapped: a line that wraps would leave its rest behind when it is drawn again."""
    assert len(drawn([engine(0, "loading")], 40.0, width=30)) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_block_is_for_terminals_only() -> None:
    """NO_COLOR, CI and dumb terminals have plain lines."""
    assert isinstance(display_for(Terminal(), {"TERM": "xterm"}), LiveDisplay)
    assert isinstance(display_for(io.StringIO(), {"TERM": "xterm"}), PlainDisplay)
    for environment in ({"NO_COLOR": "1"}, {"CI": "true"}, {"TERM": "dumb"}):
        assert isinstance(display_for(Terminal(), environment), PlainDisplay)


def test_durations_are_short() -> None:
    """Tenths only where they matter."""
    assert [duration(s) for s in (0.04, 9.94, 9.96, 119.4, 119.6, 3725)] == [
        "0.0 s",
        "9.9 s",
        "10 s",
        "119 s",
        "1 min 59 s",
        "62 min 05 s",
    ]
