"""Body of a request, and the sampling parameters that it means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from twinkle_serve.data_format.messages import ChatMessage
from twinkle_serve.gateway.bodies import Body
from twinkle_serve.gateway.conversations import ForcedCall
from twinkle_serve.gateway.errors import InvalidRequestError
from twinkle_serve.gateway.extensions import ExtensionFields
from twinkle_serve.gateway.openai.fields import bias_by_token, without_neutral
from twinkle_serve.gateway.openai.responses.items import messages_of
from twinkle_serve.gateway.parts import parse_at, parse_part

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "cache_salt": (),
    "chat_template_kwargs": (),
    "context_management": (),
    "conversation": (),
    "ec_transfer_params": (),
    "enable_response_messages": (False,),
    "image": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "media_io_kwargs": (),
    "mm_payload": ("tensors",),
    "mm_processor_kwargs": (),
    "moderation": (),
    "previous_input_messages": (),
    "prompt": (),
    "request_id": (),
    "return_mm_kwargs": (),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "stream_options": ({"include_obfuscation": False},),
    "truncation": ("disabled",),
    "vllm_xargs": (),
    "watermarking": (False,),
}
"""Fields of the protocol that cannot be honoured, with the values that ask for nothing, as null does."""

REASONING: dict[str, tuple[Any, ...]] = {
    "context": ("auto",),
    "effort": (),
    "generate_summary": ("auto",),
    "summary": ("auto",),
}
"""Fields of `reasoning`, likewise: reasoning is returned as it was sampled, and its length is the model's choice."""

LOGPROBS = "message.output_text.logprobs"


class JSONSchemaFormat(Body):
    """`text.format` with a schema."""

    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class JSONObjectFormat(Body):
    """`text.format` of any JSON object."""

    type: Literal["json_object"]


class TextFormat(Body):
    """`text.format` of any text."""

    type: Literal["text"]


FORMATS: dict[str, type[Body]] = {"text": TextFormat, "json_object": JSONObjectFormat, "json_schema": JSONSchemaFormat}


class TextConfig(Body):
    """`text`."""

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None

    def structured_outputs(self) -> dict[str, Any] | None:
        """Returns the structured output that it means. Raises InvalidRequestError."""
        if self.format is None:
            return None
        chosen = parse_part(self.format, FORMATS, "text.format")
        if isinstance(chosen, JSONSchemaFormat):
            return {"json": chosen.schema_}
        return {"json": {"type": "object"}} if isinstance(chosen, JSONObjectFormat) else None


class FunctionTool(Body):
    """One of `tools`."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Arguments are held to the schema where `tool_choice` forces the call; else this has no effect."""
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None

    def as_function(self) -> dict[str, Any]:
        """Returns it as the template reads it."""
        function = self.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        return {"type": "function", "function": function}


class NamedTool(Body):
    """`tool_choice` that names a function."""

    type: Literal["function"]
    name: str


class ResponsesRequest(ExtensionFields):
    """Body of a request."""

    model: str | None = None
    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    thinking_token_budget: int | None = None
    text: TextConfig | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    reasoning: dict[str, Any] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    """Reasoning comes as text, which can be sent back, so that there is nothing to encrypt."""
    top_logprobs: int = Field(default=0, ge=0)
    previous_response_id: str | None = None
    store: bool = True
    stream: bool = False
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    max_tool_calls: int | None = None
    """No effect: it counts calls of built-in tools."""
    prompt_cache_key: str | None = None
    """No effect: engines cache every prefix. Nor have the next two."""
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        return without_neutral(data, NEUTRAL) if isinstance(data, dict) else data

    @property
    def with_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def conversation(self, before: Sequence[ChatMessage] = ()) -> list[ChatMessage]:
        """Returns the messages as the template reads them. Raises InvalidRequestError.

        Args:
            before: those of the previous response.
        """
        instructions = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return [*instructions, *before, *messages_of(self.input)]

    def functions(self) -> list[dict[str, Any]]:
        """Returns the tools as the template reads them. Raises InvalidRequestError for a tool of another type."""
        return [_function(tool, f"tools.{i}") for i, tool in enumerate(self.tools or ())]

    def forced(self, functions: Sequence[dict[str, Any]]) -> ForcedCall | None:
        """Returns the call that `tool_choice` forces. Raises InvalidRequestError if there is no such tool."""
        choice, tools = self.tool_choice, [each["function"] for each in functions]
        if choice in (None, "none", "auto"):
            return None
        if not tools:
            raise InvalidRequestError("tool_choice needs tools.", "tool_choice")
        if not isinstance(choice, NamedTool):
            return ForcedCall(tools, once=not self.parallel_tool_calls)
        names = [tool["name"] for tool in tools]
        if choice.name not in names:
            raise InvalidRequestError(
                f"tool_choice names {choice.name!r}; tools has {', '.join(names)}.", "tool_choice.name"
            )
        return ForcedCall(tools, choice.name)

    def sampling(self) -> dict[str, Any]:
        """Returns the sampling parameters that the request gives; the service's defaults apply to the others.

        Raises:
            InvalidRequestError: two fields contradict each other, or ask for more than there is.
        """
        if asked := without_neutral(self.reasoning or {}, REASONING, "reasoning."):
            raise InvalidRequestError(f"unknown field 'reasoning.{next(iter(asked))}'. Leave it out.", "reasoning")
        if self.top_logprobs and not self.with_logprobs:
            raise InvalidRequestError(f"top_logprobs needs include: [{LOGPROBS!r}].", "top_logprobs")
        params = self.extensions()
        for name in ("temperature", "top_p", "top_k", "stop", "thinking_token_budget"):
            if (value := getattr(self, name)) not in (None, []):
                params[name] = value
        if self.max_output_tokens is not None:
            params["max_tokens"] = self.max_output_tokens
        if self.logit_bias:
            params["logit_bias"] = bias_by_token(self.logit_bias)
        if self.text is not None and (structured := self.text.structured_outputs()) is not None:
            if "structured_outputs" in params:
                raise InvalidRequestError(
                    "text.format and structured_outputs contradict each other. Drop one.", "text.format"
                )
            params["structured_outputs"] = structured
        return params | {"logprobs": self.top_logprobs if self.with_logprobs else None}


def _function(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise InvalidRequestError(
            f"{where}.type={tool.get('type')!r:.80} is a tool that OpenAI's servers run. Describe it as a function, "
            "and run it yourself.",
            f"{where}.type",
        )
    return parse_at(tool, FunctionTool, where).as_function()
