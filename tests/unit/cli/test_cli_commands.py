"""Every command of `twinkle-serve`, for a gateway's URL and by handle, over the fake engine in this process."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import fails, json_of, run, succeeds
from tests.support.gateway_app import GatewayUnderTest, gateway_app
from twinkle_serve import hub
from twinkle_serve.cli import client as cli_client
from twinkle_serve.cli import options
from twinkle_serve.cli.client import Client, Target
from twinkle_serve.cli.commands import verify
from twinkle_serve.cli.handle_client import HandleClient

PROMPT, OTHER = "12+34=", "1+1="


@dataclass(frozen=True)
class Way:
    """A way to a service: options that name it."""

    options: tuple[str, ...]
    gateway: GatewayUnderTest

    def json(self, *arguments: str, stdin: str | None = None) -> Any:
        return json_of(*arguments, *self.options, stdin=stdin)

    def text(self, *arguments: str, stdin: str | None = None) -> str:
        return succeeds(*arguments, *self.options, stdin=stdin)

    def fails(self, code: int, *arguments: str) -> str:
        return fails(code, *arguments, *self.options)


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayUnderTest]:
    with gateway_app() as made:
        yield made


@pytest.fixture(scope="module")
def url(gateway: GatewayUnderTest) -> Iterator[str]:
    with gateway.served() as served:
        yield served


@pytest.fixture
def by_handle(gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every `--service` the sampler in this process."""

    def opened(target: Target) -> Client:
        return HandleClient(target, gateway.sampler) if target.by_handle else cli_client.open_client(target)

    monkeypatch.setattr(options, "open_client", opened)
    monkeypatch.setattr(verify, "open_client", opened)


@pytest.fixture(params=["url", "handle"])
def way(request: pytest.FixtureRequest, gateway: GatewayUnderTest, url: str, by_handle: None) -> Way:
    return Way(("--url", url) if request.param == "url" else ("--service", "sampler"), gateway)


def test_status_is_that_of_the_sampler(way: Way) -> None:
    found = way.json("status")
    assert found["engines"]["local"]["state"] == "ready" and found["weights"] == "initial"
    text = way.text("status")
    assert "1 of 1 engines ready" in text and "local" in text and "fake/cpu" in text


def test_samples_are_those_of_the_handle(way: Way) -> None:
    """Tokens, logprobs, seeds; prompts from arguments and from a file, in the order in which they were given."""
    lines = [OTHER, json.dumps(OTHER), json.dumps({"messages": [{"role": "user", "content": OTHER}]})]
    options = ("-n", "2", "--max-tokens", "5", "--seed", "3", "-p", "top_k=20", "--temperature", "0.9")
    found = way.json("sample", PROMPT, "--file", "-", *options, stdin="\n\n".join(lines))["prompts"]
    conversation = [{"messages": [{"role": "user", "content": text}]} for text in (PROMPT, OTHER, OTHER, OTHER)]
    params = {"max_tokens": 5, "seed": 3, "top_k": 20, "temperature": 0.9}
    expected = way.gateway.sampler.sample(conversation, params, num_samples=2)
    assert [prompt["prompt_index"] for prompt in found] == [*range(4)]
    for prompt, part in zip(found, expected, strict=True):
        for given, wanted in zip(prompt["sequences"], part.sequences, strict=True):
            assert (given["tokens"], given["seed"]) == (wanted.tokens, wanted.seed)
            assert given["logprobs"] == pytest.approx([position[0][1] for position in wanted.logprobs or ()])
    (ids,) = way.json("sample", "--file", "-", *options, stdin='{"input_ids": [19, 20, 13]}')["prompts"]
    assert ids["prompt_token_ids"] == [19, 20, 13]
    assert len(way.text("sample", PROMPT, *options).splitlines()) == 3


def test_control_characters_of_a_sample_do_not_reach_the_terminal(way: Way) -> None:
    """As escapes instead, such as \\x1b."""
    escape = next(
        i
        for i in range(300)
        if (text := way.gateway.sampler.decode([i])) and not text.isprintable() and text not in "\n\t"
    )
    options = ("-p", f"allowed_token_ids=[{escape}]", "--max-tokens", "3", "-p", "ignore_eos=true")
    assert "\\x" in way.text("sample", PROMPT, *options)
    assert "\\x" in way.text("chat", *options, stdin=f"{PROMPT}\n")


def test_scores_are_those_of_the_handle(way: Way) -> None:
    (found,) = way.json("score", "--raw", PROMPT, "--top-logprobs", "2")["prompts"]
    (expected,) = way.gateway.sampler.score([{"text": PROMPT}], top_logprobs=2)
    assert found["prompt_token_ids"] == expected.prompt_token_ids
    assert found["prompt_logprobs"][1:] == pytest.approx((expected.prompt_logprobs or [])[1:])
    assert "".join(found["token_texts"]) == PROMPT and "sequences" not in found
    text = way.text("score", "--raw", PROMPT, "--top-logprobs", "2")
    assert "likeliest" in text and "'+'" in text


def test_chat_continues_the_tokens_of_each_reply(way: Way) -> None:
    """Streamed, each turn a line; the second prompt begins with all tokens of the first turn."""
    options = ("--max-tokens", "6", "--seed", "1", "--system", "add")
    lines = way.text("chat", *options, "--json", stdin=f"{PROMPT}\n\n{OTHER}\n/exit\nnever\n").splitlines()
    turns = [json.loads(line) for line in lines]
    assert [turn["message"] for turn in turns] == [PROMPT, OTHER]
    assert all(turn["reply"] for turn in turns)
    session = turns[0]["session"]
    if session is None:
        assert way.options[0] == "--service"
        return
    nodes = way.json("sessions", "show", session)["nodes"]
    assert [(node["id"], node["parent"], node["branch"]) for node in nodes] == [(0, None, ""), (1, 0, "")]
    assert [message["role"] for message in nodes[0]["messages"]] == ["system", "user", "assistant"]
    text = way.text("chat", *options, "--session", "named", stdin=PROMPT)
    assert text.splitlines()
    assert PROMPT in way.text("sessions", "show", "named")


def test_handle_keeps_the_conversation_token_by_token(by_handle: None, gateway: GatewayUnderTest) -> None:
    """Without a gateway no session has it; the prompt of the second turn begins with the tokens of the first."""
    conversation = HandleClient(Target(service="sampler"), gateway.sampler).conversation(
        cli_client.Sampling(params={"max_tokens": 6, "seed": 1}), None, None
    )
    first = "".join(conversation.send(PROMPT))
    begun = conversation._begun
    assert begun["messages"][-1] == {"role": "assistant", "content": first}
    list(conversation.send(OTHER))
    ids = conversation._begun["input_ids"]
    assert ids[: len(begun["input_ids"])] == begun["input_ids"]
    assert "needs a gateway" in fails(2, "chat", "--session", "s", "--service", "sampler")


def test_adapters_are_added_listed_and_removed(way: Way, adapters: list[Path]) -> None:
    """From a directory of this machine."""
    name = f"of-{way.options[0][2:]}"
    assert way.json("adapters", "add", name, str(adapters[0])) == {"adapter": f"{name}@1"}
    assert way.text("adapters", "add", name, str(adapters[1])).strip() == f"{name}@2"
    assert way.json("adapters", "list")["adapters"][name] == {"newest": f"{name}@2", "versions": [f"{name}@2"]}
    assert f"{name}@2" in way.text("adapters", "list")
    sampled = way.json("sample", PROMPT, "--adapter", name, "--max-tokens", "2")
    assert sampled["prompts"][0]["sequences"][0]["adapter"] == f"{name}@2"
    assert way.json("adapters", "rm", name) == {"removed": name}
    assert "AdapterError" in way.fails(1, "adapters", "rm", name)
    assert "no directory" in way.fails(1, "adapters", "add", name, "/no/such/place")


def test_an_option_counts_before_the_environment(by_handle: None, url: str) -> None:
    """A URL for all commands, and one command for an application on a cluster."""
    environment = {"TWINKLE_SERVE_URL": "http://127.0.0.1:1"}
    assert "engines ready" in succeeds("status", "--service", "sampler", **environment)
    assert "engines ready" in succeeds("status", "--url", url, **environment)
    assert "two services" in fails(2, "status", "--service", "sampler", "--url", url, **environment)


def test_weights_become_current(way: Way) -> None:
    """By handle and by URL; errors are of the same types."""
    label = f"pushed{way.options[0]}"
    found = way.json("weights", "push", str(hub.DEMO), "--version", label)
    assert found["weights"] == way.gateway.sampler.status()["weights"] == label
    assert found["bytes"] == (hub.DEMO / "model.safetensors").stat().st_size
    assert "WeightsError" in way.fails(1, "weights", "push", str(hub.DEMO), "--version", label)
    assert "current on all engines" in way.text("weights", "push", str(hub.DEMO), "--version", f"{label}-again")
    assert "of track main" in way.text(
        "weights", "push", str(hub.DEMO), "--version", f"{label}-main", "--track", "main"
    )
    assert "unknown track 'trial'" in way.fails(1, "weights", "push", str(hub.DEMO), "--track", "trial")
    kept = way.json("weights", "list")
    assert kept == {"versions": ["initial", f"{label}-main"], "tracks": {"main": f"{label}-main"}}
    assert way.json("weights", "use", "initial")["weights"] == way.gateway.sampler.status()["weights"] == "initial"
    assert "initial" in way.text("weights", "list")
    assert f"{label}-main is current on all engines" in way.text("weights", "use", f"{label}-main")
    assert "is no longer kept" in way.fails(1, "weights", "use", label)
    assert "safetensors" in way.fails(2, "weights", "push", "/no/such/place")


@pytest.mark.parametrize("action", ["drain", "undrain", "restart"])
def test_engines_of_a_service_are_needed_to_drain_them(way: Way, action: str) -> None:
    """An engine in this process is not replaceable, and the refusal is one line."""
    assert "UnsupportedError" in way.fails(1, "engines", action, "local")


def test_sessions_are_listed_and_exported(url: str, tmp_path: Path) -> None:
    """As training inputs, or as trees; to a file or to stdout."""
    succeeds("chat", "--session", "kept", "--max-tokens", "3", "--url", url, stdin=f"{PROMPT}\n{OTHER}\n")
    listed = json_of("sessions", "list", "--url", url)["sessions"]
    assert "kept" in {each["id"] for each in listed} and "kept" in succeeds("sessions", "list", "--url", url)
    (line,) = succeeds("sessions", "export", "kept", "--url", url).splitlines()
    feature = json.loads(line)
    assert len(feature["input_ids"]) == len(feature["labels"]) == len(feature["logprobs"])
    (tree,) = succeeds("sessions", "export", "kept", "--format", "tree", "--url", url).splitlines()
    assert len(json.loads(tree)["nodes"]) == 2
    out = tmp_path / "all.jsonl"
    written = json_of("sessions", "export", "--all", "--out", str(out), "--url", url)
    assert written == {"sessions": len(listed), "lines": len(out.read_text().splitlines()), "file": str(out)}
    assert "SessionNotFoundError" in fails(1, "sessions", "show", "unknown", "--url", url)


@pytest.mark.parametrize(
    "arguments", [("export",), ("export", "x", "--all"), ("export", "x", "--json"), ("export", "x", "--out", "/no/x")]
)
def test_exports_that_make_no_sense_are_wrong_usage(url: str, arguments: tuple[str, ...]) -> None:
    succeeds("chat", "--session", "x", "--max-tokens", "3", "--url", url, stdin=PROMPT)
    fails(2, "sessions", *arguments, "--url", url)


def test_verify_compares_with_a_second_engine(way: Way, url: str) -> None:
    """The service itself, another gateway, another application; its exit code says whether it passed."""
    options = ("-n", "2", "--max-tokens", "4", "--seed", "1")
    found = way.json("verify", PROMPT, *options, "--against", "self")
    assert found["passed"] and found["tokens"] == 8 and len(found["worst_tokens"]) == 5
    for other in (url, "another"):
        assert way.json("verify", *options, "--against", other)["max_abs_difference"] < 1e-3
    assert way.text("verify", PROMPT, *options, "--against", "self").startswith("passed")


def test_verify_fails_where_engines_disagree(way: Way) -> None:
    """The fake engine and PyTorch do; the differences are printed all the same."""
    result = run("verify", PROMPT, "--max-tokens", "4", "--model", "demo", *way.options)
    assert result.exit_code == 1 and result.stdout.startswith("failed") and result.stderr == ""


def test_top_has_history_events_and_calls(way: Way) -> None:
    found = way.json("top")
    assert found["period_s"] == 5.0 and isinstance(found["points"], list) and found["calls"] == []
    assert found["events"]
    assert "no running calls" in way.text("top")


def test_bench_measures_a_closed_loop(way: Way) -> None:
    """As many calls as were asked for, with all their tokens."""
    options = ("--calls", "6", "--concurrency", "2", "--prompts", "2", "--max-tokens", "5")
    found = way.json("bench", *options)
    assert (found["calls"], found["failed_calls"], found["samples"], found["tokens"]) == (6, 0, 12, 60)
    assert found["tokens_per_s"] == pytest.approx(60 / found["seconds"])
    assert 0 < found["latency_s"]["p50"] <= found["latency_s"]["p99"] <= found["latency_s"]["max"] <= found["seconds"]
    assert "tokens/s" in way.text("bench", PROMPT, *options)
    assert "SamplingParamsError" in way.fails(1, "bench", "--calls", "2", "--temperature", "1e30")


@pytest.mark.parametrize("command", ["status", "top"])
def test_a_live_view_outlives_a_service_that_does_not_answer(command: str) -> None:
    """It says so, and goes on."""
    from rich.console import Console

    from twinkle_serve.cli.commands import status, top
    from twinkle_serve.cli.output import Output

    target = Target(url="http://127.0.0.1:9")
    frames: dict[str, Callable[..., Any]] = {
        "status": status.frame,
        "top": functools.partial(top.frame, minutes=1.0),
    }
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(frames[command](options.Command(Output(), target), cli_client.open_client(target)))
    assert "no gateway answers at http://127.0.0.1:9" in console.export_text()
