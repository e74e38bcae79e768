"""ClusterService: how the control plane is. It answers without a leader too."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc.aio
from prism.cluster.v1 import cluster_pb2, cluster_pb2_grpc

from prism_common.errors import NotServedError

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class ClusterView:
    """What a node knows of its cluster, as protos made afresh at each call."""

    cluster: Callable[[], cluster_pb2.Cluster]
    peers: Callable[[], list[cluster_pb2.Peer]]


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
        """Not served yet."""
        raise NotServedError("AddPeer")

    async def RemovePeer(
        self, request: cluster_pb2.RemovePeerRequest, context: Context
    ) -> cluster_pb2.RemovePeerResponse:
        """Not served yet."""
        raise NotServedError("RemovePeer")

    async def TransferLeadership(
        self, request: cluster_pb2.TransferLeadershipRequest, context: Context
    ) -> cluster_pb2.TransferLeadershipResponse:
        """Not served yet."""
        raise NotServedError("TransferLeadership")

    async def Backup(
        self, request: cluster_pb2.BackupRequest, context: Context
    ) -> AsyncIterator[cluster_pb2.BackupResponse]:
        """Not served yet."""
        raise NotServedError("Backup")
        yield
