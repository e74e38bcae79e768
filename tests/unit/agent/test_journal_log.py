"""The journal's bytes: what is whole is believed, what is torn or damaged never is."""

import struct
import zlib
from itertools import accumulate, pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from prism_agent import journal_log
from prism_agent.journal_log import (
    MAGIC,
    NAMED_BEFORE,
    OLD_MAGIC,
    Damage,
    JournalFormatError,
    JournalLog,
)

MARKER = bytes(range(100, 116))
KEYS = st.sampled_from(["sb-1", "sb-2", "sb-33", "s"])
CONTENTS = st.binary(max_size=200)
Said = list[tuple[str, bytes | None]]
SAID = st.lists(st.tuples(KEYS, st.none() | CONTENTS), max_size=12)


def parts_of(said: Said, is_synced: bool = True) -> list[bytes]:
    """Return a file's begin and its frames; `is_synced`: each was synced before the next."""
    log = JournalLog(MARKER)
    parts = [log.begin()]
    for key, content in said:
        parts.append(log.frame(key, content))
        if is_synced:
            log.synced = log.sequence
    return parts


def replayed(data: bytes) -> tuple[dict[str, bytes], int, Damage]:
    log = JournalLog(bytes(16))
    valid = log.replay(data)
    log.check()
    return dict(log.records()), valid, log.damage


def state_after(said: Said) -> dict[str, bytes]:
    state: dict[str, bytes] = {}
    for key, content in said:
        if content is None:
            state.pop(key, None)
        else:
            state[key] = content
    return state


@given(SAID)
def test_the_last_word_on_each_key_counts(said: Said) -> None:
    data = b"".join(parts_of(said))
    assert replayed(data) == (state_after(said), len(data), Damage())


@given(SAID, st.data())
def test_a_torn_end_is_never_believed(said: Said, data: st.DataObject) -> None:
    begin, *frames = parts_of(said)
    whole = begin + b"".join(frames)
    length = data.draw(st.integers(0, len(whole)))
    # What a file system leaves of a write that the machine did not live to see done.
    rest = data.draw(st.sampled_from([b"", bytes(64), b"\xff" * 64]))
    if length < len(begin):
        if rest:
            with pytest.raises(JournalFormatError):
                replayed(whole[:length] + rest)
        else:
            assert replayed(whole[:length]) == ({}, 0, Damage())
        return
    count, end = 0, len(begin)
    while count < len(frames) and end + len(frames[count]) <= length:
        end += len(frames[count])
        count += 1
    assert replayed(whole[:length] + rest) == (state_after(said[:count]), end, Damage())


def damaged(whole: bytes, first: int, last: int, how: str) -> bytes:
    """Return a file of which the bytes from `first` to `last` are not what was written."""
    length = last + 1 - first
    match how:
        case "zeros":
            region = bytes(length)
        case "flips":
            region = bytes(each ^ 4 for each in whole[first : last + 1])
        case _:
            # Blocks that were written before.
            region = (whole[:first] * length)[:length]
    return whole[:first] + region + whole[last + 1 :]


MANY = st.lists(st.tuples(KEYS, st.none() | CONTENTS), min_size=1, max_size=NAMED_BEFORE)


@given(MANY, st.sampled_from(["zeros", "flips", "old"]), st.data())
def test_a_damaged_region_loses_what_is_in_it_and_says_of_whom(
    said: Said, how: str, data: st.DataObject
) -> None:
    parts = parts_of(said)
    whole = b"".join(parts)
    first = data.draw(st.integers(len(parts[0]), len(whole) - 1))
    last = data.draw(st.integers(first, min(len(whole) - 1, first + 1000)))
    broken = damaged(whole, first, last, how)
    ends = list(accumulate(map(len, parts)))
    spans = list(pairwise(ends))
    hit = [whole[begin:end] != broken[begin:end] for begin, end in spans]
    # What follows the last whole frame cannot be told from an end that is torn.
    count = len(hit)
    while count and hit[count - 1]:
        count -= 1
    state, valid, damage = replayed(broken)
    kept = [each for each, is_hit in zip(said[:count], hit, strict=False) if not is_hit]
    assert (state, valid) == (state_after(kept), ends[count])
    lost = [at for at in range(count) if hit[at]]
    assert damage.frames == len(lost)
    assert damage.size_bytes == sum(spans[at][1] - spans[at][0] for at in lost)
    # Whatever may be older than what was said is known to be that.
    newest = {key: at for at, (key, _) in enumerate(said[:count])}
    assert damage.doubtful == {key for key, at in newest.items() if hit[at]} & state.keys()
    truth = state_after(said[:count])
    assert {key for key in state if state[key] != truth.get(key)} <= damage.doubtful


def test_of_a_large_region_nobody_is_sure() -> None:
    said: Said = [(f"sb-{number}", b"x") for number in range(40)]
    parts = parts_of(said)
    for lost, doubtful in ((NAMED_BEFORE, set()), (NAMED_BEFORE + 1, {"sb-0", "sb-1"})):
        region = parts[3 : 3 + lost]
        whole = b"".join([*parts[:3], bytes(len(b"".join(region))), *parts[3 + lost :]])
        state, valid, damage = replayed(whole)
        assert (len(state), valid, damage.frames) == (40 - lost, len(whole), lost)
        assert damage.doubtful == doubtful


def test_what_a_crash_of_the_machine_has_kept_out_of_order_is_cut_off() -> None:
    said: Said = [("sb-1", b"1"), ("sb-2", b"2"), ("sb-1", b"3"), ("sb-2", b"4")]
    # The third was not synced, so it was not promised, and what came after it neither.
    log = JournalLog(MARKER)
    parts = [log.begin(), log.frame(*said[0]), log.frame(*said[1])]
    log.synced = log.sequence
    parts += [log.frame(*said[2]), log.frame(*said[3])]
    whole = b"".join([*parts[:3], bytes(len(parts[3])), parts[4]])
    assert replayed(whole) == (state_after(said[:2]), len(b"".join(parts[:3])), Damage())
    # A later frame that knows it to be synced: it was there, and has rotted.
    log.synced = log.sequence - 1
    whole += log.frame("sb-3", b"5")
    state, valid, damage = replayed(whole)
    assert (state, valid) == ({"sb-1": b"1", "sb-2": b"4", "sb-3": b"5"}, len(whole))
    assert damage.doubtful == {"sb-1"}


def test_nothing_inside_of_a_record_passes_for_a_frame() -> None:
    # Whatever a user makes up, he does not know the marker.
    forger = JournalLog(bytes(range(16)))
    forged = forger.begin() + forger.frame("sb-9", b"the user's") + old_frame("sb-8", b"too")
    said: Said = [("sb-1", b"a"), ("sb-2", b"ours" + forged), ("sb-3", b"b")]
    whole = b"".join(parts_of(said))
    assert replayed(whole)[0] == state_after(said)
    # Nor when what is around it is damaged.
    state, _, damage = replayed(whole.replace(b"ours", b"torn"))
    assert state == {"sb-1": b"a", "sb-3": b"b"}
    assert damage.frames == 1


def test_a_damaged_begin_is_made_up_for_by_the_first_frame() -> None:
    said: Said = [("sb-1", b"a"), ("sb-2", b"b")]
    begin, first, second = parts_of(said)
    state, valid, damage = replayed(bytes(len(begin)) + first + second)
    assert (state, valid) == (state_after(said), len(begin + first + second))
    assert (damage.regions, damage.doubtful) == (1, set())
    for data in (bytes(len(begin + first)) + second, bytes(len(begin)), bytes(5)):
        with pytest.raises(JournalFormatError):
            replayed(data)


def test_a_file_of_another_format_is_refused() -> None:
    with pytest.raises(JournalFormatError):
        replayed(b"PRISMJ9\n" + b"".join(parts_of([("sb-1", b"")])[1:]))
    assert replayed(b"") == ({}, 0, Damage())
    assert replayed(MAGIC[:3]) == ({}, 0, Damage())


# ── the version before ──


def old_frame(key: str, content: bytes | None) -> bytes:
    """Return a frame as prism-agent 0.1's first versions wrote it."""
    name = key.encode()
    payload = struct.pack("<BB", 2 if content is None else 1, len(name)) + name + (content or b"")
    return struct.pack("<II", len(payload), zlib.crc32(payload, len(payload))) + payload


@given(SAID.filter(bool), st.data())
def test_a_file_of_the_version_before_is_read_up_to_what_is_not_whole(
    said: Said, data: st.DataObject
) -> None:
    frames = [old_frame(*each) for each in said]
    whole = OLD_MAGIC + b"".join(frames)
    assert replayed(whole) == (state_after(said), len(whole), Damage())
    number = data.draw(st.integers(0, len(frames) - 1))
    bit = data.draw(st.integers(0, 8 * len(frames[number]) - 1))
    torn = bytearray(frames[number])
    torn[bit // 8] ^= 1 << bit % 8
    before = OLD_MAGIC + b"".join(frames[:number])
    whole = before + bytes(torn) + b"".join(frames[number + 1 :])
    assert replayed(whole) == (state_after(said[:number]), len(before), Damage())


# ── writing ──


def test_a_record_that_could_not_be_read_again_is_not_written() -> None:
    log = JournalLog(MARKER)
    with pytest.raises(ValueError, match="at most"):
        log.frame("sb-1", bytes(journal_log._PAYLOAD_BYTES_MAX))
    assert replayed(log.begin() + log.frame("sb-1", b"x"))[0] == {"sb-1": b"x"}
    with pytest.raises(ValueError, match="16"):
        JournalLog(b"short")


class Rewrites(RuleBasedStateMachine):
    """Frames are added, and the file is now and then replaced by what it says, or read again."""

    @initialize()
    def begin(self) -> None:
        self.log, self.data = JournalLog.of(MARKER, [])
        self.state: dict[str, bytes] = {}

    @rule(key=KEYS, content=st.none() | CONTENTS, fails=st.booleans())
    def add(self, key: str, content: bytes | None, fails: bool) -> None:
        frame = self.log.frame(key, content)
        if fails:
            # It could not be written, and the next one does not mind.
            return
        self.data += frame
        self.log.wrote(key, content, len(frame))
        self.state = state_after([*self.state.items(), (key, content)])

    @rule()
    def sync(self) -> None:
        self.log.synced = self.log.sequence

    @rule()
    def rewrite(self) -> None:
        self.log, data = JournalLog.of(bytes(reversed(MARKER)), self.log.records())
        assert len(data) <= len(self.data)
        self.data = data
        assert not self.log.wants_rewrite

    @rule()
    def read_again(self) -> None:
        self.log = JournalLog(bytes(16))
        self.log.replay(self.data)

    @invariant()
    def says_what_was_said(self) -> None:
        self.log.check()
        assert dict(self.log.records()) == self.state
        assert self.log.file_bytes == len(self.data)
        assert replayed(self.data) == (self.state, len(self.data), Damage())
        assert all(key in self.log for key in self.state)


TestRewrites = Rewrites.TestCase


def test_a_file_is_rewritten_when_most_of_it_counts_no_more() -> None:
    log = JournalLog(MARKER)
    content = bytes(100_000)
    while not log.wants_rewrite:
        log.wrote("sb-1", content, len(content))
    assert log.file_bytes < 12 * len(content)
    log.postpone_rewrite()
    assert not log.wants_rewrite
    for _ in range(12):
        log.wrote("sb-1", content, len(content))
    assert log.wants_rewrite


def test_a_large_file_of_what_counts_is_kept() -> None:
    log = JournalLog(MARKER)
    for number in range(30):
        log.wrote(f"sb-{number}", bytes(100_000), 100_100)
    assert not log.wants_rewrite
