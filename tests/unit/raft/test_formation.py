"""Promises while a cluster is formed; the simulator tries every order."""

from __future__ import annotations

from prism_control.raft.formation import PeerView, Propose, Wait, decide, may_accept
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
