"""A turn from the side of its caller: the input for the router, and the record for the session."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format import SampledSequence, SampleResponse
from twinkle_serve.data_format import messages as message_format
from twinkle_serve.data_format.features import prompt_of, with_message
from twinkle_serve.data_format.messages import ChatMessage, Encoded, ids_checksum, tools_checksum
from twinkle_serve.data_format.messages import Turn as BegunTurn
from twinkle_serve.data_format.plain import as_items, is_absent, plain
from twinkle_serve.data_format.prompts import InputDict
from twinkle_serve.data_format.token_lists import read_token_ids
from twinkle_serve.errors import PromptError, ServiceError, SessionError
from twinkle_serve.sessions.canonical import CallIds, message_keys, pack_keys, reply_key, root_key
from twinkle_serve.sessions.records import Found, Query, Sample, Turn, dumps, joined_messages, loads

RAW = root_key("raw", None, "")
"""Root key of prompts that are given by ids or text."""


class Conversation:
    """The prompt of a turn as the client sent it: messages, token ids or text."""

    def __init__(self, query: Query, messages: Sequence[ChatMessage] = (), tools: Any = None) -> None:
        """See `of_messages`, `of_ids` and `of_text`."""
        self.query, self.messages, self.tools = query, list(messages), tools

    @classmethod
    def of_messages(cls, messages: object, tools: object = None, variant: str = "") -> Conversation:
        """Reads a conversation of messages, the form of a Trajectory.

        Args:
            messages: a list of dicts with JSON values.
            tools: as in a Trajectory.
            variant: anything else that decides which tokens the messages become, such as options of the chat template.

        Raises:
            PromptError: not a list of dicts.
        """
        items = as_items(messages)
        if not items:
            raise PromptError(f"messages must be a list of at least one message, got {messages!r:.80}.")
        query = Query(root=root_key("messages", tools, variant), keys=tuple(message_keys(items)))
        return cls(query, [plain(message) for message in items], None if is_absent(tools) else plain(tools))

    @classmethod
    def of_ids(cls, ids: object) -> Conversation:
        """Reads a raw prompt of token ids. Raises PromptError for something else."""
        return cls(Query(root=RAW, ids=read_token_ids(ids)[0][0]))

    @classmethod
    def of_text(cls, text: str) -> Conversation:
        """Reads a raw prompt of text."""
        return cls(Query(root=RAW, text=text))


class SessionTurn:
    """A conversation, and the part of it that its session has.

    Guarantees:
        The input begins with the session's own tokens, which are never tokenised again.
    """

    def __init__(self, conversation: Conversation, found: Found) -> None:
        """
        Args:
            found: answer of `SessionsAPI.find_turn` to `conversation.query`.
        """
        self.found, self._query = found, conversation.query
        self._covered, self._checksums = joined_messages(found.steps)
        self._tools = conversation.tools if found.node is None else loads(found.tools)
        self._following = self._with_known_ids(conversation.messages)

    @property
    def continues_message(self) -> bool:
        """Whether the conversation ends with a sampled message, which a sample of `input` continues."""
        return self._query.text is None and self._query.ids is None and bool(self._covered) and not self._following

    @property
    def rest(self) -> str:
        """The text after the session's own tokens, of a prompt given by text. Encode it without special tokens at its
        beginning unless `found.node` is None, and pass its ids to `input_after`."""
        return "" if self._query.text is None else self._query.text[self.found.matched :]

    def input_after(self, ids: object) -> InputDict:
        """Returns the router's input for a prompt given by text.

        Args:
            ids: token ids of `rest`.
        """
        return {"input_ids": np.concatenate([self.found.ids, np.asarray(ids, np.int32)])}

    @property
    def input(self) -> InputDict:
        """The router's input for a prompt given by messages or ids: an InputFeature after the first turn."""
        if self._query.ids is not None:
            return {"input_ids": self._query.ids}
        tools = {} if self._tools is None else {"tools": self._tools}
        messages = {"messages": [*self._covered, *self._following]}
        if self.found.node is None:
            return {**messages, **tools}
        encoded = Encoded(
            ids=len(self.found.ids),
            checksum=ids_checksum(self.found.ids),
            messages=self._checksums,
            tools=tools_checksum(self._tools),
            assistant_start=self.found.assistant_start,
        )
        if self.found.written is not None:
            encoded["written"] = self.found.written
        return {**messages, **tools, "input_ids": self.found.ids, "encoded": encoded}

    def record(
        self,
        response: SampleResponse,
        shown: Sequence[ChatMessage] | None = None,
        texts: Sequence[str] | None = None,
        turn_id: str | None = None,
        note: str = "",
    ) -> Turn:
        """Returns the turn for `SessionsAPI.append_turn`.

        Args:
            response: the router's answer to this turn's input, one prompt.
            shown: the message of each sample as the client was given it; None: as the template's parser makes it.
            texts: the text of all tokens of each sample, special tokens and stop strings included, of a raw prompt.
                None: the client cannot continue them by text.
            turn_id: identifies the turn; None: a new id.
            note: text of the caller's own, kept with the turn.

        Raises:
            SessionError: the prompt does not begin with the session's tokens.
            TemplateError: the template's tool parser is not registered in this process.
        """
        prompt, begun = self._prompt_of(response)
        ids = self.found.ids
        raw = self._query.keys == ()
        turn = Turn(
            id=turn_id or uuid.uuid4().hex,
            root=self._query.root,
            raw=raw,
            parent=self.found.node,
            branch=self.found.branch,
            prompt=prompt[len(ids) :],
            prompt_length=len(prompt),
            prompt_checksum=ids_checksum(prompt),
            logprobs_mode=response.logprobs_mode,
            note=note,
        )
        sequences = list(response.sequences)
        if raw:
            known = [None] * len(sequences) if texts is None else list(texts)
            samples = [_sample(sequence, text=text) for sequence, text in zip(sequences, known, strict=True)]
            rest = None if self._query.text is None else self.rest
            return replace(turn, text=rest, assistant_start=len(prompt), samples=tuple(samples))
        given = [None] * len(sequences) if shown is None else list(shown)
        samples = [
            self._reply(sequence, begun, len(prompt), message)
            for sequence, message in zip(sequences, given, strict=True)
        ]
        return replace(
            turn,
            messages=dumps(self._following),
            keys=pack_keys(self._query.keys[self.found.matched :]),
            checksums=tuple(map(message_format.checksum, self._following)),
            tools=b"" if self._tools is None or self.found.node is not None else dumps(self._tools),
            replaces=begun.resumed_at is not None,
            assistant_start=len(prompt) if begun.resumed_at is None else begun.resumed_at,
            written=begun.written,
            samples=tuple(samples),
        )

    def _prompt_of(self, response: SampleResponse) -> tuple[NDArray[np.int32], BegunTurn]:
        if len(response) != 1:
            raise ServiceError(f"a bug in sessions: a turn is one prompt, and its response has {len(response)}.")
        prompt, begun = (
            prompt_of(response.sequences[0]) if len(response.sequences) else (response.prompts[0], BegunTurn())
        )
        ids = self.found.ids
        if not np.array_equal(prompt[: len(ids)], ids):
            raise SessionError(
                f"the turn was sampled from a prompt of {len(prompt)} tokens that does not begin with the session's "
                f"{len(ids)} tokens: it was cut, and cannot be a turn of a session. Set truncation_strategy to raise, "
                "or max_length higher."
            )
        return prompt, begun

    def _reply(
        self, sequence: SampledSequence, begun: BegunTurn, prompt_length: int, shown: ChatMessage | None
    ) -> Sample:
        """Returns a sample with its message in both forms."""
        before = [*self._covered, *self._following]
        messages, _ = with_message(sequence, before, self._tools, begun, prompt_length)
        reply = messages[-1] if sequence.tokens else None
        forms = [form for form in (reply, shown) if form is not None]
        return _sample(
            sequence,
            reply=b"" if reply is None else dumps(reply),
            shown=b"" if shown is None or shown == reply else dumps(shown),
            checksum=0 if reply is None else message_format.checksum(reply),
            keys=pack_keys(dict.fromkeys(map(reply_key, forms))),
        )

    def _with_known_ids(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """Returns the messages after the session's own. Tools' results in them refer to the calls by the ids that these
        have in the session, whichever ids the client gave them."""
        ids = CallIds()
        for message in messages[: self.found.matched]:
            ids.add(message)
        following = []
        for message in messages[self.found.matched :]:
            place = ids.place(message.get("tool_call_id"))
            known = None if place is None else self._call_id(*place)
            following.append(message if known is None else {**message, "tool_call_id": known})
            ids.add(message)
        return following

    def _call_id(self, message: int, call: int) -> str | None:
        """Returns the id of a call in one of the session's messages; None if it has none."""
        calls = (self._covered[message].get("tool_calls") or []) if message < len(self._covered) else []
        known = calls[call].get("id") if call < len(calls) else None
        return known if isinstance(known, str) else None


def _sample(sequence: SampledSequence, **fields: Any) -> Sample:
    return Sample(
        tokens=sequence.token_array,
        logprobs=sequence.logprob_array,
        weight_versions=tuple((span.version, span.start) for span in sequence.weight_versions),
        adapter=sequence.adapter,
        seed=sequence.seed,
        stop_reason=sequence.stop_reason,
        engine=sequence.engine,
        **fields,
    )
