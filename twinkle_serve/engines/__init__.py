"""The engines, by name. Importing this loads none of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from twinkle_serve.engines.protocol import Engine
from twinkle_serve.errors import ConfigError

EngineKind = Literal["vllm", "torch", "fake"]
ENGINES: tuple[EngineKind, ...] = get_args(EngineKind)


def check_engine_args(kind: EngineKind, engine_args: Mapping[str, Any]) -> None:
    """Refuses arguments that the engine does not have.

    Raises:
        EngineArgsError
    """
    if kind == "vllm":
        from twinkle_serve.engines import vllm

        vllm.check_engine_args(engine_args)
    elif kind == "torch":
        from twinkle_serve.engines import torch

        torch.check_engine_args(engine_args)
    else:
        from twinkle_serve.engines import fake

        fake.check_engine_args(engine_args)


def build_engine(
    kind: EngineKind,
    name: str,
    model: str,
    engine_args: Mapping[str, Any],
    *,
    device: str = "cpu",
    tp_size: int = 1,
    pp_size: int = 1,
    executor: str = "mp",
    cpus: Sequence[Sequence[int]] = (),
    devices_on_node: int = 1,
    trust_remote_code: bool = False,
) -> Engine:
    """An engine that is not started yet.

    Args:
        model: directory of the model.
        device: cpu or cuda.
        executor: vLLM's executor, mp within a node or ray across several.
        cpus: on CPU, the cores of each of the tp_size * pp_size workers; empty leaves them unbound.
        devices_on_node: on CPU, devices of all engines that share the node's memory.

    Raises:
        ConfigError: torch or fake with a replica of more than one device.
        EngineArgsError: torch or fake with arguments that they do not have.
    """
    if kind == "vllm":
        from twinkle_serve.engines.vllm import VLLMEngine

        return VLLMEngine(
            name,
            model,
            engine_args,
            device=device,
            tp_size=tp_size,
            pp_size=pp_size,
            executor=executor,
            cpus=cpus,
            devices_on_node=devices_on_node,
            trust_remote_code=trust_remote_code,
        )
    if tp_size * pp_size > 1:
        raise ConfigError(
            f"the {kind} engine runs on one device, device_mesh gives each replica {tp_size * pp_size} "
            f"(tp_size={tp_size} x pp_size={pp_size}). Set both to 1, or engine: vllm."
        )
    if kind == "torch":
        from twinkle_serve.engines.torch import TorchEngine

        return TorchEngine(name, model, engine_args, device=device, cpus=cpus, trust_remote_code=trust_remote_code)
    from twinkle_serve.engines.fake import FakeEngine

    return FakeEngine(name, model, engine_args)
