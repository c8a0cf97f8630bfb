"""Fields of this service that every protocol of messages takes besides its own."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from twinkle_serve.gateway.bodies import Body

PARAMS = (
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "allowed_token_ids",
    "bad_words",
    "structured_outputs",
    "priority",
)
"""Fields that are sampling parameters of the same name."""


class ExtensionFields(Body):
    """Fields that are not part of the protocol; clients send them in `extra_body`."""

    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: int | None = None
    return_token_ids: bool = False
    session_id: str | None = Field(default=None, max_length=256)

    def extensions(self) -> dict[str, Any]:
        """Returns the sampling parameters that these fields give."""
        return {name: value for name in PARAMS if (value := getattr(self, name)) not in (None, [])}
