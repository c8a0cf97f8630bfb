"""Bodies of Tinker's requests."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from twinkle_serve.gateway.bodies import Body
from twinkle_serve.gateway.tinker.ids import MAX_ID_LENGTH

MAX_SEQ_ID = 2**63 - 1
MAX_NUMBER = 2**53


class Notice(BaseModel):
    """Base of requests that ask for no samples: fields that are not read here are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class SessionRequest(Notice):
    """`session_heartbeat`."""

    session_id: str = Field(min_length=1, max_length=MAX_ID_LENGTH)


class CreateSamplingSession(SessionRequest):
    """`create_sampling_session`."""

    sampling_session_seq_id: int = Field(ge=0, le=MAX_NUMBER)
    base_model: str | None = None
    model_path: str | None = None


class WeightsInfo(Notice):
    """`weights_info`."""

    tinker_path: str


class FutureRequest(Notice):
    """`cancel_future`."""

    request_id: str


class RetrieveFuture(FutureRequest):
    """`retrieve_future`."""

    allow_metadata_only: bool = False


class FuturesTarget(Notice):
    """`target` of `retrieve_futures`: the requests of one client, or one copy of it."""

    sampling_session_id: str
    cloned_sampler_id: int = Field(default=0, ge=0, le=MAX_NUMBER)


class RetrieveFutures(Notice):
    """`retrieve_futures`."""

    target: FuturesTarget
    prev_cursor: int = Field(default=0, ge=0, le=2**63)
    timeout: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    retrieved_request_ids: list[str] = []


class TensorBody(Body):
    """A tensor of token ids, dense or sparse (CSR)."""

    data: list[int]
    dtype: Literal["int64"]
    shape: list[int]
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class ModelInput(Body):
    """`prompt`: its chunks are read one by one, for errors that name them."""

    chunks: list[dict[str, Any]]


class TinkerParams(Body):
    """`sampling_params`."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class SampleBody(Body):
    """`asample`. An unknown field is refused: it would change what is sampled."""

    sampling_session_id: str = Field(max_length=MAX_ID_LENGTH)
    seq_id: int = Field(ge=0, le=MAX_SEQ_ID)
    num_samples: int = 1
    prompt: ModelInput
    sampling_params: TinkerParams
    prompt_logprobs: bool | None = None
    prompt_logprobs_last_n: int | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: TensorBody | None = None
    prompt_alt_tokens_k: int = 0
    record_stability_info: bool | None = None
    base_model: str | None = None
    model_path: str | None = None
    type: Literal["sample"] = "sample"
