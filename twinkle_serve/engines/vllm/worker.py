"""Methods added to vLLM's workers. Only the processes of workers, and a core that works itself, import this, by name,
before they build the model."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.lora.layers import fused_moe
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from twinkle_serve.engines.vllm.checksum import model_checksum
from twinkle_serve.engines.vllm.processes import allow_high_temperatures, begin_worker
from twinkle_serve.tensor_sums import weight_digest
from twinkle_serve.tensors import stored_dtype

if TYPE_CHECKING:
    from torch import Tensor, nn
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def _experts_without_lora() -> None:
    """Turns LoRA off for the experts of MoE models, whose LoRA kernels need Triton.

    With LoRA on, vLLM (0.32, fused_moe/oracle) uses these kernels for every MoE model, on CPU too, where the first
    forward pass then fails. Remove once vLLM picks a kernel that the platform supports. Adapters of experts are
    refused, see `add_adapter`.
    """
    FusedMoEConfig.is_lora_enabled = property(lambda config: False, lambda config, value: None)
    for name in ("FusedMoEWithLoRA", "FusedMoE3DWithLoRA"):
        getattr(fused_moe, name).can_replace_layer = classmethod(lambda cls, *args, **kwargs: False)


if current_platform.is_cpu():
    _experts_without_lora()
begin_worker(current_platform.device_type)
allow_high_temperatures()


class WorkerExtension:
    """Mixin for vLLM's worker class, set by `worker_extension_cls`."""

    model_runner: GPUModelRunner
    vllm_config: VllmConfig
    add_lora: Callable[[LoRARequest], bool]

    start_weight_update: Callable[[], None]
    finish_weight_update: Callable[[], None]
    _weight_update_active: bool

    _digests: dict[str, str]
    """Of the weights that have come in a transfer, by name."""
    _loading = False
    """Whether a load is in progress, with the model holding both old and new weights."""

    def begin_weights(self) -> None:
        """Prepares the model to receive new weights layer by layer, under their checkpoint names."""
        self._end_interrupted()
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.get_model())
        self._loading = True

    def _end_interrupted(self) -> None:
        """Resets layers that an earlier load, which was interrupted or refused, has filled in part."""
        if not self._loading:
            return
        model = self.model_runner.get_model()
        vars(model).pop("load_weights", None)
        self._weight_update_active = False  # vLLM's, of a transfer
        for layer in model.modules():
            info = get_layerwise_info(layer)
            info.loaded_weights.clear()
            info.load_numel = 0
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.vllm_config.model_config)
        self._loading = False

    def load_weights(self, path: str) -> None:
        """Loads some of the weights from a safetensors file. A layer is updated once all its weights are loaded."""
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(load_file(path).items())

    def finish_weights(self) -> str:
        """Finishes a load. Returns a checksum of the tensors that the model computes with.

        Evicts all adapters from the worker; vLLM reloads each when a request needs it.
        """
        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.vllm_config.model_config)
        return self._finished(model)

    def unpickle_and_call(self, method: str, argument: bytes) -> None:
        """Calls a method with a pickled argument, from the router."""
        getattr(self, method)(pickle.loads(argument))

    def begin_transfer(self) -> None:
        """Prepares vLLM's weight transfer engine to receive new weights, whose digests are taken."""
        self._end_interrupted()
        self._loading = True  # even if the next line fails halfway
        self.start_weight_update()
        model = self.model_runner.get_model()
        load = model.load_weights
        self._digests = {}

        def digested(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name in self._digests:
                    raise ValueError(f"weight {name!r} comes twice")
                self._digests[name] = weight_digest(tuple(tensor.shape), stored_dtype(tensor.dtype), tensor)
                yield name, tensor

        vars(model)["load_weights"] = lambda weights: load(digested(weights))

    def finish_transfer(self) -> tuple[str, dict[str, str]]:
        """Finishes a transfer; see `finish_weights`. Returns its checksum, and the digests of the weights that came."""
        self.finish_weight_update()
        model = self.model_runner.get_model()
        vars(model).pop("load_weights", None)
        return self._finished(model), self._digests

    def _finished(self, model: nn.Module) -> str:
        self._loading = False
        if current_platform.is_cpu():
            # An output layer tied to the embedding receives no weights of its own and keeps its packed copy of the
            # old ones (vLLM 0.32). Remove once a reload repacks it.
            for module in model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)
        self.model_runner.reset_lora_state()
        return model_checksum(model)

    def add_adapter(self, name: str, adapter_id: int, path: str) -> list[str]:
        """Loads an adapter. Returns the adapter's modules that this worker's part of the model lacks.

        vLLM (0.32, #34186) loads such an adapter without an error and ignores those modules. Pipeline workers hold
        different parts of the model: a module is ignored if every worker lacks it.
        """
        self.add_lora(LoRARequest(name, adapter_id, path))
        manager = self.model_runner.lora_manager._adapter_manager
        adapter = manager.get_adapter(adapter_id)
        applied = {id(manager._get_lora_layer_weights(adapter, name)) for name in manager.modules}
        return [name for name, weights in adapter.loras.items() if id(weights) not in applied]

    def use_own_sampler(self) -> None:
        """Gives each request the logprobs that it asks for; see `RequestSampler`."""
        from twinkle_serve.engines.vllm.sampler import install  # a model runner that a GPU may not use

        install(self.model_runner)

    def keep_last_slot_empty(self) -> None:
        """Limits adapters to all slots but the last, which stays zero.

        vLLM's CPU kernels (0.32, lora/ops/torch_ops) give base model rows index −1, which selects the last slot's
        adapter. Slots stay occupied by adapters that no longer run, so the spare slot must never be filled. Remove
        once those kernels skip rows with index −1.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        last = manager.lora_config.max_loras - 1
        manager.__class__ = type("AllButTheLastSlot", (type(manager),), {"lora_slots": last})
        for module in manager.modules.values():
            module.reset_lora(last)

    def take_lora_off_the_head(self) -> None:
        """Removes vLLM's LoRA wrapper from the output layer.

        The wrapper (0.32, LogitsProcessorWithLoRA) treats all rows as sampled ones: prompt logprobs beside a running
        sequence crash the engine on CPU. Remove once it distinguishes prompt rows. Adapters of the output layer are
        refused, see `add_adapter`.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        heads = [name for name in manager.modules if name.rpartition(".")[2] == "lm_head"]
        for name in heads:
            wrapper = manager.modules.pop(name)
            parent = manager.model.get_submodule(name.rpartition(".")[0])
            parent.logits_processor = wrapper.base_layer
