"""Where sandboxes go, who waits, and what they are told meanwhile."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from prism_control.scheduler import core
from prism_control.scheduler.core import Scheduler
from prism_control.scheduler.placement import Strategy
from prism_control.scheduler.views import shape_of
from prism_control.scheduler.waiting import Waiting
from prism_control.state import commands as c
from prism_control.state.model import Amounts, ObservedState, OnNodeLoss, RuntimeRow, SandboxState
from tests.unit.state.builders import MIB, Driver, create, register


class Leader:
    def __init__(self, **options) -> None:
        self.driver = Driver()
        self.options = options
        self.now_ms = 0
        self.take_over()

    def take_over(self) -> None:
        uniform = random.Random(1).random
        self.scheduler = Scheduler.from_machine(self.driver.machine, uniform, **self.options)

    def run(self, *commands: c.Command):
        results = self.driver.run(*commands)
        self.scheduler.observe(self.driver.events)
        return results

    def decide(self, after_ms: int = 0, limit: int = 1000) -> c.AssignSandboxes:
        self.now_ms += after_ms
        return self.scheduler.decide(self.now_ms, limit) or c.AssignSandboxes()

    def step(self, after_ms: int = 0) -> c.AssignSandboxes:
        """Decide, commit, observe."""
        decision = self.decide(after_ms)
        if decision != c.AssignSandboxes():
            (result,) = self.run(decision)
            assert result.refused == ()
        assert self.scheduler.reserved_count == 0
        return decision

    def placed(self, after_ms: int = 0) -> dict[str, str]:
        return {one.sandbox_id: one.node_id for one in self.step(after_ms).placements}

    def report(self, state: ObservedState, key: str) -> None:
        self.driver.report(state, key)
        self.scheduler.observe(self.driver.events)

    def check(self) -> None:
        """The view that followed events equals one made from the machine."""
        fresh = Scheduler.from_machine(self.driver.machine, random.Random(1).random)
        ours = self.scheduler
        assert {key: free(view) for key, view in ours._nodes.items()} == {
            key: free(view) for key, view in fresh._nodes.items()
        }
        assert ours.waiting_count == fresh.waiting_count


def free(view):
    return view.cpu_free, view.memory_free, view.disk_free, view.slots_free, view.open


def test_nothing_waits_nothing_is_decided():
    leader = Leader()
    assert leader.scheduler.decide(0) is None
    assert leader.scheduler.next_ms(0) is None


def test_spread_takes_the_emptiest_of_few():
    leader = Leader()
    leader.run(*(register(f"n{k}") for k in range(4)))
    leader.run(*(create(f"s{k}") for k in range(12)))
    assert leader.scheduler.next_ms(5) == 5
    assert set(Counter(leader.placed().values()).values()) == {3}
    leader.check()


def test_spread_is_even_over_many():
    leader = Leader()
    leader.run(
        *(register(f"n{k}", capacity=Amounts(10**5, 10**12, 10**12, 100)) for k in range(50))
    )
    leader.run(*(create(f"s{k}") for k in range(500)))
    counts = Counter(leader.placed().values())
    assert len(counts) == 50
    assert max(counts.values()) <= 12


def test_pack_fills_a_node_before_it_takes_the_next():
    leader = Leader(strategy=Strategy.PACK)
    leader.run(*(register(f"n{k}") for k in range(4)))
    leader.run(*(create(f"s{k}") for k in range(10)))
    assert sorted(Counter(leader.placed().values()).values()) == [2, 8]


def test_the_leaders_node_is_second_choice():
    leader = Leader(leader_host="n1.example")
    leader.run(register("n1"), register("n2"))
    leader.run(create("s1"))
    assert leader.placed() == {"s1": "n2"}
    assert leader.scheduler.score("n1") == pytest.approx(90)
    assert leader.scheduler.score("n9") is None


def test_load_counts():
    leader = Leader()
    leader.run(register("n1"), register("n2"))
    leader.scheduler.heard_load("n1", 0.9)
    leader.scheduler.heard_load("n9", 0.9)
    leader.run(create("s1"))
    assert leader.placed() == {"s1": "n2"}


def test_a_cordoned_suspect_lost_or_unsuitable_node_takes_nothing():
    leader = Leader()
    leader.run(*(register(f"n{k}") for k in range(1, 4)))
    leader.run(
        register("n4", runtimes=(RuntimeRow("gvisor", False, "needs ptrace"),)),
        register("n5", runtimes=(), labels=(("zone", "a"),)),
    )
    leader.run(c.CordonNode("n1", True), c.SuspectNode("n2", "i1", 5), c.LoseNode("n3", "i1", 5))
    leader.run(
        create("s1"),
        create("s2", runtime="gvisor"),
        create("s3", runtime="bubblewrap"),
        create("s4", node_selector=(("zone", "b"),)),
    )
    decision = leader.step()
    assert decision.placements == ()
    texts = {
        key: {one.node_id: one.reason for one in explanation.refusals}
        for explanation in decision.explanations
        for key in explanation.sandbox_ids
    }
    assert texts["s1"]["n1"] == "is cordoned"
    assert texts["s1"]["n2"] == "is SUSPECT"
    assert texts["s1"]["n3"] == "is LOST"
    assert texts["s1"]["n5"] == "has no runtime that works"
    leader.run(register("n5", runtimes=(RuntimeRow("fake", True),), labels=(("zone", "a"),)))
    decision = leader.step(60_000)
    assert [one.node_id for one in decision.placements] == ["n5"]
    texts = {
        key: {one.node_id: one.reason for one in explanation.refusals}
        for explanation in decision.explanations
        for key in explanation.sandbox_ids
    }
    assert texts["s2"]["n5"] == "has no runtime gvisor"
    assert texts["s3"]["n4"] == "has no runtime that works"
    assert texts["s4"]["n5"] == "lacks the label zone=b"


def test_a_runtime_that_does_not_work_says_why():
    leader = Leader()
    runtimes = (RuntimeRow("fake", True), RuntimeRow("gvisor", False, "needs ptrace"))
    leader.run(register(runtimes=runtimes), create("s1", runtime="gvisor"))
    (explanation,) = leader.step().explanations
    assert explanation.refusals[0].reason == "runtime gvisor does not work: needs ptrace"


def test_a_runtime_that_says_nothing_is_just_not_there():
    leader = Leader()
    runtimes = (RuntimeRow("fake", True), RuntimeRow("gvisor", False))
    leader.run(register(runtimes=runtimes), create("s1", runtime="gvisor"))
    assert leader.step().explanations[0].refusals[0].reason == "has no runtime gvisor"


def test_a_shape_that_is_parked_wakes_the_leader_once_there_is_room():
    leader = Leader()
    leader.run(create("s1"), create("s2"))
    leader.decide(limit=0)
    leader.step()
    assert leader.scheduler.next_ms(0) > 0
    leader.run(create("s3"))
    assert leader.scheduler.next_ms(0) == 500  # to explain
    leader.run(register())
    assert leader.scheduler.next_ms(0) == 0
    leader.decide(limit=0)
    assert leader.scheduler.next_ms(0) == 0  # it is their turn


def test_a_sandbox_of_a_later_generation_takes_the_place_of_the_earlier():
    waiting = Waiting()
    shape = shape_of(create().spec)
    waiting.add((0, 1, 1, "s1"), shape)
    waiting.add((0, 1, 1, "s1"), shape)
    waiting.add((0, 1, 2, "s1"), shape)
    assert len(waiting) == 1
    entry, _ = waiting.first()
    assert entry == (0, 1, 2, "s1")


def test_a_selector_and_a_runtime_find_their_node():
    leader = Leader()
    leader.run(
        register("n1"),
        register("n2", labels=(("zone", "b"),), runtimes=(RuntimeRow("gvisor", True),)),
    )
    leader.run(create("s1", node_selector=(("zone", "b"),)), create("s2", runtime="gvisor"))
    assert leader.placed() == {"s1": "n2", "s2": "n2"}


def test_no_room_is_explained_in_numbers_and_ends_when_there_is_room():
    leader = Leader()
    leader.run(register(capacity=Amounts(600, 300 * MIB, 300 * MIB, 1)))
    leader.run(create("s1"), create("s2"))
    decision = leader.step()
    assert len(decision.placements) == 1
    row = leader.driver.sandbox("s2")
    assert row.message == "waits for a node: of 1, 1 without room for it"
    assert row.placement[0].reason == (
        "needs 500m of CPU, 100m free; 256 MiB of memory, 44 MiB free; "
        "256 MiB of disk, 44 MiB free; a slot, all 1 are taken"
    )
    assert leader.placed(100) == {}
    leader.report(ObservedState.READY, "s1")
    leader.report(ObservedState.DELETED, "s1")
    assert leader.placed() == {"s2": "n1"}
    leader.check()


def test_no_nodes_at_all_is_said():
    leader = Leader()
    leader.run(create("s1"))
    leader.step()
    assert leader.driver.sandbox().message == "no node has registered yet"
    leader.run(register())
    assert leader.placed() == {"s1": "n1"}


def test_an_explanation_is_told_again_only_when_it_has_changed_and_not_often():
    leader = Leader()
    leader.run(register(capacity=Amounts(4000, 400 * MIB, 10**12, 9)))
    leader.run(create("big", memory_bytes=1024 * MIB))
    assert len(leader.step().explanations) == 1
    assert leader.step(6000).explanations == ()
    leader.run(create("s1", memory_bytes=100 * MIB))
    assert leader.step(100).explanations == ()
    assert leader.step(6000).explanations[0].refusals[0].reason.endswith("300 MiB free")
    leader.run(create("big2", memory_bytes=1024 * MIB))
    assert leader.step(600).explanations[0].sandbox_ids == ("big2",)


def test_explaining_is_bounded_by_pass(monkeypatch):
    monkeypatch.setattr(core, "EXPLAINED_MAX", 10)
    leader = Leader()
    for begin in range(0, 30, 10):
        leader.run(*(create(f"s{k}") for k in range(begin, begin + 10)))
    leader.run(*(create(f"t{k}", priority=k, cpu_millicores=100 + k) for k in range(6)))
    told: Counter[str] = Counter()
    for _ in range(40):
        decision = leader.step(500)
        ids = [key for one in decision.explanations for key in one.sandbox_ids]
        assert len(ids) <= 10
        told.update(ids)
    assert set(told) == {f"s{k}" for k in range(30)} | {f"t{k}" for k in range(6)}
    assert set(told.values()) == {1}


def test_explanations_that_were_not_committed_are_told_again():
    leader = Leader()
    leader.run(create("s1"), create("s2"))
    command = leader.decide()
    told = {key for one in command.explanations for key in one.sandbox_ids}
    assert told == {"s1", "s2"}
    leader.scheduler.forget_all(command)
    leader.step(1000)
    leader.step(1000)
    assert leader.driver.sandbox("s1").message == "no node has registered yet"
    assert leader.driver.sandbox("s2").message == "no node has registered yet"


def test_priority_then_arrival():
    leader = Leader()
    leader.run(
        create("low"),
        create("first", priority=5),
        create("other", priority=5, cpu_millicores=100),
        create("last", priority=5),
    )
    leader.run(register(capacity=Amounts(10**5, 10**12, 10**12, 3)))
    decision = leader.step()
    assert [one.sandbox_id for one in decision.placements] == ["first", "other", "last"]


def test_a_large_one_that_waits_does_not_hold_up_small_ones():
    leader = Leader()
    leader.run(register(), create("big", priority=9, memory_bytes=10**13), create("small"))
    assert leader.placed() == {"small": "n1"}


def test_passes_are_bounded_and_do_not_give_room_away_twice():
    leader = Leader()
    leader.run(register(), *(create(f"s{k}") for k in range(12)))
    first, second = leader.decide(limit=5), leader.decide()
    assert len(first.placements) == 5
    assert len(second.placements) == 3
    assert leader.scheduler.reserved_count == 8
    for decision in (first, second):
        assert leader.run(decision)[0].refused == ()
    assert leader.scheduler.reserved_count == 0
    leader.check()


def test_void_decisions_are_made_again():
    leader = Leader()
    leader.run(register(), create("s1"), create("s2"))
    decision = leader.decide()
    leader.driver.run(c.CordonNode("n1", True))
    cordon = leader.driver.events
    (result,) = leader.driver.run(decision)
    leader.scheduler.observe(cordon)
    leader.scheduler.forget((*result.refused, "unknown"))
    assert leader.scheduler.waiting_count == 2
    leader.run(c.CordonNode("n1", False))
    assert leader.placed() == {"s1": "n1", "s2": "n1"}
    leader.check()


def ahead(leader: Leader, *creates: c.CreateSandbox) -> dict[str, str]:
    """Create in one entry with what is decided on it; return who was placed there."""
    decision, in_vain = leader.scheduler.decide_ahead(creates)
    (*_, result) = leader.run(*creates, decision)
    leader.scheduler.forget(result.refused)
    leader.scheduler.end_ahead(in_vain)
    assert leader.scheduler.reserved_count == 0
    leader.check()
    return {
        one.sandbox_id: one.node_id
        for one in decision.placements
        if one.sandbox_id not in result.refused
    }


def test_what_is_created_is_placed_in_the_same_entry():
    leader = Leader()
    leader.run(register("n1"), register("n2"))
    assert set(ahead(leader, create("s1"), create("s2"))) == {"s1", "s2"}
    states = {row.state for row in leader.driver.machine.sandboxes()}
    assert states == {SandboxState.SCHEDULED}
    assert leader.step() == c.AssignSandboxes()


def test_room_of_a_create_that_is_refused_is_given_back():
    leader = Leader()
    leader.run(register())
    assert ahead(leader, create("s1", name="one"), create("s2", name="one")) == {"s1": "n1"}
    assert leader.scheduler.waiting_count == 0


def test_what_was_created_and_could_not_be_placed_waits():
    leader = Leader()
    leader.run(register())
    creates = [create("s1"), create("s2")]
    decision, _ = leader.scheduler.decide_ahead(creates)
    leader.run(c.CordonNode("n1", True))
    (*_, result) = leader.run(*creates, decision)
    leader.scheduler.forget(result.refused)
    assert leader.scheduler.waiting_count == 2
    leader.run(c.CordonNode("n1", False))
    assert leader.placed() == {"s1": "n1", "s2": "n1"}
    leader.check()


def test_nothing_is_kept_of_an_entry_that_was_not_proposed():
    leader = Leader()
    leader.run(register())
    decision, _ = leader.scheduler.decide_ahead([create("s1"), create("s2")])
    assert leader.scheduler.reserved_count == 2
    leader.scheduler.forget_all(decision)
    assert (leader.scheduler.reserved_count, leader.scheduler.waiting_count) == (0, 0)
    leader.check()


def test_who_waits_is_not_overtaken_by_who_is_created():
    leader = Leader()
    leader.run(register("n1", capacity=Amounts(1000, 10**9, 10**10, 10)))
    leader.run(create("first", cpu_millicores=100))
    assert ahead(leader, create("s1", cpu_millicores=100)) == {}
    assert set(leader.placed()) == {"first", "s1"}
    # A shape that waits for room keeps its order; another, which has room, need not wait for it.
    leader.run(create("large", cpu_millicores=900))
    leader.step()
    assert leader.scheduler.waiting_count == 1
    late = [create("late", cpu_millicores=900), create("small", cpu_millicores=100)]
    assert ahead(leader, *late) == {"small": "n1"}
    for key in ("first", "s1"):
        leader.run(c.DeleteSandbox("", b"", key))
        leader.report(ObservedState.DELETED, key)
    # There is room now that those who wait have not been asked about.
    assert ahead(leader, create("s3", cpu_millicores=100)) == {}


def test_who_found_no_node_in_an_entry_under_way_is_not_overtaken_either():
    leader = Leader()
    leader.run(register("n1", capacity=Amounts(10_000, 10**10, 10**10, 1)))
    leader.run(create("first"))
    leader.step()
    before, in_vain = leader.scheduler.decide_ahead([create("early", priority=5)])
    assert (before.placements, in_vain) == ((), 1)
    leader.run(c.DeleteSandbox("", b"", "first"))
    leader.report(ObservedState.DELETED, "first")
    after, waits = leader.scheduler.decide_ahead([create("late")])
    # It has not looked for one: what comes behind it need not wait for it.
    assert (after.placements, waits) == ((), 0)
    leader.run(create("early", priority=5), before)
    leader.scheduler.end_ahead(in_vain)
    leader.run(create("late"), after)
    leader.scheduler.end_ahead(waits)
    assert leader.placed() == {"early": "n1"}
    leader.check()


def test_one_id_is_reserved_once():
    leader = Leader()
    leader.run(register("n1"))
    assert ahead(leader, create("s1"), create("s1", name="again")) == {"s1": "n1"}


def test_shapes_that_are_tried_at_once_are_bounded(monkeypatch):
    monkeypatch.setattr(core, "_AHEAD_SHAPES_MAX", 2)
    leader = Leader()
    leader.run(register("n1", capacity=Amounts(10_000, 10**10, 10**10, 10)))
    creates = [create(f"s{number}", cpu_millicores=100 + number) for number in range(3)]
    assert set(ahead(leader, *creates)) == {"s0", "s1"}
    assert set(leader.placed()) == {"s2"}


def test_what_matters_most_is_placed_first_where_room_is_short():
    leader = Leader()
    leader.run(register("n1", capacity=Amounts(10_000, 10**10, 10**10, 2)))
    creates = [create(f"s{priority}", priority=priority) for priority in (0, 2, 1)]
    assert set(ahead(leader, *creates)) == {"s2", "s1"}
    assert leader.scheduler.waiting_count == 1


def test_a_sandbox_that_is_deleted_while_decided_gives_its_room_back():
    leader = Leader()
    leader.run(register(), create("s1"))
    decision = leader.decide()
    leader.run(c.DeleteSandbox("", b"", "s1"))
    assert leader.scheduler.reserved_count == 0
    (result,) = leader.run(decision)
    leader.scheduler.forget(result.refused)
    assert leader.scheduler.waiting_count == 0
    leader.check()


def test_an_explanation_that_comes_while_decided_does_not_queue_it_twice():
    leader = Leader()
    leader.run(register(), create("s1"))
    leader.decide()
    leader.run(c.AssignSandboxes((), (c.Explanation(("s1",), "late news", ()),)))
    assert leader.scheduler.waiting_count == 0


def test_loss_of_a_node_lets_sandboxes_wait_again_as_another_generation():
    leader = Leader()
    leader.run(register("n1"), create("s1", on_node_loss=OnNodeLoss.RESCHEDULE), create("s2"))
    leader.step()
    leader.report(ObservedState.READY, "s1")
    leader.run(c.LoseNode("n1", "i1", 5))
    leader.check()
    leader.run(register("n2"))
    decision = leader.step()
    assert decision.placements == (c.Placement("s1", 2, "n2"),)


def test_a_node_that_is_forgotten_takes_nothing():
    leader = Leader()
    leader.run(register("n1"), create("s1"))
    leader.decide()
    leader.run(c.LoseNode("n1", "i1", 5))
    leader.run(register("n2", name="name-n1"))
    leader.scheduler.forget(("s1",))
    assert leader.placed() == {"s1": "n2"}


def test_a_sandbox_placed_by_another_hand_is_accounted_where_it_went():
    leader = Leader()
    leader.run(register("n1", capacity=Amounts(10**5, 10**12, 10**12, 99)), register("n2"))
    leader.run(create("s1"))
    (placement,) = leader.decide().placements
    other = "n2" if placement.node_id == "n1" else "n1"
    leader.run(c.AssignSandboxes((c.Placement("s1", 1, other),)))
    leader.check()
    assert leader.scheduler.reserved_count == 0


def test_without_events_patience_grows():
    leader = Leader()
    leader.run(register(), create("s1", memory_bytes=10**13))
    leader.step()
    waits = []
    now_ms = 0
    for _ in range(8):
        (queue,) = leader.scheduler._waiting.shapes()
        waits.append(queue.retry_ms - now_ms)
        now_ms = queue.retry_ms
        leader.now_ms = now_ms
        leader.step()
    assert waits == [1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]
    assert leader.scheduler.next_ms(now_ms) <= now_ms + 30_000


def test_checks_for_new_room_are_bounded(monkeypatch):
    monkeypatch.setattr(core, "_UNPARK_CHECKS_MAX", 1)
    leader = Leader()
    leader.run(create("s1", cpu_millicores=100), create("s2", cpu_millicores=200))
    leader.step()
    leader.run(register())
    assert leader.placed() == {"s1": "n1"}
    assert leader.placed(1000) == {"s2": "n1"}  # its patience is over


def test_a_full_cluster_of_many_nodes_is_used_to_the_last_slot():
    for strategy in Strategy:
        leader = Leader(strategy=strategy)
        room = Amounts(10**5, 10**12, 10**12, 3)
        leader.run(*(register(f"n{k}", capacity=room) for k in range(40)))
        leader.run(*(create(f"s{k}") for k in range(125)))
        assert len(leader.placed()) == 120
        assert leader.scheduler.waiting_count == 5


def test_deleted_while_waiting_leaves_nothing_behind():
    leader = Leader()
    leader.run(create("keep"))
    leader.step()
    for begin in range(0, 400, 100):
        ids = [f"s{k}" for k in range(begin, begin + 100)]
        leader.run(*(create(key) for key in ids))
        leader.run(*(c.DeleteSandbox("", b"", key) for key in ids))
    (queue,) = leader.scheduler._waiting.shapes()
    assert queue.members == 1
    assert len(queue.entries) <= 2 + 64
    leader.run(c.DeleteSandbox("", b"", "keep"))
    assert leader.scheduler._waiting.shapes() == []


def test_the_first_in_turn_is_deleted_before_its_turn():
    leader = Leader()
    leader.run(create("s1"), create("s2"), create("s3", priority=3))
    leader.run(c.DeleteSandbox("", b"", "s3"), c.DeleteSandbox("", b"", "s1"), register())
    assert leader.placed() == {"s2": "n1"}


def test_explain_answers_for_a_shape_that_has_room():
    leader = Leader()
    leader.run(register(), create("s1"))
    shape = shape_of(leader.driver.sandbox().spec)
    assert leader.scheduler.explain(shape) == ("waits for a node: of 1, none refuses", ())
    assert leader.scheduler._nodes["n1"].refusal(shape) == ""


def test_same_input_same_decisions():
    decisions = []
    for _ in range(2):
        leader = Leader()
        leader.run(*(register(f"n{k}") for k in range(20)))
        leader.run(*(create(f"s{k}", priority=k % 3) for k in range(100)))
        decisions.append(leader.step())
    assert decisions[0] == decisions[1]


def test_a_new_leader_goes_on_where_the_old_one_was():
    leader = Leader()
    leader.run(register(), *(create(f"s{k}") for k in range(6)))
    leader.run(leader.decide(limit=2))
    leader.take_over()
    leader.check()
    assert len(leader.placed()) == 4
    assert leader.driver.machine.counts[SandboxState.SCHEDULED] == 6


def test_room_that_new_limits_take_or_give_back_counts() -> None:
    leader = Leader()
    leader.run(register(capacity=Amounts(1000, 2048 * MIB, 4096 * MIB, 8)))
    leader.run(create("s1"), create("s2", cpu_millicores=600))
    assert leader.placed() == {"s1": "n1"}
    leader.run(c.UpdateSandbox("", b"", "s1", cpu_millicores=400))
    leader.check()
    assert leader.placed() == {"s2": "n1"}
    leader.run(create("s3", cpu_millicores=1))
    leader.check()
    assert leader.placed() == {}
