"""What must hold at every step of every run (figure 3 of the paper, and what Prism promises).

The checker sees everything at once, which no member can. It keeps only what has been seen, by
index and term, so that each step costs little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prism_control.raft.core import Core
from prism_control.raft.entry_codec import decode_configuration
from prism_control.raft.types import (
    AppendReply,
    AppendRequest,
    Configuration,
    Entry,
    EntryKind,
    Message,
    Role,
    SnapshotMeta,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)
from tests.sim.disk import Disk
from tests.sim.state_machine import State


class ViolationError(Exception):
    """A promise is broken."""


def has_quorum(configuration: Configuration, members: set[int]) -> bool:
    # Written apart from prism_control.raft.quorum, which is under test.
    for voters in (configuration.voters, configuration.voters_outgoing):
        if voters and 2 * len(members.intersection(voters)) <= len(voters):
            return False
    return True


class Invariants:
    """Sees all members, messages and disks of one cluster."""

    def __init__(self, disks: Mapping[int, Disk], fresh: Callable[[], State]) -> None:
        #: Grows with new members. Lost disks stay as they were: who had them never votes again.
        self._disks = disks
        self._fresh = fresh
        #: By which the last entry was committed, and the last committed one.
        self._deciding = self._configuration = Configuration()
        self._leader_of_term: dict[int, int] = {}
        self._vote_of: dict[tuple[int, int], int] = {}
        #: (index, term) to (term before, kind, data): log matching by induction.
        self._entry_at: dict[tuple[int, int], tuple[int, EntryKind, bytes]] = {}
        #: Committed entries by index, without gaps from 1.
        self.committed: list[Entry] = []
        #: The term in which each of them was committed.
        self._committed_in: list[int] = []
        #: Commit index of each running member as last seen.
        self._commit_seen: dict[int, int] = {}
        #: Digest of the state by applied index.
        self._digest_at: dict[int, str] = {}
        self._acknowledged_max = 0
        self.acknowledged: dict[int, bytes] = {}
        self.elections = 0
        self._turns = 0

    # ---------------------------------------------------------------- what is observed

    def started(self, core: Core) -> None:
        """Take note that a member has started, from its disk."""
        self._commit_seen[core.config.id] = core.snapshot.index
        log = core.log
        self._check_entries(log.base_term, log.slice(log.base_index + 1, log.last_index))

    def turned(self, core: Core, cores: Iterable[Core]) -> None:
        """Check a member after it was touched."""
        core.check()
        if core.role is Role.LEADER:
            self._check_leader(core)
        self._turns += 1
        if self._turns % 32 == 0:
            self._check_in_force(core)
        self._check_commit(core, cores)

    def written(self, core: Core, entries: Sequence[Entry]) -> None:
        """Check entries that have become durable: Log Matching (§5.3).

        Not those that are still to be written: a single voter that crashes during the write of
        its term leads the same term again, with other entries, and nobody can tell.
        """
        if entries:
            self._check_entries(core.log.term_at(entries[0].index - 1), entries)

    def sent(self, core: Core, message: Message) -> None:
        """Check a message that leaves a member: it may promise only what is durable."""
        image = self._disks[message.sender].synced
        free_of_term = (isinstance(message, VoteRequest) and message.pre_vote) or (
            isinstance(message, VoteReply) and message.pre_vote and message.granted
        )
        if not free_of_term and message.term > image.hard_state.term:
            raise ViolationError(f"sent in a term that is not durable: {message}")
        if isinstance(message, VoteRequest) and not message.pre_vote:
            self._check_vote(message.sender, message.term, message.sender)
        elif isinstance(message, VoteReply) and message.granted and not message.pre_vote:
            self._check_vote(message.sender, message.term, message.receiver)
        elif isinstance(message, AppendRequest):
            self._check_entries(message.previous_term, message.entries)
        elif isinstance(message, AppendReply) and not message.rejected:
            held = max(image.last_index, image.snapshot.meta.index)
            if message.index > held or (image.term_at(message.index) or 0) > message.term:
                raise ViolationError(f"acknowledged what is not on disk: {message}")
        elif isinstance(message, TimeoutNow):
            self._check_heir(core, image.last_index, message)

    def _check_heir(self, core: Core, last_index: int, message: TimeoutNow) -> None:
        """Check that leadership goes to a voter only, and if it is a transfer, one that has all."""
        if message.receiver not in core.configuration.voters:
            raise ViolationError(f"leadership is handed to one who is no voter: {message}")
        heir = self._disks[message.receiver].synced
        if core.role is Role.LEADER and heir.last_index < last_index:
            raise ViolationError(f"leadership is handed to one who lacks entries: {message}")

    def applied(self, member: int, state: State) -> None:
        """Check that all members have the same state at the same index (State Machine Safety)."""
        digest = state.digest()
        if digest and self._digest_at.setdefault(state.index, digest) != digest:
            raise ViolationError(f"member {member} has another state at {state.index}")
        if state.index > len(self.committed):
            raise ViolationError(f"member {member} applied {state.index}, not committed")

    def snapshot_taken(self, meta: SnapshotMeta) -> None:
        """Check that a snapshot carries the configuration of its index, not a later one."""
        entries = reversed(self.committed[: meta.index])
        last = next(entry for entry in entries if entry.kind is EntryKind.CONFIGURATION)
        if decode_configuration(last) != meta.configuration:
            raise ViolationError(f"the snapshot at {meta.index} has another configuration")

    def disk_changed(self) -> None:
        """Check that all that is committed is durable on a quorum."""
        if self.committed:
            self._check_durable(self.committed[-1], self._deciding)

    def write_acknowledged(self, index: int, data: bytes) -> None:
        """Check what a client is told: the write is committed, at this index."""
        if index > len(self.committed) or self.committed[index - 1].data != data:
            raise ViolationError(f"acknowledged {data!r} at {index}, where it is not committed")
        self.acknowledged[index] = data
        self._acknowledged_max = max(self._acknowledged_max, index)

    def read_asked(self) -> int:
        """Return what a read that is asked now must see at least."""
        return self._acknowledged_max

    def read_served(self, applied: int, asked: int) -> None:
        """Check that a read sees all that was acknowledged before it was asked."""
        if applied < asked:
            raise ViolationError(f"read at {applied} misses the write acknowledged at {asked}")

    def finished(self, states: Mapping[int, State]) -> None:
        """Check a healed cluster: all have caught up and nothing acknowledged is lost."""
        state = self._fresh()
        for entry in self.committed:
            state, _ = state.apply(entry)
        digest = state.digest(thorough=True)
        for member, found in states.items():
            if found.digest(thorough=True) != digest:
                raise ViolationError(f"member {member} has another state than the committed log")
        for index, data in self.acknowledged.items():
            if self.committed[index - 1].data != data:
                raise ViolationError(f"the acknowledged write {data!r} is lost")

    # ---------------------------------------------------------------- the single checks

    def _check_leader(self, core: Core) -> None:
        member, term = core.config.id, core.term
        known = self._leader_of_term.get(term)
        if known == member:
            return
        if known is not None:
            raise ViolationError(f"Election Safety: {known} and {member} lead in term {term}")
        self._leader_of_term[term] = member
        self.elections += 1
        self._check_vote(member, term, member)
        # A leader of an earlier term may be elected late, by votes that were long under way; it
        # cannot commit anything.
        first = core.log.base_index
        for entry, in_term in zip(self.committed[first:], self._committed_in[first:], strict=True):
            if in_term < term:
                self._check_complete(core, entry)

    def _check_complete(self, core: Core, entry: Entry) -> None:
        if entry.index > core.log.base_index and core.log.term_at(entry.index) != entry.term:
            raise ViolationError(
                f"Leader Completeness: {core.config.id}, leader of term {core.term}, lacks "
                f"entry {entry.index} of term {entry.term}"
            )

    def _check_vote(self, member: int, term: int, candidate: int) -> None:
        known = self._vote_of.setdefault((member, term), candidate)
        if known != candidate:
            raise ViolationError(
                f"member {member} votes for {known} and {candidate} in term {term}"
            )

    def _check_entries(self, term_before: int | None, entries: Sequence[Entry]) -> None:
        if term_before is None:
            raise ViolationError(f"nothing comes before {entries[0]}")
        for entry in entries:
            found = (term_before, entry.kind, entry.data)
            if self._entry_at.setdefault((entry.index, entry.term), found) != found:
                raise ViolationError(
                    f"Log Matching: two entries {entry.index} of term {entry.term}"
                )
            term_before = entry.term

    def _check_commit(self, core: Core, cores: Iterable[Core]) -> None:
        member, commit = core.config.id, core.commit
        seen = self._commit_seen[member]
        if commit < seen:
            raise ViolationError(f"commit of {member} went from {seen} back to {commit}")
        if commit == seen:
            return
        self._commit_seen[member] = commit
        first = max(seen, core.log.base_index) + 1
        for entry in core.log.slice(first, commit):
            self._check_committed(entry, core, cores)
        if commit > len(self.committed):
            raise ViolationError(f"member {member} knows of {commit}, not committed by anybody")

    def _check_committed(self, entry: Entry, by: Core, cores: Iterable[Core]) -> None:
        if entry.index <= len(self.committed):
            known = self.committed[entry.index - 1]
            if known != entry:
                raise ViolationError(f"committed {known} became {entry}")
            return
        if entry.index != len(self.committed) + 1:
            raise ViolationError(f"entry {entry.index} committed after {len(self.committed)}")
        self.committed.append(entry)
        self._committed_in.append(by.term)
        # The leader is the first to know, by the configuration that it has in force.
        self._deciding = by.configuration
        self._check_durable(entry, by.configuration)
        if entry.kind is EntryKind.CONFIGURATION:
            configuration = decode_configuration(entry)
            self._check_change(configuration)
            if configuration.is_joint:
                # It binds from the moment it is in the log: both majorities, whatever came after.
                self._check_durable(entry, configuration)
        for core in cores:
            if core.role is Role.LEADER and core.term >= by.term:
                self._check_complete(core, entry)

    def _check_in_force(self, core: Core) -> None:
        """Check that a member uses the last configuration that its log, or snapshot, holds."""
        log = core.log
        entries = reversed(log.slice(log.base_index + 1, log.last_index))
        last = next((e for e in entries if e.kind is EntryKind.CONFIGURATION), None)
        held = core.snapshot.configuration if last is None else decode_configuration(last)
        if last is not None and last.index <= core.snapshot.index:
            held = core.snapshot.configuration
        if core.configuration != held:
            raise ViolationError(f"member {core.config.id} uses {core.configuration}, not {held}")

    def _check_change(self, after: Configuration) -> None:
        """Check that voters change only by way of a joint configuration (§6)."""
        before, self._configuration = self._configuration, after
        if before.is_joint:
            legal = not after.is_joint and after.voters == before.voters
        elif after.is_joint:
            legal = set(after.voters_outgoing) == set(before.voters)
        else:
            legal = after.voters == before.voters
        if before.voters and not legal:
            raise ViolationError(f"the configuration {before} became {after}")

    def _check_durable(self, entry: Entry, configuration: Configuration) -> None:
        holders = {
            member
            for member, disk in self._disks.items()
            if disk.synced.holds(entry.index, entry.term)
        }
        if not has_quorum(configuration, holders):
            raise ViolationError(
                f"committed entry {entry.index} of term {entry.term} is durable on {holders} only"
            )
