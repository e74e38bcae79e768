"""Snapshots of the state machine, and the log that they make superfluous."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from prism_control.node.disk import Disk
from prism_control.raft.configuration import VOTERS_MAX
from prism_control.raft.core import Core
from prism_control.raft.types import MemberId, SnapshotMeta
from prism_control.storage.errors import DiskFullError
from prism_control.storage.log import LogStore
from prism_control.storage.snapshots import SnapshotStore

logger = logging.getLogger(__name__)

#: Applying so many takes seconds, and a restart does it.
SNAPSHOT_ENTRIES: Final = 10_000
TRAILING_ENTRIES: Final = 2000
#: After a snapshot that could not be written, most likely for want of room.
_RETRY_S: Final = 10.0
#: Encoding holds the interpreter's lock, and the loop, once it has let go of it in some call of the
#: system, gets it back after 5 ms. So after so many bytes, which take about a millisecond, encoding
#: pauses for six: 100,000 sandboxes take most of a second, and the loop goes on.
_PACE_BYTES: Final = 256 * 1024
_PACE_S: Final = 0.006
#: Members apply the same entries, and would all encode at the same moment: each takes its snapshots
#: when this share less has come than its neighbour takes them at.
_STAGGER: Final = 0.1
_SHARE_MIN: Final = 1 - (VOTERS_MAX - 1) * _STAGGER


class Snapshotted(Protocol):
    """A state machine, as far as snapshots go."""

    def snapshot(self) -> Callable[[], Iterable[bytes]]:
        """Return at once a frozen view; calling it, in any thread, encodes it."""

    def restore(self, chunks: Iterable[bytes]) -> Callable[[], None]:
        """Read a snapshot, in any thread; calling what comes back, on the loop, becomes it."""


@dataclass(frozen=True, slots=True)
class SnapshotPolicy:
    """When a snapshot is due, and how much of the log is kept behind it.

    Attributes:
        entries: Applied since the last one.
        size_bytes: Of entries; the log in memory is bounded by this and the margin, and takes
            about three times as much there.
        trailing_entries: So that a follower that was away briefly needs no snapshot.
        trailing_bytes: The same margin, for entries that are large.
    """

    entries: int = SNAPSHOT_ENTRIES
    size_bytes: int = 16 * 2**20
    trailing_entries: int = TRAILING_ENTRIES
    trailing_bytes: int = 6 * 2**20


class Compaction:
    """Takes snapshots beside the driver's loop, and compacts the log behind them.

    Args:
        core: The driver's.
        store: Its log on disk.
        snapshots: Its snapshots on disk.
        machine: What is snapshotted.
        disk: The one thread that writes the log.
        wake: Called when the driver should take a turn.
        policy: When, and how much is kept.
    """

    def __init__(
        self,
        core: Core,
        store: LogStore,
        snapshots: SnapshotStore,
        machine: Snapshotted,
        disk: Disk,
        wake: Callable[[], None],
        policy: SnapshotPolicy,
    ) -> None:
        self._core = core
        self._store = store
        self._snapshots = snapshots
        self._machine = machine
        self._disk = disk
        self._wake = wake
        self._policy = policy
        self._bytes_since = 0
        self._writing = False
        self._retry_at = 0.0
        #: Written, and not yet made known to the core.
        self._written: list[SnapshotMeta] = []
        #: Size of the last one written.
        self.snapshot_bytes = 0

    def applied(self, size_bytes: int) -> None:
        """Count an entry that was applied."""
        self._bytes_since += size_bytes

    async def install(self, meta: SnapshotMeta) -> None:
        """Load a snapshot of another member, which the log on disk follows from already.

        Raises:
            CorruptStoreError, SnapshotError: It cannot be read; the member must stop.
        """
        logger.info("installing snapshot %d of another member", meta.index)
        chunks = self._snapshots.read(meta.index)
        become = await asyncio.to_thread(self._machine.restore, chunks)
        become()
        self._core.applied(meta.index)
        self._bytes_since = 0
        self._snapshots.prune(meta.index)

    async def turn(self, tasks: asyncio.TaskGroup) -> None:
        """Compact behind what was written, and begin another snapshot if one is due."""
        written, self._written = self._written, []
        for meta in written:
            if meta.index > self._core.snapshot.index:
                await self._compact(meta)
        if self._is_due():
            meta = self._core.snapshot_meta(self._core.applied_index)
            self._writing = True
            self._bytes_since = 0
            tasks.create_task(self._write(meta, self._machine.snapshot()))

    def _is_due(self) -> bool:
        policy = self._policy
        entries = self._core.applied_index - self._core.snapshot.index
        if entries < policy.entries * _SHARE_MIN and (
            self._bytes_since < policy.size_bytes * _SHARE_MIN
        ):
            return False  # as in nearly every turn
        if self._writing or time.monotonic() < self._retry_at:
            return False
        share = share_of(self._core.config.id, self._core.configuration.voters)
        # Another's may have been installed at the very index that is applied.
        full = self._bytes_since >= policy.size_bytes * share and entries > 0
        return full or entries >= policy.entries * share

    async def _write(self, meta: SnapshotMeta, encode: Callable[[], Iterable[bytes]]) -> None:
        started = time.perf_counter()
        try:
            self.snapshot_bytes = await asyncio.to_thread(
                lambda: self._snapshots.write(meta.index, paced(encode()))
            )
        except OSError as error:
            logger.error("snapshot %d could not be written: %s", meta.index, error)
            self._retry_at = time.monotonic() + _RETRY_S
            return
        finally:
            self._writing = False
        took_s = time.perf_counter() - started
        logger.info("snapshot %d: %d bytes in %.2f s", meta.index, self.snapshot_bytes, took_s)
        self._written.append(meta)
        self._wake()

    async def _compact(self, meta: SnapshotMeta) -> None:
        first_kept = self._first_kept(meta.index)
        try:
            await self._disk.run(self._store.compact, meta, first_kept)
        except DiskFullError as error:
            logger.error("the log could not be compacted to %d: %s", meta.index, error)
            self._retry_at = time.monotonic() + _RETRY_S
            return
        self._core.snapshot_saved(meta)
        self._core.compact(first_kept - 1)
        self._snapshots.prune(meta.index)

    def _first_kept(self, index: int) -> int:
        """Return where the margin behind a snapshot begins."""
        first = max(index - self._policy.trailing_entries, self._core.log.base_index) + 1
        size = 0
        for entry in reversed(self._core.log.slice(first, index)):
            size += len(entry.data)
            if size > self._policy.trailing_bytes:
                return entry.index + 1
        return first


def share_of(me: MemberId, voters: Iterable[MemberId]) -> float:
    """Return which share of the policy's bounds a member has: each voter another."""
    ordered = sorted(voters)
    return 1 - _STAGGER * (ordered.index(me) if me in ordered else 0)


def paced(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield chunks, in a thread of their own, and let the loop's thread have its turns between."""
    size = 0
    for chunk in chunks:
        yield chunk
        size += len(chunk)
        if size >= _PACE_BYTES:
            size = 0
            time.sleep(_PACE_S)
