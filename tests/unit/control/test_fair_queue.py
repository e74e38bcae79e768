"""The queue's promises: order within a flow, turns between flows, and who makes room."""

from collections import Counter, deque

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from prism_control.fair_queue import _QUANTUM, FairQueue

FLOWS = st.sampled_from("abcd")
COSTS = st.integers(1, 5 * _QUANTUM)


def drain(queue: FairQueue[str]) -> list[str]:
    taken = []
    while (item := queue.pop()) is not None:
        taken.append(item)
        queue.check()
    return taken


def test_who_comes_after_ten_thousand_of_another_waits_for_a_few_of_them() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(10_000):
        queue.push("many", f"m{number}", 256)
    queue.push("one", "o", 256)
    assert drain(queue).index("o") <= _QUANTUM // 256


def test_flows_share_by_cost_and_not_by_number() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(1000):
        queue.push("small", f"s{number}", 256)
    for number in range(100):
        queue.push("large", f"l{number}", 2 * _QUANTUM)
    taken = Counter(item[0] for item in drain(queue)[:300])
    assert abs(taken["s"] * 256 - taken["l"] * 2 * _QUANTUM) <= 3 * _QUANTUM


def test_who_is_held_back_waits_and_the_others_do_not() -> None:
    queue: FairQueue[str] = FairQueue()
    for flow in "ab":
        queue.push(flow, flow + "1", 1)
        queue.push(flow, flow + "2", 1)
    assert not queue.can_pop({"a", "b"})
    assert queue.pop({"a", "b"}) is None
    assert [queue.pop({"a"}) for _ in range(3)] == ["b1", "b2", None]
    assert not queue.can_pop("a")
    assert drain(queue) == ["a1", "a2"]


def test_room_is_made_by_who_has_most() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(3):
        queue.push("a", f"a{number}", 1)
    queue.push("b", "b0", 1)
    assert queue.shed("a") is None  # it would have as much itself
    assert queue.shed("c") == "a2"  # the newest: it has waited least
    queue.push("c", "c0", 1)
    assert queue.shed("c") is None
    assert sorted(drain(queue)) == ["a0", "a1", "b0", "c0"]


@given(st.lists(st.tuples(FLOWS, COSTS), max_size=60))
def test_each_flow_comes_out_in_order_and_nothing_is_lost(pushed: list[tuple[str, int]]) -> None:
    queue: FairQueue[str] = FairQueue()
    for number, (flow, cost) in enumerate(pushed):
        queue.push(flow, f"{flow}{number}", cost)
    taken = drain(queue)
    for name in "abcd":
        expected = [f"{flow}{n}" for n, (flow, _) in enumerate(pushed) if flow == name]
        assert [item for item in taken if item[0] == name] == expected
    assert len(taken) == len(pushed)


class Turns(RuleBasedStateMachine):
    """Beside a model: a deque for each flow, and what each has taken while others waited."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[tuple[str, int]] = FairQueue()
        self.model: dict[str, deque[tuple[str, int]]] = {}
        #: Cost taken by others since a flow that has waited without break was served last.
        self.passed: dict[str, Counter[str]] = {}

    @rule(flow=FLOWS, cost=COSTS)
    def push(self, flow: str, cost: int) -> None:
        """Something comes."""
        self.queue.push(flow, (flow, cost), cost)
        if not self.model.get(flow):
            self.passed[flow] = Counter()
        self.model.setdefault(flow, deque()).append((flow, cost))

    @rule()
    def pop(self) -> None:
        """Something goes."""
        item = self.queue.pop()
        if item is None:
            assert not any(self.model.values())
            return
        flow, cost = item
        assert self.model[flow].popleft() == item
        self.passed[flow] = Counter()
        for other, waiting in self.model.items():
            if other != flow and waiting:
                self.passed[other][flow] += cost
                # Its own debt, of one large item, is at most so many rounds; in each round another
                # takes a quantum, and once it may go past that by one item.
                assert self.passed[other][flow] <= 8 * _QUANTUM + 5 * _QUANTUM

    @rule(flow=FLOWS)
    def shed(self, flow: str) -> None:
        """Room is made."""
        lengths = {name: len(waiting) for name, waiting in self.model.items()}
        item = self.queue.shed(flow)
        if item is None:
            assert max(lengths.values(), default=0) <= lengths.get(flow, 0) + 1
            return
        loser = item[0]
        assert lengths[loser] == max(lengths.values())
        assert self.model[loser].pop() == item

    @invariant()
    def is_sound(self) -> None:
        """All that is derived agrees."""
        self.queue.check()
        assert len(self.queue) == sum(map(len, self.model.values()))
        assert sorted(self.queue) == sorted(x for waiting in self.model.values() for x in waiting)


TestTurns = Turns.TestCase
