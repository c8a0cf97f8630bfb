"""vLLM alone and as a service: shapes that scripts/serve's config does not cover, crashes, refusals and kills."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.deploy import deployed
from tests.support.eventually import wait_until
from tests.support.lora import save_adapter
from tests.support.processes import core_processes, replica_process
from twinkle_serve import hub
from twinkle_serve.engines import build_engine
from twinkle_serve.errors import AdapterError, EngineArgsError, SamplingParamsError
from twinkle_serve.sampler import RunningSampler

QUESTIONS = [{"messages": [{"role": "user", "content": f"{a}+{a}="}]} for a in range(100, 116)]
GREEDY = {"max_tokens": 8, "temperature": 0}
pytestmark = pytest.mark.vllm
VLLM_ARGS = {"max_model_len": 256, "dtype": "float32", "kv_cache_memory_bytes": 2**27}


@pytest.mark.ray
@pytest.mark.nightly
def test_tensor_parallel_replicas_sample_what_torch_does(cluster: None, tmp_path: Path) -> None:
    """dp_size 2 x tp_size 2 on CPU: each sample once, the tokens of torch, and its logprobs within 1e-3."""
    with (
        deployed("tp2", engine="vllm", device_mesh={"dp_size": 2, "tp_size": 2}, engine_args=VLLM_ARGS) as four,
        deployed("torch", engine="torch", engine_args={"dtype": "float32"}) as torch,
    ):
        one, other = (sampler.sample(QUESTIONS, GREEDY, num_samples=2) for sampler in (four, torch))
        for name in ("engine-dp0", "engine-dp1"):
            require_forks(core_processes(replica_process("tp2", name))[0])
        with pytest.raises(AdapterError, match="LoRA is switched off"):  # it was not asked for
            four.add_adapter_to_model("lora", save_adapter(tmp_path / "lora"))
    assert [seq.prompt_index for seq in one.sequences] == [i for i in range(len(QUESTIONS)) for _ in range(2)]
    assert {seq.engine for seq in one.sequences} == {"engine-dp0", "engine-dp1"}
    assert [seq.tokens for seq in one.sequences] == [seq.tokens for seq in other.sequences]
    assert abs(one.columns.logprobs - other.columns.logprobs).max() < 1e-3  # type: ignore[operator]
    assert one.logprobs_mode == other.logprobs_mode == "raw_logprobs"


def require_forks(core: psutil.Process) -> None:
    """Workers share what their core has imported, hundreds of MB, and have cores and priority of their own."""
    workers = core.children()
    assert len(workers) == 2
    for worker in workers:
        shared_bytes = sum(mapped.shared_dirty for mapped in worker.memory_maps())
        assert shared_bytes > 50 * 2**20, shared_bytes
        assert len(worker.cpu_affinity()) < len(core.cpu_affinity())
        assert core.nice() == worker.nice() == psutil.Process().nice()


@pytest.mark.ray
async def test_engines_own_refusal_fails_its_call_alone(vllm_service: RunningSampler) -> None:
    """A stop token outside the vocabulary, refused by vLLM itself: typed, and the neighbours in the chunk finish."""
    good = [vllm_service.sample_async(QUESTIONS, {"max_tokens": 20, "ignore_eos": True}) for _ in range(3)]
    bad = vllm_service.sample_async(QUESTIONS[0], {"stop": [10**6], "max_tokens": 4})
    *responses, refused = await asyncio.gather(*good, bad, return_exceptions=True)
    assert all(len(response.sequences) == 16 for response in responses)  # type: ignore[union-attr]
    assert isinstance(refused, SamplingParamsError), refused


@pytest.mark.ray
async def test_worker_that_is_alone_runs_in_the_core_on_its_own_cores(vllm_service: RunningSampler) -> None:
    """At the priority of callers: Ray would run it at niceness 15."""
    for name in vllm_service.status()["engines"]:
        (core,) = core_processes(replica_process("sampler_group", name))
        assert not core.children()
        assert len(core.cpu_affinity()) < len(psutil.Process().cpu_affinity())
        assert core.nice() == psutil.Process().nice()


async def test_adapters_in_float32_are_refused_on_a_gpu() -> None:
    """At once: vLLM asserts it in a kernel, a minute later."""
    engine = build_engine("vllm", "wide", str(hub.DEMO), {**VLLM_ARGS, "enable_lora": True}, device="cuda")
    with pytest.raises(EngineArgsError, match=r"enable_lora with dtype float32.*Set engine_args.dtype: bfloat16"):
        await engine.start()
    await engine.stop()


INTERRUPTED = """
import os, signal, threading, time
import psutil
from twinkle_serve import vLLMSampler

def interrupt(engine, before):  # as a terminal does at Ctrl-C: the whole process group, once the call samples
    while engine.progress() <= before:
        time.sleep(0.01)
    os.killpg(0, signal.SIGINT)

def interrupted(sampler, call):
    engine = sampler._client._service._server._engine
    threading.Thread(target=interrupt, args=(engine, engine.progress())).start()
    try:
        call()
    except KeyboardInterrupt:
        while sampler.status()["requests"]:
            time.sleep(0.01)
        return 1
    return 0

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process of a shell ignores it
    sampler = vLLMSampler("demo", {"max_model_len": 1024, "dtype": "float32"})
    prompt, endless = {"input_ids": [20, 21]}, {"max_tokens": 1000, "ignore_eos": True}
    calls = [
        lambda: sampler.sample([prompt] * 32, endless, num_samples=8),
        lambda: list(sampler.sample_iter([prompt] * 32, endless, num_samples=8)),
        lambda: list(sampler.sample_stream(prompt, endless)),
    ]
    interrupts = sum(interrupted(sampler, call) for call in calls)
    response = sampler.sample(prompt, {"max_tokens": 2})
    print(interrupts, len(response.sequences), sampler._client._service._server._engine._files._path)
    print(*(child.pid for child in psutil.Process().children(recursive=True)))
"""


@pytest.mark.nightly
def test_script_goes_on_after_ctrl_c_and_leaves_nothing_though_it_forgets_shutdown(tmp_path: Path) -> None:
    """Ctrl-C in a call raises KeyboardInterrupt and aborts this call alone: the engine lives, and the next call works.
    The script ends with its processes and files, and says nothing."""
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=500, check=False, start_new_session=True
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    interrupts, samples, directory, *children = result.stdout.split()
    assert interrupts == "3" and samples == "1" and len(children) >= 2
    assert not Path(directory).exists()
    wait_until(lambda: not any(psutil.pid_exists(int(pid)) for pid in children), "its processes are gone")


@pytest.mark.ray
@pytest.mark.ends_engine
async def test_samples_go_on_when_their_engine_is_killed_and_rescore(vllm_service: RunningSampler) -> None:
    """`failover: resume`: each sample once and whole; its logprobs are those of a score of the whole, to 1e-3."""
    prompts = [{"input_ids": [20 + i, 21, 22, 23]} for i in range(32)]
    call = asyncio.ensure_future(vllm_service.sample_async(prompts, {"max_tokens": 240, "ignore_eos": True}))
    await asyncio.wait({call}, timeout=1.2)  # two reports
    assert not call.done(), "the machine is too fast: the test shows nothing"
    replica_process("sampler_group", "engine-dp0").kill()
    response = await call
    assert [seq.prompt_index for seq in response.sequences] == list(range(32))
    assert {len(seq.tokens) for seq in response.sequences} == {240}
    whole = [
        {"input_ids": [*prompt["input_ids"], *seq.tokens]}
        for prompt, seq in zip(prompts, response.sequences, strict=True)
    ]
    scores = await vllm_service.sample_async(whole, {"max_tokens": 0, "prompt_logprobs": 0})
    for seq, score in zip(response.sequences, scores, strict=True):
        assert score.prompt_logprobs is not None
        assert abs(score.prompt_logprobs[4:] - seq.logprob_array).max() < 1e-3  # type: ignore[operator]
