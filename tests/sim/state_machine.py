"""State machines whose state tells exactly which commands they have applied, in which order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Protocol

from prism_control.raft.types import Entry, EntryKind
from prism_control.state.machine import Machine
from prism_control.state.snapshot import encode_snapshot

REGISTERS = 2


class Frozen(Protocol):
    """A state that does not change: what is in a snapshot."""

    def thaw(self) -> State:
        """Return a state that goes on from here."""


class State(Protocol):
    """What a member has applied."""

    @property
    def index(self) -> int:
        """Index of the last applied entry."""

    def apply(self, entry: Entry) -> tuple[State, object]:
        """Return the state after `entry`, and the answer to whoever proposed it."""

    def freeze(self) -> Frozen:
        """Return what a snapshot would hold."""

    def digest(self, thorough: bool = False) -> str:
        """Return what must be equal at the same index; empty: too costly to tell now."""

    def register(self, key: int) -> int:
        """Return the value of a register; 0 before it is written."""


@dataclass(frozen=True)
class Chain:
    """A chain of hashes over all entries, and registers; immutable, so a snapshot is a reference.

    Commands: `set <key> <value>`, `cas <key> <old> <new>`; anything else only fills the log.
    """

    index: int = 0
    chain: bytes = b""
    registers: tuple[int, ...] = (0,) * REGISTERS

    def apply(self, entry: Entry) -> tuple[Chain, object]:
        """Return the state after `entry`.

        Raises:
            ValueError: An entry was left out or applied twice.
        """
        if entry.index != self.index + 1:
            raise ValueError(f"entry {entry.index} applied after {self.index}")
        link = b"%s|%d|%d|%d|%s" % (self.chain, entry.index, entry.term, entry.kind, entry.data)
        chain = hashlib.blake2b(link, digest_size=16).digest()
        registers, answer = self.registers, None
        if entry.kind is EntryKind.NORMAL and entry.data[:4] in (b"set ", b"cas "):
            registers, answer = self._write(entry.data)
        return Chain(entry.index, chain, registers), answer

    def _write(self, data: bytes) -> tuple[tuple[int, ...], object]:
        verb, *numbers = data.split()
        key, *values = map(int, numbers)
        if verb == b"cas" and self.registers[key] != values[0]:
            return self.registers, False
        registers = list(self.registers)
        registers[key] = values[-1]
        return tuple(registers), True

    def freeze(self) -> Chain:
        return self

    def thaw(self) -> Chain:
        return replace(self)

    def digest(self, thorough: bool = False) -> str:
        return self.chain.hex()

    def register(self, key: int) -> int:
        return self.registers[key]


@dataclass(frozen=True)
class FrozenPrism:
    """An encoded snapshot of Prism's state machine."""

    index: int = 0
    encoded: tuple[bytes, ...] = ()

    def thaw(self) -> Prism:
        machine = Machine.from_snapshot(self.encoded) if self.encoded else Machine()
        machine.applied_index = self.index
        return Prism(machine)


class Prism:
    """Prism's own state machine. Digests are costly, so only some indexes have one."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    @property
    def index(self) -> int:
        return self._machine.applied_index

    def apply(self, entry: Entry) -> tuple[Prism, object]:
        if entry.index != self.index + 1:
            raise ValueError(f"entry {entry.index} applied after {self.index}")
        if entry.kind is not EntryKind.NORMAL:
            self._machine.advance(entry.index)
            return self, None
        results, _ = self._machine.apply(entry.index, entry.data)
        return self, results

    def freeze(self) -> FrozenPrism:
        return FrozenPrism(self.index, tuple(encode_snapshot(self._machine.snapshot_view())))

    def digest(self, thorough: bool = False) -> str:
        return self._machine.digest() if thorough or self.index % 16 == 0 else ""

    def register(self, key: int) -> int:
        return 0

    def names(self) -> list[str]:
        """Return the names of all sandboxes; each request may have made one, once."""
        return [row.name for row in self._machine.sandboxes()]
