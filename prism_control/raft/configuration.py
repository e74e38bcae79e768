"""The configurations that the log contains, and the one in force.

A member uses the latest configuration in its log *from the moment it is appended*, committed
or not (§6, thesis 4.1), as the paper has it and unlike etcd, which waits until it is applied.
Joint consensus is proven for this rule; a leader need not wait for its followers' state
machines before a change takes hold; and what is in force depends on the log alone, so a
restart finds it again by reading the log. The price is that truncating the log may take a
configuration away again, for which this history exists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prism_control.raft import entry_codec
from prism_control.raft.types import NOBODY, Entry, EntryKind, HardState

#: Members of a cluster; whoever changes its configuration refuses more.
VOTERS_MAX: Final = 9

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prism_control.raft.types import Configuration, SnapshotMeta


def bootstrap(configuration: Configuration) -> tuple[HardState, Entry]:
    """Return what each first member of a new cluster writes to its empty disk.

    It is as if a leader of term 1 had committed `configuration` at index 1, so a member
    that joins later gets it like any other entry. All first members must write the same.
    """
    data = entry_codec.encode_configuration(configuration)
    return HardState(term=1, vote=NOBODY, commit=1), Entry(1, 1, EntryKind.CONFIGURATION, data)


class ConfigurationHistory:
    """Configurations by the index from which they are in force, ascending, never empty."""

    __slots__ = ("_history", "current")

    def __init__(self, snapshot: SnapshotMeta) -> None:
        #: Ascending indexes; the first covers everything before the second.
        self._history: list[tuple[int, Configuration]] = [(snapshot.index, snapshot.configuration)]
        #: The last of the history: what is in force.
        self.current: Configuration = snapshot.configuration

    def append(self, entries: Iterable[Entry]) -> None:
        """Take note of the configurations among entries that were appended to the log.

        Raises:
            CorruptEntryError: A CONFIGURATION entry holds none.
        """
        for entry in entries:
            if entry.kind is EntryKind.CONFIGURATION:
                self.current = entry_codec.decode_configuration(entry)
                self._history.append((entry.index, self.current))

    def truncate(self, index: int) -> None:
        """Forget what came from entries at `index` and after; the one before is back in force."""
        while len(self._history) > 1 and self._history[-1][0] >= index:
            self._history.pop()
        self.current = self._history[-1][1]

    def compact(self, index: int) -> None:
        """Forget what can be neither in force at `index` or after, nor come back by truncation."""
        while len(self._history) > 1 and self._history[1][0] <= index:
            self._history.pop(0)

    @property
    def current_index(self) -> int:
        """Index of the entry that holds `current`, or of the snapshot that does."""
        return self._history[-1][0]

    def since(self, index: int) -> list[Configuration]:
        """Return what was in force at `index`, and all that came into force later."""
        return [self.at(index), *(c for i, c in self._history if i > index)]

    def at(self, index: int) -> Configuration:
        """Return what was in force at `index`, which must not be compacted away."""
        return next(c for i, c in reversed(self._history) if i <= index)
