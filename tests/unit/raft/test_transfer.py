"""Leadership is handed over: thesis 3.10."""

from __future__ import annotations

import pytest

from prism_control.raft.confchange import ConfigurationChange
from prism_control.raft.core import Core
from prism_control.raft.errors import (
    InvalidRequestError,
    LeavingError,
    NotLeaderError,
    NotReadyError,
)
from prism_control.raft.types import (
    AppendRequest,
    Configuration,
    Member,
    Role,
    TimeoutNow,
    TransferResult,
    VoteRequest,
)
from tests.unit.raft.harness import THREE, Group, role_of

WITH_LEARNER = Configuration(voters=(1, 2, 3), learners=(4,))


def led_group(configuration: Configuration = THREE) -> tuple[Group, Core]:
    group = Group.bootstrapped(configuration)
    leader = group.elect(1)
    group.tick(2)
    return group, leader


def results(group: Group, member: int = 1) -> list[TransferResult]:
    return [ready.transfer for ready in group.readies[member] if ready.transfer]


def test_leadership_goes_to_the_one_who_was_chosen() -> None:
    group, leader = led_group()
    term = leader.term
    leader.transfer(3)
    group.pump()
    assert role_of(group.cores[3]) is Role.LEADER
    assert group.cores[3].term == term + 1
    assert role_of(leader) is Role.FOLLOWER
    assert results(group) == [TransferResult(3, succeeded=True)]


def test_the_other_is_brought_up_to_date_first_and_proposals_wait() -> None:
    group, leader = led_group()
    group.passes = lambda message: not isinstance(message, AppendRequest)
    leader.propose([b"last"])
    leader.transfer(2)
    group.pump()
    assert role_of(leader) is Role.LEADER
    with pytest.raises(LeavingError):
        leader.propose([b"too late"])
    group.passes = lambda message: True
    group.tick(3)
    assert role_of(group.cores[2]) is Role.LEADER
    assert [e.data for e in group.applied[2] if e.data == b"last"] == [b"last"]


def test_it_is_given_up_within_an_election_timeout() -> None:
    group, leader = led_group()
    group.passes = lambda message: not isinstance(message, TimeoutNow)
    leader.transfer(2)
    group.tick(9)
    assert results(group) == []
    group.tick(1)
    assert results(group) == [TransferResult(2, succeeded=False)]
    leader.propose([b"goes on"])
    group.pump()
    assert leader.commit == leader.log.last_index


def test_it_fails_if_somebody_else_is_elected() -> None:
    group, leader = led_group()
    group.passes = lambda message: not isinstance(message, TimeoutNow)
    leader.transfer(2)
    group.pump()
    leader._become_follower(leader.term, 0)
    group.cores[3]._campaign(Role.CANDIDATE, transfer=True)
    group.pump()
    assert role_of(group.cores[3]) is Role.LEADER
    assert results(group) == [TransferResult(2, succeeded=False)]


def test_a_leader_that_is_elected_again_has_not_handed_over() -> None:
    group, leader = led_group()
    group.passes = lambda message: (
        not (
            isinstance(message, TimeoutNow)
            or (isinstance(message, VoteRequest) and message.sender == 2)
        )
    )
    leader.transfer(2)
    group.pump()
    leader._become_follower(leader.term, 0)
    leader._campaign(Role.CANDIDATE, transfer=True)
    group.pump()
    assert role_of(leader) is Role.LEADER
    assert results(group) == [TransferResult(2, succeeded=False)]


def test_only_an_up_to_date_voter_gets_it() -> None:
    group, leader = led_group(WITH_LEARNER)
    leader.config = group.cores[1].config
    with pytest.raises(InvalidRequestError, match="leads already"):
        leader.transfer(1)
    with pytest.raises(InvalidRequestError, match="no voter"):
        leader.transfer(9)
    with pytest.raises(NotLeaderError):
        group.cores[2].transfer(3)
    group.cut = {3}
    group.tick(15)
    with pytest.raises(NotReadyError, match="not heard of"):
        leader.transfer(3)
    leader.transfer(2)
    with pytest.raises(NotReadyError, match="already"):
        leader.transfer(2)


def test_a_learner_is_never_handed_leadership() -> None:
    group = Group.bootstrapped(WITH_LEARNER)
    leader = group.elect(1)
    if leader.configuration.learners:
        with pytest.raises(InvalidRequestError, match="no voter"):
            leader.transfer(4)


def test_no_transfer_during_a_change_and_no_change_during_a_transfer() -> None:
    group, leader = led_group()
    group.cut = {2, 3}
    leader.propose_configuration(ConfigurationChange(add=(Member(5, "n5", "h5:1", ""),)))
    with pytest.raises(NotReadyError, match="change"):
        leader.transfer(2)
