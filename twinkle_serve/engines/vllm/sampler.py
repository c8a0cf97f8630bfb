"""A sampler for vLLM's workers that gives each request the logprobs that it asks for. Imported by workers only.

vLLM has one `logprobs_mode` for an engine, returns named tokens' logprobs to all requests of a batch once one has asked
for them, computes raw logprobs under the mask of structured output, and ends thinking up to two tokens after its budget
(0.32, v1/sample, gpu_model_runner). Remove once it does all that for each request.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, ModelRunnerOutput, SamplerOutput, SamplingMaskLists
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker import gpu_model_runner

from twinkle_serve.engines.logits import ThinkingMarks

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config.model import LogprobsMode
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class Extras(TypedDict, total=False):
    """A request's `extra_args`."""

    logprobs_mode: LogprobsMode
    top: int
    """Number of the likeliest tokens to return."""
    named: list[int]
    """Token ids whose logprobs follow those; vLLM is asked for as many more of the likeliest."""
    mask: bool
    """Whether the tokens that could be sampled are returned."""
    thinking_budget: int
    """Number of tokens after which thinking is ended."""


class RequestSampler(Sampler):  # type: ignore[misc]
    """Samples as vLLM's does, and gives each request of a batch the logprobs that it asked for."""

    def __init__(self, runner: GPUModelRunner) -> None:
        super().__init__(runner.sampler.logprobs_mode, runner.sampler.use_fp64_gumbel)
        self._runner = runner
        self.unmasked: Tensor | None = None
        """Logits of this step before the mask of structured output; None where there is none."""
        self.masks: SamplingMaskLists | None = None
        """Tokens that could be sampled in the last step, by request."""
        self._thinking: ThinkingMarks | None = None
        if (marks := runner.vllm_config.reasoning_config) is not None and marks.enabled:
            self._thinking = ThinkingMarks(marks.reasoning_start_token_ids, marks.reasoning_end_token_ids)

    def forward(
        self,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: LogprobsMode | None = None,
    ) -> SamplerOutput:
        unmasked, self.unmasked, self.masks = self.unmasked, None, None
        extras = self._extras()
        if unmasked is None and not extras:
            return super().forward(logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)
        count = sampling_metadata.max_num_logprobs
        raw = None if count is None else self.compute_logprobs(logits if unmasked is None else unmasked)
        logits = self.apply_logits_processors(logits.to(torch.float32), sampling_metadata, predict_bonus_token)
        self._end_thinking(logits, extras)
        with self._returning_processed():
            sampled, processed = self.sample(logits, sampling_metadata, "processed_logprobs")
        sampled = sampled.long()
        tensors = None
        if raw is not None:
            modes = [extras.get(i, {}).get("logprobs_mode", self.logprobs_mode) for i in range(len(raw))]
            rows = [i for i, mode in enumerate(modes) if mode == "processed_logprobs"]
            raw[rows] = processed[rows]
            tensors = self.gather_logprobs(raw, count, token_ids=sampled)
            _put_named(tensors, raw, extras)
        if any(each.get("mask") for each in extras.values()):
            self.masks = _kept(processed, extras)
        return SamplerOutput(sampled_token_ids=sampled.to(torch.int32).unsqueeze(-1), logprobs_tensors=tensors)

    def _extras(self) -> dict[int, Extras]:
        """Returns the `extra_args` of requests that have any, by row."""
        runner = self._runner
        params = (runner.requests[request_id].sampling_params for request_id in runner.input_batch.req_ids)
        return {i: each.extra_args for i, each in enumerate(params) if each is not None and each.extra_args}

    def _end_thinking(self, logits: Tensor, extras: dict[int, Extras]) -> None:
        """Leaves the next token of the end alone to requests that have thought for long enough."""
        runner = self._runner
        for i, each in extras.items():
            if self._thinking is None or "thinking_budget" not in each:
                continue
            request = runner.requests[runner.input_batch.req_ids[i]]
            prompt, output = request.prompt_token_ids or [], request.output_token_ids
            if (token := self._thinking.forced(prompt, output, each["thinking_budget"])) is not None:
                logits[i] = -torch.inf
                logits[i, token] = 0

    @contextlib.contextmanager
    def _returning_processed(self) -> Iterator[None]:
        """Makes the last step return the logprobs that it samples from."""
        last = self.topk_topp_sampler
        mode, last.logprobs_mode = last.logprobs_mode, "processed_logprobs"
        try:
            yield
        finally:
            last.logprobs_mode = mode


def _put_named(tensors: LogprobsTensors, logprobs: Tensor, extras: dict[int, Extras]) -> None:
    """Replaces the likeliest tokens beyond those that a request wants by the ones that it names."""
    for i, each in extras.items():
        if named := each.get("named"):
            columns = slice(1 + each["top"], 1 + each["top"] + len(named))
            tensors.logprob_token_ids[i, columns] = torch.tensor(named, dtype=tensors.logprob_token_ids.dtype)
            tensors.logprobs[i, columns] = logprobs[i, named]


def _kept(processed: Tensor, extras: dict[int, Extras]) -> SamplingMaskLists:
    """Returns the tokens that could be sampled, for the requests that want them."""
    none = np.empty(0, np.int32)
    kept = [
        processed[i].isfinite().nonzero()[:, 0].to(torch.int32).numpy() if extras.get(i, {}).get("mask") else none
        for i in range(len(processed))
    ]
    offsets = np.cumsum([0, *map(len, kept)], dtype=np.int64)
    return SamplingMaskLists(np.concatenate(kept), offsets)


def install(runner: GPUModelRunner) -> None:
    """Makes a model runner sample so."""
    sampler = runner.sampler = RequestSampler(runner)
    sample_tokens, apply_bitmask = runner.sample_tokens, gpu_model_runner.apply_grammar_bitmask

    def sample_with_masks(*args: object) -> ModelRunnerOutput:
        output = sample_tokens(*args)
        if isinstance(output, ModelRunnerOutput) and sampler.masks is not None:
            output.sampling_masks, sampler.masks = sampler.masks, None
        return output

    def apply_and_keep_unmasked(*args: object) -> None:
        logits = args[-1]
        assert isinstance(logits, torch.Tensor)
        sampler.unmasked = logits.clone()
        apply_bitmask(*args)

    runner.sample_tokens = sample_with_masks
    gpu_model_runner.apply_grammar_bitmask = apply_and_keep_unmasked
