"""Resolves model ids to directories: `demo`, a path, `ms://org/name`, `hf://org/name`; a bare id is ModelScope's.

Downloads go to the library's cache (MODELSCOPE_CACHE; HF_HOME or HF_HUB_CACHE), from the library's endpoint
(MODELSCOPE_ENDPOINT; HF_ENDPOINT). HF_HUB_OFFLINE=1 restricts both hubs to their caches: modelscope has no such switch.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from twinkle_serve.errors import HubUnreachableError, IncompleteModelError, ModelNotFoundError
from twinkle_serve.extras import require_extra

if TYPE_CHECKING:
    import httpx2

logger = logging.getLogger(__name__)

DEMO = Path(__file__).parent / "demo"
"""The embedded demo model: sums and differences, trained by examples/train_demo_model.py."""

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Index files that list the shards of a model, in the order in which loaders prefer them."""

MODELSCOPE_LIMITS = {"MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "2", "MODELSCOPE_API_CONNECT_TIMEOUT": "5"}
"""Instead of modelscope's 4 attempts of 10 s: a service without a network waits for them before it uses the cache."""

MODELSCOPE_DEFAULT = "master"
"""Always passed: without a revision, modelscope offline takes the only one in the cache, whichever it is."""

SHOWN_FILES = 5
"""Number of missing files that a message lists; it counts the rest."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A model requested from a hub."""

    hub: str
    """ms or hf."""
    name: str
    """org/name."""
    revision: str | None
    weights: bool

    def __str__(self) -> str:
        return f"{self.hub}://{self.name}" + (f" at revision {self.revision!r}" if self.revision else "")

    @property
    def ignored(self) -> list[str] | None:
        """Patterns of files that are not downloaded."""
        return None if self.weights else list(WEIGHTS)

    def includes(self, path: str) -> bool:
        return not any(fnmatch(path, pattern) for pattern in self.ignored or ())


def resolve(model_id: str, *, revision: str | None = None, weights: bool = True, download: bool = True) -> Path:
    """Returns the local directory of a model; downloads it first if it is on a hub.

    Guarantees:
        - An interrupted download is never returned as complete; calling again continues it (modelscope: within files).
        - A warning is logged if the hub did not answer and the cached copy is used.

    Does not guarantee:
        - That a ModelScope cache which was edited by hand, or left half-filled by another tool, is complete beyond its
          config.json and the shards that its index lists.

    Args:
        model_id: `demo`, a path, `ms://org/name` or `hf://org/name`; `org/name` alone is ModelScope's.
        revision: branch, tag or commit on the hub; None: the hub's default.
        weights: False downloads everything but the weights, which is enough for a tokenizer.
        download: False takes a model of a hub from the cache only.

    Raises:
        ModelNotFoundError: no such directory, no model in it, or the hub has no such model or revision or denies this
            user access.
        HubUnreachableError: the hub did not answer, or was not to be asked, and the cache has no copy.
        IncompleteModelError: the directory, or the cache if the hub did not answer, lacks files.
    """
    if revision is not None and (model_id == "demo" or is_path(model_id)):
        raise ModelNotFoundError(
            f"model_id {model_id!r} is not on a hub, so it has no revision {revision!r}. "
            "Remove revision, or use ms://org/name or hf://org/name."
        )
    if model_id == "demo":
        return DEMO
    hub, _, name = model_id.rpartition("://")
    if is_path(model_id):
        return _directory(Path(name).expanduser(), model_id, weights)
    if hub not in ("", "ms", "hf"):
        raise ModelNotFoundError(
            f"model_id {model_id!r}: unknown hub {hub!r}. Use ms://org/name, hf://org/name or a path."
        )
    if name.count("/") != 1 or not all(name.split("/")):
        raise ModelNotFoundError(
            f"model_id {model_id!r} is neither a directory here nor an id of the form org/name. "
            "Use demo, a path, ms://org/name or hf://org/name."
        )
    return _directory(_download(_Wanted(hub or "ms", name, revision, weights), download), model_id, weights)


def is_path(model_id: str) -> bool:
    """Whether an id is a path: it is spelt as one, or a directory of that name exists."""
    if model_id == "demo" or "://" in model_id:
        return False
    return model_id.startswith(("/", "./", "../", "~")) or Path(model_id).exists()


def _directory(path: Path, model_id: str, weights: bool) -> Path:
    if not path.is_dir():
        raise ModelNotFoundError(f"model_id {model_id!r}: no directory at {path}. Check the path.")
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(f"model_id {model_id!r}: {path} has no config.json, so it is not a model's directory.")
    index = next((path / name for name in INDICES if (path / name).is_file()), None)
    if weights and index is not None and (index.name == INDICES[0] or not any(path.glob("*.safetensors"))):
        shards = _shards(index, model_id)
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise IncompleteModelError(
                f"model_id {model_id!r}: {path} lacks {len(missing)} of the {len(shards)} files that {index.name} "
                f"names: {_listed(missing)}. Copy them there, or remove {index.name} if they are not wanted."
            )
    return path


def _shards(index: Path, model_id: str) -> list[str]:
    try:
        return sorted({str(shard) for shard in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IncompleteModelError(
            f"model_id {model_id!r}: {index} does not name the model's shards in a weight_map "
            f"({type(error).__name__}: {error}). Copy or download that file again."
        ) from error


def _download(wanted: _Wanted, download: bool) -> Path:
    """Downloads from the hub; takes the cache if the hub does not answer or must not be asked."""
    modules = ("huggingface_hub", "modelscope") if wanted.hub == "ms" else ("huggingface_hub",)
    require_extra("a download from a hub", "server", *modules)
    from huggingface_hub import is_offline_mode

    online, cached = {"hf": (_huggingface, _huggingface_cached), "ms": (_modelscope, _modelscope_cached)}[wanted.hub]
    if not download or is_offline_mode():
        return cached(wanted, "HF_HUB_OFFLINE is set" if download else "it must not be downloaded")
    try:
        return online(wanted)
    except HubUnreachableError as error:
        path = cached(wanted, str(error))
        logger.warning("%s: %s. Using the copy in the cache, which may be older: %s", wanted, error, path)
        return path


def _huggingface(wanted: _Wanted) -> Path:
    import httpx2
    from huggingface_hub import HfApi, errors, snapshot_download

    _set_huggingface_timeouts()
    try:
        # Called first: if this fails, snapshot_download silently uses the cache, and with a commit as revision it does
        # not call it at all but retries each missing file for half a minute.
        HfApi().model_info(wanted.name, revision=wanted.revision)
        return Path(snapshot_download(wanted.name, revision=wanted.revision, ignore_patterns=wanted.ignored))
    except (errors.HFValidationError, errors.FileMetadataError, errors.LocalEntryNotFoundError) as error:
        raise _huggingface_error(error, wanted) from error
    except (httpx2.HTTPError, json.JSONDecodeError, ConnectionError, TimeoutError) as error:
        raise _huggingface_error(error, wanted) from error


def _huggingface_cached(wanted: _Wanted, why: str) -> Path:
    from huggingface_hub import constants, errors, get_cached_repo_tree, snapshot_download

    name, revision, ignored = wanted.name, wanted.revision, wanted.ignored
    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=ignored, local_files_only=True))
    except errors.IncompleteSnapshotError as error:
        folder = Path(error.snapshot_path)
        files = [file.path for file in get_cached_repo_tree(name, revision=revision) if wanted.includes(file.path)]
        missing = [path for path in files if not (folder / path).is_file()]
        raise _incomplete(wanted, why, folder, missing, len(files)) from error
    except errors.LocalEntryNotFoundError as error:
        raise _not_cached(wanted, why, Path(constants.HF_HUB_CACHE), "HF_HOME") from error


def _huggingface_error(error: Exception, wanted: _Wanted) -> ModelNotFoundError:
    """Translates huggingface_hub's exceptions. The message of a HubUnreachableError is only the reason."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    endpoint = constants.ENDPOINT
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.HFValidationError):
        return ModelNotFoundError(f"{wanted} is not a name that {endpoint} can have: {error}")
    if isinstance(error, errors.RevisionNotFoundError):
        return _no_revision(wanted, endpoint)
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        return _no_model(wanted, endpoint, "HF_TOKEN")
    if status in (401, 403):
        return _refused(wanted, endpoint, status, "HF_TOKEN")
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return ModelNotFoundError(f"{wanted}: {endpoint} answered {status}: {_first_line(error)}")
    return HubUnreachableError(f"{endpoint} did not answer ({type(error).__name__}: {_first_line(error)})")


def _set_huggingface_timeouts() -> None:
    """Gives every request of huggingface_hub a deadline.

    Workaround for huggingface_hub 2.4: it requests `model_info` and file lists with timeout=None, so a hub that accepts
    the connection and stays silent blocks forever. Remove when HF_HUB_ETAG_TIMEOUT applies to them too.
    """
    from huggingface_hub import get_session

    hooks = get_session().event_hooks["request"]
    if _set_timeouts not in hooks:
        hooks.append(_set_timeouts)


def _set_timeouts(request: httpx2.Request) -> None:
    from huggingface_hub import constants

    timeouts = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {
        phase: constants.HF_HUB_ETAG_TIMEOUT if timeouts.get(phase) is None else timeouts[phase]
        for phase in ("connect", "read", "write", "pool")
    }


def _modelscope(wanted: _Wanted) -> Path:
    for name, value in MODELSCOPE_LIMITS.items():
        os.environ.setdefault(name, value)  # modelscope reads them when it is imported
    import requests
    from modelscope import snapshot_download
    from modelscope_hub import HubApi
    from modelscope_hub.errors import HubError

    revision, ignored = wanted.revision or MODELSCOPE_DEFAULT, wanted.ignored
    try:
        endpoint = HubApi().resolve_endpoint_for_read(wanted.name)
        files = HubApi(endpoint=endpoint).list_repo_files(wanted.name, "model", revision=revision)
        if not files:
            # For an unknown revision the hub answers an empty list, and modelscope would create an empty directory.
            raise _no_revision(wanted, endpoint)
        listing = _Listing({file.path: file.size for file in files if file.type != "tree"})
        if (before := _read_listing(wanted)) is not None and before.sizes_bytes == listing.sizes_bytes:
            listing = before
        _write_listing(wanted, listing)
        folder = Path(snapshot_download(wanted.name, revision=revision, ignore_patterns=ignored, endpoint=endpoint))
        _write_listing(wanted, replace(listing, ended=(*listing.ended, "weights" if wanted.weights else "rest")))
        return folder
    except (HubError, requests.RequestException) as error:
        raise _modelscope_error(error, wanted) from error


def _modelscope_cached(wanted: _Wanted, why: str) -> Path:
    from modelscope import snapshot_download
    from modelscope_hub.config import get_default_config
    from modelscope_hub.errors import CacheNotFound

    revision = wanted.revision or MODELSCOPE_DEFAULT
    try:
        folder = Path(snapshot_download(wanted.name, revision=revision, local_files_only=True))
    except CacheNotFound as error:
        raise _not_cached(wanted, why, get_default_config().cache_dir, "MODELSCOPE_CACHE") from error
    if folder.parent.name != "snapshots" and wanted.revision not in (None, MODELSCOPE_DEFAULT):
        why += f", and {folder} was written by modelscope before 1.38, which did not record the revision"
        raise _not_cached(wanted, why, get_default_config().cache_dir, "MODELSCOPE_CACHE")
    listing = _read_listing(wanted)
    if listing is None:
        # Downloaded by another tool: this suffix marks unfinished files.
        files = {str(path.relative_to(folder).with_suffix("")): -1 for path in folder.rglob("*.incomplete")}
    else:
        files = {path: size for path, size in listing.sizes_bytes.items() if wanted.includes(path)}
    missing = [p for p, size in files.items() if not (folder / p).is_file() or (folder / p).stat().st_size != size]
    if listing is not None and not missing and not listing.has(wanted):
        # The sizes match, but files may be from an earlier commit: modelscope checks old files after a download.
        missing = sorted(files)
    if missing:
        raise _incomplete(wanted, why, folder, missing, len(files))
    return folder


def _modelscope_error(error: Exception, wanted: _Wanted) -> ModelNotFoundError:
    """Translates modelscope's exceptions. The message of a HubUnreachableError is only the reason."""
    from modelscope_hub import errors
    from modelscope_hub.config import get_default_config

    if isinstance(error.__cause__, errors.APIError):
        error = error.__cause__  # snapshot_download wraps some in those of requests
    endpoint = str(get_default_config().endpoint)
    failed = error.failed_files if isinstance(error, errors.FileDownloadError) else {}
    for refusal in (error, *failed.values()):
        if isinstance(refusal, errors.AuthenticationError | errors.PermissionDeniedError):
            return _refused(wanted, endpoint, refusal.status_code, "MODELSCOPE_API_TOKEN")
    if isinstance(error, errors.FileDownloadError):
        causes = "; ".join(sorted({f"{type(cause).__name__}: {_first_line(cause)}" for cause in failed.values()}))
        why = f"{endpoint} did not send all files ({causes})"
        return _incomplete(wanted, why, Path(error.output_dir or ""), sorted(failed), error.total or len(failed))
    if isinstance(error, errors.NotExistError):
        return _no_model(wanted, endpoint, "MODELSCOPE_API_TOKEN")
    if isinstance(error, errors.APIError) and not error.retryable:
        return ModelNotFoundError(f"{wanted}: {endpoint} answered {error.status_code}: {_first_line(error)}")
    return HubUnreachableError(f"{endpoint} did not answer ({type(error).__name__}: {_first_line(error)})")


def _listing_path(wanted: _Wanted) -> Path:
    from modelscope_hub.config import get_default_config

    revision = quote(wanted.revision or MODELSCOPE_DEFAULT, safe="")
    cache = Path(get_default_config().cache_dir)
    return cache / ".twinkle_serve" / f"{wanted.name.replace('/', '--')}@{revision}.json"


@dataclass(frozen=True, slots=True)
class _Listing:
    """Files of a model on the hub, and the downloads of them that completed."""

    sizes_bytes: dict[str, int]
    """Size of each file by path."""
    ended: tuple[str, ...] = ()
    """Completed downloads: "weights" of all files, "rest" of all but the weights."""

    def has(self, wanted: _Wanted) -> bool:
        return "weights" in self.ended or (not wanted.weights and "rest" in self.ended)


def _write_listing(wanted: _Wanted, listing: _Listing) -> None:
    """Saves a listing, since modelscope's cache does not record whether a download completed."""
    path = _listing_path(wanted)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"files": listing.sizes_bytes, "ended": listing.ended}))
        part.replace(path)
    except OSError as error:
        logger.warning("%s: the list of its files could not be saved (%s)", wanted, error)


def _read_listing(wanted: _Wanted) -> _Listing | None:
    """The saved listing; None if it is missing or unreadable."""
    try:
        kept = json.loads(_listing_path(wanted).read_text())
        return _Listing(dict(kept["files"]), tuple(kept["ended"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _no_model(wanted: _Wanted, endpoint: str, variable: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"{endpoint} has no model {wanted.name}, or it is private. Check the id, or set {variable}."
    )


def _no_revision(wanted: _Wanted, endpoint: str) -> ModelNotFoundError:
    if wanted.revision is None:
        return ModelNotFoundError(f"{endpoint} lists no files of {wanted.name}. Check the id.")
    return ModelNotFoundError(
        f"{endpoint} has no revision {wanted.revision!r} of {wanted.name}. "
        "Use a branch, tag or commit that it has, or remove revision for the default."
    )


def _refused(wanted: _Wanted, endpoint: str, status: int | None, variable: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"{endpoint} refused {wanted} (HTTP {status}): it is gated, private or not yours. "
        f"Request access, then set {variable} to a token that has it."
    )


def _not_cached(wanted: _Wanted, why: str, cache: Path, variable: str) -> HubUnreachableError:
    return HubUnreachableError(
        f"{wanted}: {why}, and the cache at {cache} has no copy. Check the network and the endpoint, or download "
        f"the model where there is a network and point {variable} at that cache."
    )


def _incomplete(wanted: _Wanted, why: str, folder: Path, missing: list[str], files: int) -> IncompleteModelError:
    return IncompleteModelError(
        f"{wanted}: {why}, and {folder} lacks {len(missing)} of {files} files: {_listed(missing)}. "
        "Run this again when the hub can be reached: finished files are kept."
    )


def _listed(names: list[str]) -> str:
    rest = len(names) - SHOWN_FILES
    return ", ".join(names[:SHOWN_FILES]) + (f" and {rest} more" if rest > 0 else "")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
