"""Snapshots as files: written beside, synced, renamed; every chunk with its CRC-32C.

Layout: `magic (8)`, then records `length u32 | crc32c u32 | bytes`, and a last record of length 0
whose CRC field is the number of records. A torn or truncated file is thus recognised.
"""

import itertools
import os
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

import google_crc32c

from prism_control.storage.directory import sync_directory
from prism_control.storage.errors import CorruptStoreError
from prism_control.storage.incoming import IncomingSnapshot, SnapshotIdentity

_MAGIC: Final = b"PRISMSN1"
_RECORD: Final = struct.Struct("<II")
#: A record is one chunk of the state machine's encoding; it makes them far smaller than this.
_RECORD_BYTES_MAX: Final = 64 * 2**20


class SnapshotStore:
    """The snapshots of one member."""

    def __init__(self, path: Path) -> None:
        self._path = path
        #: Two may be written at once, also of one index: one of our own and one that arrives.
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        #: What arrives, or arrived in part before its transfer broke.
        self._incoming: IncomingSnapshot | None = None
        path.mkdir(mode=0o700, exist_ok=True)
        for leftover in path.glob("*.partial"):
            leftover.unlink()

    def file(self, index: int) -> Path:
        """Return the file of the snapshot that ends at `index`."""
        return self._path / f"{index:020d}.snapshot"

    def write(self, index: int, chunks: Iterable[bytes]) -> int:
        """Write a snapshot durably; return its size in bytes. Runs outside the loop."""
        partial = self._partial(index)
        try:
            with partial.open("wb") as file:
                size = _write_records(file, chunks)
            self._publish(partial, index)
        finally:
            # After a failure it would only take room, of which there may be none.
            partial.unlink(missing_ok=True)
        return size

    def incoming(self, identity: SnapshotIdentity) -> IncomingSnapshot:
        """Return where a snapshot from another member is received, with what has arrived of it.

        There is one at a time: another snapshot takes the place of one that was not completed.
        """
        with self._lock:
            incoming = self._incoming
            if incoming is None or incoming.identity != identity:
                self._forget_incoming()
                partial = self._partial(identity.index)
                incoming = IncomingSnapshot(
                    identity, partial, lambda path: self._take_in(path, identity.index)
                )
                self._incoming = incoming
            return incoming

    def arrived(self, identity: SnapshotIdentity) -> int:
        """Return how many bytes of a snapshot have arrived."""
        incoming = self._incoming
        return incoming.offset if incoming is not None and incoming.identity == identity else 0

    def finish(self, incoming: IncomingSnapshot) -> None:
        """Make a snapshot that has arrived this member's own; as `IncomingSnapshot.finish`."""
        incoming.finish()
        with self._lock:
            if self._incoming is incoming:
                self._incoming = None

    def drop(self, incoming: IncomingSnapshot) -> None:
        """Forget what has arrived of a snapshot."""
        with self._lock:
            if self._incoming is incoming:
                self._forget_incoming()

    def _forget_incoming(self) -> None:
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            incoming.abort()

    def _take_in(self, partial: Path, index: int) -> None:
        with partial.open("rb") as file:
            for _ in read_records(file, partial.name):
                pass
        self._publish(partial, index)

    def prune(self, in_force: int, *, newer: bool = False) -> None:
        """Remove what the snapshot that the log now follows from makes useless.

        A newer one may have arrived and wait for the core to take it; only at start, with `newer`,
        is it known that nobody will.
        """
        for path in self._path.glob("*.snapshot"):
            index = int(path.stem)
            if index < in_force or (newer and index > in_force):
                path.unlink(missing_ok=True)

    def read(self, index: int) -> Iterator[bytes]:
        """Yield the chunks of the snapshot that ends at `index`.

        Raises:
            CorruptStoreError: It is missing, torn, or not as it was written.
        """
        path = self.file(index)
        try:
            file = path.open("rb")
        except OSError as error:
            raise CorruptStoreError(f"snapshot {path.name}: {error.strerror}") from None
        with file:
            yield from read_records(file, path.name)

    def _partial(self, index: int) -> Path:
        return self._path / f"{index:020d}-{next(self._numbers)}.partial"

    def _publish(self, partial: Path, index: int) -> None:
        partial.rename(self.file(index))
        sync_directory(self._path)


def encode_records(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a snapshot file's bytes, a record at a time. A backup is such a file."""
    yield _MAGIC
    count = 0
    for chunk in filter(None, chunks):
        yield _RECORD.pack(len(chunk), google_crc32c.value(chunk)) + chunk
        count += 1
    yield _RECORD.pack(0, count)


def _write_records(file: BinaryIO, chunks: Iterable[bytes]) -> int:
    for record in encode_records(chunks):
        file.write(record)
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


def read_records(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield the chunks of a snapshot file or a backup.

    Raises:
        CorruptStoreError: It is torn, or not as it was written.
    """
    if file.read(len(_MAGIC)) != _MAGIC:
        raise CorruptStoreError(f"snapshot {name}: not a snapshot")
    count = 0
    while True:
        header = file.read(_RECORD.size)
        if len(header) < _RECORD.size:
            raise CorruptStoreError(f"snapshot {name}: ends early, after record {count}")
        length, crc = _RECORD.unpack(header)
        if length == 0:
            if crc != count or file.read(1):
                raise CorruptStoreError(f"snapshot {name}: {count} records of {crc}")
            return
        if length > _RECORD_BYTES_MAX:
            raise CorruptStoreError(f"snapshot {name}: record {count} has {length} bytes")
        data = file.read(length)
        if len(data) < length or google_crc32c.value(data) != crc:
            raise CorruptStoreError(f"snapshot {name}: record {count} is corrupt")
        count += 1
        yield data
