"""Snapshots on the wire: a call of their own, in chunks with CRC, resumed when it breaks."""

import asyncio
import errno
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import google_crc32c
import grpc
import grpc.aio
from prism.raft.v1 import raft_pb2, raft_pb2_grpc

from prism_common import channels
from prism_common.errors import DiskFullError, InvalidArgumentError
from prism_common.status import from_rpc_error
from prism_control.metrics import SnapshotMetrics
from prism_control.raft.types import MemberId, SnapshotMeta, SnapshotRequest
from prism_control.storage.errors import CorruptStoreError
from prism_control.storage.incoming import OutOfOrderError, SnapshotIdentity
from prism_control.storage.snapshots import SnapshotStore
from prism_control.transport import wire

logger = logging.getLogger(__name__)

_CHUNK_BYTES: Final = 256 * 1024
#: A snapshot of 100,000 sandboxes is tens of megabytes; a stalled receiver frees the sender.
_SEND_TIMEOUT_S: Final = 300.0
_OFFSET_TIMEOUT_S: Final = 5.0
#: A transfer that breaks is gone on with so often, after these pauses; then the core hears of it,
#: and the next one may be of a newer snapshot, of which nothing has arrived.
_ATTEMPTS: Final = 6
_PAUSE_S: Final = 0.25
_PAUSE_MAX_S: Final = 4.0
#: Half a gigabit a second: entries and heartbeats to the other members keep their share of the
#: network, and the receiver's disk that of its log.
RATE_BYTES_S: Final = 64 * 2**20
#: Going on would change nothing.
_FINAL: Final = frozenset(
    {"CLUSTER_MISMATCH", "MEMBER_MISMATCH", "VERSION_MISMATCH", "DISK_FULL", "CORRUPT_SNAPSHOT"}
)


@dataclass(frozen=True, slots=True)
class _Transfer:
    """One snapshot file on its way to one member."""

    term: int
    meta: SnapshotMeta
    identity: SnapshotIdentity
    file: BinaryIO
    hello: raft_pb2.Hello
    rate_bytes_s: int
    metrics: SnapshotMetrics


async def send_snapshot(
    term: int,
    meta: SnapshotMeta,
    path: Path,
    hello: raft_pb2.Hello,
    address: str,
    metrics: SnapshotMetrics,
    *,
    rate_bytes_s: int = RATE_BYTES_S,
) -> bool:
    """Send the snapshot file at `path` to `address`; return whether it is on the peer's disk.

    Args:
        term: The leader's.
        meta: What the snapshot stands for.
        path: Its file, which may lose its name meanwhile.
        hello: Who sends it to whom.
        address: host:port of the peer's Raft; empty: unknown.
        metrics: What is counted.
        rate_bytes_s: At most so many bytes a second.
    """
    if not address:
        return False
    try:
        # Opened before anything else: a newer snapshot may remove the file's name meanwhile.
        with path.open("rb") as file:
            size, crc = await asyncio.to_thread(_measure, file)
            identity = SnapshotIdentity(meta.index, meta.term, size, crc)
            transfer = _Transfer(term, meta, identity, file, hello, rate_bytes_s, metrics)
            sent = await _send(transfer, address)
    except OSError as error:
        logger.warning("snapshot %d cannot be read: %s", meta.index, error)
        sent = False
    metrics.transfers.labels("sent" if sent else "failed").inc()
    return sent


async def _send(transfer: _Transfer, address: str) -> bool:
    index, pause_s = transfer.identity.index, _PAUSE_S
    async with channels.open_channel(address) as channel:
        stub = raft_pb2_grpc.RaftServiceStub(channel)
        for attempt in range(_ATTEMPTS):
            if attempt:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_MAX_S)
            try:
                offset = await _arrived(stub, transfer)
                transfer.metrics.resumed_bytes.inc(offset)
                if offset:
                    logger.info("snapshot %d to %s goes on at byte %d", index, address, offset)
                await stub.InstallSnapshot(_chunks(transfer, offset), timeout=_SEND_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                remote = from_rpc_error(error)
                logger.warning("snapshot %d to %s broke: %s", index, address, remote.message)
                if remote.code in _FINAL:
                    return False
            else:
                logger.info("snapshot %d is on the disk of %s", index, address)
                return True
    return False


async def _arrived(stub: "raft_pb2_grpc.RaftServiceAsyncStub", transfer: _Transfer) -> int:
    identity = transfer.identity
    try:
        response = await stub.GetSnapshotOffset(
            raft_pb2.GetSnapshotOffsetRequest(
                hello=transfer.hello,
                index=identity.index,
                term=identity.term,
                size_bytes=identity.size_bytes,
                file_crc32c=identity.crc32c,
            ),
            timeout=_OFFSET_TIMEOUT_S,
        )
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return 0
        raise
    return min(response.offset, identity.size_bytes)


def _measure(file: BinaryIO) -> tuple[int, int]:
    """Return a file's size and CRC-32C."""
    crc = 0
    while data := file.read(_CHUNK_BYTES):
        crc = google_crc32c.extend(crc, data)
    return file.tell(), crc


async def _chunks(
    transfer: _Transfer, offset: int
) -> AsyncIterator[raft_pb2.InstallSnapshotRequest]:
    """Yield the chunks from an offset on, no faster than the rate; one at least."""
    started, begin, first = time.monotonic(), offset, True
    while True:
        data = await asyncio.to_thread(os.pread, transfer.file.fileno(), _CHUNK_BYTES, offset)
        if not data and not first:
            return
        chunk = raft_pb2.InstallSnapshotRequest(
            offset=offset, data=data, crc32c=google_crc32c.value(data)
        )
        if first:
            first = False
            chunk.hello.CopyFrom(transfer.hello)
            chunk.term = transfer.term
            chunk.meta.CopyFrom(wire.encode_snapshot_meta(transfer.meta))
            chunk.size_bytes = transfer.identity.size_bytes
            chunk.file_crc32c = transfer.identity.crc32c
        early_s = (offset - begin) / transfer.rate_bytes_s - (time.monotonic() - started)
        if early_s > 0:
            await asyncio.sleep(early_s)
        yield chunk
        offset += len(data)
        transfer.metrics.sent_bytes.inc(len(data))


async def receive_snapshot(
    requests: AsyncIterator[raft_pb2.InstallSnapshotRequest],
    store: SnapshotStore,
    admit: Callable[[raft_pb2.Hello], MemberId],
    me: MemberId,
) -> SnapshotRequest:
    """Write an arriving snapshot to disk; return what to tell the core.

    What has arrived when the stream breaks is kept, to be gone on with.

    Args:
        requests: The chunks.
        store: Where to write.
        admit: Checks the hello and returns the sender.
        me: This member.

    Raises:
        InvalidArgumentError: A chunk is missing or damaged, or the whole is.
        DiskFullError: There is no room for it.
    """
    first = await anext(requests, None)
    if first is None:
        raise InvalidArgumentError("a snapshot without chunks")
    sender = admit(first.hello)
    meta = wire.decode_snapshot_meta(first.meta)
    identity = SnapshotIdentity(meta.index, meta.term, first.size_bytes, first.file_crc32c)
    incoming = await asyncio.to_thread(store.incoming, identity)
    try:
        await _write_chunk(first, incoming.write)
        async for request in requests:
            await _write_chunk(request, incoming.write)
        await asyncio.to_thread(store.finish, incoming)
    except OutOfOrderError as error:
        raise InvalidArgumentError(f"snapshot {meta.index}: {error}") from None
    except CorruptStoreError as error:
        await asyncio.to_thread(store.drop, incoming)
        raise InvalidArgumentError(str(error), reason="CORRUPT_SNAPSHOT") from None
    except OSError as error:
        await asyncio.to_thread(store.drop, incoming)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(f"no room for snapshot {meta.index}", retry_after_s=5.0) from None
    return SnapshotRequest(sender, me, first.term, meta)


def arrived(request: raft_pb2.GetSnapshotOffsetRequest, store: SnapshotStore) -> int:
    """Return how many bytes of a snapshot have arrived here."""
    return store.arrived(
        SnapshotIdentity(request.index, request.term, request.size_bytes, request.file_crc32c)
    )


async def _write_chunk(
    request: raft_pb2.InstallSnapshotRequest, write: Callable[[int, bytes], None]
) -> None:
    if google_crc32c.value(request.data) != request.crc32c:
        raise InvalidArgumentError(f"snapshot chunk at {request.offset}: damaged on its way")
    await asyncio.to_thread(write, request.offset, request.data)
