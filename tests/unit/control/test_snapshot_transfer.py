"""A snapshot's way to another member: whole on its disk, or reported as failed."""

import errno
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prism.raft.v1 import raft_pb2, raft_pb2_grpc
from prometheus_client import CollectorRegistry

from prism_common.addresses import Address
from prism_common.calls import CallMetrics
from prism_common.errors import DiskFullError, InvalidArgumentError
from prism_common.server import RpcServer
from prism_control.metrics import SnapshotMetrics
from prism_control.raft.types import Configuration, Member, Message, SnapshotMeta, SnapshotRequest
from prism_control.storage.incoming import IncomingSnapshot, SnapshotIdentity
from prism_control.storage.snapshots import SnapshotStore
from prism_control.transport import snapshots as transfer
from prism_control.transport.service import RaftPort, RaftServicer

META = SnapshotMeta(
    5, 2, Configuration((1, 2), members=(Member(1, "a", "", ""), Member(2, "b", "", "")))
)
CHUNKS = [bytes([n]) * 100_000 for n in range(20)]


@dataclass
class Receiver:
    """A member that takes snapshots."""

    store: SnapshotStore
    address: str = ""
    received: list[Message] = field(default_factory=list)

    def receive(self, messages: Sequence[Message]) -> None:
        self.received.extend(messages)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    """Short pauses, and what the sender counts."""
    monkeypatch.setattr(transfer, "_PAUSE_S", 0.01)
    return CollectorRegistry()


async def send(
    counted: CollectorRegistry,
    path: Path,
    address: str,
    said: raft_pb2.Hello | None = None,
    rate_bytes_s: int = transfer.RATE_BYTES_S,
) -> bool:
    return await transfer.send_snapshot(
        9, META, path, said or hello(), address, SnapshotMetrics(counted), rate_bytes_s=rate_bytes_s
    )


def hello(cluster_id: str = "cl", receiver: int = 2) -> raft_pb2.Hello:
    member = raft_pb2.Member(id=1, name="a", raft_address="127.0.0.1:1")
    return raft_pb2.Hello(
        version=1, cluster_id=cluster_id, sender=1, receiver=receiver, member=member
    )


@pytest.fixture
async def receiver(tmp_path: Path) -> AsyncIterator[Receiver]:
    made = Receiver(SnapshotStore(tmp_path / "receiver"))

    async def join(member: Member, command_version: int) -> None:
        raise AssertionError

    servicer = RaftServicer(
        lambda _: raft_pb2.DiscoverResponse(), lambda _: raft_pb2.FormResponse()
    )
    servicer.open(
        RaftPort(
            cluster_id="cl", me=2, receive=made.receive, meet=lambda _: None, join=join,
            part=lambda _: None, heard=lambda _: None, snapshots=made.store,
        )
    )  # fmt: skip
    server = RpcServer(Address("127.0.0.1", 0), "--raft", CallMetrics(CollectorRegistry()))
    server.add(raft_pb2_grpc.add_RaftServiceServicer_to_server, servicer)
    made.address = str(server.bind())
    await server.start([])
    yield made
    await server.stop(0)


@pytest.fixture
def sender(tmp_path: Path) -> SnapshotStore:
    store = SnapshotStore(tmp_path / "sender")
    store.write(5, CHUNKS)
    return store


async def test_it_arrives_whole_and_the_core_is_told(
    receiver: Receiver, sender: SnapshotStore, counted: CollectorRegistry
) -> None:
    assert await send(counted, sender.file(5), receiver.address)
    assert list(receiver.store.read(5)) == CHUNKS
    assert receiver.received == [SnapshotRequest(1, 2, 9, META)]


async def test_one_whose_file_is_gone_is_reported_and_nothing_hangs(
    receiver: Receiver, sender: SnapshotStore, counted: CollectorRegistry
) -> None:
    sender.prune(6)
    assert not await send(counted, sender.file(5), receiver.address)
    assert receiver.received == []


async def test_one_that_is_removed_meanwhile_still_arrives(
    receiver: Receiver,
    sender: SnapshotStore,
    counted: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = transfer._chunks

    async def removed_meanwhile(*arguments: object) -> AsyncIterator[object]:
        async for chunk in original(*arguments):  # type: ignore[arg-type]
            sender.prune(6)
            yield chunk

    monkeypatch.setattr(transfer, "_chunks", removed_meanwhile)
    assert await send(counted, sender.file(5), receiver.address)
    assert list(receiver.store.read(5)) == CHUNKS


@pytest.mark.parametrize("wrong", [hello(cluster_id="other"), hello(receiver=3)])
async def test_strangers_are_refused(
    receiver: Receiver, sender: SnapshotStore, counted: CollectorRegistry, wrong: raft_pb2.Hello
) -> None:
    assert not await send(counted, sender.file(5), receiver.address, wrong)
    assert receiver.received == []


async def test_nobody_there_is_reported(sender: SnapshotStore, counted: CollectorRegistry) -> None:
    assert not await send(counted, sender.file(5), "127.0.0.1:1")


async def _receive(
    store: SnapshotStore, chunks: list[raft_pb2.InstallSnapshotRequest]
) -> SnapshotRequest:
    async def arriving() -> AsyncIterator[raft_pb2.InstallSnapshotRequest]:
        for chunk in chunks:
            yield chunk

    return await transfer.receive_snapshot(arriving(), store, lambda hello: hello.sender, 2)


async def _chunks(store: SnapshotStore) -> list[raft_pb2.InstallSnapshotRequest]:
    with store.file(5).open("rb") as file:
        size, crc = transfer._measure(file)
        sending = transfer._Transfer(
            9, META, SnapshotIdentity(5, 2, size, crc), file, hello(), 2**30,
            SnapshotMetrics(CollectorRegistry()),
        )  # fmt: skip
        return [chunk async for chunk in transfer._chunks(sending, 0)]


@pytest.mark.parametrize("damage", ["lost", "repeated", "cut", "flipped", "swapped", "none"])
async def test_chunks_that_are_not_as_sent_are_refused_and_nothing_is_installed(
    tmp_path: Path, sender: SnapshotStore, damage: str
) -> None:
    chunks = await _chunks(sender)
    assert len(chunks) > 4
    if damage == "lost":
        del chunks[2]
    elif damage == "repeated":
        chunks.insert(2, chunks[2])
    elif damage == "cut":
        del chunks[3:]
    elif damage == "flipped":
        chunks[2].data = b"\1" + chunks[2].data[1:]
    elif damage == "swapped":
        chunks[2], chunks[3] = chunks[3], chunks[2]
    else:
        chunks.clear()
    store = SnapshotStore(tmp_path / "receiver")
    with pytest.raises(InvalidArgumentError):
        await _receive(store, chunks)
    # What came before the damage is kept, and is all that is kept.
    kept = [path.suffix for path in (tmp_path / "receiver").iterdir()]
    assert kept == ([] if damage == "none" else [".partial"])
    SnapshotStore(tmp_path / "receiver")
    assert list((tmp_path / "receiver").iterdir()) == []


async def test_what_was_damaged_on_the_senders_disk_is_not_installed(
    tmp_path: Path, sender: SnapshotStore
) -> None:
    content = bytearray(sender.file(5).read_bytes())
    content[700_000] ^= 8
    sender.file(5).write_bytes(content)
    store = SnapshotStore(tmp_path / "receiver")
    with pytest.raises(InvalidArgumentError, match="corrupt") as caught:
        await _receive(store, await _chunks(sender))
    assert caught.value.code == "CORRUPT_SNAPSHOT"
    assert list((tmp_path / "receiver").iterdir()) == []


async def test_a_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, sender: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(incoming: IncomingSnapshot, offset: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IncomingSnapshot, "write", full)
    store = SnapshotStore(tmp_path / "receiver")
    with pytest.raises(DiskFullError) as caught:
        await _receive(store, await _chunks(sender))
    assert caught.value.retry_after_s
    assert list((tmp_path / "receiver").iterdir()) == []


async def test_a_broken_transfer_goes_on_from_where_it_broke(
    receiver: Receiver,
    sender: SnapshotStore,
    counted: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = IncomingSnapshot.write
    breaks = [2, 5]
    size = sender.file(5).stat().st_size

    def write(incoming: IncomingSnapshot, offset: int, data: bytes) -> None:
        if breaks and offset >= breaks[0] * transfer._CHUNK_BYTES:
            breaks.pop(0)
            raise InvalidArgumentError("the connection broke")
        original(incoming, offset, data)

    monkeypatch.setattr(IncomingSnapshot, "write", write)
    assert await send(counted, sender.file(5), receiver.address)
    assert breaks == []
    assert list(receiver.store.read(5)) == CHUNKS
    assert receiver.received == [SnapshotRequest(1, 2, 9, META)]
    resumed = counted.get_sample_value("prism_raft_snapshot_resumed_bytes_total")
    assert resumed == 7 * transfer._CHUNK_BYTES
    sent = counted.get_sample_value("prism_raft_snapshot_sent_bytes_total")
    # No more again than what was under way when it broke.
    assert sent is not None
    assert size <= sent <= size + 2 * 6 * transfer._CHUNK_BYTES


async def test_a_receiver_that_restarted_is_sent_all_of_it(
    receiver: Receiver, sender: SnapshotStore, counted: CollectorRegistry
) -> None:
    chunks = await _chunks(sender)
    with pytest.raises(InvalidArgumentError):
        await _receive(receiver.store, chunks[:3])
    restarted = SnapshotStore(receiver.store.file(5).parent)
    await _receive(restarted, chunks)
    assert list(restarted.read(5)) == CHUNKS


async def test_it_goes_no_faster_than_its_rate(
    receiver: Receiver, sender: SnapshotStore, counted: CollectorRegistry
) -> None:
    size = sender.file(5).stat().st_size
    started = time.monotonic()
    assert await send(counted, sender.file(5), receiver.address, rate_bytes_s=4 * size)
    # Its last chunk is due when all that comes before it has had its time.
    assert time.monotonic() - started >= (size - transfer._CHUNK_BYTES) / (4 * size)


async def test_one_that_never_gets_through_is_given_up(
    receiver: Receiver,
    sender: SnapshotStore,
    counted: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write(incoming: IncomingSnapshot, offset: int, data: bytes) -> None:
        raise InvalidArgumentError("the connection broke")

    monkeypatch.setattr(IncomingSnapshot, "write", write)
    monkeypatch.setattr(transfer, "_PAUSE_MAX_S", 0.02)
    assert not await send(counted, sender.file(5), receiver.address)
    failed = {"result": "failed"}
    assert counted.get_sample_value("prism_raft_snapshot_transfers_total", failed) == 1
