"""A service behind the URL of its gateway."""

from __future__ import annotations

import json
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from twinkle_serve import timing
from twinkle_serve.cli.client import Client, Sampling, Target
from twinkle_serve.cli.exits import CommandError
from twinkle_serve.cli.http import Gateway, named_error
from twinkle_serve.errors import ServiceError

if TYPE_CHECKING:
    from twinkle_serve.data_format import SampleResponse
    from twinkle_serve.data_format.status import SamplerStatus
    from twinkle_serve.data_format.telemetry import CallInfo, TelemetryReport
    from twinkle_serve.data_format.weights import PauseMode

LINES = "application/x-ndjson"
TENSORS = "application/octet-stream"
EVENTS = "text/event-stream"
UNBOUNDED_S = 24 * 3600.0
"""Timeout of a call whose deadline is the service's own."""
ANSWER_S = timing.ANSWER_TIMEOUT_S


class GatewayClient(Client):
    """Calls the native routes of a gateway, and OpenAI's for conversations."""

    def __init__(self, target: Target) -> None:
        """
        Args:
            target: with the URL, the key and the sampler.
        """
        self._http = Gateway(target.gateway_url, target.key)
        self._sampler = target.sampler

    def status(self) -> SamplerStatus:
        return cast("SamplerStatus", self._get("/status"))

    def telemetry(self, since: float = 0.0) -> TelemetryReport:
        return cast("TelemetryReport", self._get("/telemetry", since=f"{since:.3f}"))

    def calls(self) -> list[CallInfo]:
        return cast("list[CallInfo]", self._get("/calls")["calls"])

    def sample_prompts(self, inputs: Sequence[Mapping[str, Any]], sampling: Sampling) -> Iterator[dict[str, Any]]:
        lines = self._http.lines("/sample", self._sample_body(inputs, sampling), accept=LINES, timeout_s=_s(sampling))
        for line in lines:
            item = json.loads(line)
            if "done" in item:
                return
            if "error" in item:
                raise named_error(item["error"].get("type", ""), item["error"]["message"])
            yield item["prompt"]
        raise ServiceError(f"the gateway at {self._http.url} broke off its answer. Send the request again.")

    def sample(self, inputs: Sequence[Mapping[str, Any]], sampling: Sampling) -> SampleResponse:
        from twinkle_serve.gateway.native import read_samples

        body = self._sample_body(inputs, sampling)
        data = self._http.read("POST", "/sample", body, accept=TENSORS, timeout_s=_s(sampling))
        return read_samples(data, cast(Any, list(inputs)))

    def score(
        self,
        inputs: Any,
        adapter_name: str = "",
        adapter_path: str | None = None,
        *,
        top_logprobs: int = 0,
        use_base_model: bool = False,
        track: str = "",
    ) -> SampleResponse:
        from twinkle_serve.gateway.native import read_samples

        if adapter_path is not None:
            raise CommandError("a gateway takes adapters by name, not by path. Add it with `adapters add`.")
        body = {
            "inputs": [_plain(each) for each in inputs],
            "top_logprobs": top_logprobs,
            "adapter_name": adapter_name,
            "use_base_model": use_base_model,
            "track": track,
        }
        data = self._http.read("POST", "/score", self._body(body), accept=TENSORS, timeout_s=UNBOUNDED_S)
        return read_samples(data, inputs)

    def decode(self, token_ids: list[list[int]]) -> list[str]:
        answer = self._post("/decode", {"token_ids": token_ids})
        return cast("list[str]", answer["text"])

    def conversation(self, sampling: Sampling, session: str | None, system: str | None) -> GatewayConversation:
        model = sampling.adapter or self._sampler
        if sampling.adapter and self._sampler:
            model = f"{self._sampler}/{sampling.adapter}"
        return GatewayConversation(self._http, model, sampling, session or f"chat-{uuid.uuid4().hex[:12]}", system)

    def add_adapter(self, name: str, directory: Path) -> str:
        from twinkle_serve.adapters import read_adapter

        files = read_adapter(directory)
        boundary = uuid.uuid4().hex
        parts = (("config", files.config), ("weights", files.weights))
        data = b"".join(_form_part(boundary, part, content) for part, content in parts) + f"--{boundary}--\r\n".encode()
        path = f"/adapters/{urllib.parse.quote(name, safe='')}{self._query()}"
        kind = f"multipart/form-data; boundary={boundary}"
        answer = self._http.send("PUT", path, data, kind, size=len(data), timeout_s=timing.CONTROL_TIMEOUT_S)
        return str(answer["adapter"])

    def remove_adapter(self, name: str) -> None:
        path = f"/adapters/{urllib.parse.quote(name, safe='')}{self._query()}"
        self._http.json("DELETE", path, timeout_s=timing.CONTROL_TIMEOUT_S)

    def push_weights(
        self, directory: Path, version: str, mode: PauseMode, track: str, timeout_s: float, sent: Callable[[int], None]
    ) -> str:
        from twinkle_serve.checkpoint import weight_files
        from twinkle_serve.weights_file import joined_files

        size, pieces = joined_files(weight_files(directory))

        def reported() -> Iterator[bytes]:
            for piece in pieces:
                yield piece
                sent(len(piece))

        path = self._weights_path(version, "", mode, track, timeout_s)
        limit_s = 3 * timeout_s + 2 * timing.CONTROL_TIMEOUT_S
        answer = self._http.send("PUT", path, reported(), TENSORS, size=size, timeout_s=limit_s)
        return str(answer["weights"])

    def use_weights(self, version: str, mode: PauseMode, track: str, timeout_s: float) -> str:
        path = self._weights_path(version, "/use", mode, track, timeout_s)
        limit_s = 3 * timeout_s + 2 * timing.CONTROL_TIMEOUT_S
        return str(self._http.json("POST", path, timeout_s=limit_s)["weights"])

    def _weights_path(self, version: str, suffix: str, mode: PauseMode, track: str, timeout_s: float) -> str:
        query = self._query(mode=mode, timeout_s=f"{timeout_s:g}", **({"track": track} if track else {}))
        return f"/weights/{urllib.parse.quote(version, safe='')}{suffix}{query}"

    def drain_engine(self, name: str, timeout_s: float) -> None:
        self._engine("drain", name, timeout_s, timeout_s)

    def undrain_engine(self, name: str) -> None:
        self._engine("undrain", name, None, 0.0)

    def restart_engine(self, name: str, timeout_s: float) -> None:
        self._engine("restart", name, timeout_s, timeout_s + timing.CONTROL_TIMEOUT_S)

    def sessions(self) -> list[dict[str, Any]]:
        every = self._http.json("GET", "/sessions", timeout_s=ANSWER_S)["sessions"]
        return [each for each in every if self._sampler in (None, each["sampler"])]

    def trajectory(self, session: str) -> dict[str, Any]:
        path = f"/session/{urllib.parse.quote(session, safe='')}/trajectory"
        return cast("dict[str, Any]", self._get(path))

    def features(self, session: str, *, shared_tokens_once: bool) -> list[dict[str, Any]]:
        path = f"/session/{urllib.parse.quote(session, safe='')}/trajectory"
        once = str(shared_tokens_once).lower()
        return cast("list[dict[str, Any]]", self._get(path, format="features", shared_tokens_once=once)["features"])

    def _sample_body(self, inputs: Sequence[Mapping[str, Any]], sampling: Sampling) -> dict[str, Any]:
        body = {
            "inputs": [_plain(each) for each in inputs],
            "sampling_params": dict(sampling.params),
            "num_samples": sampling.num_samples,
            "adapter_name": sampling.adapter,
            "timeout_s": sampling.timeout_s,
        }
        return self._body(body)

    def _engine(self, action: str, name: str, timeout_s: float | None, limit_s: float) -> None:
        body = {"engine": name} if timeout_s is None else {"engine": name, "timeout_s": timeout_s}
        self._http.json("POST", f"/engines/{action}", self._body(body), timeout_s=limit_s + 2 * ANSWER_S)

    def _get(self, path: str, **query: str) -> Any:
        return self._http.json("GET", path + self._query(**query), timeout_s=ANSWER_S)

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._http.json("POST", path, self._body(body), timeout_s=ANSWER_S)

    def _body(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return dict(body) if self._sampler is None else {**body, "sampler": self._sampler}

    def _query(self, **query: str) -> str:
        pairs = query if self._sampler is None else {**query, "sampler": self._sampler}
        return f"?{urllib.parse.urlencode(pairs)}" if pairs else ""


class GatewayConversation:
    """A session of a gateway, by OpenAI's protocol."""

    def __init__(self, http: Gateway, model: str | None, sampling: Sampling, session: str, system: str | None) -> None:
        """
        Args:
            model: sampler or adapter; None: the gateway's first sampler.
        """
        self._http, self._model, self._sampling = http, model, sampling
        self._session = session
        self._messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]

    @property
    def session(self) -> str | None:
        return self._session

    def send(self, text: str) -> Iterator[str]:
        messages = [*self._messages, {"role": "user", "content": text}]
        body = {**self._sampling.params, "messages": messages, "stream": True}
        if self._model is not None:
            body["model"] = self._model
        path = f"/session/{urllib.parse.quote(self._session, safe='')}/v1/chat/completions"
        reply: dict[str, Any] = {"role": "assistant", "content": ""}
        for event in _events(self._http.lines(path, body, accept=EVENTS, timeout_s=_s(self._sampling))):
            for choice in event["choices"]:
                delta = choice["delta"]
                for name in ("reasoning_content", "content"):
                    if delta.get(name):
                        reply[name] = reply.get(name, "") + delta[name]
                        yield delta[name]
        self._messages = [*messages, reply]


def _events(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """Yields the events of a stream of OpenAI's protocol. Raises the error that it ends with."""
    for line in lines:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise named_error("", event["error"]["message"])
        yield event
    raise ServiceError("the gateway broke off its answer. Send the message again.")


def _s(sampling: Sampling) -> float:
    """Returns how long to wait for an answer: the gateway enforces the deadline."""
    return UNBOUNDED_S if sampling.timeout_s is None else sampling.timeout_s + timing.ROUTER_GRACE_S


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an input as JSON can hold it."""
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in given.items()}


def _form_part(boundary: str, name: str, content: bytes) -> bytes:
    """Returns a file of a form."""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n"
