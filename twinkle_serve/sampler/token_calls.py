"""Calls to the tokenizer and template of the service, for callers that do not have the model's files."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Concatenate, TypeVar, overload

from twinkle_serve import timing
from twinkle_serve.data_format.prompts import Vector
from twinkle_serve.data_format.sample_request import Inputs, TemplateChoice
from twinkle_serve.data_format.token_lists import TokenLists, read_token_ids
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.router_client import RouterClient
from twinkle_serve.tasks import Call, deferred

T = TypeVar("T")


class TokenCalls:
    """Tokens of inputs and texts of tokens, by the service's own tokenizer and the template of this sampler object.

    The router answers, whatever its engines do. Mixed into RunningSampler.
    """

    _client: RouterClient
    _template: TemplateChoice

    def encode(
        self,
        inputs: Inputs,
        *,
        continue_final_message: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> list[list[int]]:
        """Returns the token ids of each input: the prompts that `sample` would sample from.

        The engine's own limits, such as its context, are not checked: `sample` does that.

        Args:
            inputs: as of `sample`.
            continue_final_message: as in `sample`.
            add_generation_prompt: whether to end at the beginning of the assistant's turn, as for `sample`, or after
                the last message, as for `score`.

        Returns:
            One list for each input, also for a single one. It is empty for an input that `truncation_strategy="delete"`
            leaves out.

        Raises:
            PromptError: an input is invalid, or longer than the template's `max_length`, or all are left out.
            TemplateError: the template of this sampler object cannot be built.
            RequestError: another argument is invalid.
            DeadlineError: there was no answer within 600 s.
            ServiceError: the service's router failed or cannot be reached.
        """
        return list(
            self._client.loop.call(
                self._tokenize(RouterAPI.encode, inputs, continue_final_message, add_generation_prompt)
            )
        )

    def encode_async(
        self,
        inputs: Inputs,
        *,
        continue_final_message: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> Coroutine[Any, Any, list[list[int]]]:
        """As `encode`, for async code. Inputs are copied by the call itself; errors are raised when it is awaited."""
        call = deferred(lambda: self._tokenize(RouterAPI.encode, inputs, continue_final_message, add_generation_prompt))
        return self._as_lists(call)

    def count_tokens(
        self,
        inputs: Inputs,
        *,
        continue_final_message: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Returns the number of tokens of each input. Arguments and errors as of `encode`."""
        return self._client.loop.call(
            self._tokenize(RouterAPI.count_tokens, inputs, continue_final_message, add_generation_prompt)
        )

    def count_tokens_async(
        self,
        inputs: Inputs,
        *,
        continue_final_message: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> Coroutine[Any, Any, list[int]]:
        """As `count_tokens`, for async code. Inputs are copied by the call itself."""
        call = deferred(
            lambda: self._tokenize(RouterAPI.count_tokens, inputs, continue_final_message, add_generation_prompt)
        )
        return self._client.loop.call_async(call)

    @overload
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...
    @overload
    def decode(self, token_ids: Sequence[Sequence[int]], *, skip_special_tokens: bool = False) -> list[str]: ...
    @overload
    def decode(self, token_ids: Vector, *, skip_special_tokens: bool = False) -> Any: ...
    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> Any:
        """Returns the text of token ids, or the texts of several lists of them.

        Args:
            token_ids: a list of ids, or a list of such lists: lists, numpy arrays or CPU tensors, of shape [T] or
                [lists, T]. An empty list is one without ids, and its text is "".
            skip_special_tokens: leave special tokens, such as the end of the turn, out of the text.

        Returns:
            A text for a list of ids; a list of texts for a list of lists.

        Raises:
            PromptError: `token_ids` is neither, or holds something else than ids of the vocabulary; the message has
                the index.
            TemplateError: the template of this sampler object cannot be built.
            RequestError: another argument is invalid.
            DeadlineError: there was no answer within 600 s.
            ServiceError: the service's router failed or cannot be reached.
        """
        return self._client.loop.call(self._decode(token_ids, skip_special_tokens))

    @overload
    def decode_async(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = False
    ) -> Coroutine[Any, Any, str]: ...
    @overload
    def decode_async(
        self, token_ids: Sequence[Sequence[int]], *, skip_special_tokens: bool = False
    ) -> Coroutine[Any, Any, list[str]]: ...
    @overload
    def decode_async(self, token_ids: Vector, *, skip_special_tokens: bool = False) -> Coroutine[Any, Any, Any]: ...
    def decode_async(self, token_ids: Any, *, skip_special_tokens: bool = False) -> Coroutine[Any, Any, Any]:
        """As `decode`, for async code. The ids are copied by the call itself; errors are raised when it is awaited."""
        return self._client.loop.call_async(deferred(lambda: self._decode(token_ids, skip_special_tokens)))

    async def _as_lists(self, call: Call[TokenLists]) -> list[list[int]]:
        return list(await self._client.loop.call_async(call))

    def _tokenize(
        self,
        method: Callable[Concatenate[RouterAPI, Inputs, ...], Awaitable[T]],
        inputs: Inputs,
        continue_final_message: bool | None,
        add_generation_prompt: bool,
    ) -> Call[T]:
        """Calls a method of the router with inputs as they are now, and the template of this sampler object."""
        return self._client.call(
            timing.CONTROL_TIMEOUT_S,
            method,
            self._client.snapshot(inputs),
            template=self._template,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
        )

    def _decode(self, token_ids: Any, skip_special_tokens: bool) -> Call[str | list[str]]:
        lists, single = read_token_ids(token_ids)
        return self._client.call(
            timing.CONTROL_TIMEOUT_S,
            RouterAPI.decode,
            lists[0] if single else TokenLists.of(lists),
            template=self._template,
            skip_special_tokens=skip_special_tokens,
        )
