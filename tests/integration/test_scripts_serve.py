"""scripts/serve as a user runs it: real vLLM, dp_size 2, from the config in the repository."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.support.docs import blocks_of
from tests.support.eventually import wait_until
from tests.support.scripts_serve import ROOT, Service, config_with, ended, own_environment, serving, start

pytestmark = [pytest.mark.ray, pytest.mark.own_cluster, pytest.mark.vllm]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    config = config_with(tmp_path_factory.mktemp("serve") / "config.yaml")
    with own_environment() as environment, serving(config, environment) as running:
        yield running


def test_start_is_shown_stage_by_stage(service: Service) -> None:
    """Of every engine, and nothing of what Ray, Serve and vLLM print: that is in the log file that it names."""
    start, _, _ = service.output.partition("\nReady after")
    for engine in ("engine-dp0", "engine-dp1"):
        shown = re.findall(rf"^\d\d:\d\d:\d\d  sampler {engine}: (\w+)", start, re.M)
        assert [stage for stage in shown if stage != "fetching"] in (
            ["starting", "importing", "loading", "warming", "ready"],
            ["starting", "importing", "loading", "ready"],  # it took less than the launcher's look
        )
        assert re.search(rf"{engine}: ready after .* \(starting .* importing .* loading .* s\)", start)
    steps = re.compile(r"^\d\d:\d\d:\d\d  (Ray|Serve|sampler( [\w-]+)?|gateway( gateway)?|install): |^Serving |^$")
    shared = "in use by engines of other services"  # those of other tests
    assert [line for line in start.splitlines() if not (steps.match(line) or shared in line)] == []
    log = Path(re.findall(r"^  log +(\S+)$", service.output, re.M)[0])
    assert "ServeController" in log.read_text() and "ServeReplica" in log.read_text()


def test_calls_that_ready_prints_work(service: Service) -> None:
    """As they are, with the address beside them as an argument or in RAY_ADDRESS, and no other variable: the token is
    found. In the service's own directory neither is needed."""
    lines = re.findall(r"^from twinkle_serve import connect\n(?:\S.*\n)+", service.output, re.M)
    assert len(lines) == 1
    (address,) = re.findall(r'^  address +connect\(…, address="(\S+)"\), or RAY_ADDRESS, where', service.output, re.M)
    with_address = lines[0].replace('connect("sampler")', f'connect("sampler", address="{address}")')
    assert with_address != lines[0]
    for code, variables in ((lines[0], {"RAY_ADDRESS": address}), (with_address, {}), (lines[0], {})):
        result = service.run("-c", code, RAY_AUTH_MODE=None, **{"RAY_ADDRESS": None, **variables})
        assert result.returncode == 0, result.stderr
        assert len(json.loads(result.stdout.replace("'", '"'))) == 4
        assert result.stderr == ""


@pytest.mark.nightly
def test_caller_without_the_token_is_told_what_is_missing(service: Service, tmp_path: Path) -> None:
    """Where Ray looks for it, and how to get it; not that there is no cluster."""
    code = "import twinkle_serve; twinkle_serve.connect('sampler')"
    result = service.run("-c", code, RAY_AUTH_MODE=None, HOME=str(tmp_path))
    error = result.stderr.strip().splitlines()[-1]
    assert "ServiceNotReadyError: cannot join the Ray cluster at" in error
    assert "RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token" in error and "ray get-auth-token" in error


def test_commands_that_ready_prints_work_where_they_are_pasted(service: Service) -> None:
    """`serve status` and `serve deploy` find this service and its token, without a variable of their own."""
    environment = {key: value for key, value in service.environment.items() if not key.startswith("RAY_A")}
    for what, expected in (("state", "status: RUNNING"), ("change", "Sent deploy request successfully")):
        (command,) = re.findall(rf"^  {what} +(RAY_\S+ RAY_\S+ \S+/serve .*)$", service.output, re.M)
        result = subprocess.run(
            command, shell=True, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=90
        )
        assert expected in result.stdout + result.stderr, result.stderr


def test_readmes_own_call_runs_as_a_file(service: Service, tmp_path: Path) -> None:
    """As it stands."""
    script = tmp_path / "script.py"
    script.write_text(next(block.code for block in blocks_of(ROOT / "README.md") if block.language == "python"))
    result = service.run(str(script))
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 4


def test_http_listens_on_this_machine_alone(service: Service) -> None:
    """The config does not say where, and Ray Serve's own default is every interface."""
    port = yaml.safe_load(service.config.read_text())["http_options"]["port"]
    listening = [c.laddr.ip for c in psutil.net_connections() if c.status == "LISTEN" and c.laddr.port == port]
    assert set(listening) == {"127.0.0.1"}


def test_ports_beyond_this_machine_are_documented(service: Service) -> None:
    """docs/operating.md names each process that listens on another interface."""
    family = [psutil.Process(service.process.pid), *psutil.Process(service.process.pid).children(recursive=True)]
    page = (ROOT / "docs" / "operating.md").read_text()
    _, _, section = page.partition("## Ports")
    rows = re.findall(r"^\| (`[^|]+) \|", section, re.M)
    documented = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            beyond = [c for c in process.net_connections("inet") if c.status == "LISTEN" and not local(c.laddr.ip)]
            command = " ".join(process.cmdline())
            assert not beyond or any(name in command for name in documented), (command, beyond)


def local(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


REFUSED = """
import sys, twinkle_serve
sampler = twinkle_serve.connect("sampler")
prompt = {"messages": [{"role": "user", "content": "1+1="}]}
calls = {
    "sample": lambda: sampler.sample([prompt], {"max_tokens": 4}, "nobody"),
    "sample_iter": lambda: list(sampler.sample_iter([prompt], {"max_tokens": 4}, "nobody")),
    "sample_stream": lambda: list(sampler.sample_stream(prompt, {"max_tokens": 4}, "nobody")),
    "ids": lambda: list(sampler.sample_stream({"input_ids": [10**6]}, {"max_tokens": 4})),
    "late": lambda: sampler.sample([prompt] * 200, {"max_tokens": 900, "ignore_eos": True}, timeout_s=0.2),
    "control": lambda: sampler.drain_engine("nobody", timeout_s=1),
    "adapter": lambda: sampler.add_adapter_to_model("broken", sys.argv[1]),
}
for name, call in calls.items():
    try:
        call()
    except twinkle_serve.TwinkleServeError as error:
        print(type(error).__name__)
"""


def test_refused_call_is_one_line_on_the_terminal(service: Service, tmp_path: Path) -> None:
    """Not a traceback: of sampling, streaming and control calls, by the router, an engine or the store."""
    before = len(service.output)
    result = service.run("-c", REFUSED, str(tmp_path))
    refused = result.stdout.split()
    assert len(refused) == 7, result.stderr
    wait_until(lambda: service.output.count("call failed", before) >= 7, "seven lines")
    said = service.output[before:]
    assert re.findall(r"^\d\d:\d\d:\d\d  sampler router  call failed: (\w+): .+$", said, re.M) == refused
    assert len(said.splitlines()) == 7, said


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


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("steps", "what"), [(2, ("--learning-rate", "2e-3")), (5, ("--full",))], ids=["adapter", "full"]
)
def test_grpo_trains_on_what_it_published(service: Service, tmp_path: Path, steps: int, what: tuple[str, ...]) -> None:
    """Each step's samples come from the weights of the step before: the trainer's logprobs are the sampler's.

    Each step changes the policy by far more than the two may differ, so weights that do not reach an engine show.
    """
    options = ("--steps", str(steps), "--prompts", "16", "--samples", "4", "--held-out", "40", *what)
    answer = service.run("examples/grpo.py", "--out", str(tmp_path), *options, timeout_s=240)
    assert answer.returncode == 0, answer.stderr
    done = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in done] == list(range(1, steps + 1))
    for step in done:
        assert step["staleness"] == 0 and step["groups_used"]
        assert step["logprob_difference"] < 1e-4 < 1e-3 < step["policy_change"], step
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 < summary["accuracy_before"] <= 1 and summary["held_out_problems"] == 40
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


def train_agent(service: Service, out: Path, *options: str, timeout_s: float) -> tuple[list[Any], dict[str, float]]:
    """Runs examples/agent.py. Returns the metrics of its steps and its summary."""
    port = yaml.safe_load(service.config.read_text())["http_options"]["port"]
    arguments = ("--url", f"http://127.0.0.1:{port}", "--out", str(out), *options)
    answer = service.run("examples/agent.py", *arguments, timeout_s=timeout_s)
    assert answer.returncode == 0, answer.stderr
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return steps, json.loads((out / "summary.json").read_text())


SMALL = ("--steps", "2", "--prompts", "8", "--samples", "4", "--held-out", "16", "--learning-rate", "2e-3")


@pytest.mark.nightly
def test_agent_trains_on_the_tokens_of_its_sessions(service: Service, tmp_path: Path) -> None:
    """Over HTTP, by the package `openai`: the trainer's logprobs of the sessions' tokens are the sampler's, with the
    weights of the step before, retries included."""
    steps, summary = train_agent(service, tmp_path, *SMALL, timeout_s=240)
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["sessions_used"]
        assert step["logprob_difference"] < 1e-4 < 1e-3 < step["policy_change"], step
    assert summary["held_out_problems"] == 16


@pytest.mark.nightly
@pytest.mark.timeout(5400)
def test_agent_learns(service: Service, tmp_path: Path) -> None:
    """Its reward for new problems rises by at least 10 points at temperature 1, with the example's own settings, and
    it gets better at held-out ones."""
    steps, summary = train_agent(service, tmp_path, timeout_s=5000)
    assert summary["reward_last"] - summary["reward_first"] >= 0.1, summary
    assert summary["right_after"] - summary["right_before"] >= 0.04, summary
    assert max(step["logprob_difference"] for step in steps) < 1e-4


@pytest.mark.nightly
def test_agent_calls_its_tool_by_the_protocol(service: Service, tmp_path: Path) -> None:
    """It comes to its end. The demo model has never seen a tool, and none of its calls is right, so there is nothing to
    train on."""
    steps, summary = train_agent(service, tmp_path, *SMALL, "--tool-calls", timeout_s=240)
    assert [step["step"] for step in steps] == [1, 2] and summary["held_out_problems"] == 16


STALENESS = """
import ray, time, twinkle_serve, urllib.request
sampler = twinkle_serve.connect("sampler")
for _ in range(2):
    sampler.sample({"input_ids": [20, 21]}, {"max_tokens": 1})
(node,) = ray.nodes()
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
deadline = time.monotonic() + 90
while not (lines := [line for line in urllib.request.urlopen(url).read().decode().splitlines()
                     if line.startswith("ray_twinkle_sampler_staleness_count")]):
    assert time.monotonic() < deadline, "no such metric"
print(sum(float(line.rpartition(" ")[2]) for line in lines))
"""


def test_staleness_is_a_metric(service: Service) -> None:
    """One observation for each request, where Prometheus finds Ray's own metrics."""
    answer = service.run("-c", STALENESS)
    assert answer.returncode == 0, answer.stderr
    assert float(answer.stdout) >= 2


def test_dashboard_shows_router_and_engines(service: Service) -> None:
    """What the Serve page of the Ray dashboard reads."""
    code = (
        "import sys; from ray.dashboard.modules.serve.sdk import ServeSubmissionClient; "
        "details = ServeSubmissionClient(sys.argv[1]).get_serve_details(); "
        "print({d: v['status'] for d, v in details['applications']['sampler']['deployments'].items()})"
    )
    result = service.run("-c", code, service.dashboard)
    assert result.returncode == 0, result.stderr
    for name in ("router", "engine-dp0", "engine-dp1"):
        assert f"'{name}': 'HEALTHY'" in result.stdout


def test_url_that_ready_prints_answers(service: Service) -> None:
    """With the models that clients can name, and with completions."""
    (url,) = re.findall(r"^  HTTP +(http://\S+)/v1, for", service.output, re.M)
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ["sampler"]
    body = json.dumps({"model": "sampler", "prompt": "12+34=", "max_tokens": 4}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param(
            {"modelid": "demo"}, r"ConfigError: args: unknown key 'modelid', did you mean 'model_id'", id="key"
        ),
        pytest.param(
            {"device_mesh": {"dp_size": 999}},
            r"MeshError: device_mesh needs 999 [CG]PUs .*, the cluster has \d+",
            id="mesh",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            {"engine": "vlm"},
            r"ConfigError: args: engine: Input should be 'vllm', 'torch' or 'fake', got 'vlm'",
            id="engine",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            {"model_id": "/no/such/model"},
            r"ModelNotFoundError: model_id '/no/such/model': no directory at",
            id="model",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            {"engine_args": {"max_seqs": 64}},
            r"EngineArgsError: unknown vllm engine argument 'max_seqs', did you mean",
            id="engine-argument",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            {"engine_args": {"max_model_len": -5}},
            r"EngineArgsError: vLLM refuses engine_args",
            id="engine-argument-value",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_bad_config_ends_with_its_error(args: dict[str, object], message: str, tmp_path: Path) -> None:
    """Non-zero, with the typed error, and nothing left running."""
    log = tmp_path / "log"
    with own_environment() as environment:
        process = start(config_with(tmp_path / "bad.yaml", **args), environment, log)
        assert ended(process, 150) in (1, 2)
    assert re.search(message, log.read_text()), log.read_text()[-4000:]
