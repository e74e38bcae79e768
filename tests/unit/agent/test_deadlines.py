"""Deadlines: each is due once, at the last time that was set."""

import hypothesis.strategies as st
from hypothesis import given

from prism_agent.deadlines import Deadlines

STEPS = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.none() | st.integers(0, 20), st.booleans()),
    max_size=60,
)


@given(STEPS)
def test_each_is_taken_once_when_it_is_due(steps: list[tuple[str, int | None, bool]]) -> None:
    deadlines = Deadlines()
    model: dict[str, float] = {}
    for key, due, takes in steps:
        deadlines.set(key, due)
        if due is None:
            model.pop(key, None)
        else:
            model[key] = due
        assert deadlines.next() == min(model.values(), default=None)
        if takes:
            taken = deadlines.take(10)
            assert sorted(taken) == sorted(each for each, its in model.items() if its <= 10)
            assert [model[each] for each in taken] == sorted(model[each] for each in taken)
            model = {each: its for each, its in model.items() if its > 10}
        deadlines.check()


def test_deadlines_that_are_moved_again_and_again_take_no_room() -> None:
    deadlines = Deadlines()
    for number in range(10_000):
        deadlines.set("a", 100 + number)
        deadlines.check()
    assert len(deadlines._heap) < 100
    assert deadlines.take(1e9) == ["a"]
