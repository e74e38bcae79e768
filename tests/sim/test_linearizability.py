"""The checker itself: histories whose answer is known."""

from __future__ import annotations

import itertools
from random import Random

import pytest

from tests.sim.linearizability import (
    UNKNOWN_END,
    Kind,
    Operation,
    TooHardError,
    is_linearizable,
)


def write(begin: float, end: float, value: int) -> Operation:
    return Operation(Kind.WRITE, begin, end, value)


def read(begin: float, end: float, value: int) -> Operation:
    return Operation(Kind.READ, begin, end, value)


def cas(begin: float, end: float, expected: int, value: int, succeeded: bool = True) -> Operation:
    return Operation(Kind.CAS, begin, end, value, expected, succeeded)


LINEARIZABLE = {
    "nothing": [],
    "the initial value": [read(0, 1, 0)],
    "one after another": [write(0, 1, 1), read(2, 3, 1), write(4, 5, 2), read(6, 7, 2)],
    "a read during a write sees either": [write(0, 9, 1), read(1, 2, 0), read(3, 4, 1)],
    "concurrent writes in the other order": [write(0, 9, 1), write(0, 9, 2), read(10, 11, 1)],
    "an unknown write that was done later": [
        write(0, UNKNOWN_END, 1),
        read(5, 6, 0),
        read(7, 8, 1),
    ],
    "an unknown write that never was": [write(0, UNKNOWN_END, 1), read(5, 6, 0), read(7, 8, 0)],
    "an unknown read": [read(0, UNKNOWN_END, 7)],
    "a swap": [write(0, 1, 1), cas(2, 3, 1, 2), read(4, 5, 2)],
    "a swap refused": [write(0, 1, 1), cas(2, 3, 5, 2, succeeded=False), read(4, 5, 1)],
    "of two swaps one": [cas(0, 9, 0, 1), cas(0, 9, 0, 2, succeeded=False), read(10, 11, 1)],
    "an unknown swap": [cas(0, UNKNOWN_END, 0, 1), read(2, 3, 0), read(4, 5, 1)],
}
NOT_LINEARIZABLE = {
    "a value that nobody wrote": [read(0, 1, 7)],
    "a stale read": [write(0, 1, 1), write(2, 3, 2), read(4, 5, 1)],
    "a lost write": [write(0, 1, 1), read(2, 3, 0)],
    "a read back in time": [write(0, 9, 1), read(1, 2, 1), read(3, 4, 0)],
    "a write read before it began": [read(0, 1, 1), write(2, 3, 1)],
    "an unknown write before it began": [read(0, 1, 1), write(2, UNKNOWN_END, 1)],
    "an unknown write undone": [write(0, UNKNOWN_END, 1), read(2, 3, 1), read(4, 5, 0)],
    "two swaps of one value": [cas(0, 9, 0, 1), cas(0, 9, 0, 2)],
    "a swap refused without reason": [cas(0, 1, 0, 1, succeeded=False)],
    "two readers see two orders": [
        write(0, 20, 1),
        write(0, 20, 2),
        read(1, 2, 1),
        read(3, 4, 2),
        read(5, 6, 1),
    ],
}


@pytest.mark.parametrize("history", LINEARIZABLE.values(), ids=LINEARIZABLE)
def test_a_linearizable_history_is_accepted(history: list[Operation]) -> None:
    for order in itertools.islice(itertools.permutations(history), 24):
        assert is_linearizable(order)


@pytest.mark.parametrize("history", NOT_LINEARIZABLE.values(), ids=NOT_LINEARIZABLE)
def test_a_history_that_is_not_is_refused(history: list[Operation]) -> None:
    for order in itertools.islice(itertools.permutations(history), 24):
        assert not is_linearizable(order)


def _generate(random: Random, length: int, unknown: float) -> list[Operation]:
    """Return a history around points at which the operations took effect."""
    value, history = 0, []
    for point in range(length):
        begin, end = point - random.uniform(0, 2), point + random.uniform(0, 2)
        kind = random.choice(list(Kind))
        if kind is Kind.READ:
            history.append(read(begin, end, value))
        elif kind is Kind.WRITE:
            value = point + 1
            history.append(write(begin, UNKNOWN_END if random.random() < unknown else end, value))
        else:
            expected = random.choice((value, -1))
            history.append(cas(begin, end, expected, point + 1, expected == value))
            value = point + 1 if expected == value else value
    return history


@pytest.mark.parametrize("seed", range(20))
def test_long_histories_are_decided_quickly(seed: int) -> None:
    assert is_linearizable(_generate(Random(seed), 200, unknown=0.1))
    history = _generate(Random(seed), 300, unknown=0.0)
    assert is_linearizable(history)
    last = max(op.end for op in history if op.end != UNKNOWN_END)
    assert not is_linearizable([*history, read(last + 1, last + 2, 10_000)])


def test_the_search_is_bounded() -> None:
    history = [write(0, 99, value) for value in range(1, 15)] + [read(100, 101, 99)]
    with pytest.raises(TooHardError):
        is_linearizable(history, steps_max=1000)
