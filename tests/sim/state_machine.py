"""A state machine whose state tells exactly which commands it has applied, in which order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from prism_control.raft.types import Entry


@dataclass(frozen=True)
class State:
    """A chain of hashes over all applied entries; immutable, so that a snapshot is a reference."""

    index: int = 0
    chain: bytes = b""

    def apply(self, entry: Entry) -> State:
        """Return the state after `entry`.

        Raises:
            ValueError: An entry was left out or applied twice.
        """
        if entry.index != self.index + 1:
            raise ValueError(f"entry {entry.index} applied after {self.index}")
        link = b"%s|%d|%d|%d|%s" % (self.chain, entry.index, entry.term, entry.kind, entry.data)
        return State(entry.index, hashlib.blake2b(link, digest_size=16).digest())
