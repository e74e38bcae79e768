"""One long-lived stream to each peer: bounded, newest-wins for heartbeats, reconnecting."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Final

import grpc.aio
from prism.raft.v1 import raft_pb2, raft_pb2_grpc

from prism_common import channels, limits
from prism_common.signal import Signal
from prism_common.status import from_rpc_error
from prism_control.raft import entry_codec
from prism_control.raft.types import (
    AppendRequest,
    Configuration,
    Heartbeat,
    Member,
    MemberId,
    Message,
    SnapshotRequest,
)
from prism_control.transport import wire

logger = logging.getLogger(__name__)

PROTOCOL_VERSION: Final = 1
#: Reasons of a peer's refusal that do not pass by themselves.
REFUSALS: Final = frozenset({"CLUSTER_MISMATCH", "MEMBER_MISMATCH", "VERSION_MISMATCH"})

#: Twice as many as a cluster may have members.
_DIALLING_MAX: Final = 18
#: More than the core keeps in flight to one follower, so that only a dead stream overflows.
_QUEUE_LENGTH_MAX: Final = 1024
#: More than the largest entry, which is an agent's registration with all that it has, beside what
#: was batched with it. A message that a peer will not take would end replication for good.
RAFT_MESSAGE_BYTES_MAX: Final = 32 * 2**20
#: Far under that, so that heartbeats and votes do not wait behind much.
_BATCH_BYTES_MAX: Final = 2 * 2**20
#: A dead peer must be noticed within an election or two, not within gRPC's usual minutes.
_OPTIONS: Final = (
    *(
        option
        for option in channels.CHANNEL_OPTIONS
        if "keepalive_t" not in option[0] and "message_length" not in option[0]
    ),
    ("grpc.max_receive_message_length", RAFT_MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", RAFT_MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class PeerLink:
    """The stream to one peer.

    Args:
        hello: Who dials whom.
        address: host:port of the peer's Raft.
        unreachable: Called when messages to the peer were lost.
        disconnected: Called when a stream that stood has ended.
    """

    def __init__(
        self,
        hello: raft_pb2.Hello,
        address: str,
        unreachable: Callable[[MemberId], None],
        disconnected: Callable[[MemberId], None],
    ) -> None:
        self._hello = hello
        self.address = address
        self._unreachable = unreachable
        self._disconnected = disconnected
        self._queue: deque[Message] = deque()
        self._heartbeat: Heartbeat | None = None
        self._wake = Signal()
        self.connected = False
        #: What the peer last answered to our hello, if it refused; for people.
        self.refusal = ""

    def send(self, message: Message) -> None:
        """Queue a message. A newer heartbeat replaces one that still waits."""
        if isinstance(message, Heartbeat):
            self._heartbeat = message
        elif self.connected and len(self._queue) < _QUEUE_LENGTH_MAX:
            self._queue.append(message)
        else:
            self._unreachable(self._hello.receiver)
            return
        self._wake.notify()

    async def run(self) -> None:
        """Connect, send, and reconnect, until cancelled."""
        backoff_s = limits.RECONNECT_MIN_S
        async with grpc.aio.insecure_channel(self.address, options=_OPTIONS) as channel:
            while True:
                try:
                    await self._exchange(raft_pb2_grpc.RaftServiceStub(channel))
                    backoff_s = limits.RECONNECT_MIN_S
                except grpc.aio.AioRpcError as error:
                    self._note_failure(error)
                finally:
                    stood = self.connected
                    self._drop()
                if stood:
                    self._disconnected(self._hello.receiver)
                await asyncio.sleep(backoff_s * random.uniform(0.8, 1.2))  # noqa: S311
                backoff_s = min(backoff_s * 2, 1.0)

    async def _exchange(self, stub: raft_pb2_grpc.RaftServiceAsyncStub) -> None:
        call = stub.Exchange()
        try:
            await call.write(raft_pb2.ExchangeRequest(hello=self._hello))
            async with asyncio.timeout(limits.CONNECT_TIMEOUT_S):
                if await call.read() is grpc.aio.EOF:
                    return
            self.connected, self.refusal = True, ""
            logger.info("connected to peer %016x at %s", self._hello.receiver, self.address)
            async with asyncio.TaskGroup() as tasks:
                writer = tasks.create_task(self._write(call))
                # The peer says nothing more; reading notices at once when the stream ends.
                await call.read()
                writer.cancel()
        except TimeoutError:
            return
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            call.cancel()

    async def _write(
        self, call: grpc.aio.StreamStreamCall[raft_pb2.ExchangeRequest, raft_pb2.ExchangeResponse]
    ) -> None:
        while True:
            if not self._queue and self._heartbeat is None:
                await self._wake.wait()
                continue
            try:
                await call.write(raft_pb2.ExchangeRequest(messages=self._take()))
            except asyncio.InvalidStateError:
                return  # the stream has ended; the reader knows why

    def _take(self) -> list[raft_pb2.RaftMessage]:
        messages: list[raft_pb2.RaftMessage] = []
        if self._heartbeat is not None:
            messages.append(wire.encode_message(self._heartbeat))
            self._heartbeat = None
        size = 0
        while self._queue and size < _BATCH_BYTES_MAX:
            message = self._queue[0]
            if isinstance(message, AppendRequest):
                size += sum(len(entry_codec.encode(entry)) for entry in message.entries)
                if messages and size > _BATCH_BYTES_MAX:
                    break
            messages.append(wire.encode_message(self._queue.popleft()))
        return messages

    def _drop(self) -> None:
        self.connected = False
        self._heartbeat = None
        self._queue.clear()
        self._unreachable(self._hello.receiver)

    def _note_failure(self, error: grpc.aio.AioRpcError) -> None:
        remote = from_rpc_error(error)
        if remote.code in REFUSALS:
            if remote.message != self.refusal:
                logger.error("peer at %s refuses this member: %s", self.address, remote.message)
            self.refusal = remote.message
        elif self.connected:
            logger.warning(
                "lost peer %016x at %s: %s", self._hello.receiver, self.address, error.details()
            )


class Transport:
    """Sends the core's messages to the members of the configuration.

    Args:
        cluster_id: Named in every hello.
        me: This member, as others may dial it.
        unreachable: Told of peers to whom messages were lost.
        disconnected: Told of peers whose stream stood and has ended.
        send_snapshot: Told of snapshots that the core wants sent, and where to; empty: unknown.
    """

    def __init__(
        self,
        cluster_id: str,
        me: Member,
        unreachable: Callable[[MemberId], None],
        disconnected: Callable[[MemberId], None],
        send_snapshot: Callable[[SnapshotRequest, str], None],
    ) -> None:
        self._cluster_id = cluster_id
        self._me = me
        self._unreachable = unreachable
        self._disconnected = disconnected
        self._send_snapshot = send_snapshot
        self._links: dict[MemberId, tuple[PeerLink, asyncio.Task[None]]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._members: dict[MemberId, Member] = {}
        #: Who has a stream to this member. The configuration known here may not name them: it is
        #: older than theirs, and it is they who can make it newer. They must be answered.
        self._dialling: dict[MemberId, Member] = {}
        #: How many streams each of them has; one that reconnects has two for a moment.
        self._streams: Counter[MemberId] = Counter()
        #: Monotonic time at which each peer was last heard.
        self.last_contact: dict[MemberId, float] = {}

    async def run(self, configuration: Configuration) -> None:
        """Keep the streams, until cancelled."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self.update(configuration)
                await asyncio.get_running_loop().create_future()
        finally:
            self._tasks = None

    def update(self, configuration: Configuration) -> None:
        """Open streams to new members and close those to members that are gone."""
        self._members = {m.id: m for m in configuration.members if m.id != self._me.id}
        self._connect()

    def meet(self, member: Member) -> None:
        """Answer whoever has dialled, until `part`, though the configuration may not name it."""
        if member.id not in self._dialling and len(self._dialling) >= _DIALLING_MAX:
            return
        self._dialling[member.id] = member
        self._streams[member.id] += 1
        self._connect()

    def part(self, member_id: MemberId) -> None:
        """Take note that a stream that was met has ended; there may be a newer one."""
        self._streams[member_id] -= 1
        if self._streams[member_id] <= 0:
            del self._streams[member_id]
            self._dialling.pop(member_id, None)
            self._connect()

    def _connect(self) -> None:
        if self._tasks is None:
            return
        wanted = self._dialling | self._members
        wanted.pop(self._me.id, None)
        for member_id, (link, task) in list(self._links.items()):
            member = wanted.get(member_id)
            if member is None or member.raft_address != link.address:
                task.cancel()
                del self._links[member_id]
        for member_id, member in wanted.items():
            if member_id not in self._links:
                link = PeerLink(
                    self.hello(member_id), member.raft_address, self._unreachable, self._lost
                )
                self._links[member_id] = (link, self._tasks.create_task(link.run()))

    def hello(self, receiver: MemberId) -> raft_pb2.Hello:
        """Return what introduces this member to `receiver`."""
        return raft_pb2.Hello(
            version=PROTOCOL_VERSION,
            cluster_id=self._cluster_id,
            sender=self._me.id,
            receiver=receiver,
            member=wire.encode_member(self._me),
        )

    def send(self, messages: Iterable[Message]) -> None:
        """Queue messages. Each may be lost, as Raft allows."""
        for message in messages:
            entry = self._links.get(message.receiver)
            if isinstance(message, SnapshotRequest):
                # Also without an address: the core must hear that it failed.
                self._send_snapshot(message, entry[0].address if entry is not None else "")
            elif entry is not None:
                entry[0].send(message)

    def is_connected(self, peer: MemberId) -> bool:
        """Whether the stream to a peer stands."""
        entry = self._links.get(peer)
        return entry is not None and entry[0].connected

    def heard(self, peer: MemberId) -> None:
        """Note that a peer was heard just now."""
        self.last_contact[peer] = time.monotonic()

    def _lost(self, peer: MemberId) -> None:
        # Until then it was there, though followers have nothing to say to each other.
        self.heard(peer)
        self._disconnected(peer)

    def refusals(self) -> dict[str, str]:
        """Return peers that refuse this member, by address, with their reason."""
        return {link.address: link.refusal for link, _ in self._links.values() if link.refusal}
