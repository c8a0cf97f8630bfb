"""A hub on loopback with the endpoints that huggingface_hub 2.4 and modelscope 1.40 use, and ways to make it fail."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

DEFAULT_REVISIONS = ("main", "master")
"""Hugging Face's and ModelScope's name of the directory `main`."""

PATIENCE_S = 60.0
"""Maximum duration of a silent or held answer."""


@dataclass(frozen=True)
class Download:
    """One GET of a file."""

    repo: str
    path: str
    start: int
    """First byte sent; above 0 only if the client asked with Range."""
    sent_bytes: int


class HubServer:
    """Serves `root/org/name/revision/...` as both hubs do.

    Guarantees:
        - `downloads` holds every answered GET of a file, in the order in which they ended.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.downloads: list[Download] = []
        self.listings = 0
        """Number of requests about repositories, not files."""
        self.gated: set[str] = set()
        """Repositories whose files are refused."""
        self.held = threading.Event()
        """Set while a download is held."""
        self.released = threading.Event()
        """Set to let held and silent answers continue."""
        self._cuts: dict[str, int] = {}
        self._holds: dict[str, int] = {}
        self._silent: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def cut_once(self, repo: str, path: str, after_bytes: int) -> None:
        """Cuts the connection of the next GET of a file after that many bytes."""
        self._cuts[f"{repo}/{path}"] = after_bytes

    def hold(self, repo: str, path: str, after_bytes: int) -> None:
        """Pauses the next GET of a file after that many bytes, until `released`."""
        self.held.clear()
        self.released.clear()
        self._holds[f"{repo}/{path}"] = after_bytes

    @contextmanager
    def silent(self, repo: str) -> Iterator[None]:
        """Accepts requests about a repository and never answers them."""
        self.released.clear()
        self._silent.add(repo)
        try:
            yield
        finally:
            self._silent.discard(repo)
            self.released.set()

    def of(self, repo: str, path: str | None = None) -> list[Download]:
        """The downloads of a repository, or of one of its files."""
        return [load for load in self.downloads if load.repo == repo and path in (None, load.path)]

    def commit(self, repo: str, revision: str = "main") -> str | None:
        """Commit of a branch, which changes with its files; None if there is no such revision."""
        folder = self._folder(repo, revision)
        return None if folder is None else _commit(folder)

    def files(self, repo: str, revision: str) -> dict[str, bytes]:
        folder = self._folder(repo, revision)
        return {} if folder is None else _contents(folder)

    def _folder(self, repo: str, revision: str) -> Path | None:
        name = "main" if revision in DEFAULT_REVISIONS else revision
        if (self.root / repo / name).is_dir():
            return self.root / repo / name
        return next((folder for folder in (self.root / repo).iterdir() if _commit(folder) == revision), None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), {key: values[0] for key, values in parse_qs(url.query).items()}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._huggingface_api(found[1], found[2], found[3] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
            self._modelscope_files(found[1], query["Revision"])
        elif found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", path):
            self._file(found[1], query["Revision"], query["FilePath"])
        else:
            self._json(404, {"Code": 404, "Message": f"nothing at {path}"})

    def _repo(self, repo: str) -> bool:
        self.hub.listings += 1
        if repo in self.hub._silent:
            self.hub.released.wait(PATIENCE_S)
            self.close_connection = True
            return False
        if (self.hub.root / repo).is_dir():
            return True
        self._json(404, {"Code": 10010205001, "Message": "no such model"}, {"X-Error-Code": "RepoNotFound"})
        return False

    def _huggingface_api(self, repo: str, what: str | None, revision: str) -> None:
        if not self._repo(repo):
            return
        commit = self.hub.commit(repo, revision)
        if commit is None:
            self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif what == "tree":
            files = self.hub.files(repo, revision).items()
            self._json(200, [{"type": "file", "path": n, "size": len(b), "oid": _digest(b)[:40]} for n, b in files])
        else:
            self._json(200, {"id": repo, "sha": commit})

    def _modelscope_files(self, repo: str, revision: str) -> None:
        """Like the real hub, answers an empty list for an unknown revision, not an error."""
        if self._repo(repo):
            entries = [
                {"Path": name, "Name": Path(name).name, "Type": "blob", "Size": len(body), "Sha256": _digest(body)}
                for name, body in self.hub.files(repo, revision).items()
            ]
            self._json(200, {"Code": 200, "Success": True, "Data": {"Files": entries}})

    def _file(self, repo: str, revision: str, path: str) -> None:
        if repo in self.hub.gated:
            self._json(403, {"Message": "access denied"}, {"X-Error-Code": "GatedRepo"})
            return
        body = self.hub.files(repo, revision).get(path)
        if body is None:
            self._json(404, {"Message": "no such file"}, {"X-Error-Code": "EntryNotFound"})
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", f'"{_digest(body)}"')
        self.send_header("X-Repo-Commit", str(self.hub.commit(repo, revision)))
        self.end_headers()
        if self.command == "GET":
            self._send(repo, path, body, start)

    def _send(self, repo: str, path: str, body: bytes, start: int) -> None:
        key, end = f"{repo}/{path}", len(body)
        if key in self.hub._cuts:
            end = start + self.hub._cuts.pop(key)
            self.close_connection = True
        if key in self.hub._holds:
            pause = start + self.hub._holds.pop(key)
            self.wfile.write(body[start:pause])
            self.hub.held.set()
            self.hub.released.wait(PATIENCE_S)
            self.hub.downloads.append(Download(repo, path, start, pause - start))
            self.close_connection = True
            return
        self.hub.downloads.append(Download(repo, path, start, end - start))
        self.wfile.write(body[start:end])

    def _json(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _commit(folder: Path) -> str:
    contents = {name: _digest(body) for name, body in _contents(folder).items()}
    return hashlib.sha1(f"{folder} {contents}".encode()).hexdigest()


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
