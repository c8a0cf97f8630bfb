"""The store of sessions: acknowledged turns survive, sessions end for good, and there are bounds."""

from __future__ import annotations

import asyncio
import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.support.eventually import eventually
from tests.support.sessions import args, raw_turn
from twinkle_serve.errors import ConfigError, SessionError, SessionGoneError, SessionNotFoundError, StoreError
from twinkle_serve.sessions import LocalSessions, Query, SessionStore, Turn, trajectory
from twinkle_serve.sessions import store as store_module
from twinkle_serve.sessions.codec import pack_turn, unpack_turn
from twinkle_serve.sessions.records import Sample
from twinkle_serve.sessions.turn import RAW


class Clock:
    """A time that the test sets."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "directory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Storage of a store: its own memory or a directory."""
    return None if request.param == "memory" else tmp_path / "sessions"


def turns_of(store: SessionStore, session: str) -> list[str]:
    return list(dict.fromkeys(node["turn"] for node in trajectory(store.read(session))["nodes"]))


def names(store: SessionStore) -> list[str]:
    return [info.id for info in store.infos()]


def two_turns() -> list[Turn]:
    first = raw_turn(0)
    return [first, raw_turn(1, first)]


# -- turns ---------------------------------------------------------------------------------------


def test_turn_that_is_appended_twice_is_kept_once(place: Path | None) -> None:
    """A gateway repeats a call whose answer was lost; also with another store in between."""
    store = SessionStore(args(), place)
    first, second = two_turns()
    assert [store.append("s", turn) for turn in (first, first, second, first)] == [[0], [0], [1], [0]]
    if place is not None:
        store = SessionStore(args(), place)
    assert [store.append("s", turn) for turn in (second, first)] == [[1], [0]]
    assert turns_of(store, "s") == ["turn 0", "turn 1"]


def test_acknowledged_turns_are_there_for_the_next_store(tmp_path: Path) -> None:
    """With all that was recorded; sessions are told apart, and those that ended stay ended."""
    store = SessionStore(args(), tmp_path)
    for turn in two_turns():
        store.append("s", turn)
    store.append("other", raw_turn(7))
    store.append("ended", raw_turn(8))
    assert store.end("ended")
    before = {name: trajectory(store.read(name)) for name in ("s", "other")}
    again = SessionStore(args(), tmp_path)
    after = {name: trajectory(again.read(name)) for name in ("s", "other")}
    assert {name: tree["nodes"] for name, tree in after.items()} == {
        name: tree["nodes"] for name, tree in before.items()
    }
    with pytest.raises(SessionGoneError, match="session 'ended' was deleted"):
        again.append("ended", raw_turn(9))
    assert again.append("s", raw_turn(2, None)) == [2]


@pytest.mark.parametrize("kept", ["nothing", "part", "all but a byte", "damaged"])
def test_incomplete_last_record_is_dropped_and_the_rest_survives(tmp_path: Path, kept: str) -> None:
    """The process ended while it wrote, so nobody was told of that turn; it can be appended again."""
    store = SessionStore(args(), tmp_path)
    first, second = two_turns()
    store.append("s", first)
    (path,) = tmp_path.glob("*.turns")
    size = path.stat().st_size
    store.append("s", second)
    data = bytearray(path.read_bytes())
    if kept == "damaged":
        data[-1] ^= 1
    else:
        del data[{"nothing": size, "part": (size + len(data)) // 2, "all but a byte": len(data) - 1}[kept] :]
    path.write_bytes(data)
    again = SessionStore(args(), tmp_path)
    assert again.append("s", second) == [1]
    assert turns_of(again, "s") == ["turn 0", "turn 1"]
    assert turns_of(SessionStore(args(), tmp_path), "s") == ["turn 0", "turn 1"]


@pytest.mark.parametrize("kept", [0, 5, 60, 200])
def test_session_whose_first_record_is_incomplete_has_not_begun(tmp_path: Path, kept: int) -> None:
    """Its first turn was not acknowledged."""
    store = SessionStore(args(), tmp_path)
    store.append("s", raw_turn(0))
    (path,) = tmp_path.glob("*.turns")
    os.truncate(path, kept)
    again = SessionStore(args(), tmp_path)
    with pytest.raises(SessionNotFoundError):
        again.read("s")
    assert again.append("s", raw_turn(0)) == [0]
    assert turns_of(SessionStore(args(), tmp_path), "s") == ["turn 0"]


def test_disk_that_cannot_be_written_fails_the_turn_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session is as it was, and the turn can be appended once there is room."""
    store = SessionStore(args(), tmp_path)
    first, second = two_turns()
    store.append("s", first)
    (path,) = tmp_path.glob("*.turns")
    size = path.stat().st_size
    original = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *mode: Full(original(path, *mode)))
        for session, turn in (("s", second), ("new", first)):
            with pytest.raises(StoreError, match=r"No space left on device. Make room there"):
                store.append(session, turn)
    assert path.stat().st_size == size and names(store) == ["s"]
    assert store.append("s", second) == [1] and store.append("new", first) == [0]
    assert turns_of(SessionStore(args(), tmp_path), "s") == ["turn 0", "turn 1"]


def test_files_of_another_format_are_refused(tmp_path: Path) -> None:
    """Rather than read wrongly."""
    SessionStore(args(), tmp_path).append("s", raw_turn(0))
    from twinkle_serve.sessions import disk

    (path,) = tmp_path.glob("*.turns")
    path.write_bytes(disk._framed(b'{"format": 2, "session": "s", "created": 0}'))
    with pytest.raises(ConfigError, match="has format 2, this is format 1"):
        SessionStore(args(), tmp_path)


ids = arrays(np.int32, st.integers(0, 5), elements=st.integers(0, 2**31 - 1))
text = st.none() | st.text(st.characters(), max_size=5)
samples = st.builds(
    Sample,
    tokens=ids,
    logprobs=st.none() | arrays(np.float32, st.integers(0, 5), elements=st.floats(-9, 0, width=32)),
    weight_versions=st.lists(st.tuples(st.text(max_size=3), st.integers(0, 9)), max_size=2).map(tuple),
    adapter=st.text(max_size=3),
    seed=st.none() | st.integers(0, 2**62),
    stop_reason=st.sampled_from(["stop", "length"]),
    engine=st.text(max_size=3),
    reply=st.binary(max_size=9),
    shown=st.binary(max_size=9),
    checksum=st.integers(0, 2**32 - 1),
    keys=st.binary(max_size=9),
    text=text,
)
turns = st.builds(
    Turn,
    id=st.text(max_size=5),
    root=st.binary(max_size=16),
    raw=st.booleans(),
    parent=st.none() | st.integers(0, 9),
    branch=st.sampled_from(["", "retry"]),
    messages=st.binary(max_size=9),
    keys=st.binary(max_size=9),
    checksums=st.lists(st.integers(0, 2**32 - 1), max_size=2).map(tuple),
    tools=st.binary(max_size=9),
    replaces=st.booleans(),
    assistant_start=st.integers(0, 9),
    written=text,
    prompt=ids,
    prompt_length=st.integers(0, 9),
    prompt_checksum=st.integers(0, 2**32 - 1),
    text=text,
    logprobs_mode=st.text(max_size=3),
    created=st.floats(0, 1e10),
    samples=st.lists(samples, max_size=3).map(tuple),
)


@given(turn=turns)
def test_every_turn_is_read_as_it_was_written(turn: Turn) -> None:
    """Arrays too, which cannot be changed afterwards."""
    again = unpack_turn(pack_turn(turn))
    assert repr(again) == repr(turn)
    assert not again.prompt.flags.writeable and again.prompt.flags.aligned


# -- ends ----------------------------------------------------------------------------------------


def test_session_ends_for_good(place: Path | None) -> None:
    """Its id does not begin another one; to end it again does nothing."""
    store = SessionStore(args(), place)
    assert not store.end("s")
    store.append("s", raw_turn(0))
    assert store.end("s") and not store.end("s")
    for call in (
        lambda: store.find("s", Query(root=RAW, text="")),
        lambda: store.append("s", raw_turn(0)),
        lambda: store.read("s"),
    ):
        with pytest.raises(SessionGoneError, match=r"session 's' was deleted. Begin another one, with another id"):
            call()
    assert names(store) == []
    assert place is None or not list(place.glob("*.turns"))


def test_session_ends_when_it_was_not_used_for_its_lease(place: Path | None, clock: Clock) -> None:
    """Each use renews it; a turn that takes longer holds it. A new store knows the time of the last use."""
    store = SessionStore(args(lease_s=10.0), place, clock=clock)
    for name in ("s", "held", "idle"):
        store.append(name, raw_turn(0))
    clock.now += 6
    store.find("s", Query(root=RAW, text=""))
    store.find("held", Query(root=RAW, text=""), hold_s=100)
    if place is not None:
        store = SessionStore(args(lease_s=10.0), place, clock=clock)
    clock.now += 6
    assert names(store) == ["s", "held"]
    with pytest.raises(SessionGoneError, match=r"session 'idle' expired after 10 s without use"):
        store.read("idle")
    clock.now += 40
    assert names(store) == ["held"]
    assert store.expire() == pytest.approx(54)
    if place is not None:
        store = SessionStore(args(lease_s=10.0), place, clock=clock)
        with pytest.raises(SessionGoneError, match="session 's' expired"):
            store.read("s")
        assert names(store) == ["held"]


def test_turn_of_a_session_that_ended_meanwhile_is_refused(place: Path | None) -> None:
    """Also if its end has been forgotten."""
    store = SessionStore(args(), place)
    with pytest.raises(SessionGoneError, match="session 's' has ended since the turn began"):
        store.append("s", two_turns()[1])


def test_number_of_remembered_ends_is_bounded(place: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are forgotten, on disk too."""
    monkeypatch.setattr(store_module, "MAX_ENDED", 3)
    store = SessionStore(args(), place)
    for i in range(20):
        store.append(f"s{i}", raw_turn(0))
        store.end(f"s{i}")
        if place is not None and i % 7 == 6:
            store = SessionStore(args(), place)
    for i in range(17, 20):
        with pytest.raises(SessionGoneError):
            store.read(f"s{i}")
    with pytest.raises(SessionNotFoundError, match="session 's0' does not exist: its first turn makes it"):
        store.read("s0")
    if place is not None:
        assert len((place / "ended.jsonl").read_bytes().splitlines()) <= 7


def test_purge_deletes_and_forgets_everything(place: Path | None) -> None:
    """A service of the same name begins without sessions."""
    store = SessionStore(args(), place)
    for name in ("a", "b"):
        store.append(name, raw_turn(0))
    store.end("a")
    store.purge()
    for again in [store] if place is None else [store, SessionStore(args(), place)]:
        assert names(again) == []
        assert again.append("a", raw_turn(0)) == [0]
        again.purge()


# -- bounds --------------------------------------------------------------------------------------


def test_one_session_too_many_ends_the_least_recently_used(place: Path | None, clock: Clock) -> None:
    """Not the first one, if that was used since; in the order in which a new store finds them."""
    store = SessionStore(args(max_sessions=3), place, clock=clock)
    for name in "abc":
        store.append(name, raw_turn(0))
        clock.now += 1
    store.find("a", Query(root=RAW, text=""))
    if place is not None:
        store = SessionStore(args(max_sessions=3), place, clock=clock)
    store.append("d", raw_turn(0))
    assert names(store) == ["c", "a", "d"]
    with pytest.raises(SessionGoneError, match=r"session 'b' was evicted: there are 3 sessions \(sessions.max"):
        store.read("b")


def test_bytes_on_disk_are_bounded(tmp_path: Path) -> None:
    """The least recently used sessions end; a session that is too large alone is refused."""
    limit = 20_000
    store = SessionStore(args(disk_bytes=limit), tmp_path)
    for i in range(40):
        store.append(f"s{i}", raw_turn(0, tokens=150))
        assert sum(path.stat().st_size for path in tmp_path.glob("*.turns")) <= limit + 200
    assert 5 < len(names(store)) < 20 and names(store)[-1] == "s39"
    assert sum(info.size_bytes for info in store.infos()) == sum(p.stat().st_size for p in tmp_path.glob("*.turns"))
    with pytest.raises(SessionGoneError, match=r"was evicted: all sessions have 20000 bytes \(sessions.disk_bytes\)"):
        store.read("s0")
    kept = names(store)
    with pytest.raises(SessionError, match=r"session 'large' would have \d+ bytes with this turn, and all .* 20000"):
        store.append("large", raw_turn(0, tokens=5_000))
    assert names(store) == kept


def test_sessions_beyond_the_memory_are_read_from_disk(tmp_path: Path) -> None:
    """With a directory none ends; memory stays within the bound, but for the session in use."""
    store = SessionStore(args(memory_bytes=100_000), tmp_path)
    first, second = two_turns()
    for i in range(60):
        store.append(f"s{i}", first)
    in_memory = [entry.id for entry in store._sessions.values() if entry.tree is not None]
    assert len(names(store)) == 60 and 0 < len(in_memory) < 30 and store._memory <= 100_000
    for i in range(60):
        assert store.append(f"s{i}", second) == [1]
        assert turns_of(store, f"s{i}") == ["turn 0", "turn 1"]


def test_without_a_directory_memory_bounds_the_sessions(clock: Clock) -> None:
    """They have nowhere else to go."""
    store = SessionStore(args(memory_bytes=100_000), clock=clock)
    for i in range(60):
        store.append(f"s{i}", raw_turn(0))
    assert 5 < len(names(store)) < 30 and names(store)[-1] == "s59"
    with pytest.raises(SessionGoneError, match="bytes of memory"):
        store.read("s0")


@pytest.mark.parametrize("session", ["", "x" * 257, "a\nb", "\ud800", 3, None])
def test_invalid_id_is_refused(session: Any) -> None:
    """Before anything is looked up."""
    store = SessionStore(args())
    for call in (lambda: store.append(session, raw_turn(0)), lambda: store.read(session), lambda: store.end(session)):
        with pytest.raises(SessionError, match="must be 1 to 256 printable characters"):
            call()


# -- calls ---------------------------------------------------------------------------------------


async def test_calls_from_many_gateways_are_one_after_another(tmp_path: Path) -> None:
    """None is lost, and each turn has its own nodes."""
    sessions = LocalSessions(SessionStore(args(), tmp_path))
    turn = raw_turn(0)
    answers = await asyncio.gather(
        *(sessions.append_turn(f"s{i % 3}", replace(turn, id=str(i // 2))) for i in range(60))
    )
    assert len(answers) == 60
    for info in await sessions.list_sessions():
        nodes = trajectory(await sessions.read_session(info.id))["nodes"]
        assert len({node["turn"] for node in nodes}) == len(nodes) == 20
    assert await sessions.end_session("s0") and not await sessions.end_session("s0")
    await sessions.purge_sessions()
    assert await sessions.list_sessions() == []


async def test_expired_sessions_are_removed_while_nothing_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their files too."""
    monkeypatch.setattr("twinkle_serve.sessions.client.SWEEP_S", 0.01)
    sessions = LocalSessions(SessionStore(args(lease_s=0.05), tmp_path))
    await sessions.append_turn("s", raw_turn(0))
    await eventually(lambda: not list(tmp_path.glob("*.turns")), 10)
