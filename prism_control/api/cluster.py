"""ClusterService: how the control plane is, and who its members are.

The reads answer without a leader too.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import grpc.aio
from prism.cluster.v1 import cluster_pb2, cluster_pb2_grpc

from prism_common.addresses import parse_address
from prism_common.errors import NoLeaderError, NotLeaderError
from prism_control.api import validation
from prism_control.api.forward import Forwarder, time_left_s
from prism_control.raft.types import Member, MemberId

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_SERVICE: Final = "/prism.cluster.v1.ClusterService/"
_RAFT_PORT: Final = 4200
_BARRIER_TIMEOUT_S: Final = 6.0


class Members(Protocol):
    """Changes who the members are, on the leader."""

    async def add(self, raft_address: str) -> Member:
        """Take in the member that waits at an address."""

    async def remove(self, reference: str) -> None:
        """Remove a member by id or name."""

    async def transfer(self, reference: str) -> MemberId:
        """Hand leadership over; return who leads."""


@dataclass(frozen=True, slots=True)
class ClusterView:
    """What a node knows of its cluster, and can do about it.

    Attributes:
        cluster: Made afresh at each call, and so are the peers.
        members: None until this node belongs to a cluster.
        read_barrier: Returns once all that was acknowledged is here.
        backup: Returns the state as of now, to be encoded in another thread.
    """

    cluster: Callable[[], cluster_pb2.Cluster]
    peers: Callable[[], list[cluster_pb2.Peer]]
    members: Callable[[], Members | None]
    forwarder: Forwarder
    read_barrier: Callable[[], Awaitable[None]]
    backup: Callable[[], Iterable[bytes]]


class ClusterServicer(cluster_pb2_grpc.ClusterServiceServicer):
    """Serves ClusterService on one control node."""

    def __init__(self, view: ClusterView) -> None:
        self._view = view

    async def GetCluster(
        self, request: cluster_pb2.GetClusterRequest, context: Context
    ) -> cluster_pb2.Cluster:
        """Say how the cluster is, as this member sees it."""
        return self._view.cluster()

    async def ListPeers(
        self, request: cluster_pb2.ListPeersRequest, context: Context
    ) -> cluster_pb2.ListPeersResponse:
        """List the members, as this member sees them."""
        return cluster_pb2.ListPeersResponse(peers=self._view.peers())

    async def AddPeer(
        self, request: cluster_pb2.AddPeerRequest, context: Context
    ) -> cluster_pb2.Peer:
        """Take in a node that waits to join."""
        address = parse_address(request.raft_address, "raft_address", _RAFT_PORT)
        request.raft_address = str(address)
        return await self._view.forwarder.call(
            _SERVICE + "AddPeer", request, cluster_pb2.Peer, context, self._add
        )

    async def _add(self, request: cluster_pb2.AddPeerRequest, left_s: float) -> cluster_pb2.Peer:
        member = await self._members().add(request.raft_address)
        added = f"{member.id:016x}"
        return next(peer for peer in self._view.peers() if peer.id == added)

    async def RemovePeer(
        self, request: cluster_pb2.RemovePeerRequest, context: Context
    ) -> cluster_pb2.RemovePeerResponse:
        """Remove a member."""
        validation.reference(request.peer, "peer")
        return await self._view.forwarder.call(
            _SERVICE + "RemovePeer", request, cluster_pb2.RemovePeerResponse, context, self._remove
        )

    async def _remove(
        self, request: cluster_pb2.RemovePeerRequest, left_s: float
    ) -> cluster_pb2.RemovePeerResponse:
        await self._members().remove(request.peer)
        return cluster_pb2.RemovePeerResponse()

    async def TransferLeadership(
        self, request: cluster_pb2.TransferLeadershipRequest, context: Context
    ) -> cluster_pb2.TransferLeadershipResponse:
        """Hand leadership to another voter."""
        if request.peer:
            validation.reference(request.peer, "peer")
        return await self._view.forwarder.call(
            _SERVICE + "TransferLeadership",
            request,
            cluster_pb2.TransferLeadershipResponse,
            context,
            self._transfer,
        )

    async def _transfer(
        self, request: cluster_pb2.TransferLeadershipRequest, left_s: float
    ) -> cluster_pb2.TransferLeadershipResponse:
        leader = await self._members().transfer(request.peer)
        return cluster_pb2.TransferLeadershipResponse(leader_id=f"{leader:016x}")

    async def Backup(
        self, request: cluster_pb2.BackupRequest, context: Context
    ) -> AsyncIterator[cluster_pb2.BackupResponse]:
        """Stream a consistent copy of the state, as of now or later."""
        try:
            async with asyncio.timeout(min(time_left_s(context), _BARRIER_TIMEOUT_S)):
                await self._view.read_barrier()
        except TimeoutError:
            raise NoLeaderError(
                "no leader has confirmed the read: a backup needs a majority of the control nodes",
                retry_after_s=1.0,
            ) from None
        records = iter(self._view.backup())
        while (data := await asyncio.to_thread(next, records, None)) is not None:
            yield cluster_pb2.BackupResponse(data=data)

    def _members(self) -> Members:
        members = self._view.members()
        if members is None:
            raise NotLeaderError("this member does not belong to a cluster yet")
        return members
