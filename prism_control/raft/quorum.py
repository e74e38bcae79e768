"""Majorities, single and joint (§5.2, §5.4, §6).

In a joint configuration both majorities must agree, so each question is asked of each
of them and the more careful answer counts. A majority of nobody decides nothing, except that an
empty outgoing majority (no change under way) does not hold anything up.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from prism_control.raft.types import Configuration, MemberId


class VoteResult(enum.IntEnum):
    """How an election stands; in ascending order of success."""

    LOST = 0
    PENDING = 1
    WON = 2


def majority_index(voters: Sequence[MemberId], index_of: Callable[[MemberId], int]) -> int:
    """Return the greatest index that a majority of `voters` has reached; 0 for nobody."""
    if not voters:
        return 0
    indexes = sorted(map(index_of, voters))
    # With n voters a majority is n // 2 + 1, so this many from the top have got there.
    return indexes[(len(indexes) - 1) // 2]


def reached_index(configuration: Configuration, index_of: Callable[[MemberId], int]) -> int:
    """Return the greatest index that every majority of `configuration` has reached."""
    incoming = majority_index(configuration.voters, index_of)
    if not configuration.voters_outgoing:
        return incoming
    return min(incoming, majority_index(configuration.voters_outgoing, index_of))


def majority_vote(voters: Sequence[MemberId], votes: Mapping[MemberId, bool]) -> VoteResult:
    """Return how `votes` (True: granted, absent: not heard of) stand among `voters`."""
    needed = len(voters) // 2 + 1
    granted = sum(1 for voter in voters if votes.get(voter) is True)
    refused = sum(1 for voter in voters if votes.get(voter) is False)
    if granted >= needed:
        return VoteResult.WON
    if len(voters) - refused < needed:
        return VoteResult.LOST
    return VoteResult.PENDING


def vote_result(configuration: Configuration, votes: Mapping[MemberId, bool]) -> VoteResult:
    """Return how `votes` stand in `configuration`: won only if won in every majority."""
    incoming = majority_vote(configuration.voters, votes)
    if not configuration.voters_outgoing:
        return incoming
    return min(incoming, majority_vote(configuration.voters_outgoing, votes))
