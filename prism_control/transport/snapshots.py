"""Snapshots on the wire: a call of their own, in chunks with CRC, so that nothing waits behind."""

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO, Final

import google_crc32c
import grpc
import grpc.aio
from prism.raft.v1 import raft_pb2, raft_pb2_grpc

from prism_common import channels
from prism_common.errors import DiskFullError, InvalidArgumentError
from prism_control.raft.types import MemberId, SnapshotMeta, SnapshotRequest
from prism_control.storage.snapshots import SnapshotStore
from prism_control.transport import wire

logger = logging.getLogger(__name__)

_CHUNK_BYTES: Final = 256 * 1024
#: A snapshot of 100,000 sandboxes is tens of megabytes; a stalled receiver frees the sender.
_SEND_TIMEOUT_S: Final = 300.0


async def send_snapshot(
    term: int,
    meta: SnapshotMeta,
    path: Path,
    hello: raft_pb2.Hello,
    address: str,
) -> bool:
    """Send the snapshot file at `path` to `address`; return whether it is on the peer's disk."""
    if not address:
        return False
    try:
        # Opened before anything else: a newer snapshot may remove the file's name meanwhile.
        with path.open("rb") as file:
            async with channels.open_channel(address) as channel:
                stub = raft_pb2_grpc.RaftServiceStub(channel)
                chunks = _chunks(term, meta, file, hello)
                await stub.InstallSnapshot(chunks, timeout=_SEND_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        logger.warning("snapshot %d to %s failed: %s", meta.index, address, error.details())
        return False
    except OSError as error:
        logger.warning("snapshot %d cannot be read: %s", meta.index, error)
        return False
    logger.info("snapshot %d is on the disk of %s", meta.index, address)
    return True


async def _chunks(
    term: int, meta: SnapshotMeta, file: BinaryIO, hello: raft_pb2.Hello
) -> AsyncIterator[raft_pb2.InstallSnapshotRequest]:
    size = os.fstat(file.fileno()).st_size
    offset = 0
    while data := await asyncio.to_thread(file.read, _CHUNK_BYTES):
        chunk = raft_pb2.InstallSnapshotRequest(
            offset=offset, data=data, crc32c=google_crc32c.value(data)
        )
        if offset == 0:
            chunk.hello.CopyFrom(hello)
            chunk.term = term
            chunk.meta.CopyFrom(wire.encode_snapshot_meta(meta))
            chunk.size_bytes = size
        yield chunk
        offset += len(data)


async def receive_snapshot(
    requests: AsyncIterator[raft_pb2.InstallSnapshotRequest],
    store: SnapshotStore,
    admit: Callable[[raft_pb2.Hello], MemberId],
    me: MemberId,
) -> SnapshotRequest:
    """Write an arriving snapshot to disk; return what to tell the core.

    Args:
        requests: The chunks.
        store: Where to write.
        admit: Checks the hello and returns the sender.
        me: This member.

    Raises:
        InvalidArgumentError: A chunk is missing or damaged.
        DiskFullError: There is no room for it.
    """
    first = await anext(requests, None)
    if first is None:
        raise InvalidArgumentError("a snapshot without chunks")
    sender = admit(first.hello)
    meta = wire.decode_snapshot_meta(first.meta)
    incoming = await asyncio.to_thread(store.receive, meta.index)
    finished = False
    try:
        await _write_chunk(incoming.offset, first, incoming.write)
        async for request in requests:
            await _write_chunk(incoming.offset, request, incoming.write)
        if incoming.offset != first.size_bytes:
            raise InvalidArgumentError(
                f"snapshot {meta.index}: {incoming.offset} bytes of {first.size_bytes} arrived"
            )
        await asyncio.to_thread(incoming.finish)
        finished = True
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(f"no room for snapshot {meta.index}", retry_after_s=5.0) from None
    finally:
        if not finished:
            incoming.abort()
    return SnapshotRequest(sender, me, first.term, meta)


async def _write_chunk(
    offset: int, request: raft_pb2.InstallSnapshotRequest, write: Callable[[bytes], None]
) -> None:
    if request.offset != offset or google_crc32c.value(request.data) != request.crc32c:
        raise InvalidArgumentError(f"snapshot chunk at {request.offset}: damaged or out of order")
    await asyncio.to_thread(write, request.data)
