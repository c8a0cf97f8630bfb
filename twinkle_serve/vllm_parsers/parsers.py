"""Arguments of vLLM's parsers, which travel with responses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twinkle_serve.data_format.message_stream import MessageStream, SampleParsing


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMParsers:
    """Parsers of vLLM for the samples of one model. They are loaded in the process that reads a message."""

    model: str
    """Directory of the model, for its tokenizer."""
    hub_model: tuple[str, str | None] | None = None
    """Id and revision of the model on a hub, from where the tokenizer is taken if there is no such directory."""
    tool_parser: str | None = None
    """Name in vLLM's registry. None: tool calls are parsed otherwise."""
    reasoning_parser: str | None = None
    """Name in vLLM's registry. None: reasoning is parsed otherwise."""
    end_tokens: tuple[str, ...] = ()
    """Texts of the tokens that end a turn, which vLLM's parsers do not expect."""
    enable_thinking: bool | None = None
    """Argument of the chat template, which some parsers read. None: the chat template's default."""
    trust_remote_code: bool = False
    """Run code that comes with the tokenizer."""

    def load(self) -> None:
        """Imports vLLM and loads the tokenizer, if this has not happened in this process. Takes 10 s and 0.5 GB.

        Raises:
            TemplateError: vLLM is not installed here, there is no tokenizer, or a parser cannot be used with it.
        """
        from twinkle_serve.vllm_parsers.loading import make_parser

        make_parser(self, ())

    def without_tools(self) -> VLLMParsers | None:
        """Returns the parsers without that of tool calls; None if no other is left."""
        return None if self.reasoning_parser is None else replace(self, tool_parser=None)

    def stream(self, sample: SampleParsing) -> MessageStream:
        """Makes a parser of one sample: see MessageParser.stream.

        Raises:
            TemplateError: as `load`.
        """
        from twinkle_serve.vllm_parsers.streams import VLLMMessageStream

        return VLLMMessageStream(self, sample)
