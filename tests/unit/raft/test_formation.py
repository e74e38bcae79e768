"""Promises while a cluster is formed; the simulator tries every order."""

from __future__ import annotations

import pytest

from prism_control.raft.formation import PeerView, Propose, Start, Wait, decide, may_accept
from prism_control.raft.types import Configuration, Member


def member(id_: int) -> Member:
    return Member(id_, f"n{id_}", f"h{id_}:1", "")


def of(*ids: int) -> Configuration:
    return Configuration(voters=ids, members=tuple(map(member, ids)))


def test_a_promise_is_kept_unless_its_proposer_gives_it_up() -> None:
    """Else 1 could start with 3 and 4, and 2 with 3 and 4, and each get one of them."""
    assert may_accept(3, 3, of(1, 3, 4), 1) == ""
    assert may_accept(3, 3, of(1, 3, 4), 1, of(1, 3, 4)) == ""
    assert may_accept(3, 3, of(1, 3, 5), 1, of(1, 3, 4)) == ""
    assert "n1, n3, n4" in may_accept(3, 3, of(2, 3, 4), 2, of(1, 3, 4))


def test_who_has_promised_to_follow_another_proposes_nothing() -> None:
    peers = [PeerView(member(id_), "", 3, Configuration()) for id_ in (3, 4)]
    assert decide(member(2), 3, peers) == Propose(of(2, 3, 4))
    assert decide(member(2), 3, peers, of(2, 3, 5)) == Propose(of(2, 3, 4))
    assert isinstance(decide(member(2), 3, peers, of(1, 2, 3)), Wait)


def view(id_: int, expected: int = 3, cluster: str = "", *started: int) -> PeerView:
    return PeerView(member(id_), cluster, expected, of(*started) if started else Configuration())


def test_the_smallest_proposes_once_exactly_the_expected_have_met() -> None:
    assert decide(member(1), 3, [view(2), view(3), view(1)]) == Propose(of(1, 2, 3))
    assert decide(member(1), 1, []) == Propose(of(1))


def test_a_member_follows_the_cluster_that_it_is_in() -> None:
    assert decide(member(3), 3, [view(1, 3, "c", 1, 2, 3)]) == Start("c", of(1, 2, 3))


@pytest.mark.parametrize(
    ("me", "peers", "reason"),
    [
        (1, [view(2)], "2 of 3 members"),
        (1, [view(2), view(3), view(4)], "4 members have been met"),
        (1, [view(2), view(3, 5)], "n3 do not have --bootstrap-expect=3"),
        (2, [view(1), view(3)], "smallest id"),
        (9, [view(1, 3, "c", 1, 2, 3)], "formed without this member"),
    ],
)
def test_it_waits_and_says_for_what(me: int, peers: list[PeerView], reason: str) -> None:
    decision = decide(member(me), 3, peers)
    assert isinstance(decision, Wait)
    assert reason in decision.reason.replace("which was formed without", "formed without")


@pytest.mark.parametrize(
    ("configuration", "proposer", "reason"),
    [
        (Configuration((1, 2, 3), (1, 2)), 1, "only voters"),
        (of(1, 2, 4), 1, "is not in it"),
        (of(1, 3), 1, "it has 2 voters"),
        (of(1, 2, 3), 2, "smallest id"),
        (Configuration((1, 2, 3)), 1, "its members and its voters differ"),
    ],
)
def test_a_proposal_that_cannot_be_is_refused(
    configuration: Configuration, proposer: int, reason: str
) -> None:
    assert reason in may_accept(3, 3, configuration, proposer)
