"""dp_size changed by `serve deploy` while trainers sample: scripts/serve as a user runs it, with the fake engine."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.support.eventually import wait_until
from tests.support.scripts_serve import Service, config_with, ended, own_environment, serving

pytestmark = [pytest.mark.ray, pytest.mark.own_cluster, pytest.mark.nightly]

LOAD = """
import json, sys, threading, twinkle_serve
sampler = twinkle_serve.connect("sampler")
stop, changed, failed, done = threading.Event(), threading.Condition(), [], []
questions = [{"messages": [{"role": "user", "content": f"{a}+{a}="}]} for a in range(12, 28)]
params = {"max_tokens": 60, "ignore_eos": True}

def load(seed):
    while not stop.is_set():
        try:
            response = sampler.sample(questions, {**params, "seed": seed}, num_samples=2, timeout_s=60)
            tokens = [list(sequence.tokens) for sequence in response.sequences]
            with changed:
                done.append((seed, tokens, {sequence.engine for sequence in response.sequences}))
                changed.notify_all()
        except Exception as error:
            with changed:
                failed.append(repr(error))
                changed.notify_all()

threads = [threading.Thread(target=load, args=(seed,)) for seed in range(4)]
for thread in threads:
    thread.start()
for line in sys.stdin:  # "mark": what was done since the last one
    with changed:
        before = len(done)
        changed.wait_for(lambda: len(done) >= before + 12 or failed)
    status = sampler.status()["engines"]
    print(json.dumps({
        "failed": failed, "engines": {name: engine["state"] for name, engine in status.items()},
        "used": sorted({name for _, _, names in done[-4:] for name in names}), "calls": len(done),
        "repeated": all(tokens == dict((s, t) for s, t, _ in done)[seed] for seed, tokens, _ in done),
    }), flush=True)
stop.set()
for thread in threads:
    thread.join()
print(json.dumps({"failed": failed, "calls": len(done)}), flush=True)
"""


class Load:
    """Four callers of one sampler, in a process of their own, that never stop."""

    def __init__(self, service: Service) -> None:
        environment = service.environment
        self._process = subprocess.Popen(
            [sys.executable, "-c", LOAD], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def mark(self) -> dict[str, Any]:
        """What became of twelve calls more."""
        assert self._process.stdin and self._process.stdout
        print("mark", file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def until(self, engines: set[str]) -> dict[str, Any]:
        """As `mark`, when these engines alone are there and used."""
        while True:
            seen = self.mark()
            assert not seen["failed"] and seen["repeated"], seen
            if seen["engines"] == dict.fromkeys(engines, "ready") and set(seen["used"]) == engines:
                return seen

    def end(self) -> dict[str, Any]:
        out, _ = self._process.communicate(timeout=60)
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """dp_size 1, on a cluster that says it has eight cores."""
    config = config_with(tmp_path_factory.mktemp("elastic") / "config.yaml", **with_engines(1))
    with own_environment(RAY_OVERRIDE_RESOURCES='{"CPU": 8}') as environment, serving(config, environment) as running:
        yield running


def with_engines(dp_size: int) -> dict[str, Any]:
    engine_args = {"token_latency_s": 0.01, "max_num_seqs": 16}
    return {"engine": "fake", "engine_args": engine_args, "device_mesh": {"dp_size": dp_size, "device_type": "cpu"}}


def deploy(service: Service, dp_size: int) -> None:
    """`serve deploy` of the config with another dp_size."""
    document = yaml.safe_load(service.config.read_text())
    document["applications"][0]["args"] |= with_engines(dp_size)
    service.config.write_text(yaml.safe_dump(document))
    serve = Path(sys.executable).with_name("serve")
    done = subprocess.run(
        [serve, "deploy", "-a", service.dashboard, str(service.config)],
        env=service.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def replicas(service: Service) -> dict[str, psutil.Process]:
    """Processes by deployment."""
    found: dict[str, psutil.Process] = {}
    for process in psutil.Process(service.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if title := re.search(r"ServeReplica:sampler:([\w-]+)", " ".join(process.cmdline())):
                assert title[1] not in found, "two processes of a deployment"
                found[title[1]] = process
    return found


def require_two_engines(service: Service) -> None:
    """Deploys dp_size 2, unless an earlier test has."""
    if "engine-dp1" not in replicas(service):
        deploy(service, 2)
        wait_until(lambda: "engine-dp1" in replicas(service), "engine-dp1 started", 60)


def test_dp_size_changes_without_failing_a_call_or_replacing_what_stays(service: Service) -> None:
    """1, 3, 1, 2: router, store and engine-dp0 keep their processes; those of engines that left are gone."""
    load = Load(service)
    try:
        load.until({"engine-dp0"})
        first = replicas(service)
        assert set(first) == {"router", "store", "engine-dp0"}
        deploy(service, 3)
        load.until({"engine-dp0", "engine-dp1", "engine-dp2"})
        three = replicas(service)
        assert three.items() >= first.items() and len(three) == 5
        deploy(service, 1)
        load.until({"engine-dp0"})
        _, alive = psutil.wait_procs([three["engine-dp1"], three["engine-dp2"]], timeout=60)
        assert not alive and replicas(service) == first
        deploy(service, 2)
        load.until({"engine-dp0", "engine-dp1"})
        two = replicas(service)
        assert two.items() >= first.items() and two["engine-dp1"] != three["engine-dp1"]
        assert not load.end()["failed"]
    finally:
        load.kill()


ROUTER_OF_NOW = """
import twinkle_serve
from twinkle_serve.sampler.connect import wait_for_engines
sampler = twinkle_serve.connect("sampler")
wait_for_engines(sampler._client, 60)
print(sorted(sampler.status()["engines"]))
"""


def test_router_that_is_replaced_has_the_engines_of_now(service: Service) -> None:
    """Not those that there were when the application was first deployed."""
    require_two_engines(service)
    before = replicas(service)
    router = before.pop("router")
    router.kill()
    router.wait(60)
    answer = service.run("-c", ROUTER_OF_NOW)
    assert answer.stdout.strip() == "['engine-dp0', 'engine-dp1']", answer.stderr
    assert replicas(service).items() >= before.items()


RESTART = """
import twinkle_serve
sampler = twinkle_serve.connect("sampler")
sampler.restart_engine("engine-dp1", timeout_s=90)
print(sampler.status()["engines"]["engine-dp1"]["state"])
"""


def test_restart_by_name_replaces_that_process_alone(service: Service) -> None:
    """And returns when the new one is used; calls go on meanwhile."""
    require_two_engines(service)
    load = Load(service)
    try:
        load.until({"engine-dp0", "engine-dp1"})
        before = replicas(service)
        answer = service.run("-c", RESTART)
        assert answer.stdout.strip() == "ready", answer.stderr
        load.until({"engine-dp0", "engine-dp1"})
        after = replicas(service)
        assert after.pop("engine-dp1") != before.pop("engine-dp1") and after == before
        assert not load.end()["failed"]
    finally:
        load.kill()


def test_launcher_says_what_becomes_of_the_application(service: Service) -> None:
    """Replaced, and unhealthy while a process is; and when it is over."""
    before = len(service.output)

    def says(text: str) -> None:
        wait_until(lambda: text in service.output[before:], text, timeout_s=60.0)

    deploy(service, 1)
    says("sampler was deployed again")
    says("sampler is ready again after")
    engine = replicas(service)["engine-dp0"]
    engine.kill()
    says("sampler is unhealthy: engine-dp0")
    says("sampler is healthy again after")


def test_launcher_of_another_application_leaves_the_service_alone(service: Service, tmp_path: Path) -> None:
    """Deploying its config would delete the service; nor may it shut Serve down as it ends."""
    document = yaml.safe_load(service.config.read_text())
    document["applications"][0]["name"] = "other"
    config = tmp_path / "other.yaml"
    config.write_text(yaml.safe_dump(document))
    before = replicas(service)
    answer = service.run("-m", "graphs.run", str(config))
    assert answer.returncode == 2 and "also serves sampler" in answer.stderr
    assert replicas(service) == before
    assert service.run("-c", "import twinkle_serve; twinkle_serve.connect('sampler').status()").returncode == 0


def test_plain_kill_stops_all_of_it(service: Service) -> None:
    """SIGTERM means what Ctrl-C means: exit code 0, nothing left."""
    service.process.send_signal(signal.SIGTERM)
    assert ended(service.process, 60) == 0, service.config.with_name("log").read_text()[-4000:]
