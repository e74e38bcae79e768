"""RaftService: what peers call on port 4200."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio
from prism.raft.v1 import raft_pb2, raft_pb2_grpc

from prism_common.errors import InvalidArgumentError, WrongStateError
from prism_control.raft.errors import CorruptEntryError
from prism_control.raft.types import Member, MemberId, Message
from prism_control.storage.snapshots import SnapshotStore
from prism_control.transport import wire
from prism_control.transport.peers import PROTOCOL_VERSION
from prism_control.transport.snapshots import arrived, receive_snapshot

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RaftPort:
    """What the service needs of a member that belongs to a cluster."""

    cluster_id: str
    me: MemberId
    receive: Callable[[Sequence[Message]], None]
    meet: Callable[[Member], None]
    part: Callable[[MemberId], None]
    join: Callable[[Member, int], Awaitable[None]]
    heard: Callable[[MemberId], None]
    snapshots: SnapshotStore


class RaftServicer(raft_pb2_grpc.RaftServiceServicer):
    """Checks who speaks, and hands messages to the driver.

    Args:
        discover: Answers Discover, before and after the cluster is formed.
        form: Answers Form.
    """

    def __init__(
        self,
        discover: Callable[[raft_pb2.DiscoverRequest], raft_pb2.DiscoverResponse],
        form: Callable[[raft_pb2.FormRequest], raft_pb2.FormResponse],
    ) -> None:
        self._discover = discover
        self._form = form
        self._port: RaftPort | None = None

    def open(self, port: RaftPort) -> None:
        """Begin to take messages: this member belongs to a cluster."""
        self._port = port

    async def Exchange(
        self,
        request_iterator: AsyncIterator[raft_pb2.ExchangeRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[raft_pb2.ExchangeResponse]:
        """Take messages from one peer until its stream ends."""
        first = await anext(request_iterator, None)
        if first is None:
            return
        port, sender = self._admit(first.hello)
        port.meet(wire.decode_member(first.hello.member))
        try:
            yield raft_pb2.ExchangeResponse(member_id=port.me)
            async for request in request_iterator:
                port.heard(sender)
                port.receive(_decode(request, sender, port.me))
        finally:
            port.part(sender)

    async def InstallSnapshot(
        self,
        request_iterator: AsyncIterator[raft_pb2.InstallSnapshotRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> raft_pb2.InstallSnapshotResponse:
        """Take a snapshot from the leader."""
        port = self._require_port()
        request = await receive_snapshot(
            request_iterator, port.snapshots, lambda hello: self._admit(hello)[1], port.me
        )
        port.heard(request.sender)
        port.receive([request])
        return raft_pb2.InstallSnapshotResponse(index=request.meta.index)

    async def GetSnapshotOffset(
        self,
        request: raft_pb2.GetSnapshotOffsetRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> raft_pb2.GetSnapshotOffsetResponse:
        """Say how much of a snapshot has arrived."""
        port, _ = self._admit(request.hello)
        return raft_pb2.GetSnapshotOffsetResponse(offset=arrived(request, port.snapshots))

    async def Discover(
        self, request: raft_pb2.DiscoverRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> raft_pb2.DiscoverResponse:
        """Say who this member is."""
        return self._discover(request)

    async def Form(
        self, request: raft_pb2.FormRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> raft_pb2.FormResponse:
        """Accept or refuse a first configuration."""
        return self._form(request)

    async def Join(
        self, request: raft_pb2.JoinRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> raft_pb2.JoinResponse:
        """Take a new member in."""
        port = self._require_port()
        member = wire.decode_member(request.member)
        if not member.id or not member.name or not member.raft_address:
            raise InvalidArgumentError("member: needs an id, a name and addresses", field="member")
        await port.join(member, request.command_version)
        return raft_pb2.JoinResponse(cluster_id=port.cluster_id)

    def _require_port(self) -> RaftPort:
        if self._port is None:
            raise WrongStateError("this member does not belong to a cluster yet")
        return self._port

    def _admit(self, hello: raft_pb2.Hello) -> tuple[RaftPort, MemberId]:
        """Check a hello.

        Raises:
            WrongStateError: Another cluster, another member, or another version; it says which.
        """
        port = self._require_port()
        if hello.version != PROTOCOL_VERSION:
            raise WrongStateError(
                f"protocol version {hello.version}; this member speaks {PROTOCOL_VERSION}",
                reason="VERSION_MISMATCH",
            )
        if hello.cluster_id != port.cluster_id:
            raise WrongStateError(
                f"cluster {hello.cluster_id or '(none)'} is not this member's cluster "
                f"{port.cluster_id}: is --data-dir that of another cluster?",
                reason="CLUSTER_MISMATCH",
            )
        if hello.member.id != hello.sender or not hello.member.raft_address:
            raise InvalidArgumentError("hello.member: needs the sender's id and address")
        if hello.receiver != port.me:
            raise WrongStateError(
                f"member {hello.receiver:016x} was wanted; this is {port.me:016x}: was its data "
                "directory replaced?",
                reason="MEMBER_MISMATCH",
            )
        # Not whether the sender is in the configuration: the one known here may be older than the
        # sender's, and only the sender can then make it newer. Pre-vote and lease keep a removed
        # member from disturbing.
        return port, hello.sender


def _decode(request: raft_pb2.ExchangeRequest, sender: MemberId, me: MemberId) -> list[Message]:
    """Return the messages of a request; those of a kind unknown to this version are left out.

    Raises:
        InvalidArgumentError: An entry is not what was encoded. Nothing of the request is taken;
            the stream ends, and what is missing is sent again on the next.
    """
    try:
        decoded = [wire.decode_message(message, sender, me) for message in request.messages]
    except CorruptEntryError as error:
        logger.error("from member %016x: %s; nothing of it is taken", sender, error)
        raise InvalidArgumentError(str(error), reason="CORRUPT_ENTRY") from None
    return [message for message in decoded if message is not None]
