"""The streams between members: bounded, reconnecting, and plain about who is refused."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
from prism.raft.v1 import raft_pb2, raft_pb2_grpc
from prometheus_client import CollectorRegistry

from prism_common.addresses import Address
from prism_common.calls import CallMetrics
from prism_common.server import RpcServer
from prism_control.raft import entry_codec
from prism_control.raft.types import (
    AppendRequest,
    Configuration,
    Entry,
    EntryKind,
    Heartbeat,
    HeartbeatReply,
    Member,
    Message,
    SnapshotMeta,
    SnapshotRequest,
)
from prism_control.storage.snapshots import SnapshotStore
from prism_control.transport import peers
from prism_control.transport.peers import RAFT_MESSAGE_BYTES_MAX, PeerLink, Transport
from prism_control.transport.service import RaftPort, RaftServicer

ME = Member(1, "n1", "127.0.0.1:1", "")


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what no event tells of."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


class Peer:
    """Another member's port."""

    def __init__(self, path: Path) -> None:
        self.snapshots = SnapshotStore(path)
        self.received: list[Message] = []
        self.heard: list[int] = []
        self.address = Address("127.0.0.1", 0)
        self.server: RpcServer | None = None
        self.cluster_id = "cl"

    def receive(self, messages: Sequence[Message]) -> None:
        self.received.extend(messages)

    async def start(self) -> None:
        async def join(member: Member, command_version: int) -> None:
            raise AssertionError

        servicer = RaftServicer(
            lambda _: raft_pb2.DiscoverResponse(), lambda _: raft_pb2.FormResponse()
        )
        servicer.open(
            RaftPort(
                cluster_id=self.cluster_id, me=2, receive=self.receive, meet=lambda _: None,
                part=lambda _: None, join=join, heard=self.heard.append, snapshots=self.snapshots,
            )
        )  # fmt: skip
        metrics = CallMetrics(CollectorRegistry())
        self.server = RpcServer(self.address, "--raft", metrics, RAFT_MESSAGE_BYTES_MAX)
        self.server.add(raft_pb2_grpc.add_RaftServiceServicer_to_server, servicer)
        self.address = self.server.bind()
        await self.server.start([])

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(0)
            self.server = None


class Bench:
    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.lost: list[int] = []
        self.disconnected: list[int] = []
        self.snapshots: list[tuple[SnapshotRequest, str]] = []
        self.transport = Transport(
            "cl",
            ME,
            self.lost.append,
            self.disconnected.append,
            lambda *request: self.snapshots.append(request),
        )

    @property
    def configuration(self) -> Configuration:
        other = Member(2, "n2", str(self.peer.address), "")
        return Configuration((1, 2), members=(ME, other))

    async def connected(self) -> None:
        await until(lambda: self.transport.is_connected(2))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    peer = Peer(tmp_path)
    await peer.start()
    made = Bench(peer)
    task = asyncio.get_running_loop().create_task(made.transport.run(made.configuration))
    await asyncio.sleep(0)
    yield made
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await peer.stop()


async def test_a_stream_that_ends_is_told_once(bench: Bench) -> None:
    await bench.connected()
    assert bench.disconnected == []
    await bench.peer.stop()
    await until(lambda: bench.disconnected == [2])
    # Attempts to connect that fail are nothing that has ended.
    lost = len(bench.lost)
    await until(lambda: len(bench.lost) >= lost + 2)
    assert bench.disconnected == [2]


async def test_messages_arrive_in_order(bench: Bench) -> None:
    await bench.connected()
    sent = [HeartbeatReply(1, 2, 3, number) for number in range(500)]
    bench.transport.send(sent)
    await until(lambda: len(bench.peer.received) == 500)
    assert bench.peer.received == sent
    assert set(bench.peer.heard) == {1}


async def test_the_largest_entry_arrives(bench: Bench) -> None:
    """One that a peer refused for its size would end replication for good."""
    await bench.connected()
    entries = tuple(
        Entry(index, 1, EntryKind.NORMAL, bytes(size))
        for index, size in enumerate((10, 12 * 2**20, 10, 3 * 2**20), 1)
    )
    sent = [AppendRequest(1, 2, 3, entry.index - 1, 1, (entry,), 0) for entry in entries]
    bench.transport.send(sent)
    await until(lambda: len(bench.peer.received) == 4)
    assert bench.peer.received == sent


async def test_a_corrupt_entry_ends_the_stream_in_one_line_and_nothing_of_it_is_taken(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.connected()
    good = Entry(1, 1, EntryKind.NORMAL, b"good")
    damaged = bytearray(entry_codec.encode(Entry(2, 1, EntryKind.NORMAL, b"bad")))
    damaged[-1] ^= 1
    bad = Entry(2, 1, EntryKind.NORMAL, b"bad", bytes(damaged))
    bench.transport.send([AppendRequest(1, 2, 3, 0, 0, (good, bad), 0)])
    await until(lambda: bench.disconnected == [2])
    assert bench.peer.received == []
    said = [record for record in caplog.records if "entry 2 is corrupt" in record.getMessage()]
    assert "nothing of it is taken" in said[0].getMessage()
    assert not any(record.exc_info for record in caplog.records)
    # The stream comes back, and what is sent again arrives.
    await bench.connected()
    again = AppendRequest(1, 2, 3, 0, 0, (good,), 0)
    bench.transport.send([again])
    await until(lambda: bench.peer.received == [again])


async def test_a_peer_that_comes_back_is_found_and_the_loss_is_told(bench: Bench) -> None:
    await bench.connected()
    bench.lost.clear()
    await bench.peer.stop()
    await until(lambda: not bench.transport.is_connected(2))
    assert set(bench.lost) == {2}
    bench.lost.clear()
    bench.transport.send([HeartbeatReply(1, 2, 3)])
    assert bench.lost == [2]
    await bench.peer.start()
    await bench.connected()
    bench.transport.send([HeartbeatReply(1, 2, 4)])
    await until(lambda: bench.peer.received == [HeartbeatReply(1, 2, 4)])


async def test_a_refusal_is_said_once_and_kept_for_people(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prism_common.limits.RECONNECT_MIN_S", 0.01)
    peer = Peer(tmp_path)
    peer.cluster_id = "other"
    await peer.start()
    bench = Bench(peer)
    task = asyncio.get_running_loop().create_task(bench.transport.run(bench.configuration))
    await until(lambda: len(bench.lost) > 4)
    ((address, reason),) = bench.transport.refusals().items()
    assert address == str(peer.address)
    assert "is not this member's cluster other" in reason
    assert len([r for r in caplog.records if "refuses this member" in r.getMessage()]) == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await peer.stop()


async def test_members_come_and_go(bench: Bench) -> None:
    await bench.connected()
    bench.transport.update(Configuration((1,), members=(ME,)))
    assert not bench.transport.is_connected(2)
    bench.transport.send([HeartbeatReply(1, 2, 3)])
    bench.transport.update(bench.configuration)
    await bench.connected()
    assert bench.peer.received == []


async def test_who_dials_is_answered_though_unknown(bench: Bench) -> None:
    bench.transport.update(Configuration((1,), members=(ME,)))
    dialler = Member(2, "n2", str(bench.peer.address), "")
    bench.transport.meet(dialler)
    bench.transport.meet(dialler)
    await bench.connected()
    bench.transport.part(2)
    assert bench.transport.is_connected(2)
    bench.transport.part(2)
    assert not bench.transport.is_connected(2)


async def test_a_snapshot_without_an_address_is_handed_on_to_be_reported(bench: Bench) -> None:
    known = SnapshotRequest(1, 2, 3, SnapshotMeta())
    unknown = SnapshotRequest(1, 9, 3, SnapshotMeta())
    bench.transport.send([known, unknown])
    assert bench.snapshots == [(known, str(bench.peer.address)), (unknown, "")]


# ── One link's queue ─────────────────────────────────────────────────────────────────────────────


def link(lost: list[int]) -> PeerLink:
    made = PeerLink(raft_pb2.Hello(sender=1, receiver=2), "127.0.0.1:1", lost.append, lost.append)
    made.connected = True
    return made


async def test_a_newer_heartbeat_replaces_one_that_waits() -> None:
    made = link([])
    for commit in range(100):
        made.send(Heartbeat(1, 2, 3, commit))
    made.send(HeartbeatReply(1, 2, 3))
    first, second = made._take()
    assert first.heartbeat.commit == 99
    assert second.HasField("heartbeat_reply")
    assert made._take() == []


async def test_a_full_queue_loses_and_says_so() -> None:
    lost: list[int] = []
    made = link(lost)
    for _ in range(peers._QUEUE_LENGTH_MAX + 3):
        made.send(HeartbeatReply(1, 2, 3))
    assert lost == [2, 2, 2]
    assert len(made._queue) == peers._QUEUE_LENGTH_MAX


async def test_a_write_is_bounded_in_bytes_and_a_heartbeat_goes_first() -> None:
    made = link([])
    big = Entry(1, 1, EntryKind.NORMAL, bytes(2**20))
    for _ in range(5):
        made.send(AppendRequest(1, 2, 3, 0, 0, (big,), 0))
    made.send(Heartbeat(1, 2, 3, 7))
    writes = []
    while messages := made._take():
        writes.append([message.WhichOneof("message") for message in messages])
    assert writes[0][0] == "heartbeat"
    assert sum(len(write) for write in writes) == 6
    assert max(write.count("append_request") for write in writes) <= 2
