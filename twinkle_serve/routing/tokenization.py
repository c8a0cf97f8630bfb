"""Encodes and decodes for callers that do not have the model's files. Free of Ray."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.sample_request import Inputs, TemplateChoice
from twinkle_serve.data_format.token_lists import TokenLists, read_token_ids
from twinkle_serve.errors import PromptError
from twinkle_serve.routing.encoding_thread import EncodingThread
from twinkle_serve.template import Template
from twinkle_serve.template.prompts import InputEncoder, Prompt
from twinkle_serve.validation import flag

PIECE = 16
"""Number of inputs encoded, or lists decoded, before other calls have their turn."""


class Tokenization:
    """The tokenizer and template of a router, by themselves.

    Guarantees:
        No engine is needed.
        A large call does not hold up others: their work has its turn after each PIECE.
    """

    def __init__(self, thread: EncodingThread, template: Callable[[TemplateChoice], Awaitable[Template]]) -> None:
        """
        Args:
            thread: the thread of all work with tokenizers.
            template: returns the template of a call.
        """
        self._thread, self._template = thread, template

    async def encode(
        self,
        inputs: Inputs,
        *,
        template: TemplateChoice = None,
        continue_final_message: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> TokenLists:
        """See `RouterAPI.encode`."""
        flag("add_generation_prompt", add_generation_prompt)
        encoder = await self._thread.run(
            False, InputEncoder, inputs, await self._template(template), add_generation_prompt, continue_final_message
        )
        prompts: list[Prompt] = []
        for first in range(0, len(encoder), PIECE):
            prompts += await self._thread.run(False, encoder.encode, first, first + PIECE)
        encoder.require_some(prompts)
        return await self._thread.run(False, _of_inputs, prompts, len(encoder))

    async def decode(self, token_ids: object, choice: TemplateChoice, skip_special_tokens: bool) -> str | list[str]:
        """See `RouterAPI.decode`."""
        flag("skip_special_tokens", skip_special_tokens)
        template = await self._template(choice)
        lists, single = await self._thread.run(False, _read, token_ids, template)
        texts: list[str] = []
        for first in range(0, len(lists), PIECE):
            part = lists[first : first + PIECE]
            texts += await self._thread.run(False, _decode, part, first, template, skip_special_tokens)
        return texts[0] if single else texts


def _of_inputs(prompts: Sequence[Prompt], count: int) -> TokenLists:
    """Returns the ids of all inputs; none of those that were left out."""
    lists = [np.empty(0, np.int32)] * count
    for prompt in prompts:
        lists[prompt.index] = prompt.ids
    return TokenLists.of(lists)


def _read(token_ids: object, template: Template) -> tuple[list[NDArray[np.int32]], bool]:
    return read_token_ids(token_ids, template.max_id)


def _decode(lists: Sequence[NDArray[np.int32]], first: int, template: Template, skip_special_tokens: bool) -> list[str]:
    texts = []
    for i, ids in enumerate(lists, first):
        try:
            texts.append(template.decode(ids, skip_special_tokens=skip_special_tokens))
        except Exception as error:  # in the tokenizer's own types
            raise PromptError(f"token_ids[{i}] cannot be decoded: {type(error).__name__}: {error}") from None
    return texts
