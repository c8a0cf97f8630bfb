"""Messages to token ids, by the model's own chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.errors import ModelNotFoundError, PromptError


class Template:
    """The chat template and tokenizer of one model. Inputs are never changed."""

    def __init__(self, model: Path, *, trust_remote_code: bool = False) -> None:
        """
        Args:
            model: directory of the model.

        Raises:
            ModelNotFoundError: it has no tokenizer.
        """
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(f"no tokenizer in {model}: {error}") from error
        self.special_tokens: tuple[str, ...] = tuple(self._tokenizer.all_special_tokens)

    def encode(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, where: str
    ) -> NDArray[np.int32]:
        """Token ids of a conversation, up to where the assistant's turn begins. Shape [P].

        Raises:
            PromptError: the model has no chat template, or it refuses the messages.
        """
        if self._tokenizer.chat_template is None:
            raise PromptError(f"{where}: the model has no chat template. Hand in input_ids instead of messages.")
        try:
            ids = self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # jinja's errors and Python's own, out of a template that is the model's
            raise PromptError(
                f"{where}: the chat template refuses the messages: {type(error).__name__}: {error}"
            ) from error
        return np.asarray(ids, np.int32)
