"""A disk whose written and synced images differ, until a sync or a crash.

A transaction is atomic, as LMDB's is. Those that were written and not synced are in a queue;
a crash applies a random prefix of it, since the kernel may or may not have got that far.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from prism_control.raft import entry_codec
from prism_control.raft.types import Entry, HardState, SnapshotMeta
from tests.sim.state_machine import Frozen


class DiskError(Exception):
    """The driver has written something that cannot be."""


@dataclass(frozen=True)
class Snapshot:
    """A snapshot and what it contains."""

    meta: SnapshotMeta
    state: Frozen


@dataclass(frozen=True)
class Transaction:
    """One atomic write. Order of effects: snapshot replaces all, entries, compaction."""

    hard_state: HardState | None = None
    #: A received snapshot: replaces the log.
    received: Snapshot | None = None
    entries: tuple[Entry, ...] = ()
    #: A snapshot of its own: leaves the log.
    taken: Snapshot | None = None
    compact_index: int = 0


@dataclass
class Image:
    """What a reader of the disk would find."""

    hard_state: HardState
    snapshot: Snapshot
    first_index: int
    encoded: list[bytes] = field(default_factory=list)
    #: Terms of `encoded`, for the invariants.
    terms: list[int] = field(default_factory=list)

    @property
    def last_index(self) -> int:
        return self.first_index + len(self.encoded) - 1

    def term_at(self, index: int) -> int | None:
        if self.first_index <= index <= self.last_index:
            return self.terms[index - self.first_index]
        return None

    def holds(self, index: int, term: int) -> bool:
        """Whether the entry is there, by itself or in the snapshot."""
        return index <= self.snapshot.meta.index or self.term_at(index) == term

    def apply(self, transaction: Transaction) -> None:
        if transaction.hard_state is not None:
            self.hard_state = transaction.hard_state
        if transaction.received is not None:
            self.snapshot = transaction.received
            self.first_index = transaction.received.meta.index + 1
            self.encoded.clear()
            self.terms.clear()
        if transaction.entries:
            keep = transaction.entries[0].index - self.first_index
            if not 0 <= keep <= len(self.encoded):
                raise DiskError(f"entries from {transaction.entries[0].index} leave a gap")
            del self.encoded[keep:]
            del self.terms[keep:]
            self.encoded.extend(map(entry_codec.encode, transaction.entries))
            self.terms.extend(entry.term for entry in transaction.entries)
        taken = transaction.taken
        if taken is not None and taken.meta.index > self.snapshot.meta.index:
            self.snapshot = taken
        dropped = min(transaction.compact_index, self.snapshot.meta.index) - self.first_index + 1
        if dropped > 0:
            del self.encoded[:dropped]
            del self.terms[:dropped]
            self.first_index += dropped


class Disk:
    """The disk of one member; survives its crashes."""

    def __init__(self, hard_state: HardState, entries: tuple[Entry, ...], state: Frozen) -> None:
        snapshot = Snapshot(SnapshotMeta(), state)
        self.synced = Image(hard_state, snapshot, first_index=1)
        self.synced.apply(Transaction(entries=entries))
        self._written: list[Transaction] = []
        #: Until then a write takes for ever, or finds no room.
        self.stalled_until_us = 0
        self.full_until_us = 0
        #: The next sync fails (EIO); what is on the disk is then unknown.
        self.fails_next = False

    def write(self, transaction: Transaction) -> None:
        """Queue a transaction; durable after `sync`, perhaps after a crash."""
        self._written.append(transaction)

    def sync(self, transaction: Transaction) -> None:
        """Make `transaction` durable, and all that was written before it.

        It may be durable already, if something later was synced.
        """
        if not any(written is transaction for written in self._written):
            return
        while True:
            first = self._written.pop(0)
            self.synced.apply(first)
            if first is transaction:
                return

    def flip_bit(self, random: Random) -> int:
        """Damage one entry; return its position."""
        position = random.randrange(len(self.synced.encoded))
        damaged = bytearray(self.synced.encoded[position])
        damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
        self.synced.encoded[position] = bytes(damaged)
        return position

    def crash(self, random: Random) -> int:
        """Lose what the kernel had not got to; return how many transactions survive."""
        kept = random.randrange(len(self._written) + 1)
        for transaction in self._written[:kept]:
            self.synced.apply(transaction)
        self._written.clear()
        return kept

    def read_entries(self) -> list[Entry]:
        """Return all entries, decoded and with their CRCs verified."""
        return [entry_codec.decode(encoded) for encoded in self.synced.encoded]
