"""How the cluster and its control nodes are shown."""

from typing import Final

from prism.cluster.v1 import cluster_pb2 as pb

from prism_cli.output import Column, age, enum_name, when


def role_of(peer: pb.Peer) -> str:
    """Return its part in Raft; `-` where the member that answers does not know it."""
    return enum_name(pb.PeerRole.DESCRIPTOR, peer.role) if peer.role else "-"


def _reachable(peer: pb.Peer) -> str:
    return "yes" if peer.reachable else "no"


PEER_COLUMNS: Final = (
    Column("NAME", lambda peer: peer.name),
    Column("ROLE", role_of),
    Column("REACHABLE", _reachable),
    Column("HEARD", lambda peer: age(peer.last_contact_time)),
    Column("MATCH", lambda peer: str(peer.match_index) if peer.match_index else "-"),
    Column("RAFT", lambda peer: peer.raft_address),
    Column("API", lambda peer: peer.api_address),
    Column("ID", lambda peer: peer.id),
)
PEER_FACTS: Final = (
    Column("Name", lambda peer: peer.name),
    Column("Id", lambda peer: peer.id),
    Column("Role", role_of),
    Column("Reachable", _reachable),
    Column("Last heard", lambda peer: when(peer.last_contact_time)),
    Column("On its disk", lambda peer: _match(peer)),
    Column("Raft address", lambda peer: peer.raft_address),
    Column("API address", lambda peer: peer.api_address),
)


def _match(peer: pb.Peer) -> str:
    return f"up to index {peer.match_index}" if peer.match_index else "not known (ask the leader)"


def facts(cluster: pb.Cluster) -> list[tuple[str, str]]:
    """Return what `info` says, as lines with titles. What is wrong comes first."""
    lines = [("Warning", warning) for warning in cluster.warnings]
    lines += [
        ("Cluster", cluster.id or "not formed yet"),
        ("Leader", _leader(cluster)),
        ("Members", _members(cluster)),
        ("Nodes", _counts(cluster.nodes)),
        ("Sandboxes", _counts(cluster.sandboxes)),
        ("Answered by", f"{cluster.member_name} (version {cluster.version})"),
        ("Raft", f"term {cluster.term}, revision {cluster.revision}"),
        (
            "Log",
            f"last {cluster.last_index}, committed {cluster.commit_index}, "
            f"applied {cluster.applied_index}",
        ),
    ]
    return lines


def _leader(cluster: pb.Cluster) -> str:
    if not cluster.leader_id:
        return "none known: nothing can be written until a majority of the members is back"
    names = [peer.name for peer in cluster.peers if peer.id == cluster.leader_id]
    return f"{names[0] if names else cluster.leader_id} ({cluster.leader_api_address})"


def _members(cluster: pb.Cluster) -> str:
    voters = [peer for peer in cluster.peers if peer.role != pb.PEER_ROLE_LEARNER]
    reachable = sum(peer.reachable for peer in voters)
    tolerated = max(0, (len(voters) - 1) // 2)
    words = f"{len(voters)} voters, {reachable} reachable, {tolerated} may fail"
    learners = len(cluster.peers) - len(voters)
    return f"{words}; {learners} learners" if learners else words


def _counts(counts: "object") -> str:
    items = sorted(dict(counts).items())  # type: ignore[call-overload]
    parts = [f"{count} {name}" for name, count in items if count]
    return ", ".join(parts) or "none"
