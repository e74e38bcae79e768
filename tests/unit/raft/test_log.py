from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_control.raft.entry_codec import HEADER_BYTES
from prism_control.raft.errors import InvariantError
from prism_control.raft.log import Log
from tests.unit.raft.harness import entry


def make_log(*terms: int, base: int = 0, base_term: int = 0) -> Log:
    return Log(base, base_term, [entry(i, term) for i, term in enumerate(terms, base + 1)])


def test_entries_must_follow_each_other() -> None:
    log = make_log(1, 1)
    with pytest.raises(InvariantError, match="entry 4 of term 1 cannot follow entry 2"):
        log.append([entry(4, 1)])
    log.append([entry(3, 2)])
    with pytest.raises(InvariantError, match="of term 1 cannot follow"):
        log.append([entry(4, 1)])
    assert (log.last_index, log.last_term) == (3, 2)


def test_appended_entries_are_not_persisted_until_somebody_says_so() -> None:
    log = make_log(1, 1)
    assert log.persisted == 2
    log.append([entry(3, 1), entry(4, 1)])
    assert log.persisted == 2
    log.persisted_to(4)
    assert log.persisted == 4
    for wrong in (3, 5):
        with pytest.raises(InvariantError, match="persisted cannot go"):
            log.persisted_to(wrong)


def test_truncation_takes_back_what_was_persisted() -> None:
    log = make_log(1, 2, 2, 3)
    log.truncate(3)
    assert (log.last_index, log.last_term, log.persisted) == (2, 2, 2)
    log.truncate(1)
    assert (log.last_index, log.last_term, log.persisted) == (0, 0, 0)
    with pytest.raises(InvariantError, match="cannot cut"):
        log.truncate(1)


def test_compaction_keeps_the_term_before_the_first_entry() -> None:
    log = make_log(1, 2, 3)
    log.compact(2)
    log.compact(1)
    assert (log.base_index, log.base_term, log.last_index) == (2, 2, 3)
    assert [log.term_at(i) for i in range(1, 5)] == [None, 2, 3, None]
    log.append([entry(4, 3)])
    with pytest.raises(InvariantError, match="cannot compact to 4: persisted is 3"):
        log.compact(4)
    with pytest.raises(InvariantError, match="cannot cut"):
        log.truncate(2)


def test_a_snapshot_takes_the_place_of_everything() -> None:
    log = make_log(1, 1)
    log.reset(10, 4)
    assert (log.base_index, log.base_term) == (10, 4)
    assert (log.last_index, log.last_term, log.persisted) == (10, 4, 10)


def test_a_slice_holds_what_was_asked_or_fails() -> None:
    log = make_log(1, 1, 1, base=5)
    assert [e.index for e in log.slice(6, 8)] == [6, 7, 8]
    assert log.slice(9, 8) == ()
    for first, last in ((5, 6), (8, 9)):
        with pytest.raises(InvariantError, match="no entries"):
            log.slice(first, last)


def test_a_bounded_slice_never_stops_at_one_large_entry() -> None:
    log = Log(0, 0, [entry(1, 1, b"x" * 100), entry(2, 1, b"y"), entry(3, 1, b"z")])
    assert log.bounded_slice(1, 3, 10) == (log.slice(1, 1), HEADER_BYTES + 100)
    assert log.bounded_slice(2, 3, 2 * HEADER_BYTES + 2) == (log.slice(2, 3), 2 * HEADER_BYTES + 2)
    assert log.bounded_slice(2, 3, 2 * HEADER_BYTES + 1) == (log.slice(2, 2), HEADER_BYTES + 1)
    assert log.bounded_slice(4, 3, 100) == ((), 0)


def test_the_first_conflict_is_the_first_other_term_or_missing_entry() -> None:
    log = make_log(1, 2, 2)
    assert log.first_conflict([]) == 0
    assert log.first_conflict([entry(1, 1), entry(2, 2)]) == 2
    assert log.first_conflict([entry(2, 2), entry(3, 3)]) == 1
    assert log.first_conflict([entry(3, 2), entry(4, 2)]) == 1


@pytest.mark.parametrize(
    ("last_index", "last_term", "expected"),
    [(3, 2, True), (9, 1, False), (1, 3, True), (2, 2, False), (4, 2, True)],
)
def test_later_term_and_then_longer_log_is_more_up_to_date(
    last_index: int, last_term: int, expected: bool
) -> None:
    """§5.4.1."""
    assert make_log(1, 2, 2).is_up_to_date(last_index, last_term) is expected


def test_the_hint_skips_all_entries_of_a_conflicting_term() -> None:
    log = make_log(1, 4, 4, 4, 6)
    assert log.last_index_of_term(5, 3) == 1
    assert log.last_index_of_term(9, 4) == 4
    assert log.last_index_of_term(2, 9) == 2


def test_below_the_base_the_hint_makes_no_claim() -> None:
    log = make_log(5, 5, base=10, base_term=5)
    assert log.last_index_of_term(7, 5) == 7
    assert log.last_index_of_term(12, 4) == 9
    assert log.last_index_of_term(12, 5) == 12


@given(
    st.lists(st.integers(1, 6), max_size=12).map(sorted),
    st.integers(0, 14),
    st.integers(0, 7),
)
def test_the_hint_is_what_a_search_from_the_end_finds(
    terms: list[int], index: int, term: int
) -> None:
    log = make_log(*terms)
    expected = min(index, len(terms))
    while expected and terms[expected - 1] > term:
        expected -= 1
    assert log.last_index_of_term(index, term) == expected
