"""Models from hubs: the libraries' own download code, in separate processes, against a hub on loopback."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.support.hub_clients import ANSWER_S, FILES, WEIGHTS, Client, World
from tests.support.hub_server import HubServer
from twinkle_serve import hub
from twinkle_serve.errors import HubUnreachableError, IncompleteModelError, ModelNotFoundError

SOON_S = 20.0
"""Within this, a hub that cannot be reached has to be given up."""


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


def test_hub_is_not_asked_when_nothing_may_be_downloaded(world: World, online: Client) -> None:
    """A model in the cache is found; another one is not, and the message does not blame the environment."""
    world.serve("found")
    path = online.whole(world.id("found"))
    world.serve("lost")
    listings = world.server.listings
    outcome = online.resolve(world.id("found"), download=False)
    assert (outcome.path, outcome.warnings) == (path, [])
    outcome = online.resolve(world.id("lost"), download=False)
    assert outcome.error == HubUnreachableError.__name__ and "it must not be downloaded" in outcome.message
    assert world.server.listings == listings


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


def test_importing_the_hub_loads_no_library() -> None:
    """A service whose model is a path needs neither library."""
    loaded = "import sys, twinkle_serve.hub; print([m for m in ('huggingface_hub', 'modelscope') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True, timeout=ANSWER_S)
    assert done.stdout.strip() == "[]"
