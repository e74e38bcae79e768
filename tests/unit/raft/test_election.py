"""Elections: §5.2, §5.4.1, thesis 4.2.3, 6.2 and 9.6."""

from __future__ import annotations

import pytest

from prism_control.raft.errors import InvariantError
from prism_control.raft.types import (
    AppendReply,
    AppendRequest,
    Configuration,
    EntryKind,
    Heartbeat,
    HeartbeatReply,
    Role,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)
from tests.unit.raft.harness import (
    FIVE,
    THREE,
    Group,
    drain,
    make_core,
    role_of,
    sent,
    tick_until,
    turn,
)


def campaign_role(member: int, configuration: Configuration) -> Role:
    core = make_core(member, configuration)
    for _ in range(50):
        core.tick()
    return core.role


def test_a_single_voter_elects_itself_and_commits_after_its_own_write() -> None:
    core = make_core(1, Configuration(voters=(1,)))
    tick_until(core, lambda: core.role is Role.LEADER)
    assert core.commit == 0
    ready = core.take_ready()
    assert ready is not None
    assert [entry.kind for entry in ready.entries] == [EntryKind.NOOP]
    assert core.commit == 0
    core.persisted(ready)
    assert core.commit == 1


@pytest.mark.parametrize(
    ("configuration", "expected"),
    [
        (Configuration(voters=(1, 2)), Role.PRE_CANDIDATE),
        (Configuration(voters=(2, 3), learners=(1,)), Role.FOLLOWER),
        (Configuration(voters=(2, 3)), Role.FOLLOWER),
        (Configuration(voters=(2, 3), voters_outgoing=(1, 2)), Role.PRE_CANDIDATE),
        (Configuration(), Role.FOLLOWER),
    ],
)
def test_only_a_voter_ever_campaigns(configuration: Configuration, expected: Role) -> None:
    assert campaign_role(1, configuration) is expected


def test_election_timeouts_are_spread_over_one_to_two_minimums() -> None:
    seen = set()
    core = make_core(1)
    for _ in range(200):
        core._election.reset()
        seen.add(core._election._timeout)
    assert seen == set(range(10, 20))


def test_a_pre_vote_changes_nobodys_term_or_vote() -> None:
    """Thesis 9.6."""
    candidate, voter = make_core(1), make_core(2)
    tick_until(candidate, lambda: candidate.role is Role.PRE_CANDIDATE)
    assert (candidate.term, candidate.vote) == (0, 0)
    (request,) = sent(drain(candidate), VoteRequest, 2)
    assert request.pre_vote
    assert request.term == 1
    voter.step(request)
    (reply,) = drain(voter)
    assert reply == VoteReply(2, 1, 1, pre_vote=True, granted=True)
    assert (voter.term, voter.vote) == (0, 0)


def test_a_member_cut_off_does_not_depose_the_leader_when_it_returns() -> None:
    """Thesis 9.6: without pre-vote its inflated term would."""
    group = Group.bootstrapped()
    leader = group.elect(1)
    term = leader.term
    group.cut = {3}
    group.tick(60)
    assert group.cores[3].term == term
    group.cut = set()
    group.tick(30)
    assert role_of(leader) is Role.LEADER
    assert leader.term == term
    assert group.cores[3].leader == 1


def test_a_vote_is_given_once_a_term() -> None:
    """§5.2: first come, first served."""
    core = make_core(3, FIVE, (1,))
    core.step(VoteRequest(1, 3, 2, pre_vote=False, last_index=1, last_term=1))
    core.step(VoteRequest(2, 3, 2, pre_vote=False, last_index=1, last_term=1))
    core.step(VoteRequest(1, 3, 2, pre_vote=False, last_index=1, last_term=1))
    assert [(reply.receiver, reply.granted) for reply in sent(drain(core), VoteReply)] == [
        (1, True),
        (2, False),
        (1, True),
    ]


def test_a_vote_leaves_only_after_it_is_on_disk() -> None:
    core = make_core(3)
    core.step(VoteRequest(1, 3, 2, pre_vote=False, last_index=0, last_term=0))
    ready = core.take_ready()
    assert ready is not None
    assert ready.hard_state is not None
    assert (ready.hard_state.term, ready.hard_state.vote) == (2, 1)
    assert ready.messages_now == ()
    assert len(ready.messages_after_persist) == 1


def test_a_vote_survives_a_restart() -> None:
    core = make_core(3, term=2, vote=1)
    core.step(VoteRequest(2, 3, 2, pre_vote=False, last_index=9, last_term=2))
    (reply,) = drain(core)
    assert reply == VoteReply(3, 2, 2, pre_vote=False, granted=False)


@pytest.mark.parametrize("pre_vote", [True, False])
@pytest.mark.parametrize(
    ("last_index", "last_term", "granted"), [(3, 2, True), (9, 1, False), (2, 2, False)]
)
def test_a_voter_denies_its_vote_to_a_log_less_up_to_date(
    pre_vote: bool, last_index: int, last_term: int, granted: bool
) -> None:
    """§5.4.1."""
    core = make_core(3, THREE, (1, 2, 2))
    core.step(VoteRequest(1, 3, 3, pre_vote, last_index, last_term))
    (reply,) = drain(core)
    assert isinstance(reply, VoteReply)
    assert reply.granted is granted


def test_a_vote_request_is_ignored_while_a_leader_is_heard() -> None:
    """Thesis 4.2.3: a removed member must not disturb."""
    core = make_core(3, THREE, (1,))
    core.step(Heartbeat(1, 3, 1, 0))
    drain(core)
    for pre_vote in (True, False):
        core.step(VoteRequest(2, 3, 9, pre_vote, 9, 8))
    assert drain(core) == []
    assert core.term == 1
    for _ in range(10):
        core._election.elapsed += 1
    core.step(VoteRequest(2, 3, 9, True, 9, 8))
    assert len(drain(core)) == 1


def test_a_transfer_overrides_the_lease_of_the_leader_that_wants_it() -> None:
    """Thesis 4.2.3."""
    core = make_core(3, THREE, (1,))
    core.step(Heartbeat(1, 3, 1, 0))
    core.step(VoteRequest(2, 3, 2, False, 1, 1, transfer=True))
    assert VoteReply(3, 2, 2, pre_vote=False, granted=True) in drain(core)


def test_timeout_now_makes_a_voter_campaign_without_pre_vote() -> None:
    """Thesis 3.10."""
    core = make_core(3, THREE, (1,))
    core.step(Heartbeat(1, 3, 1, 0))
    drain(core)
    core.step(TimeoutNow(2, 3, 1))
    assert role_of(core) is Role.FOLLOWER
    core.step(TimeoutNow(1, 3, 1))
    assert role_of(core) is Role.CANDIDATE
    requests = sent(drain(core), VoteRequest)
    assert [request.receiver for request in requests] == [1, 2]
    assert all(r.transfer and not r.pre_vote and r.term == 2 for r in requests)


def test_timeout_now_of_an_old_leader_is_ignored() -> None:
    core = make_core(3, THREE, (1, 2))
    core.step(TimeoutNow(1, 3, 1))
    assert role_of(core) is Role.FOLLOWER
    assert drain(core) == []


def test_a_refusal_is_never_counted_as_a_vote() -> None:
    core = make_core(1, FIVE)
    tick_until(core, lambda: core.role is Role.PRE_CANDIDATE)
    for member in (2, 2, 3):
        core.step(VoteReply(member, 1, 0, pre_vote=True, granted=False))
        assert role_of(core) is Role.PRE_CANDIDATE
    core.step(VoteReply(4, 1, 0, pre_vote=True, granted=False))
    assert role_of(core) is Role.FOLLOWER
    assert core.term == 0


def test_one_member_has_one_vote_however_often_it_answers() -> None:
    core = make_core(1, FIVE)
    tick_until(core, lambda: core.role is Role.PRE_CANDIDATE)
    for _ in range(3):
        core.step(VoteReply(2, 1, 1, pre_vote=True, granted=True))
    assert role_of(core) is Role.PRE_CANDIDATE
    core.step(VoteReply(3, 1, 1, pre_vote=True, granted=True))
    assert role_of(core) is Role.CANDIDATE


def test_a_pre_vote_is_not_a_vote() -> None:
    core = make_core(1)
    tick_until(core, lambda: core.role is Role.PRE_CANDIDATE)
    core.step(VoteReply(2, 1, 1, pre_vote=False, granted=True))
    assert role_of(core) is Role.FOLLOWER, "a real vote of a later term only teaches the term"
    tick_until(core, lambda: core.role is Role.PRE_CANDIDATE)
    core.step(VoteReply(2, 1, 2, pre_vote=True, granted=True))
    assert role_of(core) is Role.CANDIDATE
    core.step(VoteReply(2, 1, 3, pre_vote=True, granted=True))
    core.step(VoteReply(3, 1, 2, pre_vote=True, granted=True))
    assert role_of(core) is Role.CANDIDATE
    core.step(VoteReply(3, 1, 2, pre_vote=False, granted=True))
    assert role_of(core) is Role.LEADER


def test_a_pre_vote_for_another_term_does_not_count() -> None:
    core = make_core(1)
    tick_until(core, lambda: core.role is Role.PRE_CANDIDATE)
    core.step(VoteReply(2, 1, 7, pre_vote=True, granted=True))
    assert role_of(core) is Role.PRE_CANDIDATE


def test_a_vote_that_comes_after_the_election_changes_nothing() -> None:
    group = Group.bootstrapped()
    leader = group.elect(1)
    leader.step(VoteReply(3, 1, leader.term, pre_vote=False, granted=True))
    leader.step(VoteReply(3, 1, leader.term, pre_vote=True, granted=False))
    assert role_of(leader) is Role.LEADER


def test_a_candidate_yields_to_the_leader_of_its_term() -> None:
    """§5.2."""
    core = make_core(1, FIVE, term=1)
    tick_until(core, lambda: core.role is Role.PRE_CANDIDATE)
    for member in (2, 3):
        core.step(VoteReply(member, 1, 2, pre_vote=True, granted=True))
    assert role_of(core) is Role.CANDIDATE
    core.step(AppendRequest(4, 1, 2, 0, 0, (), 0))
    assert role_of(core) is Role.FOLLOWER
    assert core.leader == 4
    assert core.vote == 1, "its vote of this term stays given"


def test_a_candidate_without_majority_asks_anew_with_a_pre_vote() -> None:
    core = make_core(1, term=1)
    tick_until(core, lambda: core.role is Role.PRE_CANDIDATE)
    core.step(VoteReply(2, 1, 2, pre_vote=True, granted=True))
    assert role_of(core) is Role.CANDIDATE
    tick_until(core, lambda: core.role is Role.PRE_CANDIDATE)
    assert core.term == 2


def test_a_leader_that_hears_no_quorum_steps_down() -> None:
    """Thesis 6.2."""
    group = Group.bootstrapped(FIVE)
    leader = group.elect(1)
    group.cut = {3, 4, 5}
    for _ in range(2 * leader.config.election_ticks):
        leader.tick()
        group.pump()
    assert role_of(leader) is Role.FOLLOWER
    assert leader.leader == 0


def test_a_leader_that_hears_a_quorum_goes_on() -> None:
    group = Group.bootstrapped(FIVE)
    leader = group.elect(1)
    group.cut = {4, 5}
    group.tick(50)
    assert role_of(leader) is Role.LEADER


@pytest.mark.parametrize("pre_vote", [True, False])
def test_a_candidate_of_an_old_term_learns_the_present_one(pre_vote: bool) -> None:
    """§5.1."""
    core = make_core(1, THREE, (1, 5))
    core.step(VoteRequest(2, 1, 3, pre_vote, 9, 3))
    assert drain(core) == [VoteReply(1, 2, 5, pre_vote, granted=False)]


def test_a_leader_of_an_old_term_learns_the_present_one() -> None:
    """§5.1; or a member that campaigned in vain could never return."""
    core = make_core(1, THREE, (1, 5))
    core.step(Heartbeat(2, 1, 3, 0))
    assert drain(core) == [HeartbeatReply(1, 2, 5)]
    old_leader = make_core(2, THREE, (1,))
    old_leader.step(HeartbeatReply(1, 2, 5))
    assert (old_leader.term, old_leader.role) == (5, Role.FOLLOWER)


def test_other_messages_of_an_old_term_are_ignored() -> None:
    core = make_core(1, THREE, (1, 5))
    core.step(HeartbeatReply(2, 1, 3))
    core.step(VoteReply(2, 1, 3, pre_vote=False, granted=True))
    assert drain(core) == []


def test_a_message_for_somebody_else_is_ignored() -> None:
    core = make_core(1)
    core.step(Heartbeat(2, 3, 9, 0))
    assert core.term == 0


def test_two_leaders_in_one_term_stop_the_member() -> None:
    """Election Safety, figure 3."""
    core = make_core(3, THREE, (1,))
    core.step(Heartbeat(1, 3, 1, 0))
    with pytest.raises(InvariantError, match="members 1 and 2 both lead in term 1"):
        core.step(Heartbeat(2, 3, 1, 0))
    leader = Group.bootstrapped().elect(1)
    with pytest.raises(InvariantError, match="both lead"):
        leader.step(Heartbeat(2, 1, leader.term, 0))


def test_nothing_leaves_in_a_term_that_is_not_durable() -> None:
    """Else, after a crash, a member could lead the same term twice."""
    core = make_core(1, Configuration(voters=(1,), learners=(2,)))
    tick_until(core, lambda: core.role is Role.LEADER)
    ready = core.take_ready()
    assert ready is not None
    assert ready.hard_state is not None
    assert ready.messages_now == ()
    assert sent(ready.messages_after_persist, AppendRequest, 2)
    core.persisted(ready)
    core.propose([b"next"])
    core.step(AppendReply(2, 1, core.term, False, 1))
    ready = turn(core)
    assert ready is not None
    assert sent(ready.messages_now, AppendRequest, 2), "once it is, entries need not wait"


def test_joint_configuration_elects_by_both_majorities() -> None:
    """§6."""
    core = make_core(1, Configuration(voters=(1, 2, 3), voters_outgoing=(1, 4, 5)))
    tick_until(core, lambda: core.role is Role.PRE_CANDIDATE)
    assert {request.receiver for request in sent(drain(core), VoteRequest)} == {2, 3, 4, 5}
    core.step(VoteReply(2, 1, 1, pre_vote=True, granted=True))
    core.step(VoteReply(3, 1, 1, pre_vote=True, granted=True))
    assert role_of(core) is Role.PRE_CANDIDATE
    core.step(VoteReply(4, 1, 1, pre_vote=True, granted=True))
    assert role_of(core) is Role.CANDIDATE


def test_followers_that_lost_the_connection_of_their_leader_elect_another_soon() -> None:
    group = Group.bootstrapped(FIVE)
    group.elect(1)
    group.tick(2)
    term = group.cores[1].term
    group.cut = {1}
    for member in (2, 3, 4, 5):
        group.cores[member].report_disconnected(1)
    group.tick(2)
    assert group.cores[2].role is Role.LEADER
    assert group.cores[2].term == term + 1
    assert [group.cores[m].leader for m in (3, 4, 5)] == [2, 2, 2]


def test_the_next_in_rank_campaigns_when_the_first_is_dead_too() -> None:
    group = Group.bootstrapped(FIVE)
    group.elect(1)
    group.tick(2)
    group.cut = {1, 2}
    for member in (3, 4, 5):
        group.cores[member].report_disconnected(1)
    group.tick(4)
    assert group.cores[3].role is Role.LEADER


def test_a_broken_connection_deposes_no_leader_that_the_others_hear() -> None:
    group = Group.bootstrapped(THREE)
    group.elect(1)
    group.tick(2)
    term = group.cores[1].term
    silent = [True]
    group.passes = lambda message: not (silent[0] and {message.sender, message.receiver} == {1, 2})
    for _ in range(30):
        group.cores[2].report_disconnected(1)
        group.tick()
    assert group.cores[1].role is Role.LEADER
    assert group.cores[3].leader == 1
    silent[0] = False
    group.tick(3)
    assert [core.term for core in group.cores.values()] == [term] * 3
    assert group.cores[2].leader == 1


def test_a_leader_that_is_heard_again_is_waited_for_as_long_as_ever() -> None:
    group = Group.bootstrapped(THREE)
    group.elect(1)
    group.tick(2)
    follower = group.cores[2]
    follower.report_disconnected(1)
    assert not follower._hears_leader()
    group.cores[1].tick()
    group.pump()
    assert follower._hears_leader()
    for _ in range(follower.config.election_ticks - 1):
        follower.tick()
    assert role_of(follower) is Role.FOLLOWER


def test_only_the_leaders_connection_counts_and_only_for_voters() -> None:
    group = Group.bootstrapped(THREE)
    group.elect(1)
    group.tick(2)
    group.cores[2].report_disconnected(3)
    group.cores[1].report_disconnected(2)
    assert group.cores[2]._hears_leader()
    assert group.cores[1].role is Role.LEADER
    learner = make_core(4, Configuration(voters=(1, 2, 3), learners=(4,)))
    learner.step(Heartbeat(1, 4, 1, 0))
    learner.report_disconnected(1)
    for _ in range(30):
        learner.tick()
    assert role_of(learner) is Role.FOLLOWER


def test_a_late_refusal_of_an_old_campaign_deposes_nobody() -> None:
    group = Group.bootstrapped(THREE)
    group.elect(1)
    group.tick(2)
    term = group.cores[1].term
    for member in (1, 2):
        group.cores[member].step(VoteReply(3, member, term + 1, pre_vote=True, granted=False))
    assert [core.term for core in group.cores.values()] == [term] * 3
    assert group.cores[1].role is Role.LEADER


def test_an_answer_of_a_removed_member_does_not_depose_the_leader() -> None:
    group = Group.bootstrapped(THREE)
    leader = group.elect(1)
    term = leader.term
    leader.step(HeartbeatReply(9, 1, term + 1))
    leader.step(AppendReply(9, 1, term + 1, rejected=False, index=1))
    assert (leader.role, leader.term) == (Role.LEADER, term)
    # One that is still a member must be heard, or it would stay alone for ever.
    leader.step(HeartbeatReply(3, 1, term + 1))
    assert (role_of(leader), leader.term) == (Role.FOLLOWER, term + 1)
