"""How members that start together agree on the first configuration, and on only one.

Members meet by asking each other who they are. Once a member sees that it and the others are
exactly the expected number, and that its id is the smallest, it proposes them as the first
configuration under a new cluster id. Each member accepts durably; when *all* have accepted, the
proposer starts, and the others start when they see that it has.

Why there is never a second cluster with a majority of started members, even if more members than
expected find each other: a configuration starts only after every member in it has accepted, and
its proposer is the first to start. A member that has accepted keeps that promise: it accepts
something else only of the same proposer, which thereby gives up what it had proposed before, and
has not started. So two configurations that start have no member in common, or else one proposer
would have started twice. If the proposer is lost for good before it has started, the others must be
started anew with empty data directories; nothing is in them yet.

Pure: the edge asks, persists and sends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from prism_control.raft.types import Configuration, Member, MemberId

if TYPE_CHECKING:
    from collections.abc import Iterable


#: Nothing was accepted yet.
_NOTHING: Final = Configuration()


@dataclass(frozen=True, slots=True)
class PeerView:
    """What one member says of itself.

    Attributes:
        member: Who it is.
        cluster_id: The cluster it belongs to; empty before it has started.
        expected: Its --bootstrap-expect.
        configuration: The first configuration, once it has started.
    """

    member: Member
    cluster_id: str
    expected: int
    configuration: Configuration


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do yet; `reason` is for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class Propose:
    """Ask every other member in `configuration` to accept it."""

    configuration: Configuration


@dataclass(frozen=True, slots=True)
class Start:
    """Start with this configuration: the proposer has."""

    cluster_id: str
    configuration: Configuration


def decide(
    me: Member, expected: int, peers: Iterable[PeerView], accepted: Configuration = _NOTHING
) -> Wait | Propose | Start:
    """Return what a member that has not started does next.

    Args:
        me: This member.
        expected: Its --bootstrap-expect.
        peers: What the others answered just now; an answer of this member itself is ignored.
        accepted: What this member has accepted, durably; without voters if nothing.
    """
    others = {peer.member.id: peer for peer in peers if peer.member.id != me.id}
    for _, peer in sorted(others.items()):
        if peer.cluster_id:
            if me.id in peer.configuration.ids():
                return Start(peer.cluster_id, peer.configuration)
            return Wait(
                f"{peer.member.name} belongs to cluster {peer.cluster_id}, which was formed "
                "without this member; if this one's data directory was lost, remove the old member "
                "and add this one"
            )
    disagreeing = [p.member.name for p in others.values() if p.expected != expected]
    if disagreeing:
        return Wait(
            f"{', '.join(sorted(disagreeing))} do not have --bootstrap-expect={expected}; all must"
        )
    if len(others) + 1 < expected:
        return Wait(f"{len(others) + 1} of {expected} members have been met")
    if len(others) + 1 > expected:
        return Wait(
            f"{len(others) + 1} members have been met, but --bootstrap-expect={expected}; "
            "--join must list exactly the members of the new cluster"
        )
    if me.id > min(others, default=me.id):
        return Wait("waiting for the proposal of the member with the smallest id")
    if accepted.voters and me.id != min(accepted.voters):
        return Wait(_promised(accepted))
    members = tuple(sorted((me, *(p.member for p in others.values())), key=lambda m: m.id))
    return Propose(Configuration(voters=tuple(m.id for m in members), members=members))


def may_accept(
    me: MemberId,
    expected: int,
    configuration: Configuration,
    proposer: MemberId,
    accepted: Configuration = _NOTHING,
) -> str:
    """Return why a member that has not started refuses a proposal; empty: it accepts.

    Args:
        me: This member.
        expected: Its --bootstrap-expect.
        configuration: What is proposed.
        proposer: By whom.
        accepted: What this member has accepted before, durably; without voters if nothing.
    """
    if accepted.voters and proposer != min(accepted.voters):
        return _promised(accepted)
    if configuration.voters_outgoing or configuration.learners:
        return "a first configuration has only voters"
    if me not in configuration.voters:
        return f"member {me:016x} is not in it"
    if len(configuration.voters) != expected:
        return f"it has {len(configuration.voters)} voters; --bootstrap-expect={expected} here"
    if proposer != min(configuration.voters):
        return f"{proposer:016x} is not the member with the smallest id"
    if {m.id for m in configuration.members} != set(configuration.voters):
        return "its members and its voters differ"
    return ""


def _promised(accepted: Configuration) -> str:
    names = ", ".join(member.name for member in accepted.members)
    return (
        f"it has agreed to form a cluster of {names}; if those are not the members to be, start "
        "all of them anew with empty data directories"
    )
