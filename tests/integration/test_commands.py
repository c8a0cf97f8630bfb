"""The lines of `twinkle-serve` on the pages of the documentation run against a service on vLLM and its gateway."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.support.deploy import deployed
from tests.support.docs import PAGES, Block, blocks_of
from tests.support.gateway import gateway_url
from tests.support.lora import save_adapter
from twinkle_serve import hub

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.nightly]

VLLM_ARGS = {"max_model_len": 256, "dtype": "float32", "kv_cache_memory_bytes": 2**27, "enable_lora": True}
COMMAND = "twinkle-serve"
ELSEWHERE = {
    "up": "starts a service of its own: test_scripts_serve.py",
    "--install-completion": "writes to the shell's own files",
}
"""Commands that are not run here, by a word of theirs, and why."""
ENDLESS_S = 10.0
"""After this time a command that goes on until Ctrl-C gets it."""


def blocks() -> list[Block]:
    found = [block for page in PAGES for block in blocks_of(page) if block.language in ("console", "sh", "bash")]
    return [block for block in found if COMMAND in block.code]


def lines(block: Block) -> list[str]:
    """Its commands of `twinkle-serve`; of a shell block, each line."""
    given = block.code.splitlines()
    if block.language == "console":
        given = [line.removeprefix("$ ") for line in given if line.startswith("$ ")]
    return [line for line in given if COMMAND in line and not set(line.split()) & ELSEWHERE.keys()]


@pytest.fixture(scope="module")
def url(cluster: None) -> Iterator[str]:
    with deployed("sampler", engine="vllm", engine_args=VLLM_ARGS), gateway_url() as url:
        yield url


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_commands_of_a_page_run(block: Block, url: str, tmp_path: Path) -> None:
    """One after the other, each with a line of input, in a directory with the files that pages name."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "step-100").symlink_to(hub.DEMO)
    save_adapter(tmp_path / "adapter")
    (tmp_path / "prompts.jsonl").write_text('"12+34="\n"1+1="\n')
    (tmp_path / "serve_config.yaml").write_text((Path(__file__).parents[2] / "serve_config.yaml").read_text())
    address = ray.get_runtime_context().gcs_address
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TWINKLE_SERVE_URL": url,
    }
    for line in lines(block):
        line = line.replace("https://sampler.example.org --key KEY", url).replace("10.0.0.1:6379", address)
        endless = "--watch" in line.split()
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", f"exec {line}" if endless else line],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate("12+34=\n", timeout=ENDLESS_S if endless else 300)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT if endless else signal.SIGKILL)
            output, _ = process.communicate(timeout=60)
            assert endless, f"{line} did not end: {output}"
            assert process.returncode == 130, f"{line}: {process.returncode}: {output}"
            continue
        assert process.returncode == 0, f"{line}: {process.returncode}: {output}"
