"""Keys of HTTP callers: who may do what, and where no key is needed."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from graphs import gateway as graph
from graphs.config_file import check_config_file
from tests.support.gateway_app import GatewayUnderTest, gateway_app
from twinkle_serve.errors import ConfigError
from twinkle_serve.gateway.config import GatewayArgs, is_loopback
from twinkle_serve.gateway.keys import VARIABLE, Caller, Keys

TRAINER, EVAL = "trainer-0123456789", "eval-0123456789ab"
BODY = {"inputs": {"input_ids": [1, 2]}, "sampling_params": {"max_tokens": 2}}
CONFIG = """
http_options: {{host: {host}}}
applications:
  - name: gateway
    route_prefix: /
    import_path: graphs.gateway:build
    args: {args}
"""


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayUnderTest]:
    with gateway_app(keys={TRAINER: Caller("trainer", "admin"), EVAL: Caller("eval", "sample")}) as made:
        yield made


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": f"Bearer {EVAL}"}, 200),
        ({"authorization": f"bearer  {EVAL} "}, 200),
        ({"x-api-key": EVAL}, 200),
        ({"authorization": "Basic dTpw", "x-api-key": EVAL}, 200),
        ({"authorization": "Bearer ", "x-api-key": EVAL}, 200),
        ({"authorization": "Bearer unknown", "x-api-key": EVAL}, 401),
        ({"authorization": EVAL}, 401),
        ({"x-api-key": EVAL[:-1]}, 401),
        ({"x-api-key": EVAL + "x"}, 401),
        ({"x-api-key": "\u00e9" * 16}, 401),
    ],
)
async def test_a_request_needs_a_known_key(gateway: GatewayUnderTest, headers: dict[str, str], status: int) -> None:
    """In either header; 401 says how to send it."""
    async with gateway.http() as http:
        sent = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        answer = await http.post("/sample", json=BODY, headers=sent)
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "UnauthorizedError"


async def test_every_path_but_those_of_load_balancers_and_the_console_needs_a_key(gateway: GatewayUnderTest) -> None:
    """Those that do not exist, and the document, too."""
    async with gateway.http() as http:
        closed = ("/status", "/v1/models", "/docs", "/openapi.json", "/nowhere", "/console/nowhere", "/healthz/")
        for path in closed:
            assert (await http.get(path)).status_code == 401, path
        for path in ("/healthz", "/readyz", "/", "/console/app.js"):
            assert (await http.get(path)).status_code == 200, path


async def test_a_key_for_sampling_changes_nothing(gateway: GatewayUnderTest) -> None:
    """Adapters, weights and pauses need scope admin."""
    form = {"config": b"{}", "weights": b""}
    async with gateway.http(authorization=f"Bearer {EVAL}") as http:
        assert (await http.get("/adapters")).status_code == 200
        refused = [
            await http.put("/adapters/a", files=form),
            await http.delete("/adapters/a"),
            await http.put("/weights/a", content=b""),
            await http.post("/weights/a/use"),
            await http.post("/pause", json={}),
            await http.post("/resume", json={"pause": 0}),
        ]
    assert [answer.status_code for answer in refused] == [403] * 6
    assert "needs admin" in refused[0].json()["error"]["message"]
    async with gateway.http(authorization=f"Bearer {TRAINER}") as http:
        pause = (await http.post("/pause", json={})).json()["pause"]
        assert (await http.post("/resume", json={"pause": pause})).status_code == 200
        assert (await http.put("/adapters/a", files=form)).status_code == 400


async def test_the_names_of_keys_take_turns_in_the_queue(gateway: GatewayUnderTest) -> None:
    """A request's caller is the name of its key."""
    for key, name in ((TRAINER, "trainer"), (EVAL, "eval")):
        async with gateway.http(authorization=f"Bearer {key}") as http:
            assert (await http.post("/sample", json=BODY)).status_code == 200
        assert gateway.client.requests[-1].caller == name


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("/v1/completions", {"message", "type", "param", "code"}),
        ("/v1/messages", {"message", "type"}),
        ("/sample", {"message", "type"}),
    ],
)
async def test_a_refusal_has_the_form_of_its_protocol(gateway: GatewayUnderTest, path: str, form: set[str]) -> None:
    async with gateway.http() as http:
        assert set((await http.post(path, json={})).json()["error"]) == form


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ("trainer:admin:short", "has 5 characters, and needs at least 16"),
        (f"trainer:root:{TRAINER}", "with a scope of sample or admin"),
        (TRAINER, "must be name:scope:key"),
        (f"a:sample:{EVAL},b:sample:{EVAL}", "is there twice"),
        ("a:sample:" + "é" * 16, "ASCII"),
        (f"a b:sample:{EVAL}", "must be name:scope:key"),
    ],
)
def test_an_invalid_key_is_refused_and_not_shown(entries: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        Keys.read(None, {VARIABLE: entries})
    assert "0123456789" not in str(caught.value)


def test_keys_come_from_a_file_with_comments(tmp_path: Path) -> None:
    """Digests of them alone travel and are kept."""
    file = tmp_path / "keys"
    file.write_text(f"# keys\n\ntrainer:admin:{TRAINER}\neval:sample:{EVAL}\n")
    keys = Keys.read(str(file))
    assert keys.caller({"x-api-key": TRAINER}) == Caller("trainer", "admin")
    assert TRAINER.encode() not in pickle.dumps(keys)
    file.write_text("# none\n")
    for bad in (file, tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="keys_file="):
            Keys.read(str(bad))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("::ffff:10.0.0.1", False),
    ],
)
def test_hosts_of_this_machine_alone_are_known(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


def test_a_config_beyond_this_machine_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher refuses it before anything starts."""
    monkeypatch.delenv(VARIABLE, raising=False)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(host="0.0.0.0", args="{}"))
    with pytest.raises(ConfigError, match=r"http_options.host=0.0.0.0 listens beyond this machine"):
        check_config_file(path)
    monkeypatch.setenv(VARIABLE, f"trainer:admin:{TRAINER}")
    assert check_config_file(path).gateways == {"gateway": GatewayArgs()}
    monkeypatch.delenv(VARIABLE)
    path.write_text(CONFIG.format(host="127.0.0.1", args="{}"))
    assert check_config_file(path)
    path.write_text(CONFIG.format(host="127.0.0.1", args='{listen: "0.0.0.0:8001"}'))
    with pytest.raises(ConfigError, match=r"listen=0.0.0.0 listens beyond this machine"):
        check_config_file(path)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("{limit: {}}", "unknown key 'limit', did you mean 'limits'"),
        ("{limits: {prompt: 1}}", "unknown key in limits 'prompt', did you mean 'prompts'"),
        ("{num_replicas: 0}", "num_replicas"),
        ("{samplers: {}}", "samplers is empty"),
        ("{samplers: {a@1: sampler}}", "invalid name 'a@1'"),
        ("{listen: '8000'}", "'8000' is not host:port, as in 127.0.0.1:8000"),
        ("{listen: 'localhost:99999'}", "listen.port"),
        ("{keys_file: /nowhere/keys}", "keys_file=/nowhere/keys cannot be read"),
    ],
)
def test_a_mistake_in_the_gateways_config_is_reported(tmp_path: Path, args: str, words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(host="127.0.0.1", args=args))
    with pytest.raises(ConfigError, match=words):
        check_config_file(path)


def test_the_graph_refuses_to_listen_beyond_this_machine_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is deployed: `serve run` and `serve.run` do not pass the launcher."""
    monkeypatch.delenv(VARIABLE, raising=False)
    client = Mock(http_config=Mock(host="0.0.0.0"))
    monkeypatch.setattr(graph, "_get_global_client", lambda **_: client)
    with pytest.raises(ConfigError, match="listens beyond this machine"):
        graph.build(GatewayArgs())
    monkeypatch.setenv(VARIABLE, f"trainer:admin:{TRAINER}")
    assert graph.build(GatewayArgs())
    monkeypatch.delenv(VARIABLE)
    client.http_config.host = "127.0.0.1"
    assert graph.build(GatewayArgs())
    with pytest.raises(ConfigError, match=r"listen=:: listens beyond this machine"):
        graph.build(GatewayArgs.model_validate({"listen": "[::]:8001"}))
