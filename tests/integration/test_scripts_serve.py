"""scripts/serve as a user runs it: real vLLM, dp_size 2, from the config in the repository."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[2]
READY_S = 240


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def config_with(path: Path, **args: object) -> Path:
    """serve_config.yaml with some args of its own, on a port of its own."""
    document = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    document["http_options"] = {"port": free_port()}
    document["applications"][0]["args"].update(args)
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Ray finds no other cluster, and none finds this one."""
    directory = tempfile.mkdtemp(prefix="tst")
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    yield {**inherited, "RAY_TMPDIR": directory}
    shutil.rmtree(directory, ignore_errors=True)


@dataclass
class Service:
    process: subprocess.Popen[str]
    environment: dict[str, str]
    dashboard: str
    config: Path

    def run(self, *command: str, timeout_s: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            env={**self.environment, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )


def start(config: Path, environment: dict[str, str], log: Path) -> subprocess.Popen[str]:
    with log.open("w") as output:
        return subprocess.Popen(
            ["scripts/serve", str(config)], cwd=ROOT, env=environment, stdout=output, stderr=output, text=True
        )


def ended(process: subprocess.Popen[str], timeout_s: float) -> int:
    """Its exit code; nothing that it started may outlive it."""
    family = psutil.Process(process.pid).children(recursive=True)
    code = process.wait(timeout_s)
    _, alive = psutil.wait_procs(family, timeout=15)
    for survivor in alive:
        survivor.kill()
    assert not alive, f"left behind: {alive}"
    return code


def ready(process: subprocess.Popen[str], log: Path) -> str:
    """Waits until it says that it is ready. Returns the dashboard's address."""
    follow = subprocess.run(
        ["timeout", str(READY_S), "sh", "-c", f"tail -n +1 -f --pid={process.pid} {log} | grep -m1 'dashboard  http'"],
        capture_output=True,
        text=True,
    )
    found = re.search(r"dashboard  (http://\S+?)/#", follow.stdout)
    assert found, f"not ready within {READY_S} s:\n{log.read_text()[-4000:]}"
    return found[1]


@contextlib.contextmanager
def serving(config: Path, environment: dict[str, str]) -> Iterator[Service]:
    """scripts/serve of a config, ready; it must end by Ctrl-C, and leave nothing."""
    log = config.with_name("log")
    process = start(config, environment, log)
    try:
        dashboard = ready(process, log)
        yield Service(process, environment, dashboard, config)
        process.send_signal(signal.SIGINT)
        assert ended(process, 60) == 0, log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def service(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(config_with(tmp_path_factory.mktemp("serve") / "config.yaml"), environment) as running:
        yield running


@pytest.mark.timeout(400)
def test_example_prints_right_and_wrong_sums(service: Service) -> None:
    """From both engines, with logprobs."""
    result = service.run("examples/sample.py", "--prompts", "16")
    assert result.returncode == 0, result.stderr
    lines = re.findall(
        r"^ *(\d+)([+-])(\d+)=(\S*) +logprob +(-?[\d.]+)  (engine-dp\d)  (right|wrong)", result.stdout, re.M
    )
    assert len(lines) == 64
    for a, sign, b, answer, logprob, _, verdict in lines:
        truth = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert (answer == str(truth)) == (verdict == "right")
        assert float(logprob) <= 0
    assert {line[-1] for line in lines} == {"right", "wrong"}
    assert {line[-2] for line in lines} == {"engine-dp0", "engine-dp1"}


REPEATABLE = """
import json, sys, twinkle_serve
sampler = twinkle_serve.connect("sampler")
prompts = [{"messages": [{"role": "user", "content": f"{a}+{a+1}="}]} for a in range(100, 116)]
seeded = [sampler.sample(prompts, {"max_tokens": 8, "seed": 3, "temperature": 1.0}, num_samples=4) for _ in range(2)]
greedy = sampler.sample(prompts, {"max_tokens": 8, "temperature": 0})
json.dump({
    "seeded": [[seq.tokens for seq in response.sequences] for response in seeded],
    "greedy": [seq.tokens for seq in greedy.sequences],
    "logprobs": [[lp[0][1] for lp in seq.logprobs] for seq in greedy.sequences],
    "prompts": [part.prompt_token_ids for part in greedy],
    "engines": sorted({seq.engine for seq in greedy.sequences}),
}, open(sys.argv[1], "w"))
"""


@pytest.mark.timeout(400)
async def test_service_samples_what_the_torch_engine_does(service: Service, tmp_path: Path) -> None:
    """Greedy tokens of both vLLM engines are torch's, logprobs within 1e-3; a seed repeats itself."""
    import json

    import numpy as np

    from twinkle_serve import hub
    from twinkle_serve.data_format.groups import Group
    from twinkle_serve.data_format.sampling_params import DecodingParams
    from twinkle_serve.engines import build_engine

    out = tmp_path / "samples.json"
    result = service.run("-c", REPEATABLE, str(out))
    assert result.returncode == 0, result.stderr
    got = json.loads(out.read_text())
    assert got["engines"] == ["engine-dp0", "engine-dp1"]
    assert got["seeded"][0] == got["seeded"][1]
    engine = build_engine("torch", "reference", str(hub.DEMO), {"dtype": "float32"})
    await engine.start()
    for i, prompt in enumerate(got["prompts"]):
        params = DecodingParams(max_tokens=8, temperature=0)
        columns = await engine.sample_group(Group(id=i, prompt_ids=np.array(prompt, np.int32), params=params))
        assert columns.tokens.tolist() == got["greedy"][i]
        assert columns.logprobs is not None
        assert np.abs(columns.logprobs[:, 0] - np.array(got["logprobs"][i])).max() < 1e-3
    await engine.stop()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("what", [("--learning-rate", "2e-3"), ("--full",)], ids=["adapter", "full"])
def test_grpo_trains_on_what_it_published(service: Service, tmp_path: Path, what: tuple[str, ...]) -> None:
    """Each step's samples come from the weights of the step before: the trainer's logprobs are the sampler's.

    Each step changes the policy by far more than the two may differ, so weights that do not reach an engine show.
    """
    options = ("--steps", "5", "--prompts", "16", "--samples", "4", "--held-out", "40", *what)
    answer = service.run("examples/grpo.py", "--out", str(tmp_path), *options, timeout_s=240)
    assert answer.returncode == 0, answer.stderr
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    for step in steps:
        assert step["staleness"] == 0 and step["groups_used"]
        assert step["logprob_difference"] < 1e-4 < 1e-3 < step["policy_change"], step
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 < summary["accuracy_before"] <= 1 and summary["held_out_problems"] == 40
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


STALENESS = """
import ray, time, twinkle_serve, urllib.request
twinkle_serve.connect("sampler")
(node,) = ray.nodes()
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
deadline = time.monotonic() + 90
while not (lines := [line for line in urllib.request.urlopen(url).read().decode().splitlines()
                     if line.startswith("ray_twinkle_sampler_staleness_count") and 'adapter="policy"' in line]):
    assert time.monotonic() < deadline, "no such metric"
print(lines[0].rpartition(" ")[2])
"""


def test_staleness_is_a_metric(service: Service) -> None:
    """One observation for each request of the training run, where Prometheus finds Ray's own metrics."""
    answer = service.run("-c", STALENESS)
    assert answer.returncode == 0, answer.stderr
    assert float(answer.stdout) >= 5


def test_dashboard_shows_router_and_engines(service: Service) -> None:
    """What the Serve page of the Ray dashboard reads."""
    code = (
        "import sys; from ray.dashboard.modules.serve.sdk import ServeSubmissionClient; "
        "details = ServeSubmissionClient(sys.argv[1]).get_serve_details(); "
        "print({d: v['status'] for d, v in details['applications']['sampler']['deployments'].items()})"
    )
    result = service.run("-c", code, service.dashboard, RAY_AUTH_MODE="token")
    assert result.returncode == 0, result.stderr
    for name in ("router", "engine-dp0", "engine-dp1"):
        assert f"'{name}': 'HEALTHY'" in result.stdout


@pytest.mark.timeout(400)
def test_http_says_that_it_has_no_api(service: Service) -> None:
    """Plainly, without a traceback."""
    port = yaml.safe_load(service.config.read_text())["http_options"]["port"]
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30)
    body = caught.value.read().decode()
    assert caught.value.code == 501 and "get_app_handle" in body and "Traceback" not in body


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"engine": "vlm"}, r"ConfigError: args: engine: Input should be 'vllm', 'torch' or 'fake', got 'vlm'"),
        ({"modelid": "demo"}, r"ConfigError: args: unknown key 'modelid', did you mean 'model_id'"),
        ({"model_id": "/no/such/model"}, r"ModelNotFoundError: model_id '/no/such/model': no directory at"),
        ({"device_mesh": {"dp_size": 999}}, r"MeshError: device_mesh needs 999 [CG]PUs .*, the cluster has \d+"),
        (
            {"engine_args": {"max_seqs": 64}},
            r"EngineArgsError: unknown vllm engine argument 'max_seqs', did you mean",
        ),
        ({"engine_args": {"max_model_len": -5}}, r"EngineArgsError: vLLM refuses engine_args"),
    ],
    ids=["engine", "key", "model", "mesh", "engine-argument", "engine-argument-value"],
)
def test_bad_config_ends_with_its_error(
    args: dict[str, object], message: str, environment: dict[str, str], tmp_path: Path
) -> None:
    """Non-zero, with the typed error as what is printed last, and nothing left running."""
    own_ray = tempfile.mkdtemp(prefix="tst")
    log = tmp_path / "log"
    process = start(config_with(tmp_path / "bad.yaml", **args), {**environment, "RAY_TMPDIR": own_ray}, log)
    try:
        assert ended(process, 150) in (1, 2)
    finally:
        shutil.rmtree(own_ray, ignore_errors=True)
    assert re.search(message, log.read_text()), log.read_text()[-4000:]


@pytest.mark.timeout(300)
def test_plain_kill_stops_all_of_it(environment: dict[str, str], tmp_path: Path) -> None:
    """SIGTERM means what Ctrl-C means: exit code 0, nothing left."""
    own_ray = tempfile.mkdtemp(prefix="tst")
    log = tmp_path / "log"
    config = config_with(tmp_path / "fake.yaml", engine="fake", engine_args={}, device_mesh={"dp_size": 1})
    process = start(config, {**environment, "RAY_TMPDIR": own_ray}, log)
    try:
        ready(process, log)
        process.send_signal(signal.SIGTERM)
        assert ended(process, 60) == 0, log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            process.kill()
        shutil.rmtree(own_ray, ignore_errors=True)
