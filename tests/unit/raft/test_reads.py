"""ReadIndex: thesis 6.4."""

from __future__ import annotations

from prism_control.raft.config import Limits
from prism_control.raft.core import Core
from prism_control.raft.types import (
    Configuration,
    Heartbeat,
    HeartbeatReply,
    ReadIndexReply,
    ReadIndexRequest,
    ReadState,
    Role,
)
from tests.unit.raft.harness import (
    FIVE,
    THREE,
    Group,
    drain,
    make_core,
    sent,
    tick_until,
    turn,
)
from tests.unit.raft.test_replication import accept, make_leader


def reads(group: Group, member: int) -> list[ReadState]:
    return [read for ready in group.readies[member] for read in ready.reads]


def dropped(core: Core) -> tuple[int, ...]:
    ready = turn(core)
    return ready.reads_dropped if ready else ()


def settled_leader(configuration: Configuration = THREE, limits: Limits | None = None) -> Core:
    """Return a leader that has committed in its own term and has nothing to send."""
    leader = make_leader((1,), configuration, limits)
    drain(leader)
    for member in configuration.voters[1:]:
        accept(leader, member, 2)
    drain(leader)
    return leader


def test_a_read_waits_until_a_majority_confirms_the_leader() -> None:
    leader = settled_leader(FIVE)
    leader.read_index(77)
    ready = turn(leader)
    assert ready is not None
    assert ready.reads == ()
    heartbeats = sent(ready.messages_now, Heartbeat)
    assert [heartbeat.receiver for heartbeat in heartbeats] == [2, 3, 4, 5]
    number = heartbeats[0].read_context
    leader.step(HeartbeatReply(2, 1, leader.term, number))
    assert turn(leader) is None
    leader.step(HeartbeatReply(3, 1, leader.term, number))
    ready = turn(leader)
    assert ready is not None
    assert ready.reads == (ReadState(77, 2),)


def test_one_round_confirms_all_reads_that_waited_for_it() -> None:
    leader = settled_leader()
    for context in (1, 2, 3):
        leader.read_index(context)
    assert len(sent(drain(leader), Heartbeat)) == 2
    assert leader.replication is not None
    leader.step(HeartbeatReply(2, 1, leader.term, leader.replication.reads.number))
    ready = turn(leader)
    assert ready is not None
    assert [read.context for read in ready.reads] == [1, 2, 3]


def test_a_late_answer_does_not_confirm_a_newer_read() -> None:
    leader = settled_leader()
    leader.read_index(1)
    drain(leader)
    leader.read_index(2)
    drain(leader)
    leader.step(HeartbeatReply(2, 1, leader.term, 1))
    ready = turn(leader)
    assert ready is not None
    assert [read.context for read in ready.reads] == [1]
    leader.step(HeartbeatReply(3, 1, leader.term, 2))
    ready = turn(leader)
    assert ready is not None
    assert [read.context for read in ready.reads] == [2]


def test_a_leader_serves_no_read_before_it_has_committed_in_its_own_term() -> None:
    """It does not know yet what is committed."""
    leader = make_leader((1, 1))
    leader.read_index(7)
    drain(leader)
    leader.step(HeartbeatReply(2, 1, leader.term, 0))
    assert turn(leader) is None
    accept(leader, 2, 3)
    heartbeats = sent(drain(leader), Heartbeat)
    leader.step(HeartbeatReply(2, 1, leader.term, heartbeats[-1].read_context))
    ready = turn(leader)
    assert ready is not None
    assert ready.reads == (ReadState(7, 3),)


def test_a_single_voter_confirms_itself() -> None:
    core = make_core(1, Configuration(voters=(1,)))
    tick_until(core, lambda: core.role is Role.LEADER)
    core.read_index(5)
    drain(core)
    core.read_index(6)
    ready = turn(core)
    assert ready is not None
    assert ready.reads == (ReadState(6, 1),)


def test_a_follower_asks_the_leader_and_serves_the_read_itself() -> None:
    group = Group.bootstrapped()
    leader = group.elect(1)
    leader.propose([b"x"])
    group.pump()
    group.cores[3].read_index(9)
    group.pump()
    assert reads(group, 3) == [ReadState(9, leader.commit)]
    assert reads(group, 1) == []


def test_a_repeated_answer_is_not_a_second_read() -> None:
    core = make_core(2, THREE, (1,))
    core.step(Heartbeat(1, 2, 1, 0))
    core.read_index(4)
    assert sent(drain(core), ReadIndexRequest) == [ReadIndexRequest(2, 1, 1, 4)]
    for _ in range(2):
        core.step(ReadIndexReply(1, 2, 1, 4, 1))
    ready = turn(core)
    assert ready is not None
    assert ready.reads == (ReadState(4, 1),)


def test_without_a_leader_a_read_is_dropped_and_reported() -> None:
    core = make_core(2, THREE, (1,))
    core.read_index(4)
    assert dropped(core) == (4,)


def test_a_read_whose_answer_is_lost_is_dropped_after_an_election_timeout() -> None:
    core = make_core(2, THREE, (1,))
    core.step(Heartbeat(1, 2, 1, 0))
    core.read_index(4)
    drain(core)
    for _ in range(9):
        core.tick()
    core.step(Heartbeat(1, 2, 1, 0))
    core.read_index(5)
    assert dropped(core) == ()
    core.tick()
    assert dropped(core) == (4,)


def test_reads_are_dropped_when_the_leader_changes() -> None:
    core = make_core(2, THREE, (1,))
    core.step(Heartbeat(1, 2, 1, 0))
    core.read_index(4)
    core.step(Heartbeat(3, 2, 2, 0))
    assert dropped(core) == (4,)


def test_a_leader_that_steps_down_drops_its_own_reads() -> None:
    leader = settled_leader()
    leader.read_index(1)
    drain(leader)
    leader.read_index(2)
    leader.step(ReadIndexRequest(3, 1, leader.term, 50))
    leader.step(Heartbeat(2, 1, leader.term + 1, 0))
    assert dropped(leader) == (1, 2)


def test_reads_past_the_bound_are_dropped() -> None:
    leader = settled_leader(limits=Limits(reads_waiting_max=1))
    leader.read_index(1)
    leader.read_index(2)
    leader.step(ReadIndexRequest(3, 1, leader.term, 50))
    assert dropped(leader) == (2,)
    follower = make_core(2, THREE, (1,), limits=Limits(reads_waiting_max=1))
    follower.step(Heartbeat(1, 2, 1, 0))
    follower.read_index(1)
    follower.read_index(2)
    assert dropped(follower) == (2,)


def test_only_a_leader_answers_read_requests() -> None:
    core = make_core(2, THREE, (1,))
    core.step(ReadIndexRequest(3, 2, 1, 50))
    assert drain(core) == []
