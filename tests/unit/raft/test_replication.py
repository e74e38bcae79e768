"""Log replication: §5.3, §5.4.2, thesis 10.2.1."""

from __future__ import annotations

import pytest

from prism_control.raft.config import Limits
from prism_control.raft.core import Core
from prism_control.raft.errors import InvariantError, NotLeaderError, ProposalDroppedError
from prism_control.raft.progress import ProgressState
from prism_control.raft.types import (
    AppendReply,
    AppendRequest,
    Configuration,
    Heartbeat,
    HeartbeatReply,
    Role,
    VoteReply,
)
from tests.unit.raft.harness import (
    FIVE,
    THREE,
    Group,
    drain,
    entry,
    make_core,
    sent,
    tick_until,
    turn,
)


def make_leader(
    terms: tuple[int, ...] = (1,),
    configuration: Configuration = THREE,
    limits: Limits | None = None,
    commit: int = 0,
) -> Core:
    """Return member 1 as the leader of the term after `terms`, its own log written."""
    core = make_core(1, configuration, terms, limits=limits, commit=commit)
    tick_until(core, lambda: core.role is Role.PRE_CANDIDATE)
    for pre_vote in (True, False):
        for member in configuration.voters[1:]:
            core.step(VoteReply(member, 1, max(terms) + 1, pre_vote, granted=True))
    assert core.role is Role.LEADER
    turn(core)
    return core


def accept(core: Core, member: int, index: int) -> None:
    core.step(AppendReply(member, core.config.id, core.term, rejected=False, index=index))


def test_an_entry_is_committed_once_a_majority_has_it_on_disk() -> None:
    """§5.3."""
    leader = make_leader((1,), FIVE)
    drain(leader)
    accept(leader, 2, 2)
    assert leader.commit == 0
    accept(leader, 3, 2)
    assert leader.commit == 2


def test_the_leader_counts_itself_only_after_its_own_write() -> None:
    """Thesis 10.2.1: it sends while it writes, and followers alone may commit."""
    leader = make_leader((1,), FIVE)
    drain(leader)
    for member in (2, 3):
        accept(leader, member, 2)
    assert leader.propose([b"x"]) == range(3, 4)
    ready = leader.take_ready()
    assert ready is not None
    assert ready.entries[0].index == 3
    assert {m.receiver for m in sent(ready.messages_now, AppendRequest)} == {2, 3}
    assert leader.log.persisted == 2
    leader.persisted(ready)
    accept(leader, 2, 3)
    assert leader.commit == 2
    accept(leader, 3, 3)
    assert leader.commit == 3


def test_leader_does_not_commit_earlier_term_by_counting_copies() -> None:
    """§5.4.2, figure 8."""
    leader = make_leader((1, 2), FIVE)
    for member in (2, 3, 4, 5):
        accept(leader, member, 2)
    assert leader.commit == 0, "entry 2 is on all members, but of term 2"
    accept(leader, 2, 3)
    assert leader.commit == 0
    accept(leader, 3, 3)
    assert leader.commit == 3


def test_joint_configuration_commits_by_both_majorities() -> None:
    """§6."""
    both = Configuration(voters=(1, 2, 3), voters_outgoing=(1, 4, 5))
    core = make_core(1, both, (1,))
    tick_until(core, lambda: core.role is Role.PRE_CANDIDATE)
    for pre_vote in (True, False):
        for member in (2, 4):
            core.step(VoteReply(member, 1, 2, pre_vote, granted=True))
    drain(core)
    accept(core, 2, 2)
    accept(core, 3, 2)
    assert core.commit == 0
    accept(core, 5, 2)
    assert core.commit == 2


def test_a_learner_gets_entries_and_does_not_count() -> None:
    """Thesis 4.2.1."""
    leader = make_leader((1,), Configuration(voters=(1, 2, 3), learners=(4,)))
    assert sent(drain(leader), AppendRequest, 4) == []
    accept(leader, 4, 2)
    assert leader.commit == 0
    leader.propose([b"x"])
    assert sent(drain(leader), AppendRequest, 4)


def test_a_new_leader_appends_an_empty_entry_of_its_term() -> None:
    """§8."""
    leader = make_leader((1, 1))
    assert (leader.log.last_index, leader.log.last_term) == (3, 2)
    assert leader.log.slice(3, 3)[0].data == b""


def test_a_follower_rejects_entries_that_do_not_join_its_log() -> None:
    """§5.3, consistency check."""
    core = make_core(2, THREE, (1, 1))
    core.step(AppendRequest(1, 2, 2, 3, 2, (entry(4, 2),), 0))
    assert drain(core) == [AppendReply(2, 1, 2, True, 3, hint_index=2, hint_term=1)]
    core.step(AppendRequest(1, 2, 2, 2, 2, (entry(3, 2),), 0))
    assert drain(core) == [AppendReply(2, 1, 2, True, 2, hint_index=2, hint_term=1)]
    assert core.log.last_index == 2


def test_conflicting_entries_are_cut_and_replaced() -> None:
    """§5.3, figure 7."""
    core = make_core(2, THREE, (1, 2, 2, 2), commit=1)
    core.step(AppendRequest(1, 2, 3, 1, 1, (entry(2, 3), entry(3, 3)), 2))
    ready = turn(core)
    assert ready is not None
    assert [(e.index, e.term) for e in ready.entries] == [(2, 3), (3, 3)]
    assert sent(ready.messages_after_persist, AppendReply) == [AppendReply(2, 1, 3, False, 3)]
    assert (core.log.last_index, core.commit) == (3, 2)


def test_an_old_append_cuts_nothing_that_came_after_it() -> None:
    """§5.3: only a conflict cuts; messages may be reordered."""
    core = make_core(2, THREE, (1, 1, 1, 1))
    core.step(AppendRequest(1, 2, 1, 1, 1, (entry(2, 1),), 0))
    assert core.log.last_index == 4
    assert drain(core) == [AppendReply(2, 1, 1, False, 2)]


def test_a_follower_acknowledges_only_what_the_message_covers() -> None:
    """Its own tail may conflict with the leader's."""
    core = make_core(2, THREE, (1, 1, 2, 2))
    core.step(AppendRequest(1, 2, 3, 2, 1, (), 9))
    assert sent(drain(core), AppendReply) == [AppendReply(2, 1, 3, False, 2)]
    assert core.commit == 2, "and commits no further, whatever the leader has committed"


def test_a_leader_that_would_replace_committed_entries_stops_the_member() -> None:
    """State Machine Safety, figure 3."""
    core = make_core(2, THREE, (1, 1, 1), commit=2)
    with pytest.raises(InvariantError, match="entry 2 is committed"):
        core._write((entry(2, 3),))


def test_what_is_committed_already_is_skipped() -> None:
    core = make_core(2, THREE, (1, 1, 1), commit=3)
    core.step(AppendRequest(1, 2, 1, 0, 0, (entry(1, 1),), 1))
    assert drain(core) == [AppendReply(2, 1, 1, False, 3)]
    core.step(AppendRequest(1, 2, 1, 1, 1, (entry(2, 1), entry(3, 1), entry(4, 1)), 3))
    assert drain(core) == [AppendReply(2, 1, 1, False, 4)]
    assert core.log.last_index == 4


def test_a_leader_finds_the_common_log_in_one_round_per_conflicting_term() -> None:
    """End of §5.3, figure 7 (f)."""
    leader = make_core(1, THREE, (1, 1, 1, 4, 4, 5, 5, 6, 6, 6))
    follower = make_core(2, THREE, (1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3))
    group = Group([leader, follower, make_core(3, THREE, (1, 1, 1, 4, 4, 5, 5, 6, 6, 6))])
    probes: list[int] = []

    def passes(message: object) -> bool:
        if isinstance(message, AppendRequest) and message.receiver == 2:
            probes.append(message.previous_index)
        return True

    group.passes = passes
    group.elect(1)
    assert [e.term for e in follower.log.slice(1, 11)] == [1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 7]
    assert probes[:2] == [10, 3]
    assert follower.commit == leader.commit == 11


def test_a_lost_message_is_found_at_the_next_heartbeat() -> None:
    group = Group.bootstrapped()
    leader = group.elect(1)
    group.passes = lambda message: (
        not (isinstance(message, AppendRequest) and message.receiver == 3)
    )
    leader.propose([b"lost"])
    group.pump()
    group.passes = lambda message: True
    assert group.cores[3].log.last_index == leader.log.last_index - 1
    group.tick(3)
    assert group.cores[3].log.last_index == leader.log.last_index
    assert group.cores[3].commit == leader.commit


def test_a_lost_probe_is_sent_again_after_a_heartbeat() -> None:
    leader = make_leader()
    progress = leader.replication.progress[2] if leader.replication else None
    assert progress is not None
    assert progress.probe_sent
    leader.tick()
    assert sent(drain(leader), AppendRequest, 2) == []
    leader.step(HeartbeatReply(2, 1, leader.term))
    assert len(sent(drain(leader), AppendRequest, 2)) == 1


def test_the_window_bounds_what_is_sent_ahead() -> None:
    limits = Limits(append_bytes_max=30, inflight_messages_max=3)
    leader = make_leader(limits=limits)
    drain(leader)
    accept(leader, 2, 2)
    leader.propose([b"x" * 10] * 9)
    assert len(sent(drain(leader), AppendRequest, 2)) == 3
    accept(leader, 2, 4)
    requests = sent(drain(leader), AppendRequest, 2)
    assert [request.previous_index for request in requests] == [5, 6]


def test_after_lost_messages_the_leader_probes_from_the_last_match() -> None:
    leader = make_leader()
    drain(leader)
    accept(leader, 2, 2)
    leader.propose([b"x"])
    drain(leader)
    leader.report_unreachable(2)
    leader.report_unreachable(9)
    assert leader.replication is not None
    progress = leader.replication.progress[2]
    assert (progress.state, progress.next) == (ProgressState.PROBE, 3)
    assert len(sent(drain(leader), AppendRequest, 2)) == 1
    make_core(2).report_unreachable(1)


def test_followers_hear_of_a_commit_without_waiting_for_a_heartbeat() -> None:
    group = Group.bootstrapped()
    leader = group.elect(1)
    leader.propose([b"x"])
    group.pump()
    assert {core.commit for core in group.cores.values()} == {leader.log.last_index}


def test_a_heartbeat_never_commits_past_what_the_follower_acknowledged() -> None:
    """It may hold other entries there."""
    leader = make_leader((1,), FIVE)
    drain(leader)
    for member in (2, 3):
        accept(leader, member, 2)
    assert leader.commit == 2
    drain(leader)
    leader.tick()
    heartbeats = {m.receiver: m.commit for m in sent(drain(leader), Heartbeat)}
    assert heartbeats == {2: 2, 3: 2, 4: 0, 5: 0}


def test_a_commit_index_past_the_log_stops_the_member() -> None:
    core = make_core(2, THREE, (1,))
    with pytest.raises(InvariantError, match="acknowledged entries are gone"):
        core.step(Heartbeat(1, 2, 1, 5))


def test_a_follower_that_claims_what_does_not_exist_stops_the_leader() -> None:
    leader = make_leader()
    with pytest.raises(InvariantError, match="member 2 acknowledges 99"):
        accept(leader, 2, 99)


def test_answers_of_strangers_and_to_followers_are_ignored() -> None:
    leader = make_leader()
    drain(leader)
    accept(leader, 9, 2)
    leader.step(HeartbeatReply(9, 1, leader.term))
    assert leader.commit == 0
    follower = make_core(2, THREE, (1,))
    follower.step(AppendReply(1, 2, 1, False, 1))
    follower.step(HeartbeatReply(1, 2, 1))
    assert drain(follower) == []


def test_an_acknowledgement_of_an_old_term_is_not_sent_after_the_log_was_cut() -> None:
    """Both leaders' messages may wait while the disk writes; the first ack would be a lie."""
    core = make_core(3, FIVE, (1,))
    core.step(AppendRequest(1, 3, 1, 1, 1, (entry(2, 1), entry(3, 1)), 0))
    core.step(AppendRequest(2, 3, 2, 1, 1, (entry(2, 2),), 0))
    replies = sent(drain(core), AppendReply)
    assert replies == [AppendReply(3, 2, 2, False, 2)]


def test_only_the_leader_takes_proposals() -> None:
    core = make_core(2, THREE, (1,))
    with pytest.raises(NotLeaderError, match="unknown") as caught:
        core.propose([b"x"])
    assert caught.value.leader == 0
    core.step(Heartbeat(1, 2, 1, 0))
    with pytest.raises(NotLeaderError, match="the leader is 1"):
        core.propose([b"x"])


def test_proposals_are_dropped_while_too_much_is_uncommitted() -> None:
    leader = make_leader(limits=Limits(uncommitted_bytes_max=10), commit=1)
    assert leader.propose([b"x" * 50]) == range(3, 4), "alone, even a large one may pass"
    with pytest.raises(ProposalDroppedError, match="50 bytes are waiting"):
        leader.propose([b"x"])
    drain(leader)
    accept(leader, 2, 3)
    assert leader.commit == 3
    assert leader.propose([b"x", b"y"]) == range(4, 6)
    assert leader.propose([]) == range(6, 6)


def test_bytes_that_a_new_leader_inherits_count_as_uncommitted() -> None:
    leader = make_leader((1, 1), commit=1)
    assert leader.replication is not None
    assert leader.replication.uncommitted_bytes == len(entry(2, 1).data)
    leader.check()


def test_a_message_that_is_rejected_late_does_not_move_the_leader_back() -> None:
    leader = make_leader((1, 1, 1))
    drain(leader)
    accept(leader, 2, 4)
    leader.step(AppendReply(2, 1, leader.term, True, 3, hint_index=1, hint_term=1))
    assert leader.replication is not None
    progress = leader.replication.progress[2]
    assert (progress.state, progress.match) == (ProgressState.REPLICATE, 4)
    accept(leader, 2, 3)
    assert progress.match == 4
