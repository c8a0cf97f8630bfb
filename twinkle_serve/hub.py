"""Model ids to directories: `demo`, a path, `ms://org/name`, `hf://org/name`; a bare id is ModelScope's."""

from __future__ import annotations

from pathlib import Path

from twinkle_serve.errors import ModelNotFoundError

DEMO = Path(__file__).parent / "demo"
"""The embedded demo model: sums and differences, trained by examples/train_demo_model.py."""

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


def resolve(model_id: str, *, weights: bool = True) -> Path:
    """The local directory of a model, downloaded first if it is on a hub.

    Args:
        weights: False leaves the weights out of a download: enough for a tokenizer.

    Raises:
        ModelNotFoundError: no such directory, nothing to load in it, or the hub did not hand it over.
    """
    if model_id == "demo":
        return DEMO
    hub, _, name = model_id.rpartition("://")
    if is_path(model_id):
        return _directory(Path(name).expanduser(), model_id)
    if hub not in ("", "ms", "hf"):
        raise ModelNotFoundError(
            f"model_id {model_id!r}: unknown hub {hub!r}. Use ms://org/name, hf://org/name or a path."
        )
    if name.count("/") != 1 or not all(name.split("/")):
        raise ModelNotFoundError(
            f"model_id {model_id!r} is neither a directory here nor an id of the form org/name. "
            "Use demo, a path, ms://org/name or hf://org/name."
        )
    return _directory(_download(hub or "ms", name, weights), model_id)


def is_path(model_id: str) -> bool:
    """Whether an id means a directory: one that is here, or that is spelt as a path."""
    if model_id == "demo" or "://" in model_id:
        return False
    return model_id.startswith(("/", "./", "../", "~")) or Path(model_id).exists()


def _directory(path: Path, model_id: str) -> Path:
    if not path.is_dir():
        raise ModelNotFoundError(f"model_id {model_id!r}: no directory at {path}. Check the path.")
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(f"model_id {model_id!r}: {path} has no config.json, so it is not a model's directory.")
    return path


def _download(hub: str, name: str, weights: bool) -> Path:
    ignored = None if weights else list(WEIGHTS)
    try:
        if hub == "hf":
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(name, ignore_patterns=ignored))
        from modelscope import snapshot_download as ms_snapshot_download

        return Path(ms_snapshot_download(name, ignore_patterns=ignored))
    except Exception as error:
        # Both libraries raise errors of many kinds for a missing model and for a missing network.
        raise ModelNotFoundError(f"{hub}://{name} could not be downloaded: {type(error).__name__}: {error}") from error
