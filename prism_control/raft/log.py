"""The log in memory: what follows the last compaction (§5.3, §7).

`Log` knows entries and terms, and which of them are on this member's disk. It does not
know about commitment, except that the core never asks it to cut below the commit index.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from prism_control.raft.entry_codec import HEADER_BYTES
from prism_control.raft.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prism_control.raft.types import Entry


def _term(entry: Entry) -> int:
    return entry.term


class Log:
    """Entries `base_index + 1 ..= last_index`, and the index and term just before them."""

    __slots__ = ("_entries", "base_index", "base_term", "last_index", "last_term", "persisted")

    def __init__(self, base_index: int, base_term: int, entries: Sequence[Entry]) -> None:
        """Start with what the disk holds.

        Args:
            base_index: Index of the last entry that is compacted away, or 0.
            base_term: Its term.
            entries: All after it, all durable.

        Raises:
            InvariantError: The entries are not contiguous, or their terms go down.
        """
        self._entries: list[Entry] = []
        #: Index and term of the entry before the first one held; compaction moves them up.
        self.base_index = base_index
        self.base_term = base_term
        #: Index and term of the last entry, or the base if there is none.
        self.last_index = base_index
        self.last_term = base_term
        self.append(entries)
        #: Everything up to here is on this member's disk; base_index <= persisted <= last_index.
        self.persisted = self.last_index

    def append(self, entries: Sequence[Entry]) -> None:
        """Add `entries` after the last one; they are not persisted yet.

        Raises:
            InvariantError: They do not follow, or their terms go down.
        """
        for entry in entries:
            if entry.index != self.last_index + 1 or entry.term < self.last_term:
                raise InvariantError(
                    f"entry {entry.index} of term {entry.term} cannot follow entry "
                    f"{self.last_index} of term {self.last_term}"
                )
            self._entries.append(entry)
            self.last_index = entry.index
            self.last_term = entry.term

    def truncate(self, index: int) -> None:
        """Remove the entry at `index`, which must exist, and all after it."""
        position = index - self.base_index - 1
        if not 0 <= position < len(self._entries):
            raise InvariantError(
                f"cannot cut at {index}: holding {self.base_index + 1}..{self.last_index}"
            )
        del self._entries[position:]
        self.last_index = index - 1
        self.last_term = self._entries[-1].term if self._entries else self.base_term
        self.persisted = min(self.persisted, self.last_index)

    def reset(self, index: int, term: int) -> None:
        """Drop everything: a snapshot up to `index` takes the place of the log."""
        self._entries.clear()
        self.base_index = self.last_index = self.persisted = index
        self.base_term = self.last_term = term

    def compact(self, index: int) -> None:
        """Drop entries up to and including `index`, which must be persisted."""
        if index <= self.base_index:
            return
        if index > self.persisted:
            raise InvariantError(f"cannot compact to {index}: persisted is {self.persisted}")
        position = index - self.base_index
        self.base_term = self._entries[position - 1].term
        self.base_index = index
        del self._entries[:position]

    def persisted_to(self, index: int) -> None:
        """Take note that everything up to `index` is on disk."""
        if not self.persisted <= index <= self.last_index:
            raise InvariantError(
                f"persisted cannot go from {self.persisted} to {index}; last is {self.last_index}"
            )
        self.persisted = index

    def term_at(self, index: int) -> int | None:
        """Return the term of the entry at `index`, or None if it is compacted or absent."""
        position = index - self.base_index
        if position == 0:
            return self.base_term
        if position < 0 or index > self.last_index:
            return None
        return self._entries[position - 1].term

    def first_conflict(self, entries: Sequence[Entry]) -> int:
        """Return how many of `entries`, which follow one that matches, are here already.

        An entry here with the same index and term is the same (Log Matching, §5.3).
        """
        held = self._entries
        position = entries[0].index - self.base_index - 1 if entries else 0
        for count, entry in enumerate(entries):
            if position + count >= len(held) or held[position + count].term != entry.term:
                return count
        return len(entries)

    def is_up_to_date(self, last_index: int, last_term: int) -> bool:
        """Whether a log that ends so is at least as up to date as this one (§5.4.1)."""
        return (last_term, last_index) >= (self.last_term, self.last_index)

    def last_index_of_term(self, index: int, term: int) -> int:
        """Return the greatest index <= `index` whose entry has at most `term`.

        Both sides use it to skip a whole conflicting term in one round trip (end of
        §5.3): the logs cannot agree at an index where one's term is past the other's.
        Below the base nothing is known, so there it returns what may still agree.
        """
        end = min(index, self.last_index) - self.base_index
        if end < 0:
            return index
        position = bisect_right(self._entries, term, 0, end, key=_term)
        if position == 0 and self.base_term > term:
            return self.base_index - 1
        return self.base_index + position

    def slice(self, first: int, last: int) -> tuple[Entry, ...]:
        """Return the entries `first ..= last`, all of which must be here."""
        if first > last:
            return ()
        if first <= self.base_index or last > self.last_index:
            raise InvariantError(
                f"no entries {first}..{last}: holding {self.base_index + 1}..{self.last_index}"
            )
        return tuple(self._entries[first - self.base_index - 1 : last - self.base_index])

    def bounded_slice(self, first: int, last: int, bytes_max: int) -> tuple[tuple[Entry, ...], int]:
        """Return a prefix of `first ..= last` of at most `bytes_max`, but one entry at least.

        Returns:
            The entries, and their size in bytes when encoded.
        """
        size_bytes = 0
        position = first - self.base_index - 1
        for index in range(first, last + 1):
            entry_bytes = HEADER_BYTES + len(self._entries[position].data)
            if size_bytes and size_bytes + entry_bytes > bytes_max:
                return self.slice(first, index - 1), size_bytes
            size_bytes += entry_bytes
            position += 1
        return self.slice(first, last), size_bytes
