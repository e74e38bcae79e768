from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prism_control.raft import quorum
from prism_control.raft.quorum import VoteResult
from prism_control.raft.types import Configuration

VOTERS = st.lists(st.integers(1, 9), min_size=1, max_size=7, unique=True).map(tuple)


@given(VOTERS, st.dictionaries(st.integers(1, 9), st.integers(0, 20)))
def test_a_majority_has_reached_the_index_and_none_a_greater_one(
    voters: tuple[int, ...], indexes: dict[int, int]
) -> None:
    reached = quorum.majority_index(voters, lambda voter: indexes.get(voter, 0))
    have = sum(1 for voter in voters if indexes.get(voter, 0) >= reached)
    have_more = sum(1 for voter in voters if indexes.get(voter, 0) > reached)
    assert 2 * have > len(voters)
    assert 2 * have_more <= len(voters)


@given(VOTERS, st.dictionaries(st.integers(1, 9), st.booleans()))
def test_an_election_is_decided_only_when_no_missing_vote_could_change_it(
    voters: tuple[int, ...], votes: dict[int, bool]
) -> None:
    granted = sum(votes.get(voter) is True for voter in voters)
    unknown = sum(voter not in votes for voter in voters)
    result = quorum.majority_vote(voters, votes)
    assert (result is VoteResult.WON) == (2 * granted > len(voters))
    assert (result is VoteResult.LOST) == (2 * (granted + unknown) <= len(voters))


@given(VOTERS, VOTERS, st.dictionaries(st.integers(1, 9), st.integers(0, 20)))
def test_a_joint_configuration_needs_both_majorities_to_commit(
    incoming: tuple[int, ...], outgoing: tuple[int, ...], indexes: dict[int, int]
) -> None:
    """§6."""
    both = quorum.reached_index(Configuration(incoming, outgoing), lambda v: indexes.get(v, 0))
    one = quorum.reached_index(Configuration(incoming), lambda v: indexes.get(v, 0))
    other = quorum.reached_index(Configuration(outgoing), lambda v: indexes.get(v, 0))
    assert both == min(one, other)


@given(VOTERS, VOTERS, st.dictionaries(st.integers(1, 9), st.booleans()))
def test_a_joint_configuration_needs_both_majorities_to_elect(
    incoming: tuple[int, ...], outgoing: tuple[int, ...], votes: dict[int, bool]
) -> None:
    """§6."""
    both = quorum.vote_result(Configuration(incoming, outgoing), votes)
    one = quorum.vote_result(Configuration(incoming), votes)
    other = quorum.vote_result(Configuration(outgoing), votes)
    assert both is min(one, other)


def test_nobody_commits_and_elects_nothing() -> None:
    nobody = Configuration()
    assert quorum.reached_index(nobody, lambda _: 9) == 0
    assert quorum.vote_result(nobody, {1: True}) is VoteResult.LOST


def test_learners_count_in_no_majority() -> None:
    """Thesis 4.2.1."""
    configuration = Configuration(voters=(1, 2, 3), learners=(4, 5))
    assert quorum.reached_index(configuration, {1: 5, 2: 0, 3: 0, 4: 5, 5: 5}.__getitem__) == 0
    assert quorum.vote_result(configuration, {1: True, 4: True, 5: True}) is VoteResult.PENDING
    assert configuration.ids() == (1, 2, 3, 4, 5)
    assert not configuration.is_joint
    assert not configuration.is_voter(4)
