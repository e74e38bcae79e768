"""Changes of the configuration by the core: §6, thesis chapter 4."""

from __future__ import annotations

from random import Random

import pytest

from prism_control.raft.confchange import ConfigurationChange
from prism_control.raft.config import CoreConfig, Limits
from prism_control.raft.core import Core
from prism_control.raft.errors import InvalidRequestError, NotLeaderError, NotReadyError
from prism_control.raft.types import (
    AppendReply,
    AppendRequest,
    Configuration,
    EntryKind,
    HardState,
    Heartbeat,
    Member,
    Message,
    Role,
    SnapshotMeta,
    TimeoutNow,
    VoteRequest,
)
from tests.unit.raft.harness import THREE, Group, drain, make_core, role_of, sent

NEW = Member(4, "n4", "h4:1", "")


def new_core(id_: int, promotes_learners: bool = True) -> Core:
    """Return a member with an empty disk."""
    config = CoreConfig(id_, promotes_learners=promotes_learners)
    return Core(config, Random(id_), HardState(), SnapshotMeta(), [])


def group_with(*new: int, configuration: Configuration = THREE) -> tuple[Group, Core]:
    """Return a cluster led by 1, and new members that nobody has added yet."""
    group = Group.bootstrapped(configuration)
    for id_ in new:
        group.cores[id_] = new_core(id_)
        group.applied[id_], group.readies[id_] = [], []
    leader = group.elect(1)
    group.tick(3)
    return group, leader


def add(group: Group, leader: Core, *ids: int) -> None:
    members = tuple(Member(id_, f"n{id_}", f"h{id_}:1", "") for id_ in ids)
    leader.propose_configuration(ConfigurationChange(add=members))
    group.pump()


def test_a_new_member_starts_empty_catches_up_and_becomes_a_voter_by_itself() -> None:
    """Thesis 4.2.1."""
    group, leader = group_with(4)
    leader.propose([b"before"])
    index = leader.propose_configuration(ConfigurationChange(add=(NEW,)))
    assert leader.configuration.learners == (4,), "in force from the moment it is in the log"
    group.pump()
    assert leader.commit >= index
    assert group.applied[4][-1].index == leader.commit
    group.tick(3)
    for core in group.cores.values():
        assert core.configuration.voters == (1, 2, 3, 4)
        assert core.is_settled
        assert core.configuration.members == (NEW,), "its address travels with it"
    kinds = [entry.kind for entry in group.applied[1]]
    assert kinds.count(EntryKind.CONFIGURATION) == 4, "first, learner, joint, final"


def test_learners_stay_if_nobody_is_to_promote_them_until_somebody_does() -> None:
    group, leader = group_with(4)
    leader.config = CoreConfig(1, promotes_learners=False)
    add(group, leader, 4)
    group.tick(5)
    assert leader.configuration.learners == (4,)
    assert leader.caught_up_learners() == (4,)
    assert group.cores[2].caught_up_learners() == ()
    leader.propose_configuration(ConfigurationChange(promote=(4,)))
    assert leader.configuration.is_joint
    assert not leader.is_settled
    group.pump()
    assert leader.configuration.voters == (1, 2, 3, 4)


def test_a_learner_that_is_silent_or_behind_is_not_promoted() -> None:
    group, leader = group_with(4)
    leader._limits = Limits(promotion_lag_entries_max=0)
    group.cut = {4}
    add(group, leader, 4)
    group.tick(15)
    assert leader.configuration.learners == (4,)
    with pytest.raises(NotReadyError, match="has not caught up"):
        leader.propose_configuration(ConfigurationChange(promote=(4,)))
    group.cut = set()
    group.tick(5)
    assert leader.configuration.voters == (1, 2, 3, 4)


def test_a_member_that_lags_behind_the_log_begins_with_a_snapshot() -> None:
    group, leader = group_with(4)
    leader.propose([b"x"] * 5)
    group.pump()
    meta = leader.snapshot_meta(leader.applied_index)
    leader.snapshot_saved(meta)
    leader.compact(meta.index)
    add(group, leader, 4)
    group.tick(5)
    assert group.cores[4].snapshot == meta
    assert leader.configuration.voters == (1, 2, 3, 4)


def test_several_are_replaced_at_once() -> None:
    group, leader = group_with(4, 5)
    for core in group.cores.values():
        core.config = CoreConfig(core.config.id, promotes_learners=False)
    add(group, leader, 4, 5)
    group.tick(2)
    leader.propose_configuration(ConfigurationChange(promote=(4, 5), remove=(2, 3)))
    joint = leader.configuration
    assert (joint.voters, joint.voters_outgoing) == ((1, 4, 5), (1, 2, 3))
    group.pump()
    assert leader.configuration.voters == (1, 4, 5)
    assert not leader.configuration.is_joint
    group.cut = {2, 3}
    leader.propose([b"without them"])
    group.pump()
    assert leader.commit == leader.log.last_index


@pytest.mark.parametrize("cut", [{2, 3}, {4, 5}], ids=["the new alone", "the old alone"])
def test_a_joint_configuration_decides_by_both_majorities(cut: set[int]) -> None:
    """§6."""
    group, leader = group_with(4, 5)
    for core in group.cores.values():
        core.config = CoreConfig(core.config.id, promotes_learners=False)
    add(group, leader, 4, 5)
    group.tick(2)
    group.cut = cut
    index = leader.propose_configuration(ConfigurationChange(promote=(4, 5), remove=(2, 3)))
    group.pump()
    assert leader.commit < index
    assert leader.configuration.is_joint
    group.cut = set()
    group.tick(3)
    assert leader.is_settled


def test_a_later_leader_completes_the_change() -> None:
    """§6."""
    group, leader = group_with()
    group.passes = lambda message: not isinstance(message, AppendReply)
    leader.propose_configuration(ConfigurationChange(remove=(3,)))
    group.pump()
    assert group.cores[2].configuration.is_joint
    group.passes = lambda message: True
    leader._become_follower(leader.term, 0)
    successor = group.elect(2)
    assert successor.is_settled
    assert successor.configuration.voters == (1, 2)


def test_one_change_at_a_time() -> None:
    group, leader = group_with()
    group.cut = {2, 3}
    leader.propose_configuration(ConfigurationChange(add=(NEW,)))
    with pytest.raises(NotReadyError, match="another change"):
        leader.propose_configuration(ConfigurationChange(remove=(3,)))


def test_a_leader_changes_nothing_before_it_has_committed_in_its_own_term() -> None:
    """The known flaw of changes by two leaders in turn."""
    group = Group.bootstrapped()
    group.passes = lambda message: not isinstance(message, AppendRequest)
    leader = group.elect(1)
    with pytest.raises(NotReadyError, match="of its term"):
        leader.propose_configuration(ConfigurationChange(add=(NEW,)))
    with pytest.raises(NotLeaderError):
        group.cores[2].propose_configuration(ConfigurationChange(add=(NEW,)))


def test_nobody_is_removed_if_those_who_stay_are_not_heard_of() -> None:
    group, leader = group_with()
    group.cut = {3}
    group.tick(25)
    assert role_of(leader) is Role.LEADER
    with pytest.raises(NotReadyError, match="not heard of"):
        leader.propose_configuration(ConfigurationChange(remove=(2,)))
    leader.propose_configuration(ConfigurationChange(remove=(3,)))
    group.pump()
    assert leader.configuration.voters == (1, 2)


def test_an_uncommitted_change_is_undone_with_its_entry() -> None:
    """Thesis 4.1."""
    group, leader = group_with(4)
    group.cut = {1}
    leader.propose_configuration(ConfigurationChange(add=(NEW,)))
    group.pump()
    assert leader.configuration.learners == (4,)
    group.elect(2)
    group.cut = set()
    group.tick(3)
    assert leader.configuration == THREE
    assert leader.is_settled


def test_a_leader_that_is_removed_hands_over_once_that_is_committed() -> None:
    """§6; and its heir need not wait for an election timeout (thesis 3.10)."""
    group, leader = group_with()
    leader.propose_configuration(ConfigurationChange(remove=(1,)))
    group.pump()
    assert role_of(leader) is Role.FOLLOWER
    (heir,) = [core for core in group.cores.values() if core.role is Role.LEADER]
    assert heir.configuration.voters == (2, 3)
    assert heir.is_settled


def test_a_leader_that_is_removed_does_not_count_itself() -> None:
    group, leader = group_with()
    others: list[Message] = []

    def passes(message: Message) -> bool:
        final = leader.configuration.voters == (2, 3) and not leader.configuration.is_joint
        if final and isinstance(message, AppendRequest) and message.receiver == 3:
            others.append(message)
            return False
        return True

    group.passes = passes
    leader.propose_configuration(ConfigurationChange(remove=(1,)))
    group.pump()
    assert others
    assert role_of(leader) is Role.LEADER
    assert leader.commit < leader.log.last_index, "its own copy and one of two are no majority"


def test_a_removed_member_disturbs_nobody() -> None:
    """Thesis 4.2.3."""
    group, leader = group_with()
    group.passes = lambda message: (
        3 not in (message.sender, message.receiver) or isinstance(message, VoteRequest)
    )
    leader.propose_configuration(ConfigurationChange(remove=(3,)))
    group.pump()
    assert leader.configuration.voters == (1, 2)
    term = leader.term
    group.passes = lambda message: True
    group.tick(60)
    assert (role_of(leader), leader.term) == (Role.LEADER, term)
    assert group.cores[3].configuration.is_voter(3), "it does not even know"


def test_a_member_whose_removal_may_not_be_committed_still_campaigns() -> None:
    """Thesis 4.2.2: else nobody could lead, since the other one lacks its last entry."""
    group, leader = group_with(configuration=Configuration(voters=(1, 2)))
    group.passes = lambda message: leader.configuration.is_joint
    leader.propose_configuration(ConfigurationChange(remove=(1,)))
    group.pump()
    assert leader.configuration.voters == (2,)
    leader._become_follower(leader.term, 0)
    group.passes = lambda message: True
    group.tick(60)
    assert role_of(group.cores[2]) is Role.LEADER
    assert group.cores[2].configuration.voters == (2,)
    assert group.cores[2].is_settled


def test_a_new_member_never_campaigns() -> None:
    core = new_core(7)
    for _ in range(100):
        core.tick()
    assert drain(core) == []
    core.step(Heartbeat(1, 7, 3, 0))
    core.step(TimeoutNow(1, 7, 3))
    assert role_of(core) is Role.FOLLOWER


def test_a_change_that_makes_no_sense_is_refused() -> None:
    _, leader = group_with()
    with pytest.raises(InvalidRequestError):
        leader.propose_configuration(ConfigurationChange(remove=(9,)))


def test_a_sole_voter_leads_at_once() -> None:
    core = make_core(1, Configuration(voters=(1,), learners=(2,)), (1,))
    assert role_of(core) is Role.LEADER
    drain(core)
    assert core.commit == 2
    assert role_of(make_core(2, Configuration(voters=(1,), learners=(2,)))) is Role.FOLLOWER
    assert role_of(make_core(1, Configuration((1,), (1, 2)))) is Role.FOLLOWER


def test_learners_are_not_promoted_during_a_transfer_or_before_the_first_commit() -> None:
    group, leader = group_with(4)
    group.passes = lambda message: not isinstance(message, TimeoutNow)
    leader.transfer(2)
    leader.tick()
    assert leader.configuration.voters == (1, 2, 3)
    with pytest.raises(NotReadyError, match="handed over"):
        leader.propose_configuration(ConfigurationChange(add=(NEW,)))
    assert sent(drain(leader), TimeoutNow, 2)


def test_a_learner_waits_while_another_change_is_under_way_or_would_be_in_danger() -> None:
    group, leader = group_with(4)
    add(group, leader, 4)
    leader.propose_configuration(ConfigurationChange(add=(Member(5, "n5", "h5:1", ""),)))
    leader.tick()
    assert leader.configuration.learners == (4, 5), "the change before is not committed"
    alone, sole = group_with(4, configuration=Configuration(voters=(1, 2)))
    add(alone, sole, 4)
    for id_ in (1, 2):
        assert sole.replication is not None
        sole.replication.progress[id_].silent_ticks = 11
    sole.tick()
    assert sole.configuration.learners == (4,), "most of the voters to be are silent"
