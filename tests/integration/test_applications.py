"""Applications of others: a sampler of the same name neither replaces nor deletes them unless it is told to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.serve.schema import ServeDeploySchema

from graphs.cluster import submit
from tests.support.eventually import wait_until
from tests.support.ray_cluster import ray_cluster
from tests.support.samplers import FakeSampler
from tests.support.scripts_serve import READY_S, config_with, ended, start
from twinkle_serve import connect
from twinkle_serve.errors import ConfigError, NotOwnerError
from twinkle_serve.remote import applications
from twinkle_serve.remote.applications import deploying, job_runs, own_job, owner_of

pytestmark = pytest.mark.ray

QUESTION = {"messages": [{"role": "user", "content": "12+34="}]}
SHORT = {"max_tokens": 2}

OTHER_JOB = """
import sys, time
from tests.support.samplers import FakeSampler
if __name__ == "__main__":
    sampler = FakeSampler("demo", remote_group="theirs")
    print("ready", flush=True)
    sys.stdin.read()
    sampler.shutdown()
"""


@contextlib.contextmanager
def other_job(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another driver on the shared cluster, which has deployed `theirs`."""
    script = tmp_path / "their_script.py"
    script.write_text(OTHER_JOB)
    environment = {
        **os.environ,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    process = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.nightly
def test_application_of_a_job_that_runs_is_left_alone_and_taken_over_when_it_is_over(
    cluster: None, tmp_path: Path
) -> None:
    """The error says who has deployed it and when; the application goes on."""
    with other_job(tmp_path) as process:
        who = rf"application 'theirs' was deployed by job \w+, \w+@\S+, pid {process.pid} \(.*their_script.py\) at 20"
        with pytest.raises(NotOwnerError, match=rf"{who}.*would be replaced.*replace=True"):
            FakeSampler("demo", remote_group="theirs")
        sampler = connect("theirs")
        with pytest.raises(NotOwnerError, match=rf"{who}.*would be deleted.*force=True"):
            sampler.shutdown()
        assert len(sampler.sample(QUESTION, SHORT).sequences) == 1
        owner = owner_of("theirs")
        assert owner is not None and owner.job is not None
    wait_until(lambda: not job_runs(str(owner.job)), "Ray has noticed that the job is over")
    own = FakeSampler("demo", remote_group="theirs")
    assert len(own.sample(QUESTION, SHORT).sequences) == 1
    own.shutdown()
    assert "theirs" not in serve.status().applications


@pytest.mark.nightly
def test_application_of_serve_is_replaced_and_deleted_only_where_the_caller_says_so(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that a config has deployed belongs to no job. By replace=True it becomes the caller's."""
    args = {"model_id": "demo", "engine": "fake", "device_mesh": {"device_type": "cpu"}}
    application = {"name": "declared", "import_path": "graphs.sampler:build", "args": args, "route_prefix": None}
    config = {"applications": [application]}
    submit(ServeDeploySchema.model_validate(config))
    sampler = connect("declared")
    by_serve = "application 'declared' was deployed by `serve` or scripts/serve at 20"
    with pytest.raises(NotOwnerError, match=rf"{by_serve}.*would be replaced"):
        FakeSampler("demo", remote_group="declared")
    with pytest.raises(NotOwnerError, match=rf"{by_serve}.*would be deleted"):
        sampler.shutdown()
    assert len(sampler.sample(QUESTION, SHORT).sequences) == 1
    own = FakeSampler("demo", remote_group="declared", replace=True)
    assert len(own.sample(QUESTION, SHORT).sequences) == 1
    monkeypatch.setattr(applications, "own_job", lambda: "another")
    with pytest.raises(NotOwnerError, match=rf"by job .*pid {os.getpid()} .*would be deleted"):
        own.shutdown()
    own.shutdown(force=True)
    assert "declared" not in serve.status().applications


def test_two_that_deploy_one_name_at_once_do_not_replace_each_other(cluster: None) -> None:
    """The second one is told while the first one's application is not there yet."""
    with deploying("contested"), pytest.raises(NotOwnerError, match=rf"is being deployed by job .*pid {os.getpid()} "):
        FakeSampler("demo", remote_group="contested")
    with deploying("contested"):  # free again
        pass


def test_joined_cluster_is_named(cluster: None) -> None:
    """At INFO, with the variable that it is from; and a process in one cluster does not go to another."""
    code = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from twinkle_serve.remote.reservation import join_or_start\n"
        "join_or_start(log_to_driver=False)"
    )
    address = ray.get_runtime_context().gcs_address
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert f"joined the Ray cluster at {address} (RAY_ADDRESS={address})" in result.stderr
    with pytest.raises(ConfigError, match=f"in the Ray cluster at {address} already, not at address=10.0.0.1:6379"):
        connect(address="10.0.0.1:6379")


@pytest.mark.own_cluster
@pytest.mark.nightly
def test_launcher_on_a_cluster_of_others_ends_its_own_applications_alone(tmp_path: Path) -> None:
    """At Ctrl-C; and it does not replace one of another job that runs, or of another launcher."""
    log = tmp_path / "log"
    config = config_with(tmp_path / "config.yaml", engine="fake", engine_args={}, device_mesh={"device_type": "cpu"})
    with ray_cluster(num_cpus=8, with_serve=False) as address, contextlib.ExitStack() as started:
        environment = {**os.environ, "RAY_ADDRESS": address}

        def launched() -> subprocess.Popen[str]:
            launcher = start(config, environment, log)
            started.callback(launcher.kill)
            return launcher

        launcher = launched()
        wait_until(lambda: "\nReady after" in log.read_text(), "the launcher is ready", READY_S)
        later = FakeSampler("demo", remote_group="later")
        with pytest.raises(NotOwnerError, match="application 'sampler' was deployed by `serve` or scripts/serve"):
            FakeSampler("demo", remote_group="sampler")
        launcher.send_signal(signal.SIGINT)
        assert ended(launcher, 60) == 0, log.read_text()
        assert serve.status().applications.keys() == {"later"}
        assert len(later.sample(QUESTION, SHORT).sequences) == 1
        config.write_text(config.read_text().replace("name: sampler", "name: later"))
        assert ended(launched(), 60) == 2
        assert f"NotOwnerError: application 'later' was deployed by job {own_job()}" in log.read_text()
        later.shutdown()
