"""Bodies of Anthropic's requests, and the sampling parameters that they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from twinkle_serve.data_format.messages import ChatMessage
from twinkle_serve.gateway.anthropic.history import messages_of
from twinkle_serve.gateway.bodies import Body
from twinkle_serve.gateway.conversations import ForcedCall, TurnRequest
from twinkle_serve.gateway.errors import InvalidRequestError
from twinkle_serve.gateway.extensions import ExtensionFields
from twinkle_serve.gateway.openai.fields import without_neutral
from twinkle_serve.gateway.parts import parse_at
from twinkle_serve.gateway.samplers import Target

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "cache_salt": (),
    "chat_template_kwargs": (),
    "container": (),
    "context_management": (),
    "diagnostics": (),
    "ec_transfer_params": (),
    "inference_geo": ("global",),
    "kv_transfer_params": (),
    "mcp_servers": (),
    "mm_payload": ("tensors",),
    "return_mm_kwargs": (),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "vllm_xargs": (),
    "watermarking": (False,),
}
"""Fields of the protocol that cannot be honoured, with the values that ask for nothing, as null does."""


class Thinking(Body):
    """`thinking`."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1)
    display: Literal["summarized"] | None = None
    """Thinking is returned as it was sampled."""

    def budget(self, max_tokens: int | None) -> int | None:
        """Returns the number of tokens that thinking may take; None: as many as the model likes.

        Raises:
            InvalidRequestError: there is a budget where the type has none, or none where it needs one.
        """
        if self.type != "enabled":
            if self.budget_tokens is not None:
                raise InvalidRequestError(
                    f"thinking.budget_tokens needs thinking.type enabled, got {self.type}.", "thinking.budget_tokens"
                )
            return None
        if self.budget_tokens is None:
            raise InvalidRequestError("thinking.budget_tokens is missing.", "thinking.budget_tokens")
        if max_tokens is not None and self.budget_tokens >= max_tokens:
            raise InvalidRequestError(
                f"thinking.budget_tokens={self.budget_tokens} must be below max_tokens={max_tokens}.",
                "thinking.budget_tokens",
            )
        return self.budget_tokens


class OutputFormat(Body):
    """`output_config.format`."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """`output_config`."""

    effort: Literal["high"] | None = None
    """Others are refused: high is the protocol's default, and asks for nothing."""
    format: OutputFormat | None = None


class Tool(Body):
    """One of `tools`."""

    type: Literal["custom"] | None = None
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    """The input is held to the schema where `tool_choice` forces the call; else this has no effect."""
    cache_control: dict[str, Any] | None = None
    eager_input_streaming: bool | None = None
    """No effect: a stream sends the input as the parser of the model's calls reads it."""
    defer_loading: Literal[False] | None = None
    input_examples: list[dict[str, Any]] | None = Field(default=None, max_length=0)
    allowed_callers: list[Literal["direct"]] | None = None

    def as_function(self) -> dict[str, Any]:
        """Returns it as the template reads it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function | {"parameters": self.input_schema}}


class ToolChoice(Body):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class PromptFields(Body):
    """Fields that make the prompt: those of a request that counts tokens."""

    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1)
    system: str | list[Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None
    """No effect: engines cache every prefix. Blocks of messages have it, too."""
    session_id: str | None = Field(default=None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        return without_neutral(data, NEUTRAL) if isinstance(data, dict) else data

    def conversation(self) -> list[ChatMessage]:
        """Returns the messages as the template reads them. Raises InvalidRequestError."""
        return messages_of(self.system, self.messages)

    def functions(self) -> list[dict[str, Any]]:
        """Returns the tools as the template reads them. Raises InvalidRequestError for a tool of another type."""
        return [_function(tool, f"tools.{i}") for i, tool in enumerate(self.tools or ())]

    def forced(self, functions: Sequence[dict[str, Any]]) -> ForcedCall | None:
        """Returns the call that `tool_choice` forces. Raises InvalidRequestError if there is no such tool."""
        choice = self.tool_choice
        if choice is None or choice.type in ("auto", "none"):
            return None
        tools = [each["function"] for each in functions]
        if not tools:
            raise InvalidRequestError(f"tool_choice.type={choice.type} needs tools.", "tool_choice")
        if choice.type == "any":
            return ForcedCall(tools, once=bool(choice.disable_parallel_tool_use))
        names = [tool["name"] for tool in tools]
        if choice.name not in names:
            raise InvalidRequestError(
                f"tool_choice.name is {choice.name!r}; tools has {', '.join(names)}.", "tool_choice.name"
            )
        return ForcedCall(tools, choice.name)

    def turn(
        self, target: Target, session: str | None, caller: str = "", timeout_s: float | None = None
    ) -> TurnRequest:
        """Returns the turn that it asks for."""
        messages, functions, choice = self.conversation(), self.functions(), self.tool_choice
        forced, continues = self.forced(functions), messages[-1]["role"] == "assistant"
        if continues and messages[-1].get("tool_calls"):
            raise InvalidRequestError(
                "the last message has a tool_use, which cannot be continued. Append its tool_result.", "messages"
            )
        if continues and forced is not None:
            raise InvalidRequestError(
                "tool_choice forces a call, and the last message is the beginning of a text. Drop one.",
                "tool_choice",
            )
        return TurnRequest(
            target=target,
            messages=messages,
            tools=functions,
            params=self.sampling(),
            forced=forced,
            parse_tools=choice is None or choice.type != "none",
            one_call=choice is not None and choice.disable_parallel_tool_use,
            continue_final_message=continues,
            session=session,
            caller=caller,
            timeout_s=timeout_s,
        )

    def sampling(self) -> dict[str, Any]:
        """Returns the sampling parameters that the request gives."""
        return {}


class CountTokensRequest(PromptFields):
    """Body of `/v1/messages/count_tokens`."""


class MessagesRequest(PromptFields, ExtensionFields):
    """Body of `/v1/messages`."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool = False
    metadata: dict[str, Any] | None = None
    """No effect."""

    def sampling(self) -> dict[str, Any]:
        """Returns the sampling parameters that the request gives; the service's defaults apply to the others.

        Raises:
            InvalidRequestError: two fields contradict each other.
        """
        params = self.extensions() | {"max_tokens": self.max_tokens}
        for name in ("temperature", "top_p", "top_k"):
            if (value := getattr(self, name)) is not None:
                params[name] = value
        if self.stop_sequences:
            params["stop"] = self.stop_sequences
        if self.thinking is not None and (budget := self.thinking.budget(self.max_tokens)) is not None:
            params["thinking_token_budget"] = budget
        if self.output_config is not None and self.output_config.format is not None:
            if "structured_outputs" in params:
                raise InvalidRequestError(
                    "output_config.format and structured_outputs contradict each other. Drop one.", "output_config"
                )
            params["structured_outputs"] = {"json": self.output_config.format.schema_}
        return params


def _function(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise InvalidRequestError(
            f"{where}.type={tool['type']!r:.80} is a tool that Anthropic's servers run, or describe. Describe it as a "
            "custom tool with an input_schema, and run it yourself.",
            f"{where}.type",
        )
    return parse_at(tool, Tool, where).as_function()
