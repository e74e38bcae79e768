"""Snapshots and compaction: §7, figure 13."""

from __future__ import annotations

from random import Random

import pytest

from prism_control.raft.config import CoreConfig
from prism_control.raft.configuration import bootstrap
from prism_control.raft.core import Core
from prism_control.raft.errors import InvariantError
from prism_control.raft.progress import Progress, ProgressState
from prism_control.raft.types import (
    AppendReply,
    AppendRequest,
    Entry,
    HardState,
    HeartbeatReply,
    SnapshotMeta,
    SnapshotRequest,
)
from tests.unit.raft.harness import FIVE, THREE, Group, drain, entry, make_core, sent, turn
from tests.unit.raft.test_replication import accept, make_leader


def compacted_leader() -> tuple[Core, Progress]:
    """Return a leader whose log begins after 3, and what it knows of member 3."""
    leader = make_leader((1, 1, 1))
    drain(leader)
    accept(leader, 2, 4)
    drain(leader)
    leader.snapshot_saved(leader.snapshot_meta(4))
    leader.compact(3)
    leader.propose([b"x"])
    drain(leader)
    assert leader.replication is not None
    return leader, leader.replication.progress[3]


def reject(leader: Core, member: int, index: int, hint: int) -> None:
    leader.step(AppendReply(member, 1, leader.term, True, index, hint_index=hint, hint_term=1))


def test_a_follower_behind_the_log_gets_a_snapshot_and_then_entries() -> None:
    leader, progress = compacted_leader()
    reject(leader, 3, 3, 0)
    (request,) = sent(drain(leader), SnapshotRequest)
    assert request.meta == SnapshotMeta(4, 2, THREE)
    assert progress.state is ProgressState.SNAPSHOT
    leader.propose([b"y"])
    assert sent(drain(leader), AppendRequest, 3) == [], "nothing is sent meanwhile"
    leader.report_snapshot(3, ok=True)
    assert (progress.state, progress.next) == (ProgressState.PROBE, 5)
    leader.tick()
    leader.step(HeartbeatReply(3, 1, leader.term))
    (append,) = sent(drain(leader), AppendRequest, 3)
    assert (append.previous_index, len(append.entries)) == (4, 2)


def test_a_failed_snapshot_is_tried_again_after_a_heartbeat() -> None:
    leader, progress = compacted_leader()
    reject(leader, 3, 3, 0)
    drain(leader)
    leader.report_snapshot(3, ok=False)
    assert sent(drain(leader), SnapshotRequest) == []
    leader.tick()
    leader.step(HeartbeatReply(3, 1, leader.term))
    assert len(sent(drain(leader), SnapshotRequest)) == 1
    assert progress.state is ProgressState.SNAPSHOT


def test_no_snapshot_is_sent_to_a_member_that_is_not_there() -> None:
    leader, progress = compacted_leader()
    progress.become_probe(1)
    progress.recent_active = False
    assert sent(drain(leader), SnapshotRequest) == []


def test_the_acknowledgement_of_a_snapshot_ends_it_before_the_report_comes() -> None:
    leader, progress = compacted_leader()
    reject(leader, 3, 3, 0)
    drain(leader)
    accept(leader, 3, 2)
    assert progress.state.name == "SNAPSHOT"
    accept(leader, 3, 4)
    assert progress.state.name == "REPLICATE"
    assert progress.match == 4
    leader.report_snapshot(3, ok=False)
    leader.report_snapshot(9, ok=True)
    assert progress.state.name == "REPLICATE"
    make_core(2).report_snapshot(1, ok=True)


def test_a_snapshot_that_arrives_after_more_was_compacted_is_followed_by_another() -> None:
    """Found by the simulator, seed 231: the follower stayed in SNAPSHOT for ever."""
    leader, progress = compacted_leader()
    reject(leader, 3, 3, 0)
    drain(leader)
    accept(leader, 2, 5)
    drain(leader)
    leader.snapshot_saved(leader.snapshot_meta(5))
    leader.compact(5)
    leader.propose([b"more"])
    accept(leader, 3, 4)
    assert [request.meta.index for request in sent(drain(leader), SnapshotRequest)] == [5]
    assert progress.pending_snapshot == 5


def test_messages_sent_ahead_that_are_lost_and_compacted_lead_to_a_snapshot() -> None:
    leader = make_leader((1,))
    drain(leader)
    accept(leader, 3, 2)
    leader.propose([b"x"])
    drain(leader)
    accept(leader, 2, 3)
    drain(leader)
    assert leader.replication is not None
    progress = leader.replication.progress[3]
    leader.propose([b"y"])
    drain(leader)
    accept(leader, 2, 4)
    drain(leader)
    leader.snapshot_saved(leader.snapshot_meta(4))
    leader.compact(4)
    progress.next = 4
    leader.tick()
    leader.step(HeartbeatReply(3, 1, leader.term))
    assert len(sent(drain(leader), SnapshotRequest)) == 1


def test_a_received_snapshot_replaces_a_log_that_conflicts() -> None:
    """§7: the follower discards its entire log."""
    core = make_core(3, THREE, (1, 1, 1))
    meta = SnapshotMeta(2, 2, FIVE)
    core.step(SnapshotRequest(1, 3, 3, meta))
    core.step(AppendRequest(1, 3, 3, 2, 2, (entry(3, 3),), 3))
    ready = core.take_ready()
    assert ready is not None
    assert ready.snapshot == meta
    assert ready.hard_state == HardState(3, 0, 3)
    assert [e.index for e in ready.entries] == [3]
    assert [e.index for e in ready.committed] == [3]
    assert sent(ready.messages_after_persist, AppendReply) == [
        AppendReply(3, 1, 3, False, 2),
        AppendReply(3, 1, 3, False, 3),
    ]
    core.persisted(ready)
    core.applied(2)
    core.applied(3)
    core.check()
    assert core.configuration == FIVE


def test_a_received_snapshot_that_the_log_covers_only_commits() -> None:
    """§7: entries that follow the snapshot are retained."""
    core = make_core(3, THREE, (1, 1, 1))
    core.step(SnapshotRequest(1, 3, 1, SnapshotMeta(2, 1, THREE)))
    ready = turn(core)
    assert ready is not None
    assert ready.snapshot is None
    assert (core.commit, core.log.last_index) == (2, 3)


def test_an_old_snapshot_changes_nothing() -> None:
    """The snapshot index never moves backwards."""
    core = make_core(3, THREE, (1, 1, 1), commit=3)
    core.step(SnapshotRequest(1, 3, 1, SnapshotMeta(2, 1, THREE)))
    assert drain(core) == [AppendReply(3, 1, 1, False, 3)]
    assert core.commit == 3
    turn(core)
    core.snapshot_saved(core.snapshot_meta(3))
    core.snapshot_saved(SnapshotMeta(1, 1, THREE))
    assert core.snapshot.index == 3


def test_a_snapshot_can_be_taken_only_of_what_is_applied() -> None:
    core = make_core(1, THREE, (1, 1, 1), commit=2)
    turn(core)
    assert core.snapshot_meta(2) == SnapshotMeta(2, 1, THREE)
    with pytest.raises(InvariantError, match="no snapshot at 3"):
        core.snapshot_meta(3)
    core.snapshot_saved(core.snapshot_meta(2))
    with pytest.raises(InvariantError, match="no snapshot at 1"):
        core.snapshot_meta(1)


def test_only_what_a_snapshot_covers_can_be_compacted() -> None:
    core = make_core(1, THREE, (1, 1, 1), commit=3)
    turn(core)
    with pytest.raises(InvariantError, match="cannot compact to 2: the snapshot is at 0"):
        core.compact(2)
    core.snapshot_saved(core.snapshot_meta(2))
    core.compact(2)
    assert core.log.base_index == 2


def restart(snapshot: SnapshotMeta, entries: list[Entry], commit: int = 0) -> Core:
    return Core(CoreConfig(1), Random(1), HardState(3, 0, commit), snapshot, entries)


def test_restart_from_a_snapshot_keeps_the_trailing_entries() -> None:
    core = restart(SnapshotMeta(4, 2, THREE), [entry(i, 1 + i // 4) for i in range(2, 7)])
    assert (core.log.base_index, core.log.last_index) == (2, 6)
    assert (core.commit, core.applied_index) == (4, 4)
    assert core.configuration == THREE


def test_restart_drops_a_log_that_ends_before_the_snapshot() -> None:
    core = restart(SnapshotMeta(9, 2, THREE), [entry(1, 1), entry(2, 1)])
    assert (core.log.base_index, core.log.last_index, core.log.last_term) == (9, 9, 2)


def test_restart_refuses_a_log_that_does_not_fit_the_snapshot() -> None:
    with pytest.raises(InvariantError, match="another entry 2 than the snapshot"):
        restart(SnapshotMeta(2, 2, THREE), [entry(1, 1), entry(2, 1)])
    with pytest.raises(InvariantError, match="cannot follow"):
        restart(SnapshotMeta(2, 2, THREE), [entry(4, 2)])
    with pytest.raises(InvariantError, match="commit <= last"):
        restart(SnapshotMeta(2, 2, THREE), [entry(3, 2)], commit=4)


def test_restart_finds_the_configuration_in_the_log() -> None:
    hard_state, first = bootstrap(FIVE)
    core = Core(CoreConfig(1), Random(1), hard_state, SnapshotMeta(), [first])
    assert core.configuration == FIVE
    assert core.commit == 1


def test_truncation_rolls_the_configuration_back() -> None:
    """Thesis 4.1: an uncommitted configuration may vanish with its entry."""
    hard_state, first = bootstrap(THREE)
    core = Core(CoreConfig(3), Random(1), hard_state, SnapshotMeta(), [first])
    _, other = bootstrap(FIVE)
    core.step(AppendRequest(1, 3, 1, 1, 1, (Entry(2, 1, other.kind, other.data),), 1))
    assert core.configuration == FIVE
    core.step(AppendRequest(2, 3, 2, 1, 1, (entry(2, 2),), 1))
    assert core.configuration == THREE


def test_a_member_that_was_away_catches_up_through_a_snapshot() -> None:
    group = Group.bootstrapped()
    leader = group.elect(1)
    group.cut = {3}
    for _ in range(10):
        leader.propose([b"x"])
        group.pump()
    leader.snapshot_saved(leader.snapshot_meta(leader.applied_index))
    leader.compact(leader.applied_index)
    group.cut = set()
    group.tick(3)
    leader.report_snapshot(3, ok=True)
    group.tick(5)
    assert group.cores[3].applied_index == leader.applied_index
    assert any(ready.snapshot for ready in group.readies[3])
