"""A member's disk: what is on it when a write has returned, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prism_control.raft.types import Entry, HardState, SnapshotMeta
from prism_control.storage.errors import CorruptStoreError


class MemoryLog:
    """Stands in for `storage.log.LogStore`."""

    def __init__(self, hard_state: HardState, entries: Sequence[Entry]) -> None:
        self.hard_state = hard_state
        self.snapshot = SnapshotMeta()
        self.entries = {entry.index: entry for entry in entries}

    def persist(
        self, hard_state: HardState | None, snapshot: SnapshotMeta | None, entries: Sequence[Entry]
    ) -> None:
        """Write one turn's changes."""
        if snapshot is not None:
            self.snapshot = snapshot
            self.entries.clear()
        if entries:
            first = entries[0].index
            self.entries = {index: e for index, e in self.entries.items() if index < first}
            self.entries |= {entry.index: entry for entry in entries}
        if hard_state is not None:
            self.hard_state = hard_state

    def compact(self, snapshot: SnapshotMeta, first_kept: int) -> None:
        """Record a snapshot, and drop the entries before `first_kept`."""
        self.snapshot = snapshot
        self.entries = {index: e for index, e in self.entries.items() if index >= first_kept}

    def in_order(self) -> list[Entry]:
        """Return all entries."""
        return [self.entries[index] for index in sorted(self.entries)]


class MemorySnapshots:
    """Stands in for `storage.snapshots.SnapshotStore`."""

    def __init__(self) -> None:
        self.files: dict[int, list[bytes]] = {}

    def write(self, index: int, chunks: Iterable[bytes]) -> int:
        """Write a snapshot; return its size in bytes."""
        self.files[index] = list(chunks)
        return sum(map(len, self.files[index]))

    def read(self, index: int) -> Iterator[bytes]:
        """Return the chunks of a snapshot."""
        if index not in self.files:
            raise CorruptStoreError(f"snapshot {index} is missing")
        return iter(self.files[index])

    def prune(self, in_force: int, *, newer: bool = False) -> None:
        """Remove what is useless."""
        for index in list(self.files):
            if index < in_force or (newer and index > in_force):
                del self.files[index]
