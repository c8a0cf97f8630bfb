"""vLLM's parsers of tool calls and reasoning behind MessageParser. vLLM is imported when a message is read."""

from twinkle_serve.vllm_parsers.names import VLLM, check_name
from twinkle_serve.vllm_parsers.parsers import VLLMParsers

__all__ = ["VLLM", "VLLMParsers", "check_name"]
