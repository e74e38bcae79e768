"""Cores without a network: messages are moved by hand, so that a test can choose their fate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

from prism_control.raft.config import CoreConfig, Limits
from prism_control.raft.configuration import bootstrap
from prism_control.raft.core import Core
from prism_control.raft.types import (
    Configuration,
    Entry,
    EntryKind,
    HardState,
    Message,
    Ready,
    Role,
    SnapshotMeta,
)

THREE = Configuration(voters=(1, 2, 3))
FIVE = Configuration(voters=(1, 2, 3, 4, 5))

M = TypeVar("M")


def entry(index: int, term: int, data: bytes = b"") -> Entry:
    return Entry(index, term, EntryKind.NORMAL, data or b"%d.%d" % (index, term))


def make_core(
    member: int = 1,
    configuration: Configuration = THREE,
    terms: Sequence[int] = (),
    *,
    term: int = 0,
    vote: int = 0,
    commit: int = 0,
    limits: Limits | None = None,
    heartbeat_ticks: int = 1,
) -> Core:
    """Return a core whose log has entries of `terms`, from index 1 on, all on disk."""
    entries = [entry(index, of_term) for index, of_term in enumerate(terms, 1)]
    return Core(
        CoreConfig(member, heartbeat_ticks=heartbeat_ticks, limits=limits or Limits()),
        Random(member),
        HardState(max([term, *terms]), vote, commit),
        SnapshotMeta(0, 0, configuration),
        entries,
    )


def turn(core: Core) -> Ready | None:
    """Perform one Ready, messages apart."""
    ready = core.take_ready()
    if ready is not None:
        core.persisted(ready)
        if ready.snapshot is not None:
            core.applied(ready.snapshot.index)
        if ready.committed:
            core.applied(ready.committed[-1].index)
    core.check()
    return ready


def drain(core: Core) -> list[Message]:
    """Perform all that there is to do, and return the messages."""
    messages: list[Message] = []
    while (ready := turn(core)) is not None:
        messages += [*ready.messages_now, *ready.messages_after_persist]
    return messages


def sent(messages: Sequence[Message], kind: type[M], receiver: int = 0) -> list[M]:
    """Return the messages of one kind, to one member or to all."""
    return [
        message
        for message in messages
        if isinstance(message, kind) and receiver in (0, message.receiver)
    ]


def role_of(core: Core) -> Role:
    """Return the role; through a function, since mypy takes it to be constant."""
    return core.role


def tick_until(core: Core, done: Callable[[], bool], ticks_max: int = 100) -> None:
    for _ in range(ticks_max):
        if done():
            return
        core.tick()
    raise AssertionError("it never happened")


class Group:
    """Some cores, and links between them that a test may cut."""

    def __init__(self, cores: Sequence[Core]) -> None:
        self.cores = {core.config.id: core for core in cores}
        self.cut: set[int] = set()
        #: Returns whether a message is delivered.
        self.passes: Callable[[Message], bool] = lambda message: True
        self.applied: dict[int, list[Entry]] = {member: [] for member in self.cores}
        self.readies: dict[int, list[Ready]] = {member: [] for member in self.cores}

    @classmethod
    def bootstrapped(
        cls, configuration: Configuration = THREE, limits: Limits | None = None
    ) -> Group:
        """Return a new cluster, as the driver makes it."""
        hard_state, first = bootstrap(configuration)
        return cls(
            [
                Core(
                    CoreConfig(member, limits=limits or Limits()),
                    Random(member),
                    hard_state,
                    SnapshotMeta(),
                    [first],
                )
                for member in configuration.ids()
            ]
        )

    def pump(self) -> None:
        """Move messages until there are none, and all have been told what is committed."""
        announced = False
        while True:
            messages: list[Message] = []
            for member, core in self.cores.items():
                while (ready := turn(core)) is not None:
                    self.readies[member].append(ready)
                    self.applied[member] += ready.committed
                    messages += [*ready.messages_now, *ready.messages_after_persist]
            if not messages:
                if announced:
                    return
                announced = True
                for core in self.cores.values():
                    core.announce_commit()
            for message in messages:
                if not self.cut & {message.sender, message.receiver} and self.passes(message):
                    self.cores[message.receiver].step(message)

    def elect(self, member: int) -> Core:
        """Make `member` the leader, by letting only its clock run."""
        core = self.cores[member]
        for other in self.cores.values():
            if other is not core:
                # Their leader is silent, as if it had crashed.
                for _ in range(other.config.election_ticks):
                    if not other._election.is_past_minimum:
                        other._election.elapsed += 1
        for _ in range(100):
            core.tick()
            self.pump()
            if core.role is Role.LEADER:
                return core
        raise AssertionError(f"{member} is not elected")

    def tick(self, ticks: int = 1) -> None:
        for _ in range(ticks):
            for core in self.cores.values():
                core.tick()
            self.pump()
