"""An agent is told all that it shall have, once, and no more starts than it can take."""

from __future__ import annotations

import pytest

from prism_control.scheduler import assignments
from prism_control.scheduler.assignments import AgentDispatch, Dispatch, assignment_of
from prism_control.state import commands as c
from prism_control.state.events import NodeChanged
from prism_control.state.model import (
    Amounts,
    DesiredState,
    ObservedState,
    OnNodeLoss,
    SandboxState,
)
from tests.unit.state.builders import Driver, create, register

ROOM = Amounts(10**6, 10**13, 10**13, 1000)


class Session:
    def __init__(self, *, has: tuple[str, ...] = (), starts_max: int = 64) -> None:
        self.driver = Driver()
        self.driver.run(register(capacity=ROOM))
        self.has, self.starts_max = has, starts_max

    def open(self) -> AgentDispatch:
        self.dispatch = Dispatch()
        rows = self.driver.machine.sandboxes_on("n1")
        self.agent = AgentDispatch("n1", rows, self.has, self.starts_max)
        self.dispatch.open(self.agent)
        return self.agent

    def place(self, *ids: str, **changes: object) -> list[str]:
        self.driver.run(*(create(key, **changes) for key in ids))
        return self.run(c.AssignSandboxes(tuple(c.Placement(key, 1, "n1") for key in ids)))

    def run(self, *commands: c.Command) -> list[str]:
        self.driver.run(*commands)
        return self.dispatch.observe(self.driver.events)

    def report(self, state: ObservedState, key: str) -> list[str]:
        self.driver.report(state, key)
        return self.dispatch.observe(self.driver.events)


def wishes(assignments):
    return [(one.sandbox_id, one.generation, one.desired) for one in assignments]


RUN, STOP, DELETE = DesiredState.RUNNING, DesiredState.STOPPED, DesiredState.DELETED


def test_first_batch_is_complete():
    session = Session(has=("s1", "s2", "s3", "s4"))
    session.driver.bring(SandboxState.READY, "s1", ttl_ms=5000)
    session.driver.bring(SandboxState.STOPPED, "s2")
    session.driver.bring(SandboxState.DELETING, "s3")
    session.driver.bring(SandboxState.FAILED, "s4")
    session.driver.bring(SandboxState.SCHEDULED, "s5")
    agent = session.open()
    assert agent.ready
    [batch] = agent.complete()
    assert wishes(batch) == [
        ("s1", 1, RUN), ("s2", 1, STOP), ("s3", 1, DELETE), ("s4", 1, STOP), ("s5", 1, RUN)
    ]  # fmt: skip
    assert batch[0].spec is session.driver.sandbox("s1").spec
    assert batch[0].expire_ms == session.driver.sandbox("s1").expire_ms
    assert batch[1].spec is None
    assert batch[2].grace_ms == 5000
    assert not agent.ready
    assert agent.take() == []


def test_changes_are_sent_once():
    session = Session()
    agent = session.open()
    agent.complete()
    assert session.place("s1") == ["n1"]
    assert agent.take() == [assignment_of(session.driver.sandbox("s1"))]
    assert session.report(ObservedState.STARTING, "s1") == []
    assert session.report(ObservedState.READY, "s1") == []
    assert session.run(c.StopSandbox("", b"", "s1", 100)) == ["n1"]
    assert session.run(c.DeleteSandbox("", b"", "s1")) == ["n1"]
    assert wishes(agent.take()) == [("s1", 1, DELETE)]
    assert session.report(ObservedState.DELETED, "s1") == []
    assert agent.take() == []


def test_restart_is_told_by_its_count():
    session = Session()
    agent = session.open()
    agent.complete()
    session.place("s1")
    agent.take()
    session.report(ObservedState.READY, "s1")
    session.run(c.StopSandbox("", b"", "s1"))
    agent.take()
    session.report(ObservedState.STOPPED, "s1")
    session.run(c.StartSandbox("", b"", "s1"))
    (again,) = agent.take()
    assert (again.desired, again.start_count) == (RUN, 2)
    assert again.spec is not None


def test_starts_in_flight_are_bounded_and_go_on_as_reports_come():
    session = Session(starts_max=2)
    agent = session.open()
    agent.complete()
    session.place("s1", "s2", "s3", "s4")
    assert wishes(agent.take()) == [("s1", 1, RUN), ("s2", 1, RUN)]
    assert (agent.starting_count, agent.held_back_count, agent.ready) == (2, 2, False)
    assert session.report(ObservedState.STARTING, "s1") == []
    assert session.report(ObservedState.READY, "s1") == ["n1"]
    assert wishes(agent.take()) == [("s3", 1, RUN)]
    assert session.report(ObservedState.FAILED, "s2") == ["n1"]
    assert wishes(agent.take()) == [("s2", 1, STOP), ("s4", 1, RUN)]


def test_stops_and_deletes_are_never_held_back():
    session = Session(starts_max=1)
    agent = session.open()
    agent.complete()
    session.place("s1", "s2", "s3")
    agent.take()
    session.run(c.DeleteSandbox("", b"", "s2"), c.StopSandbox("", b"", "s1"))
    assert wishes(agent.take()) == [("s2", 1, DELETE), ("s1", 1, STOP), ("s3", 1, RUN)]


def test_starts_that_the_agent_does_not_have_may_be_missing_in_the_first_batch():
    session = Session(has=("s4",), starts_max=2)
    session.open()
    session.place("s1", "s2", "s3", "s4")
    agent = session.open()
    assert wishes(*agent.complete()) == [("s4", 1, RUN), ("s1", 1, RUN)]
    session.report(ObservedState.READY, "s4")
    session.report(ObservedState.READY, "s1")
    assert wishes(agent.take()) == [("s2", 1, RUN), ("s3", 1, RUN)]


def test_batches_are_bounded_in_items_and_bytes():
    session = Session(starts_max=1000)
    agent = session.open()
    agent.complete()
    session.place("s1", "s2", "s3", env=(("A", "x" * 60_000),))
    assert len(agent.take(2)) == 2
    assert len(agent.take(2)) == 1
    big = tuple((f"A{k}", "x" * 400_000) for k in range(3))
    session.place("b1", "b2", "b3", env=big)
    assert [len(agent.take()) for _ in range(4)] == [1, 1, 1, 0]


def test_what_was_placed_elsewhere_is_deleted_here():
    session = Session()
    agent = session.open()
    agent.complete()
    session.place("s1", "s2", on_node_loss=OnNodeLoss.RESCHEDULE)
    agent.take(1)
    assert session.run(c.LoseNode("n1", "i1", 5)) == ["n1"]
    assert wishes(agent.take()) == [("s1", 1, DELETE)]  # s2 was never told
    session.run(register(capacity=ROOM))
    session.run(c.AssignSandboxes((c.Placement("s1", 2, "n1"),)))
    assert wishes(agent.take()) == [("s1", 2, RUN)]


def test_a_wish_that_is_taken_back_before_it_was_sent_is_not_sent():
    session = Session(has=("s1",))
    session.driver.bring(SandboxState.READY, "s1")
    agent = session.open()
    agent.complete()
    row = session.driver.sandbox("s1")
    session.run(c.StopSandbox("", b"", "s1"))
    agent._put(row)
    assert agent.take() == []


def test_sessions_replace_each_other():
    session = Session()
    old = session.open()
    dispatch = session.dispatch
    new = AgentDispatch("n1", (), ())
    dispatch.open(new)
    dispatch.close(old)
    assert dispatch.agent("n1") is new
    dispatch.close(new)
    assert dispatch.agent("n1") is None
    assert session.place("s1") == []


def test_changes_of_nodes_and_of_others_sandboxes_are_nothing_to_send():
    session = Session()
    agent = session.open()
    agent.complete()
    assert session.run(register("n2", capacity=ROOM)) == []
    assert isinstance(session.driver.events[0], NodeChanged)
    session.run(create("s1"))
    assert session.run(c.AssignSandboxes((c.Placement("s1", 1, "n2"),))) == []
    assert not agent.ready


@pytest.mark.parametrize("state", [SandboxState.SCHEDULED, SandboxState.READY])
def test_lost_with_the_node_leaves_nothing_to_send_in_a_new_session(state):
    session = Session()
    session.driver.bring(state)
    session.driver.run(c.LoseNode("n1", "i1", 5), register(capacity=ROOM))
    assert session.open().complete() == [[]]


def test_first_batches_stay_below_a_message(monkeypatch):
    monkeypatch.setattr(assignments, "_BATCH_BYTES_MAX", 1024)
    session = Session(has=("s1", "s2", "s3"))
    for key in ("s1", "s2", "s3"):
        session.driver.bring(SandboxState.READY, key)
    agent = session.open()
    batches = agent.complete()
    assert [[one.sandbox_id for one in batch] for batch in batches] == [["s1", "s2"], ["s3"]]
    assert agent.take() == []


def test_a_new_deadline_is_told():
    session = Session(has=("s1",))
    session.driver.bring(SandboxState.READY, "s1")
    agent = session.open()
    agent.complete()
    assert session.run(c.UpdateSandbox("", b"", "s1", (("a", "b"),))) == []
    assert session.run(c.UpdateSandbox("", b"", "s1", (), 2_000_000)) == ["n1"]
    assert [one.expire_ms for one in agent.take()] == [2_000_000]


def test_nodes_with_news_are_named_in_the_order_of_the_changes():
    driver, dispatch = Driver(), Dispatch()
    nodes = [f"n{number}" for number in range(1, 9)]
    driver.run(*(register(node, capacity=ROOM) for node in nodes))
    for node in nodes:
        agent = AgentDispatch(node, [], ())
        agent.complete()
        dispatch.open(agent)
    driver.run(*(create(f"s-{node}") for node in nodes))
    placements = [c.Placement(f"s-{node}", 1, node) for node in reversed(nodes)]
    driver.run(c.AssignSandboxes(tuple(placements)))
    assert dispatch.observe(driver.events) == nodes[::-1]


def test_an_agent_is_told_of_new_limits_once_and_of_labels_never() -> None:
    session = Session()
    agent = session.open()
    session.place("s1")
    agent.complete()
    session.report(ObservedState.READY, "s1")
    assert agent.take() == []
    assert session.run(c.UpdateSandbox("", b"", "s1", (("a", "b"),))) == []
    for wish in (c.ResumeSandbox("", b"", "s1"), c.PauseSandbox("", b"", "s1")):
        session.run(wish)
        agent.take()
        size = session.driver.sandbox().spec.memory_bytes * 2
        assert session.run(c.UpdateSandbox("", b"", "s1", memory_bytes=size)) == ["n1"]
        (told,) = agent.take()
        assert told.spec is not None
        assert told.spec.memory_bytes == size
        assert agent.take() == []
