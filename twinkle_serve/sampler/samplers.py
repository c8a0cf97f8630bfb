"""vLLMSampler and TorchSampler: a sampler described in Python, in this process or as a service on Ray."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from twinkle_serve.config import MeshArgs, ServiceArgs, mesh_args
from twinkle_serve.conventions import follows_twinkle
from twinkle_serve.data_format.groups import EngineKind
from twinkle_serve.errors import ConfigError
from twinkle_serve.extras import require_extra
from twinkle_serve.mesh import DeviceMesh
from twinkle_serve.sampler.base import RunningSampler
from twinkle_serve.sampler.router_client import RouterClient
from twinkle_serve.validation import flag

BUILDER = "graphs.sampler:build"
"""Builder of the service: the `import_path` of its YAML."""


class _EngineSampler(RunningSampler):
    engine: ClassVar[EngineKind]
    default_engine_args: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        model_id: str | Path,
        engine_args: Mapping[str, Any] | None = None,
        device_mesh: DeviceMesh | None = None,
        remote_group: str | None = None,
        *,
        replace: bool = False,
        **service_args: Any,
    ) -> None:
        """Starts the sampler; returns when it is ready.

        Args:
            model_id: demo, a path, ms://org/name, hf://org/name, or org/name of ModelScope.
            engine_args: arguments of the engine.
            device_mesh: dp_size engines of tp_size x pp_size devices each; None is one device.
            remote_group: deploys the sampler as a Ray Serve application of this name, next to others, one engine a
                data-parallel replica, and calls it by handle. After `initialize` it names a DeviceGroup, whose devices
                alone it takes. None, or `initialize("local")`: the engine runs in this process.
            replace: replace an application of the name `remote_group`, whoever has deployed it. Without it, one is
                replaced that this job has deployed, or one that is over.
            service_args: any other key of the config; see `twinkle_serve.config.ServiceArgs`.

        Raises:
            ConfigError: an unknown or invalid argument; MeshError, ModelNotFoundError, EngineArgsError.
                Or the server extra is not installed.
            NotOwnerError: another running job, or `serve`, has deployed an application of the name `remote_group`.
            EngineStartError: the engine did not start.
        """
        if engine_args is not None and not isinstance(engine_args, Mapping):
            raise ConfigError(f"engine_args must be a dict, got {engine_args!r}.")
        if remote_group is not None and (not isinstance(remote_group, str) or not remote_group):
            raise ConfigError(f"remote_group must be the name of an application, got {remote_group!r}.")
        flag("replace", replace, error=ConfigError)
        if replace and remote_group is None:
            raise ConfigError("replace=True is for a sampler with a remote_group. Give one, or leave replace out.")
        require_extra(type(self).__name__, "server", "torch", "transformers", "blake3")
        mesh = MeshArgs() if device_mesh is None else mesh_args(device_mesh)
        twinkles = {"logprobs_mode": "processed_logprobs"} if follows_twinkle() and self.engine != "fake" else {}
        args = ServiceArgs.model_validate(
            {
                "model_id": str(model_id),
                "engine": self.engine,
                "engine_args": {**self.default_engine_args, **twinkles, **(engine_args or {})},
                "device_mesh": mesh,
                **service_args,
            }
        )
        super().__init__(_client(args, remote_group, replace))
        self.device_mesh = args.device_mesh.mesh()
        self.model_id = args.model_id


class vLLMSampler(_EngineSampler):  # upstream's name
    """Samples on vLLM. LoRA is on unless `engine_args` has `enable_lora: False`.

    Without `remote_group`, a script makes it below `if __name__ == "__main__":`: vLLM's process imports the script.
    """

    engine = "vllm"
    default_engine_args: ClassVar[Mapping[str, Any]] = {"enable_lora": True}


VLLMSampler = vLLMSampler


class TorchSampler(_EngineSampler):
    """Samples on plain PyTorch, by transformers: slow, easy to step through, and a reference to check vLLM against."""

    engine = "torch"


def _client(args: ServiceArgs, remote_group: str | None, replace: bool) -> RouterClient:
    """Starts the sampler. Engines, Ray and Serve are imported here, when one is made."""
    from twinkle_serve import remote

    if remote_group is None or remote.mode() == "local":
        from twinkle_serve.sampler.local import LocalClient

        return LocalClient(args)
    from twinkle_serve.remote.session import session
    from twinkle_serve.sampler.connect import deploy

    if remote.mode() == "ray" and remote.known_groups():
        remote.group_devices(remote_group)  # an unknown group is named before anything starts
        args = args.model_copy(update={"device_group": remote_group})
    module, _, function = BUILDER.partition(":")
    client = deploy(remote_group, args, getattr(import_module(module), function), replace=replace)
    if args.device_group is not None:
        session.samplers.add(client)  # its engines must end before their devices are given away
    return client
