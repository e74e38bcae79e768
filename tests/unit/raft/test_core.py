"""The contract between the core and its driver."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prism_control.raft.config import CoreConfig, Limits
from prism_control.raft.errors import CorruptEntryError, InvariantError
from prism_control.raft.types import (
    AppendRequest,
    Configuration,
    Entry,
    EntryKind,
    Heartbeat,
    Role,
)
from tests.unit.raft.harness import THREE, Group, drain, entry, make_core, sent, tick_until, turn
from tests.unit.raft.test_replication import make_leader


def test_nothing_to_do_is_none() -> None:
    core = make_core(1)
    assert core.take_ready() is None
    core.tick()
    assert core.take_ready() is None


def test_each_ready_must_be_persisted_before_the_next() -> None:
    core = make_core(2, THREE, (1,))
    core.step(AppendRequest(1, 2, 1, 1, 1, (entry(2, 1),), 0))
    ready = core.take_ready()
    assert ready is not None
    with pytest.raises(InvariantError, match="was not persisted"):
        core.take_ready()
    with pytest.raises(InvariantError, match="not the last Ready"):
        core.persisted(replace(ready))
    core.persisted(ready)
    with pytest.raises(InvariantError, match="not the last Ready"):
        core.persisted(ready)


def test_a_commit_index_alone_is_not_worth_a_write() -> None:
    core = make_core(2, THREE, (1, 1), term=1)
    core.step(Heartbeat(1, 2, 1, 2))
    ready = turn(core)
    assert ready is not None
    assert not ready.needs_persist
    assert [e.index for e in ready.committed] == [1, 2]
    core.step(AppendRequest(1, 2, 1, 2, 1, (entry(3, 1),), 2))
    ready = turn(core)
    assert ready is not None
    assert ready.hard_state is not None
    assert ready.hard_state.commit == 2, "it rides along with the next write"


def test_the_hard_state_is_not_written_again_if_nothing_changed() -> None:
    core = make_core(2, THREE, (1,))
    core.step(AppendRequest(1, 2, 1, 1, 1, (entry(2, 1),), 0))
    ready = turn(core)
    assert ready is not None
    assert ready.entries
    assert ready.hard_state is None


def test_what_is_applied_at_once_is_bounded() -> None:
    core = make_core(2, THREE, (1, 1, 1), limits=Limits(committed_bytes_max=60))
    core.step(Heartbeat(1, 2, 1, 3))
    batches = []
    while (ready := turn(core)) is not None:
        batches.append([e.index for e in ready.committed])
    assert batches == [[1, 2], [3]]


def test_a_change_of_role_or_leader_is_reported_once() -> None:
    core = make_core(2, THREE, (1,))
    core.step(Heartbeat(1, 2, 1, 0))
    ready = turn(core)
    assert ready is not None
    assert ready.soft_state is not None
    assert (ready.soft_state.role, ready.soft_state.leader) == (Role.FOLLOWER, 1)
    core.step(Heartbeat(1, 2, 1, 0))
    ready = turn(core)
    assert ready is not None
    assert ready.soft_state is None


def test_applied_goes_forward_and_not_past_what_was_handed_out() -> None:
    core = make_core(2, THREE, (1, 1), commit=2)
    ready = core.take_ready()
    assert ready is not None
    core.persisted(ready)
    core.applied(1)
    for wrong in (0, 3):
        with pytest.raises(InvariantError, match=f"applied went from 1 to {wrong}"):
            core.applied(wrong)


def test_a_broken_invariant_is_named() -> None:
    core = make_core(2, THREE, (1,))
    core.leader = 2
    with pytest.raises(InvariantError, match="member 2: leads iff leader is itself"):
        core.check()
    leader = make_leader()
    assert leader.replication is not None
    leader.replication.uncommitted_bytes += 1
    with pytest.raises(InvariantError, match="bytes are uncommitted"):
        leader.check()


def test_an_entry_that_should_be_a_configuration_and_is_not_stops_the_member() -> None:
    core = make_core(2, THREE, (1,))
    bad = Entry(2, 1, EntryKind.CONFIGURATION, b"\x00")
    with pytest.raises(CorruptEntryError):
        core.step(AppendRequest(1, 2, 1, 1, 1, (bad,), 0))


def test_a_log_that_lost_committed_entries_is_noticed() -> None:
    core = make_core(2, THREE, (1,))
    core.commit = 9
    with pytest.raises(InvariantError, match="term of entry 9 is unknown"):
        core.step(AppendRequest(1, 2, 1, 9, 1, (), 9))


def test_heartbeats_leave_at_their_interval() -> None:
    core = make_core(1, Configuration(voters=(1,), learners=(2,)), heartbeat_ticks=3)
    tick_until(core, lambda: core.role is Role.LEADER)
    drain(core)
    counts = []
    for _ in range(6):
        core.tick()
        counts.append(len(sent(drain(core), Heartbeat)))
    assert counts == [0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("member", "election_ticks", "heartbeat_ticks"), [(0, 10, 1), (1, 10, 10), (1, 10, 0)]
)
def test_a_config_that_cannot_work_is_refused(
    member: int, election_ticks: int, heartbeat_ticks: int
) -> None:
    with pytest.raises(ValueError, match=r"cannot be the id|do not fit"):
        CoreConfig(member, election_ticks, heartbeat_ticks)


def test_the_same_inputs_give_the_same_outputs() -> None:
    def run() -> list[object]:
        core = make_core(1, Configuration(voters=(1, 2, 3, 4, 5)))
        outputs: list[object] = []
        for _ in range(100):
            core.tick()
            outputs += drain(core)
        return outputs

    assert run() == run()


def test_a_cluster_applies_the_same_entries_in_the_same_order() -> None:
    group = Group.bootstrapped()
    leader = group.elect(2)
    for number in range(20):
        leader.propose([b"%d" % number])
    group.pump()
    datas = [[e.data for e in entries][-20:] for entries in group.applied.values()]
    assert datas == [[b"%d" % number for number in range(20)]] * 3
