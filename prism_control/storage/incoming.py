"""A snapshot that arrives from another member: kept when its transfer breaks, and gone on with."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from prism_control.storage.errors import CorruptStoreError


@dataclass(frozen=True, slots=True)
class SnapshotIdentity:
    """Which bytes a snapshot file has. Members may encode one state in different ways.

    Attributes:
        index: The last entry that it covers.
        term: Of that entry.
        size_bytes: Of the file.
        crc32c: Of the file.
    """

    index: int
    term: int
    size_bytes: int
    crc32c: int


class OutOfOrderError(Exception):
    """Bytes that do not follow those that are there: some were lost, or two streams send."""


class IncomingSnapshot:
    """The file of a snapshot while it arrives. Any thread may write; each write says where it goes.

    Args:
        identity: What arrives.
        partial: Where it is kept meanwhile.
        publish: Makes the complete file the snapshot of its index; checks its records.
    """

    def __init__(
        self, identity: SnapshotIdentity, partial: Path, publish: Callable[[Path], None]
    ) -> None:
        self.identity = identity
        self._partial = partial
        self._publish = publish
        self._lock = threading.Lock()
        self._offset = 0
        self._crc = 0
        self._awaited = True
        partial.touch(mode=0o600)

    @property
    def offset(self) -> int:
        """Bytes that have arrived."""
        return self._offset

    def write(self, offset: int, data: bytes) -> None:
        """Append bytes. At offset 0 the sender begins anew, whatever is there.

        Raises:
            OutOfOrderError: They do not follow, or the snapshot is not awaited any more.
            CorruptStoreError: They are more than was announced.
            OSError: They cannot be written.
        """
        with self._lock:
            if self._awaited and offset == 0:
                self._offset = self._crc = 0
            if not self._awaited or offset != self._offset:
                raise OutOfOrderError(f"bytes at {offset}, where {self._offset} have arrived")
            if offset + len(data) > self.identity.size_bytes:
                raise CorruptStoreError(
                    f"snapshot {self.identity.index}: more than {self.identity.size_bytes} bytes"
                )
            # Opened anew, so that a transfer that never goes on holds no descriptor.
            with self._partial.open("ab" if offset else "wb") as file:
                file.write(data)
            self._offset += len(data)
            self._crc = google_crc32c.extend(self._crc, data)

    def finish(self) -> None:
        """Check the whole, make it durable, and give it its name.

        Raises:
            OutOfOrderError: It is not complete.
            CorruptStoreError: What arrived is not what was announced, or no whole snapshot.
        """
        identity = self.identity
        with self._lock:
            if not self._awaited or self._offset != identity.size_bytes:
                raise OutOfOrderError(f"{self._offset} bytes of {identity.size_bytes} arrived")
            # 0: the sender is of a version that announces none; the records have theirs.
            if identity.crc32c and self._crc != identity.crc32c:
                raise CorruptStoreError(f"snapshot {identity.index}: is not as it was announced")
            with self._partial.open("rb") as file:
                os.fsync(file.fileno())
            self._awaited = False
            self._publish(self._partial)

    def abort(self) -> None:
        """Forget what has arrived."""
        with self._lock:
            self._awaited = False
            self._partial.unlink(missing_ok=True)
