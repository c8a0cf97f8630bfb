"""How the prompt of a conversation ends: with a new turn, the last message, or inside the last message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from twinkle_serve.data_format.plain import as_items
from twinkle_serve.errors import PromptError, RequestError
from twinkle_serve.template.conversation import conversation


@dataclass(frozen=True, slots=True)
class Ending:
    """How prompts of a call end."""

    generation_prompt: bool = True
    """Whether the assistant's turn is opened; a conversation that is only scored ends with its last message."""
    continue_final_message: bool | None = None
    """Whether the assistant's message that ends a conversation is continued. None: as `default`."""
    default: bool = False
    """The template's `continue_final_message`."""

    def __post_init__(self) -> None:
        if self.continue_final_message is not None and not isinstance(self.continue_final_message, bool):
            raise RequestError(
                f"continue_final_message must be true, false or None, got {self.continue_final_message!r}."
            )

    def is_open(self, messages: object) -> bool:
        """Whether a conversation ends with an assistant's message."""
        return _last_role(messages) == "assistant"

    def check(self, messages: object, where: str) -> None:
        """Raises PromptError if the call asks to continue a message that is not the assistant's."""
        role = _last_role(messages)
        if self.continue_final_message and role not in (None, "assistant"):
            raise PromptError(
                f"{where}.messages ends with a message of role {role!r}, and continue_final_message=True continues the "
                "assistant's only. Leave the option out for it."
            )

    def continues(self, messages: object, where: str) -> bool:
        """Whether the last message of a conversation that is encoded is continued.

        Raises:
            PromptError: it is the assistant's, and neither the call nor the template says that it is continued.
        """
        self.check(messages, where)
        if not self.is_open(messages):
            return False
        default = self.default and self.generation_prompt
        wanted = default if self.continue_final_message is None else self.continue_final_message
        if self.generation_prompt and not wanted:
            conversation(messages, where)  # what is invalid in it is said first
            raise PromptError(
                f"{where}.messages ends with an assistant's message. Set continue_final_message=True to continue it, "
                "in the call or the template, or append the message that the assistant is to answer."
            )
        return wanted


def _last_role(messages: object) -> object:
    """Role of the last message; None if the messages are invalid."""
    items = as_items(messages)
    last = items[-1] if items else None
    role = last.get("role") if isinstance(last, Mapping) else None
    return role if isinstance(role, str) else None
