"""The journal's bytes: what is whole is believed, what is torn or damaged never is."""

import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from prism_agent import journal_log
from prism_agent.journal_log import (
    MAGIC,
    JournalFormatError,
    JournalLog,
    forget_frame,
    put_frame,
)

KEYS = st.sampled_from(["sb-1", "sb-2", "sb-33", "s"])
CONTENTS = st.binary(max_size=200)
SAID = st.lists(st.tuples(KEYS, st.none() | CONTENTS), max_size=12)


def frame_of(key: str, content: bytes | None) -> bytes:
    return forget_frame(key) if content is None else put_frame(key, content)


def replayed(data: bytes) -> tuple[dict[str, bytes], int]:
    log = JournalLog()
    valid = log.replay(data)
    log.check()
    return dict(log.records()), valid


def state_after(said: list[tuple[str, bytes | None]]) -> dict[str, bytes]:
    state: dict[str, bytes] = {}
    for key, content in said:
        if content is None:
            state.pop(key, None)
        else:
            state[key] = content
    return state


@given(SAID)
def test_the_last_word_on_each_key_counts(said: list[tuple[str, bytes | None]]) -> None:
    data = MAGIC + b"".join(frame_of(*each) for each in said)
    assert replayed(data) == (state_after(said), len(data))


@given(SAID, st.data())
def test_a_torn_end_is_never_believed(
    said: list[tuple[str, bytes | None]], data: st.DataObject
) -> None:
    frames = [frame_of(*each) for each in said]
    whole = MAGIC + b"".join(frames)
    length = data.draw(st.integers(0, len(whole)))
    # What a file system leaves of a write that the machine did not live to see done.
    rest = data.draw(st.sampled_from([b"", bytes(64), b"\xff" * 64]))
    count, end = 0, len(MAGIC)
    while length >= len(MAGIC) and count < len(frames) and end + len(frames[count]) <= length:
        end += len(frames[count])
        count += 1
    if length < len(MAGIC):
        if rest and not MAGIC.startswith((whole[:length] + rest)[: len(MAGIC)]):
            with pytest.raises(JournalFormatError):
                replayed(whole[:length] + rest)
            return
        count, end = 0, 0
    assert replayed(whole[:length] + rest) == (state_after(said[:count]), end)


@given(SAID.filter(bool), st.data())
def test_nothing_is_believed_from_a_damaged_frame_on(
    said: list[tuple[str, bytes | None]], data: st.DataObject
) -> None:
    frames = [frame_of(*each) for each in said]
    number = data.draw(st.integers(0, len(frames) - 1))
    bit = data.draw(st.integers(0, 8 * len(frames[number]) - 1))
    damaged = bytearray(frames[number])
    damaged[bit // 8] ^= 1 << bit % 8
    before = MAGIC + b"".join(frames[:number])
    whole = before + bytes(damaged) + b"".join(frames[number + 1 :])
    assert replayed(whole) == (state_after(said[:number]), len(before))


def test_a_frame_inside_of_a_record_is_not_a_frame() -> None:
    forged = put_frame("sb-1", b"the user's")
    whole = MAGIC + put_frame("sb-2", b"ours" + forged)
    assert replayed(whole)[0] == {"sb-2": b"ours" + forged}
    # Nor when what is around it is damaged.
    assert replayed(whole.replace(b"ours", b"torn"))[0] == {}


def test_a_file_of_another_format_is_refused() -> None:
    with pytest.raises(JournalFormatError):
        replayed(b"PRISMJ9\n" + put_frame("sb-1", b""))
    assert replayed(b"") == ({}, 0)
    assert replayed(MAGIC[:3]) == ({}, 0)


def test_a_record_that_could_not_be_read_again_is_not_written() -> None:
    with pytest.raises(ValueError, match="at most"):
        put_frame("sb-1", bytes(journal_log._PAYLOAD_BYTES_MAX))


class Rewrites(RuleBasedStateMachine):
    """Frames are added, and the file is now and then replaced by what it says."""

    @initialize()
    def begin(self) -> None:
        self.log = JournalLog()
        self.data = self.log.whole()
        self.log.rewritten(len(self.data))
        self.state: dict[str, bytes] = {}

    @rule(key=KEYS, content=CONTENTS)
    def put(self, key: str, content: bytes) -> None:
        frame = put_frame(key, content)
        self.data += frame
        self.log.wrote(key, frame, forgets=False)
        self.state[key] = content

    @rule(key=KEYS)
    def forget(self, key: str) -> None:
        frame = forget_frame(key)
        self.data += frame
        self.log.wrote(key, frame, forgets=True)
        self.state.pop(key, None)

    @rule()
    def rewrite(self) -> None:
        assert len(self.log.whole()) <= len(self.data)
        self.data = self.log.whole()
        self.log.rewritten(len(self.data))
        assert not self.log.wants_rewrite

    @invariant()
    def says_what_was_said(self) -> None:
        self.log.check()
        assert dict(self.log.records()) == self.state
        assert self.log.file_bytes == len(self.data)
        assert replayed(self.data) == (self.state, len(self.data))
        assert all(key in self.log for key in self.state)


TestRewrites = Rewrites.TestCase


def test_a_file_is_rewritten_when_most_of_it_counts_no_more() -> None:
    log = JournalLog()
    frame = put_frame("sb-1", bytes(100_000))
    while not log.wants_rewrite:
        log.wrote("sb-1", frame, forgets=False)
    assert log.file_bytes < 12 * len(frame)
    log.postpone_rewrite()
    assert not log.wants_rewrite
    for _ in range(12):
        log.wrote("sb-1", frame, forgets=False)
    assert log.wants_rewrite


def test_a_large_file_of_what_counts_is_kept() -> None:
    log = JournalLog()
    for number in range(30):
        log.wrote(f"sb-{number}", put_frame(f"sb-{number}", bytes(100_000)), forgets=False)
    assert not log.wants_rewrite
