"""Text on how to call a ready service."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from graphs.cluster import Cluster
from twinkle_serve.config import ServiceArgs
from twinkle_serve.errors import PromptError, TwinkleServeError

TRIAL_S = 60.0

SUM = "12+34="
"""A problem for the demo model."""
QUESTION = "What is the capital of France?"


def ready_text(
    samplers: Mapping[str, ServiceArgs], cluster: Cluster, config: Path, log: Path, urls: Sequence[str] = ()
) -> str:
    """Calls of each sampler, which were tried, and where everything is.

    Args:
        urls: of gateways.
    """
    lines: list[str] = []
    asks = False
    for name, args in samplers.items():
        prompt, problem = working_prompt(name, args)
        asks = asks or "messages" in prompt
        lines += [problem] if problem else []
        lines += [*calls(name, prompt), ""]
    python = _command("python")
    for url in urls:
        lines.append(f"  HTTP       {url}/v1, for OpenAI's and Anthropic's clients; {url}/docs lists every route")
        lines += [f"  console    {url}/", ""]
    if samplers:
        lines.append(f"  python     {python}, for the lines above")
    if asks:
        first = next(iter(samplers))
        option = "" if first == "sampler" else f" --name {first}"
        lines.append(f"  example    {python} examples/sample.py{option}")
    lines.append(
        f'  address    connect(…, address="{cluster.address}"), or RAY_ADDRESS, where connect() does not find it'
    )
    if cluster.dashboard_url:
        token = f", with the token of: {_command('ray')} get-auth-token" if cluster.needs_token else ""
        lines.append(f"  dashboard  http://{cluster.dashboard_url}/#/serve{token}")
        # Neither looks for the token by itself, and the dashboard's port may be another one.
        mode = "RAY_AUTH_MODE=token " if cluster.needs_token else ""
        where = f"{mode}RAY_DASHBOARD_ADDRESS=http://{cluster.dashboard_url}"
        lines.append(f"  state      {where} {_command('serve')} status")
        lines.append(f"  change     {where} {_command('serve')} deploy {shlex.quote(str(config))}")
    lines += [f"  log        {log}", "  stop       Ctrl-C"]
    return "\n".join(lines)


def calls(name: str, prompt: str) -> list[str]:
    """Python lines that sample a prompt, without indentation, so that a Python prompt takes them."""
    return [
        "from twinkle_serve import connect",
        f"sampler = connect({json.dumps(name)})",
        f'response = sampler.sample([{prompt}], {{"max_tokens": 16}}, num_samples=4)',
        "print([sequence.decoded for sequence in response.sequences])",
    ]


def working_prompt(name: str, args: ServiceArgs) -> tuple[str, str]:
    """A prompt that the sampler takes, as Python source: messages, or ids where the model has no chat template.

    Also the error, if sampling failed.
    """
    from twinkle_serve import connect

    content = SUM if args.model_id == "demo" else QUESTION
    message = {"messages": [{"role": "user", "content": content}]}
    try:
        connect(name, timeout_s=TRIAL_S).sample([message], {"max_tokens": 1}, timeout_s=TRIAL_S)
    except PromptError:
        return json.dumps({"input_ids": [1, 2, 3]}), ""
    except TwinkleServeError as error:
        return json.dumps(message), f"A first sample of {name} failed. {type(error).__name__}: {error}"
    return json.dumps(message), ""


def _command(name: str) -> str:
    """A program beside this Python's, as it can be typed here."""
    path = Path(sys.executable).with_name(name)
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return os.fspath(path)
