"""What vLLM's worker processes are asked beyond their own methods. Imported there alone, by name, before the model."""

from __future__ import annotations

import hashlib
from typing import Any

from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.lora.layers import fused_moe
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform


def _experts_without_lora() -> None:
    """Keeps LoRA off the experts of a mixture, whose kernels for it need Triton, so that the model runs without.

    With LoRA on, vLLM (0.32, fused_moe/oracle) takes those kernels for every mixture, on CPU too, and the first forward
    pass fails. To be removed when it looks for a kernel that the platform has. An adapter of experts is refused, as
    `add_adapter` says.
    """
    FusedMoEConfig.is_lora_enabled = property(lambda config: False, lambda config, value: None)
    for name in ("FusedMoEWithLoRA", "FusedMoE3DWithLoRA"):
        getattr(fused_moe, name).can_replace_layer = classmethod(lambda cls, *args, **kwargs: False)


if current_platform.is_cpu():
    _experts_without_lora()


class WorkerExtension:
    """Mixed into vLLM's worker by `worker_extension_cls`."""

    model_runner: Any
    vllm_config: Any
    add_lora: Any
    compute_weight_checksums: Any

    _receiving = False
    """Whether the model is being given weights, and holds some of the old and some of the new."""

    def begin_weights(self) -> None:
        """Prepares the model for new weights of its own, layer by layer, as its checkpoint names them."""
        with set_current_vllm_config(self.vllm_config):
            model = self.model_runner.get_model()
            if self._receiving:  # what came last was cut off, or refused: layers that are half loaded go back
                for layer in model.modules():
                    info = get_layerwise_info(layer)
                    info.loaded_weights.clear()
                    info.load_numel = 0
                finalize_layerwise_reload(model, self.vllm_config.model_config)
            initialize_layerwise_reload(model)
        self._receiving = True

    def load_weights(self, path: str) -> None:
        """Loads a part of the weights, a safetensors file. A layer is in place once all its weights have come."""
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(load_file(path).items())

    def finish_weights(self) -> str:
        """Ends what `begin_weights` began. Returns a checksum of what the model computes with.

        Adapters leave the worker's memory; vLLM loads each again when a request needs it.
        """
        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.vllm_config.model_config)
        self._receiving = False
        if current_platform.is_cpu():
            # An output layer that shares the embedding's weights gets none of its own, and goes on with its packed
            # copy of the old ones (vLLM 0.32). To be removed when a reload packs it again.
            for module in model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)
        self.model_runner.reset_lora_state()
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.compute_weight_checksums().items()):
            digest.update(f"{name} {tensor}\n".encode())
        return digest.hexdigest()

    def add_adapter(self, name: str, adapter_id: int, path: str) -> list[str]:
        """Loads an adapter. Returns its modules that this worker's part of the model has no place for.

        vLLM (0.32, #34186) loads such an adapter without an error and answers without them. Workers of a pipeline
        hold different parts: a module is left out where it is so at every one.
        """
        self.add_lora(LoRARequest(name, adapter_id, path))
        manager = self.model_runner.lora_manager._adapter_manager
        adapter = manager.get_adapter(adapter_id)
        applied = {id(manager._get_lora_layer_weights(adapter, name)) for name in manager.modules}
        return [name for name, weights in adapter.loras.items() if id(weights) not in applied]

    def keep_last_slot_empty(self) -> None:
        """Has adapters use all slots but the last, which stays zero.

        vLLM's CPU kernels (0.32, lora/ops/torch_ops) give rows of the base model index −1, and with it the last slot's
        adapter. Slots stay taken by adapters that no longer run, so a slot to spare must be one that is never filled.
        To be removed when those kernels leave rows of index −1 out.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        last = manager.lora_config.max_loras - 1
        manager.__class__ = type("AllButTheLastSlot", (type(manager),), {"lora_slots": last})
        for module in manager.modules.values():
            module.reset_lora(last)

    def take_lora_off_the_head(self) -> None:
        """Undoes vLLM's wrapping of the output layer.

        It adds an adapter to the logits of sampled rows, whatever rows it is given (0.32, LogitsProcessorWithLoRA):
        prompt logprobs beside a running sequence end the engine on CPU. To be removed when rows of a prompt are told
        apart there. An adapter of the output layer is refused, as `add_adapter` says.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        heads = [name for name in manager.modules if name.rpartition(".")[2] == "lm_head"]
        for name in heads:
            wrapper = manager.modules.pop(name)
            parent = manager.model.get_submodule(name.rpartition(".")[0])
            parent.logits_processor = wrapper.base_layer
