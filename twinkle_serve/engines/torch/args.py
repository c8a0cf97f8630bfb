"""Arguments of the torch engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from twinkle_serve.data_format.sampling_params import LogprobsMode
from twinkle_serve.engines.protocol import parse_engine_args


class ReasoningMarks(BaseModel):
    """Texts that begin and end a model's thinking."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reasoning_start_str: str = Field(min_length=1)
    reasoning_end_str: str = Field(min_length=1)


class TorchArgs(BaseModel):
    """`engine_args` of the torch engine, named as vLLM's and with their meaning."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: PositiveInt | None = None
    """None: the model's own limit."""
    max_num_seqs: PositiveInt = 64
    """Largest number of rows in a batch."""
    max_logprobs: PositiveInt = 20
    logprobs_mode: LogprobsMode = "raw_logprobs"
    reasoning_config: ReasoningMarks | None = None
    """How the model marks its thinking; needed for thinking_token_budget."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    enable_lora: bool = True
    """Costs nothing until an adapter is loaded."""
    max_lora_rank: PositiveInt = 512


def check_engine_args(engine_args: Mapping[str, object]) -> TorchArgs:
    """Parses the arguments; see `parse_engine_args`."""
    return parse_engine_args(TorchArgs, "torch", engine_args)
