"""The tree of a session's turns."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.messages import ids_checksum
from twinkle_serve.errors import ServiceError, SessionError
from twinkle_serve.sessions.canonical import MessageKey, unpack_keys
from twinkle_serve.sessions.records import NO_IDS, Branch, Found, Query, Sample, Step, Turn

TURN_BYTES = 1_500
"""Approximate memory of a turn, besides its messages, keys and arrays."""
NODE_BYTES = 2_000
"""Approximate memory of a node, besides the same."""
MESSAGE_BYTES = 600
"""Approximate memory of a message's place in the tree."""


class Place:
    """A place in a conversation, after some of its messages."""

    __slots__ = ("has_samples", "next", "node", "reasonings")

    def __init__(self, reasonings: Iterable[bytes] = (), node: Node | None = None) -> None:
        """
        Args:
            reasonings: keys that the reasoning of the message before may have.
            node: the sample that ends here.
        """
        self.reasonings, self.node = frozenset(reasonings), node
        self.next: dict[bytes, list[Place]] = {}
        """Places after one more message, by its digest."""
        self.has_samples = False
        """Whether a prompt ends here."""

    def after(self, key: MessageKey) -> list[Place]:
        """Returns the places after one more message."""
        return [place for place in self.next.get(key.digest, ()) if key.reasoning in place.reasonings]

    def add_given(self, key: MessageKey) -> Place:
        """Returns the place after a message that the client wrote."""
        for place in self.after(key):
            if place.node is None:
                return place
        place = Place([key.reasoning])
        self.next.setdefault(key.digest, []).append(place)
        return place

    def add_sample(self, node: Node) -> None:
        """Adds the place after a sample's message. The client may send it back in several forms."""
        self.has_samples = True
        keys = unpack_keys(node.sample.keys)
        place = node.after = Place([b"", *(key.reasoning for key in keys)], node)
        for digest in dict.fromkeys(key.digest for key in keys):
            self.next.setdefault(digest, []).append(place)


class Node:
    """A sample, with everything before it."""

    __slots__ = (
        "after",
        "before",
        "checksum",
        "id",
        "length",
        "parent",
        "sample",
        "text_checksum",
        "text_length",
        "turn",
    )

    def __init__(self, number: int, parent: Node | None, turn: Turn, sample: Sample) -> None:
        self.id, self.parent, self.turn, self.sample = number, parent, turn, sample
        self.length = turn.prompt_length + len(sample.tokens)
        """Number of token ids."""
        self.checksum = ids_checksum(sample.tokens, before=turn.prompt_checksum)
        self.text_length, self.text_checksum = self._measure_text()
        self.before: Place | None = None
        """Place at the end of its prompt."""
        self.after: Place | None = None
        """Place after its message."""

    @property
    def can_be_followed(self) -> bool:
        """Whether messages can follow its tokens."""
        return bool(self.sample.reply)

    @property
    def path(self) -> list[Node]:
        """The nodes up to this one, the first of the conversation first."""
        path: list[Node] = []
        node: Node | None = self
        while node is not None:
            path.append(node)
            node = node.parent
        return path[::-1]

    def ids(self) -> NDArray[np.int32]:
        """Returns all token ids, of prompts and samples. Shape [length]."""
        parts = [part for node in self.path for part in (node.turn.prompt, node.sample.tokens)]
        return np.concatenate([*parts, NO_IDS])

    def text(self) -> str:
        """Returns the text of all tokens, where it is known."""
        return "".join(part or "" for node in self.path for part in (node.turn.text, node.sample.text))

    def steps(self) -> tuple[Step, ...]:
        """Returns the messages that each node on the path adds."""
        return tuple(
            Step(
                messages=node.turn.messages,
                checksums=node.turn.checksums,
                reply=node.sample.reply,
                checksum=node.sample.checksum,
                replaces=node.turn.replaces,
            )
            for node in self.path
        )

    def _measure_text(self) -> tuple[int | None, int]:
        """Returns number of characters and checksum of the text; None and 0 if a part is unknown."""
        texts = (self.turn.text, self.sample.text)
        known, checksum = (0, 0) if self.parent is None else (self.parent.text_length, self.parent.text_checksum)
        if known is None or None in texts:
            return None, 0
        text = "".join(filter(None, texts))
        return known + len(text), text_checksum(text, checksum)


class SessionTree:
    """The turns of a session, and where its conversations go on. Not thread-safe."""

    def __init__(self, turns: Iterable[Turn] = ()) -> None:
        self.turns: list[Turn] = []
        self.nodes: list[Node] = []
        self._roots: dict[bytes, Place] = {}
        """Beginnings of conversations, by their root key."""
        self._raw: dict[int, list[Node]] = {}
        """Nodes of raw prompts by their number of tokens."""
        self._texts: dict[int, list[Node]] = {}
        """Nodes of raw prompts by their number of characters."""
        self._numbers: dict[str, range] = {}
        """Nodes of each turn, by its id."""
        self._prompts: set[tuple[int | None, int, int]] = set()
        """Prompts that were sampled: node before, length and checksum."""
        self.memory_bytes = 0
        """Approximate memory of all turns."""
        self._followed: set[int | None] = set()
        """Nodes that turns follow; None once there is a turn."""
        for turn in turns:
            self.add(turn)

    def nodes_of(self, turn_id: str) -> list[int] | None:
        """Returns the nodes of a turn that was added; None if it was not."""
        numbers = self._numbers.get(turn_id)
        return None if numbers is None else list(numbers)

    def leaves(self) -> list[Node]:
        """Returns the nodes that no turn follows, in the order in which they were added."""
        return [node for node in self.nodes if node.id not in self._followed]

    # -- adding ----------------------------------------------------------------------------------

    def checked(self, turn: Turn) -> Turn:
        """Returns a turn as it is to be added, with the reason why it is a branch.

        Raises:
            SessionError: there is no such node before it.
            ServiceError: its prompt does not begin with the tokens of that node.
        """
        length, checksum = 0, 0
        if turn.parent is not None:
            if not 0 <= turn.parent < len(self.nodes):
                raise SessionError(f"node {turn.parent} does not exist, the session has {len(self.nodes)} nodes.")
            parent = self.nodes[turn.parent]
            length, checksum = parent.length, parent.checksum
        joined = (length + len(turn.prompt), ids_checksum(turn.prompt, before=checksum))
        if joined != (turn.prompt_length, turn.prompt_checksum):
            raise ServiceError(
                f"a bug in sessions: turn {turn.id} was sampled from a prompt of {turn.prompt_length} tokens with the "
                f"checksum {turn.prompt_checksum}, and node {turn.parent} with its new tokens has {joined[0]} with "
                f"{joined[1]}."
            )
        return replace(turn, branch=self._branch(turn))

    def _branch(self, turn: Turn) -> Branch:
        if _prompt(turn) in self._prompts:
            return "retry"
        if turn.branch or turn.parent not in self._followed:
            return turn.branch
        return "root" if turn.parent is None else "fork"

    def add(self, turn: Turn) -> list[int]:
        """Adds a turn that `checked` returned. Returns the numbers of its nodes."""
        parent = None if turn.parent is None else self.nodes[turn.parent]
        first = len(self.nodes)
        nodes = [Node(first + i, parent, turn, sample) for i, sample in enumerate(turn.samples)]
        self.turns.append(turn)
        self.nodes += nodes
        self.memory_bytes += _memory(turn)
        self._numbers[turn.id] = range(first, len(self.nodes))
        self._prompts.add(_prompt(turn))
        self._followed |= {turn.parent, None}
        if turn.raw:
            self._add_raw(nodes)
        else:
            self._add_places(turn, parent, nodes)
        return [node.id for node in nodes]

    def _add_raw(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            self._raw.setdefault(node.length, []).append(node)
            if node.text_length is not None:
                self._texts.setdefault(node.text_length, []).append(node)

    def _add_places(self, turn: Turn, parent: Node | None, nodes: Sequence[Node]) -> None:
        place = self._roots.setdefault(turn.root, Place()) if parent is None else parent.after
        keys = unpack_keys(turn.keys)
        if turn.replaces:  # the last message before the samples is the beginning of theirs
            place = parent.before if parent is not None and not keys else place
            keys = keys[:-1]
        assert place is not None, "the node before is of messages, too"
        for key in keys:
            place = place.add_given(key)
        for node in nodes:
            node.before = place
            place.add_sample(node)

    # -- finding ---------------------------------------------------------------------------------

    def find(self, query: Query) -> Found:
        """Returns the longest part of a conversation that the session has.

        Of samples with equal messages, it is of the latest turn, and there the first one.
        """
        if query.ids is not None:
            return self._found(*self._find_ids(query.ids))
        if query.text is not None:
            return self._found(*self._find_text(query.text))
        root = self._roots.get(query.root)
        if root is None:
            return Found(branch="tools" if self._roots else "root" if self.turns else "")
        return self._find_messages(root, query.keys)

    def _find_messages(self, root: Place, keys: Sequence[MessageKey]) -> Found:
        places, depth = [root], 0
        best: Node | None = None
        matched = empty = 0
        for count, key in enumerate(keys, 1):
            if not (following := [after for place in places for after in place.after(key)]):
                break
            places, depth = following, count
            nodes = [place.node for place in places if place.node is not None]
            followed = [node for node in nodes if node.can_be_followed]
            if followed:
                best, matched = latest(followed), count
            elif nodes:
                empty = count
        found = self._found(best, matched)
        if empty > matched:
            return replace(found, branch="empty")
        if depth < len(keys) and keys[depth].is_reply and any(place.has_samples for place in places):
            return replace(found, branch="edited")
        return found

    def _find_ids(self, ids: NDArray[np.int32]) -> tuple[Node | None, int]:
        checksum, start = 0, 0
        candidates: list[Node] = []
        for length in sorted(length for length in self._raw if length <= len(ids)):
            checksum, start = ids_checksum(ids[start:length], before=checksum), length
            if nodes := [node for node in self._raw[length] if node.checksum == checksum]:
                candidates.append(latest(nodes))
        for node in reversed(candidates):
            if np.array_equal(node.ids(), ids[: node.length]):
                return node, node.length
        return None, 0

    def _find_text(self, text: str) -> tuple[Node | None, int]:
        checksum, start = 0, 0
        candidates: list[tuple[Node, int]] = []
        for length in sorted(length for length in self._texts if length <= len(text)):
            checksum, start = text_checksum(text[start:length], checksum), length
            if nodes := [node for node in self._texts[length] if node.text_checksum == checksum]:
                candidates.append((latest(nodes), length))
        for node, length in reversed(candidates):
            if text.startswith(node.text()):
                return node, length
        return None, 0

    def _found(self, node: Node | None, matched: int) -> Found:
        if node is None:
            return Found(branch="root" if self.turns else "")
        return Found(
            node=node.id,
            matched=matched,
            ids=node.ids(),
            steps=() if node.turn.raw else node.steps(),
            tools=node.path[0].turn.tools,
            assistant_start=node.turn.assistant_start,
            written=node.turn.written,
        )


def latest(nodes: Sequence[Node]) -> Node:
    """Returns the node of the latest turn, and there of the first sample."""
    newest = max(nodes, key=lambda node: node.id).turn
    return next(node for node in nodes if node.turn is newest)


def text_checksum(text: str, before: int = 0) -> int:
    """Checksum of a text, or of one that continues a text with the checksum `before`."""
    return zlib.crc32(text.encode(errors="surrogatepass"), before)


def _prompt(turn: Turn) -> tuple[int | None, int, int]:
    return turn.parent, turn.prompt_length, turn.prompt_checksum


def _memory(turn: Turn) -> int:
    texts = [turn.messages, turn.keys, turn.tools, turn.text or "", turn.note]
    size = TURN_BYTES + turn.prompt.nbytes + MESSAGE_BYTES * len(turn.checksums)
    for sample in turn.samples:
        texts += [sample.reply, sample.shown, sample.keys, sample.text or ""]
        size += NODE_BYTES + sample.tokens.nbytes + (0 if sample.logprobs is None else sample.logprobs.nbytes)
    return size + sum(map(len, texts))
