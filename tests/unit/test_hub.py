"""Models from hubs: the libraries' own download code, in separate processes, against a hub on loopback."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.support.hub_server import HubServer
from twinkle_serve import hub
from twinkle_serve.errors import HubUnreachableError, IncompleteModelError, ModelNotFoundError

ANSWER_S = 60.0
"""How long a test waits for one call of resolve."""

SOON_S = 6.0
"""Within this, a hub that cannot be reached has to be given up."""

WEIGHTS = Random(0).randbytes(3 * 2**20)
FILES = {
    "config.json": b'{"model_type": "main"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
}


@dataclass(frozen=True)
class Outcome:
    """Outcome of one call of resolve."""

    path: Path | None
    error: str
    """Name of the exception's class; empty if there was none."""
    message: str
    warnings: list[str]
    seconds: float


class Client:
    """A process that resolves models, with its own environment, which the libraries read on import.

    All are forked from one process that has imported torch, which ModelScope's library imports: that takes seconds.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", __name__])
        self._here, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, environment), daemon=True)
        self.process.start()
        there.close()

    def ask(self, model_id: str, **arguments: Any) -> None:
        self._here.send((model_id, arguments))

    def answer(self) -> Outcome:
        assert self._here.poll(ANSWER_S), f"resolve took longer than {ANSWER_S} s"
        outcome: Outcome = self._here.recv()
        return outcome

    def resolve(self, model_id: str, **arguments: Any) -> Outcome:
        self.ask(model_id, **arguments)
        return self.answer()

    def whole(self, model_id: str, **arguments: Any) -> Path:
        """Directory returned by a call that must succeed."""
        outcome = self.resolve(model_id, **arguments)
        assert outcome.path is not None, f"{outcome.error}: {outcome.message}"
        return outcome.path

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self._here.close()


def _serve(calls: Connection, environment: dict[str, str]) -> None:
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "MODELSCOPE_")) or name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ.update(environment)
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    hub.logger.addHandler(handler)
    while True:
        try:
            model_id, arguments = calls.recv()
        except EOFError:
            return
        warnings.clear()
        started = time.monotonic()
        path, error, message = None, "", ""
        try:
            path = hub.resolve(model_id, **arguments)
        except Exception as caught:
            error, message = type(caught).__name__, str(caught)
        calls.send(Outcome(path, error, message, list(warnings), time.monotonic() - started))


@dataclass
class World:
    """A hub, a cache, and clients of one library that share both."""

    scheme: str
    """hf or ms."""
    server: HubServer
    cache: Path
    clients: list[Client] = field(default_factory=list)

    def client(self, endpoint: str | None = None, **environment: str) -> Client:
        made = Client(
            {
                "HF_ENDPOINT": endpoint or self.server.endpoint,
                "HF_HOME": str(self.cache / "hf"),
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "MODELSCOPE_ENDPOINT": endpoint or self.server.endpoint,
                "MODELSCOPE_CACHE": str(self.cache / "ms"),
                "MODELSCOPE_HOME": str(self.cache / "ms-home"),
                "MODELSCOPE_DOWNLOAD_INTRA_CLOUD": "false",
                **environment,
            }
        )
        self.clients.append(made)
        return made

    def id(self, name: str) -> str:
        return f"{self.scheme}://org/{name}"

    def serve(self, name: str, revision: str = "main", **changed: bytes | None) -> str:
        """Puts a model on the hub and returns its repository. Keywords replace files, by name without suffix."""
        folder = self.server.root / "org" / name / revision
        folder.mkdir(parents=True)
        for path, body in FILES.items():
            content = changed.get(path.split(".")[0], body)
            if content is not None:
                (folder / path).write_bytes(content)
        return f"org/{name}"


@pytest.fixture(scope="module", params=["hf", "ms"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One per library. Every test serves models under its own names."""
    made = World(request.param, HubServer(tmp_path_factory.mktemp("hub")), tmp_path_factory.mktemp("cache"))
    yield made
    for client in made.clients:
        client.kill()
    made.server.close()


@pytest.fixture(scope="module")
def online(world: World) -> Client:
    return world.client()


@pytest.fixture(scope="module")
def cut_off(world: World) -> Client:
    """A client of a hub at whose address nothing listens."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{port.getsockname()[1]}"
    return world.client(endpoint)


@pytest.fixture(scope="module")
def offline(world: World) -> Client:
    """A client with HF_HUB_OFFLINE set, although the hub would answer."""
    return world.client(HF_HUB_OFFLINE="1")


def content(folder: Path) -> dict[str, bytes]:
    return {path: (folder / path).read_bytes() for path in FILES if (folder / path).is_file()}


def lose(folder: Path, path: str) -> None:
    """Removes a file from a cached copy, as if its download had never begun."""
    target = (folder / path).resolve()
    (folder / path).unlink()
    target.unlink(missing_ok=True)


def test_model_is_downloaded_by_its_id(world: World, online: Client) -> None:
    """All its files, unchanged, each downloaded once."""
    repo = world.serve("plain")
    assert content(online.whole(world.id("plain"))) == FILES
    assert sorted(load.path for load in world.server.of(repo)) == sorted(FILES)


def test_revision_selects_its_files_when_named(world: World, online: Client) -> None:
    """A branch and a commit; the default is unaffected."""
    repo = world.serve("versioned")
    world.serve("versioned", "v2", config=b'{"model_type": "v2"}')
    assert content(online.whole(world.id("versioned"), revision="v2"))["config.json"] == b'{"model_type": "v2"}'
    assert content(online.whole(world.id("versioned"))) == FILES
    commit = world.server.commit(repo, "v2")
    assert content(online.whole(world.id("versioned"), revision=commit))["config.json"] == b'{"model_type": "v2"}'


def test_bare_id_is_resolved_by_modelscope(world: World, online: Client) -> None:
    """Each library has its own cache, so the path shows which one was used."""
    repo = world.serve("bare")
    path = online.whole(repo)
    assert path.is_relative_to(world.cache / "ms")
    assert online.whole(world.id("bare")).is_relative_to(world.cache / world.scheme)


def test_unknown_model_is_not_found(world: World, online: Client) -> None:
    """The hub answered, so the network is not the cause; the message names the model and the hub."""
    outcome = online.resolve(world.id("nowhere"))
    assert outcome.error == ModelNotFoundError.__name__
    assert f"{world.server.endpoint} has no model org/nowhere" in outcome.message


def test_unknown_revision_is_not_found(world: World, online: Client) -> None:
    """ModelScope answers with an empty list, which must not become an empty directory."""
    world.serve("unversioned")
    outcome = online.resolve(world.id("unversioned"), revision="v9")
    assert outcome.error == ModelNotFoundError.__name__
    assert f"{world.server.endpoint} has no revision 'v9' of org/unversioned" in outcome.message
    assert not list(world.cache.glob("**/snapshots/v9"))


def test_gated_model_is_refused_with_the_variable_to_set(world: World, online: Client) -> None:
    """Its file list is public, its files are not."""
    world.server.gated.add(world.serve("gated"))
    outcome = online.resolve(world.id("gated"))
    assert outcome.error == ModelNotFoundError.__name__
    assert f"{world.server.endpoint} refused" in outcome.message and "HTTP 403" in outcome.message
    assert {"hf": "HF_TOKEN", "ms": "MODELSCOPE_API_TOKEN"}[world.scheme] in outcome.message


def test_model_is_not_downloaded_again_when_cached(world: World, online: Client) -> None:
    """Neither in the same process nor in a new one; the hub is asked whether it has changed."""
    repo = world.serve("cached")
    path = online.whole(world.id("cached"))
    downloads, listings = world.server.of(repo), world.server.listings
    fresh = world.client()
    assert [client.whole(world.id("cached")) for client in (online, fresh)] == [path, path]
    fresh.kill()
    assert world.server.of(repo) == downloads
    assert world.server.listings > listings


def test_changed_model_is_downloaded_again(world: World, online: Client) -> None:
    """After a branch has moved, the next call returns the new files."""
    world.serve("moving")
    online.whole(world.id("moving"))
    shutil.rmtree(world.server.root / "org" / "moving")
    world.serve("moving", config=b'{"model_type": "moved"}')
    assert content(online.whole(world.id("moving")))["config.json"] == b'{"model_type": "moved"}'


def test_weights_are_not_downloaded_when_not_wanted(world: World, online: Client, offline: Client) -> None:
    """Offline, the copy is enough for a tokenizer but not for an engine; a later call adds the weights."""
    repo = world.serve("light")
    path = online.whole(world.id("light"), weights=False)
    assert sorted(content(path)) == ["config.json", "tokenizer.json"]
    assert offline.whole(world.id("light"), weights=False) == path
    outcome = offline.resolve(world.id("light"))
    assert outcome.error == IncompleteModelError.__name__
    assert "lacks 1 of 3 files: model.safetensors" in outcome.message
    assert content(online.whole(world.id("light"))) == FILES
    assert len(world.server.of(repo)) == 3


def test_tokenizer_of_a_downloaded_model_loads(world: World, online: Client) -> None:
    """The demo model, served by a hub."""
    from transformers import AutoTokenizer

    shutil.copytree(hub.DEMO, world.server.root / "org" / "demo" / "main")
    tokenizer = AutoTokenizer.from_pretrained(online.whole(world.id("demo"), weights=False))
    tokens = tokenizer("12+34=")["input_ids"]
    assert tokens and tokens == AutoTokenizer.from_pretrained(hub.DEMO)("12+34=")["input_ids"]


def test_cached_model_is_used_without_a_request_when_offline(world: World, online: Client, offline: Client) -> None:
    """Without a warning, since offline mode was requested."""
    world.serve("kept")
    path = online.whole(world.id("kept"))
    listings = world.server.listings
    outcome = offline.resolve(world.id("kept"))
    assert (outcome.path, outcome.warnings, world.server.listings) == (path, [], listings)


def test_model_outside_the_cache_is_unreachable_when_offline(world: World, offline: Client) -> None:
    """Also if only another revision is cached. The message names the variable that forbids downloads."""
    world.serve("unkept")
    listings = world.server.listings
    outcome = offline.resolve(world.id("unkept"))
    assert outcome.error == HubUnreachableError.__name__
    assert "HF_HUB_OFFLINE is set" in outcome.message and str(world.cache / world.scheme) in outcome.message
    assert world.server.listings == listings


def test_other_revision_is_not_used_when_offline(world: World, online: Client, offline: Client) -> None:
    """In both directions: the cached revision is not the requested one."""
    world.serve("exact")
    world.serve("exact", "v2")
    online.whole(world.id("exact"), revision="v2")
    assert offline.resolve(world.id("exact")).error == HubUnreachableError.__name__
    assert offline.resolve(world.id("exact"), revision="v3").error == HubUnreachableError.__name__
    assert offline.resolve(world.id("exact"), revision="v2").path is not None


def test_hub_is_unreachable_soon_when_nothing_listens(world: World, cut_off: Client) -> None:
    """The message names the endpoint and the cache."""
    cut_off.resolve(world.id("warm-up"))  # imports the libraries
    outcome = cut_off.resolve(world.id("far"))
    assert outcome.error == HubUnreachableError.__name__
    assert "http://127.0.0.1:" in outcome.message and str(world.cache / world.scheme) in outcome.message
    assert world.server.endpoint not in outcome.message
    assert outcome.seconds < SOON_S


def test_hub_is_unreachable_soon_when_it_never_answers(world: World) -> None:
    """A connection that is accepted and then stays silent is dropped after the library's own timeout variable."""
    client = world.client(HF_HUB_ETAG_TIMEOUT="1", MODELSCOPE_REPO_TREE_PAGE_TIMEOUT_SECONDS="1")
    client.resolve(world.id("warm-up"))  # imports the libraries
    repo = world.serve("mute")
    with world.server.silent(repo):
        outcome = client.resolve(world.id("mute"))
    assert (outcome.error, outcome.path) == (HubUnreachableError.__name__, None)
    assert outcome.seconds < SOON_S
    assert client.resolve(world.id("mute")).path is not None
    client.kill()


def test_cached_model_is_used_with_a_warning_when_nothing_listens(
    world: World, online: Client, cut_off: Client
) -> None:
    """The warning says that the copy may be older than the hub's."""
    world.serve("safe")
    path = online.whole(world.id("safe"))
    outcome = cut_off.resolve(world.id("safe"))
    assert outcome.path == path
    (warning,) = outcome.warnings
    assert "did not answer" in warning and str(path) in warning


@pytest.mark.parametrize("by", ["branch", "commit"])
def test_half_cached_model_is_incomplete_when_nothing_listens(
    world: World, online: Client, cut_off: Client, by: str
) -> None:
    """The message lists and counts the missing files; the next call with a network downloads only those."""
    repo = world.serve(f"half-{by}")
    revision = world.server.commit(repo) if by == "commit" else None
    path = online.whole(world.id(f"half-{by}"), revision=revision)
    lose(path, "tokenizer.json")
    outcome = cut_off.resolve(world.id(f"half-{by}"), revision=revision)
    assert outcome.error == IncompleteModelError.__name__
    assert "lacks 1 of 3 files: tokenizer.json" in outcome.message
    assert outcome.seconds < SOON_S
    assert content(online.whole(world.id(f"half-{by}"), revision=revision)) == FILES
    assert [load.path for load in world.server.of(repo)][len(FILES) :] == ["tokenizer.json"]


def test_download_resumes_when_its_connection_breaks(world: World, online: Client) -> None:
    """Within the call: the rest is requested with Range, and the file is complete."""
    weights = Random(1).randbytes(24 * 2**20)  # huggingface_hub writes in steps of 10 MiB
    repo, cut = world.serve("broken", model=weights), 16 * 2**20
    world.server.cut_once(repo, "model.safetensors", cut)
    assert content(online.whole(world.id("broken")))["model.safetensors"] == weights
    first, second = world.server.of(repo, "model.safetensors")
    assert (first.start, first.sent_bytes) == (0, cut)
    assert 0 < second.start <= cut
    assert second.start + second.sent_bytes == len(weights)


def test_model_is_incomplete_until_continued_when_its_download_was_killed(
    world: World, cut_off: Client, online: Client
) -> None:
    """Files left by the killed process are never used as a model; the next call with a network completes them."""
    repo, half = world.serve("killed"), len(WEIGHTS) // 2
    online.whole(world.id("killed"), weights=False)  # else it may die before any file is in the cache
    world.server.hold(repo, "model.safetensors", half)
    victim = world.client()
    victim.ask(world.id("killed"))
    assert world.server.held.wait(ANSWER_S)
    victim.kill()
    world.server.released.set()
    outcome = cut_off.resolve(world.id("killed"))
    assert outcome.error == IncompleteModelError.__name__
    assert "lacks 1 of 3 files: model.safetensors" in outcome.message
    assert content(online.whole(world.id("killed"))) == FILES


def test_download_that_was_not_confirmed_is_incomplete(world: World, cut_off: Client, online: Client) -> None:
    """All files exist with the right size, but unchecked: they may be from an earlier commit."""
    if world.scheme == "hf":
        pytest.skip("huggingface_hub keeps each commit in its own folder")
    world.serve("unchecked")
    online.whole(world.id("unchecked"))
    (kept,) = [path for path in world.cache.rglob(".twinkle_serve/*.json") if "unchecked" in path.name]
    listing = json.loads(kept.read_text())
    kept.write_text(json.dumps({**listing, "ended": []}))
    assert cut_off.resolve(world.id("unchecked")).error == IncompleteModelError.__name__
    online.whole(world.id("unchecked"))
    assert cut_off.resolve(world.id("unchecked")).path
    kept.write_text("{")  # an unreadable listing is ignored
    assert cut_off.resolve(world.id("unchecked")).path


def test_modelscope_continues_within_a_file_when_called_again(world: World, online: Client) -> None:
    """The interrupted call reports the file and the cause; the next one requests only the rest."""
    if world.scheme == "hf":
        pytest.skip("huggingface_hub drops a partial file when its call ends")
    repo, half = world.serve("continued"), len(WEIGHTS) // 2
    world.server.cut_once(repo, "model.safetensors", half)
    client = world.client(MODELSCOPE_DOWNLOAD_MAX_RETRIES="0")
    outcome = client.resolve(world.id("continued"))
    assert outcome.error == IncompleteModelError.__name__
    assert "lacks 1 of 3 files: model.safetensors" in outcome.message and "NetworkError" in outcome.message
    assert content(online.whole(world.id("continued"))) == FILES
    assert [(load.start, load.sent_bytes) for load in world.server.of(repo, "model.safetensors")] == [
        (0, half),
        (half, len(WEIGHTS) - half),
    ]
    client.kill()


def sharded(folder: Path, *shards: str, index: str = "model.safetensors.index.json") -> Path:
    """A model directory whose index lists three shards, some of which exist."""
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    (folder / "config.json").write_text("{}")
    (folder / index).write_text(json.dumps({"weight_map": {f"layer.{name}": name for name in names}}))
    for shard in shards:
        (folder / shard).write_bytes(b"")
    return folder


def test_directory_without_its_shards_is_incomplete(tmp_path: Path) -> None:
    """Every missing shard is listed; without weights they are not required."""
    sharded(tmp_path, "model-00001-of-00003.safetensors")
    with pytest.raises(IncompleteModelError, match="lacks 2 of the 3 files") as caught:
        hub.resolve(str(tmp_path))
    assert "model-00002-of-00003.safetensors, model-00003-of-00003.safetensors" in str(caught.value)
    assert hub.resolve(str(tmp_path), weights=False) == tmp_path


def test_directory_with_all_its_shards_is_used_unchanged(tmp_path: Path) -> None:
    """Pickled weights may be absent if there are safetensors."""
    sharded(tmp_path, *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)))
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"layer": "pytorch_model-00001.bin"}}')
    assert hub.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "model.safetensors.index.json").unlink()
    assert hub.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("text", ['{"weight_map": {"a": "m.safe', "[]", '{"metadata": {}}', '{"weight_map": []}'])
def test_directory_is_incomplete_when_its_index_cannot_be_read(tmp_path: Path, text: str) -> None:
    """A truncated copy, or a file with other content."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(IncompleteModelError, match=r"model\.safetensors\.index\.json does not name the model's shards"):
        hub.resolve(str(tmp_path))


def test_path_and_demo_have_no_revision(tmp_path: Path) -> None:
    """It would be ignored silently."""
    (tmp_path / "config.json").write_text("{}")
    for model_id in ("demo", str(tmp_path)):
        with pytest.raises(ModelNotFoundError, match="has no revision 'v2'"):
            hub.resolve(model_id, revision="v2")
        assert hub.resolve(model_id).is_dir()


def test_importing_the_hub_loads_no_library() -> None:
    """A service whose model is a path needs neither library."""
    loaded = "import sys, twinkle_serve.hub; print([m for m in ('huggingface_hub', 'modelscope') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True, timeout=ANSWER_S)
    assert done.stdout.strip() == "[]"
