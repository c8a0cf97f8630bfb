"""The transformers model of the torch engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.samples import PromptScores
from twinkle_serve.engines.logits import ThinkingMarks
from twinkle_serve.engines.stages import OnStage, ignore_stage
from twinkle_serve.engines.torch.args import TorchArgs
from twinkle_serve.engines.torch.rows import Row, RowSampler, RowStopper

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TorchModel:
    """A transformers model and its tokenizer on one device. Used by one thread only, but for the tokenizer."""

    causal_lm: PreTrainedModel
    """Set by `load`."""
    tokenizer: PreTrainedTokenizerBase
    """Set by `load`."""
    eos: set[int]
    """End-of-sequence ids. Set by `load`."""
    thinking: ThinkingMarks | None
    """Set by `load`."""

    def __init__(
        self, path: str, args: TorchArgs, *, device: str, cpus: Sequence[int], trust_remote_code: bool
    ) -> None:
        self._path = path
        self._args = args
        self._device = device
        self._cpus = cpus
        self._trust_remote_code = trust_remote_code

    def load(self, on_stage: OnStage = ignore_stage) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        on_stage("loading")
        if self._device == "cpu" and self._cpus:
            # Threads started from here on, including torch's pool, inherit this thread's affinity.
            os.sched_setaffinity(0, self._cpus)
            torch.set_num_threads(len(self._cpus))
        self.tokenizer = AutoTokenizer.from_pretrained(self._path, trust_remote_code=self._trust_remote_code)
        self.causal_lm = AutoModelForCausalLM.from_pretrained(
            self._path,
            dtype=self._args.dtype,
            attn_implementation=self._args.attn_implementation,
            trust_remote_code=self._trust_remote_code,
        )
        self.causal_lm.to(self._device).eval()
        eos = self.causal_lm.generation_config.eos_token_id
        self.eos = {*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id} - {None}
        self.thinking = None
        if (marks := self._args.reasoning_config) is not None:
            start, end = self.encode(marks.reasoning_start_str), self.encode(marks.reasoning_end_str)
            self.thinking = ThinkingMarks(start, end)
        # generate takes its defaults from here, such as the model's end-of-sequence ids and temperature.
        self.causal_lm.generation_config = GenerationConfig()

    @property
    def max_positions(self) -> int | None:
        """Longest context of the model, if its config says so."""
        positions: int | None = getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        return positions

    @property
    def vocab_size(self) -> int:
        size: int = self.causal_lm.config.get_text_config().vocab_size
        return size

    def encode(self, text: str) -> list[int]:
        """Tokenises a text, without special tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Decodes tokens to text."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def generate(
        self, prompts: Sequence[NDArray[np.int32]], rows: Sequence[Row], between_tokens: Callable[[], bool]
    ) -> None:
        """Samples rows, each from its prompt and the tokens that it has, until all are done.

        Args:
            between_tokens: see `RowStopper`.
        """
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        width = max(len(prompt) + len(row.tokens) for prompt, row in zip(prompts, rows, strict=True))
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            tokens = torch.tensor([*prompt.tolist(), *row.tokens])
            ids[i, width - len(tokens) :] = tokens
            mask[i, width - len(tokens) :] = 1
        self.causal_lm.generate(
            ids.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=GenerationConfig(
                do_sample=False,  # the sampler below leaves one token to choose
                max_new_tokens=max(row.max_tokens - len(row.tokens) for row in rows),
                pad_token_id=0,
            ),
            logits_processor=LogitsProcessorList([RowSampler(rows)]),
            stopping_criteria=StoppingCriteriaList([RowStopper(rows, between_tokens)]),
        )

    def score(self, prompt_ids: NDArray[np.int32], k: int) -> PromptScores:
        """Computes the logprobs of a prompt's tokens and the top k at each position."""
        import torch

        ids = torch.from_numpy(prompt_ids.astype(np.int64)).to(self._device)
        logprobs = torch.log_softmax(self.causal_lm(ids[None]).logits[0, :-1].float(), -1)
        own = logprobs.gather(1, ids[1:, None])
        top = logprobs.topk(k, dim=-1)
        none = torch.full((1, 1 + k), float("nan"))
        values = torch.cat([none, torch.cat([own, top.values], 1).cpu()]).numpy()
        tokens = torch.cat([torch.full((1, k), -1), top.indices.cpu()]).numpy().astype(np.int32)
        return PromptScores(logprobs=values[:, 0], top_tokens=tokens, top_logprobs=values[:, 1:])
