"""What a node tells of itself: gauges, peers, the cluster, and readiness in words."""

import time
from collections.abc import Callable
from typing import Final

from google.protobuf import timestamp_pb2
from prism.cluster.v1 import cluster_pb2

from prism_common import __version__
from prism_control.batcher import Batcher
from prism_control.metrics import RaftFigures, StateFigures
from prism_control.node.driver import Driver
from prism_control.node.replica import Replica
from prism_control.node.upgrade import VersionGate
from prism_control.raft.types import NOBODY, Member, MemberId, Role
from prism_control.state.model import NodeState, SandboxState
from prism_control.transport.peers import Transport

#: A peer that was not heard for an election timeout counts as unreachable.
UNREACHABLE_S: Final = 2.0
_ROLES: Final = {
    Role.FOLLOWER: cluster_pb2.PEER_ROLE_FOLLOWER,
    Role.PRE_CANDIDATE: cluster_pb2.PEER_ROLE_CANDIDATE,
    Role.CANDIDATE: cluster_pb2.PEER_ROLE_CANDIDATE,
    Role.LEADER: cluster_pb2.PEER_ROLE_LEADER,
}


class NodeStatus:
    """Reads a node that belongs to a cluster. It changes nothing, so any thread may ask.

    Args:
        me: This member.
        cluster_id: Its cluster.
        has_room: Whether its disk takes more commands.
        gate: Knows which members hold commands back.
    """

    def __init__(
        self,
        me: Member,
        cluster_id: str,
        driver: Driver,
        transport: Transport,
        replica: Replica,
        batcher: Batcher,
        has_room: Callable[[], bool],
        gate: VersionGate,
    ) -> None:
        self._gate = gate
        self._me = me
        self._cluster_id = cluster_id
        self._driver = driver
        self._transport = transport
        self._replica = replica
        self._batcher = batcher
        self._has_room = has_room
        self._started = time.monotonic()

    # ── Gauges ───────────────────────────────────────────────────────────────────────────────

    def raft(self) -> RaftFigures:
        """Return Raft's gauges."""
        core = self._driver.core
        names = {member.id: member.name for member in self._driver.configuration.members}
        return RaftFigures(
            term=core.term,
            is_leader=core.role is Role.LEADER,
            last_index=core.log.last_index,
            commit_index=core.commit,
            applied_index=core.applied_index,
            leader_changes=self._driver.leader_changes,
            snapshot_bytes=self._driver.snapshot_bytes,
            match_index={names[i]: m for i, m in self._matches().items() if i in names},
            last_contact={
                names[i]: heard
                for i, heard in dict(self._transport.last_contact).items()
                if i in names
            },
        )

    def state(self) -> StateFigures:
        """Return the gauges of state and queues."""
        machine = self._replica.machine
        nodes = dict.fromkeys((state.name for state in NodeState), 0)
        for row in machine.nodes():
            nodes[row.state.name] += 1
        counts = machine.counts
        return StateFigures(
            sandboxes={state.name: counts[state] for state in SandboxState},
            nodes=nodes,
            pending=counts[SandboxState.PENDING],
            queues=self._batcher.queues(),
        )

    def _matches(self) -> dict[MemberId, int]:
        replication = self._driver.core.replication
        if replication is None:
            return {}
        return {member: p.match for member, p in dict(replication.progress).items()}

    # ── In words ─────────────────────────────────────────────────────────────────────────────

    def readiness(self) -> tuple[bool, str]:
        """Return whether this member serves, and what is wrong or who leads."""
        leader = self._driver.leader
        members = self._driver.configuration.ids()
        if members and self._me.id not in members:
            return False, (
                "this member was removed from the cluster: stop it; to bring it back, start it "
                "with an empty --data-dir and --join"
            )
        if self._driver.disk_full:
            return False, "the disk is full: nothing is written until there is room"
        if leader is None:
            return False, self._no_leader()
        if leader.id == self._me.id and not self._driver.leads:
            return False, "leads, and is still applying what earlier leaders committed"
        if leader.id == self._me.id and not self._has_room():
            return False, "leads, and the disk is full: writes are refused until there is room"
        return True, f"{leader.name} leads in term {self._driver.core.term}"

    def warnings(self) -> list[str]:
        """Return what is wrong and what to do, in words."""
        warnings = []
        ready, text = self.readiness()
        if not ready:
            warnings.append(text)
        unreachable = self._unreachable()
        if unreachable and ready and self._driver.leads:
            voters = len(self._driver.configuration.voters)
            left = voters - len(unreachable) - (voters // 2 + 1)
            names = ", ".join(member.name for member in unreachable)
            warnings.append(
                f"{names} cannot be reached; {max(left, 0)} more may fail before writes stop: "
                "start it again, or look at its log"
            )
        old = sorted(name for name, version in self._gate.behind().items() if version is not None)
        if old:
            warnings.append(
                f"{', '.join(old)} run an older release: what is new is refused until they are "
                "upgraded"
            )
        for address, refusal in self._transport.refusals().items():
            warnings.append(f"the member at {address} refuses this one: {refusal}")
        return warnings

    def _no_leader(self) -> str:
        configuration = self._driver.configuration
        unreachable = [m for m in self._unreachable() if configuration.is_voter(m.id)]
        voters = len({*configuration.voters, *configuration.voters_outgoing})
        if not voters:
            return "this member waits for the leader of its cluster to send it the state"
        if voters - len(unreachable) > voters // 2:
            return "no leader yet: an election is under way; writes wait for it"
        names = ", ".join(member.name for member in unreachable)
        # The majority ended when the last of those went that it needed.
        heard = sorted((self._heard(member.id) for member in unreachable), reverse=True)
        reachable = voters - len(unreachable)
        silent_s = time.monotonic() - heard[voters // 2 - reachable]
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time.time() - silent_s))
        return (
            f"{len(unreachable)} of {voters} voters unreachable since {since}, {silent_s:.0f} s "
            f"({names}): without a majority writes and consistent reads are refused; running "
            "sandboxes go on; start them again, or if they are lost for ever see `prismd recover`"
        )

    def _unreachable(self) -> list[Member]:
        return [
            member
            for member in self._driver.configuration.members
            if member.id != self._me.id and not self._is_reachable(member.id)
        ]

    def _is_reachable(self, member_id: MemberId) -> bool:
        # Followers have nothing to say to each other: that the stream stands must do.
        if not self._driver.leads and self._transport.is_connected(member_id):
            return True
        return time.monotonic() - self._heard(member_id) < UNREACHABLE_S

    def _heard(self, member_id: MemberId) -> float:
        return self._transport.last_contact.get(member_id, self._started)

    # ── Protos ───────────────────────────────────────────────────────────────────────────────

    def peers(self) -> list[cluster_pb2.Peer]:
        """Return every member, in order of name."""
        soft = self._driver.soft_state
        matches = self._matches()
        versions = self._gate.known()
        members = sorted(self._driver.configuration.members, key=lambda member: member.name)
        return [
            cluster_pb2.Peer(
                id=f"{member.id:016x}",
                name=member.name,
                raft_address=member.raft_address,
                api_address=member.api_address,
                role=self._role(member.id, soft.leader),
                match_index=matches.get(member.id, 0),
                last_contact_time=self._contact_time(member.id),
                reachable=member.id == self._me.id or self._is_reachable(member.id),
                command_version=versions.get(member.name, 0),
            )
            for member in members
        ]

    def _role(self, member_id: MemberId, leader: MemberId) -> cluster_pb2.PeerRole.ValueType:
        if member_id == self._me.id:
            return _ROLES[self._driver.soft_state.role]
        if member_id == leader:
            return cluster_pb2.PEER_ROLE_LEADER
        if member_id in self._driver.configuration.learners:
            return cluster_pb2.PEER_ROLE_LEARNER
        return (
            cluster_pb2.PEER_ROLE_UNSPECIFIED
            if leader == NOBODY
            else cluster_pb2.PEER_ROLE_FOLLOWER
        )

    def _contact_time(self, member_id: MemberId) -> timestamp_pb2.Timestamp | None:
        heard = self._transport.last_contact.get(member_id)
        if heard is None:
            return None
        proto = timestamp_pb2.Timestamp()
        proto.FromNanoseconds(int((time.time() - (time.monotonic() - heard)) * 1e9))
        return proto

    def cluster(self) -> cluster_pb2.Cluster:
        """Return how the cluster is."""
        raft, state = self.raft(), self.state()
        leader = self._driver.leader
        return cluster_pb2.Cluster(
            id=self._cluster_id,
            member_id=f"{self._me.id:016x}",
            member_name=self._me.name,
            leader_id=f"{leader.id:016x}" if leader else "",
            leader_api_address=leader.api_address if leader else "",
            term=raft.term,
            last_index=raft.last_index,
            commit_index=raft.commit_index,
            applied_index=raft.applied_index,
            peers=self.peers(),
            revision=self._replica.machine.revision,
            sandboxes={
                name: count
                for name, count in state.sandboxes.items()
                if count and name != SandboxState.DELETED.name
            },
            nodes={name: count for name, count in state.nodes.items() if count},
            version=__version__,
            warnings=self.warnings(),
            command_version=self._replica.machine.command_version,
        )
