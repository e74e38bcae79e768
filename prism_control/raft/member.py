"""The state of one member, and its changes of role and term (§5.1, §5.2, figure 2 and 4).

`core.Core` adds what messages and the driver do to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prism_control.raft.configuration import ConfigurationHistory
from prism_control.raft.election import Election
from prism_control.raft.errors import InvariantError
from prism_control.raft.log import Log
from prism_control.raft.outbox import Outbox
from prism_control.raft.quorum import VoteResult
from prism_control.raft.reads import ForwardedReads
from prism_control.raft.replication import Replication
from prism_control.raft.transfer import Transfer
from prism_control.raft.types import NOBODY, Entry, EntryKind, Role, SoftState, VoteRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prism_control.raft.config import CoreConfig, RandomSource
    from prism_control.raft.types import Configuration, HardState, MemberId, Ready, SnapshotMeta


class MemberState:
    """All fields of one member, and how its role and term change."""

    __slots__ = (
        "_applied",
        "_applying",
        "_configurations",
        "_election",
        "_forwarded_reads",
        "_limits",
        "_outbox",
        "_received_snapshot",
        "_saved_hard_state",
        "_shown_soft_state",
        "_transfer",
        "_unpersisted_ready",
        "commit",
        "config",
        "leader",
        "log",
        "replication",
        "role",
        "snapshot",
        "term",
        "vote",
    )

    def __init__(
        self,
        config: CoreConfig,
        random: RandomSource,
        hard_state: HardState,
        snapshot: SnapshotMeta,
        entries: Sequence[Entry],
    ) -> None:
        """Start from what the disk holds; the state machine is at `snapshot`.

        Args:
            config: Identity and limits.
            random: For election timeouts.
            hard_state: As last persisted.
            snapshot: The newest one, or `SnapshotMeta()`.
            entries: All on disk, ascending. They may begin before the end of the snapshot
                (the trailing margin); whatever the snapshot makes useless is left out.

        Raises:
            InvariantError: These do not fit together.
            CorruptEntryError: An entry that should hold a configuration does not.
        """
        self.config = config
        self._limits = config.limits

        # Durable: what is in the next Ready, or on disk.
        #: Never goes down.
        self.term = hard_state.term
        #: Given in `term`; within a term it goes from nobody to somebody, once.
        self.vote = hard_state.vote
        #: The newest snapshot on disk; snapshot.index >= log.base_index.
        self.snapshot = snapshot
        #: Entries after the last compaction.
        self.log = _restore_log(snapshot, entries)

        # Volatile.
        #: Never goes down; applied <= applying <= commit <= log.last_index.
        self.commit = max(hard_state.commit, snapshot.index)
        #: Handed out in `Ready.committed` up to here.
        self._applying = snapshot.index
        #: Applied, says the driver, up to here.
        self._applied = snapshot.index
        self.role = Role.FOLLOWER
        #: Leader of `term` as far as known; itself iff `role` is LEADER.
        self.leader: MemberId = NOBODY
        self._election = Election(random, config.election_ticks)
        #: Not None iff `role` is LEADER; made anew in each term.
        self.replication: Replication | None = None
        #: Waiting for `leader`; empty if it is this member or unknown.
        self._forwarded_reads = ForwardedReads(config.election_ticks)
        #: Goes into the next Ready.
        self._received_snapshot: SnapshotMeta | None = None
        self._outbox = Outbox()
        #: Begun by this member and not ended; while it leads, nothing is appended meanwhile.
        self._transfer: Transfer | None = None

        # Derived.
        #: In force: the last in the log, committed or not.
        self._configurations = ConfigurationHistory(snapshot)
        self._configurations.append(self.log.slice(snapshot.index + 1, self.log.last_index))
        #: As of the last persisted Ready.
        self._saved_hard_state = hard_state
        #: As of the last Ready.
        self._shown_soft_state = SoftState(Role.FOLLOWER, NOBODY, self.term)
        #: Taken and not yet `persisted`.
        self._unpersisted_ready: Ready | None = None
        self.check()

    @property
    def configuration(self) -> Configuration:
        """The configuration in force: the last in the log, committed or not (§6)."""
        return self._configurations.current

    # ------------------------------------------------------------------ invariants

    def check(self) -> None:
        """Verify the invariants of all fields; for tests, after each step.

        Raises:
            InvariantError: One of them is broken.
        """
        log, leads = self.log, self.role is Role.LEADER
        broken = [
            name
            for name, holds in (
                ("applied <= applying", self._applied <= self._applying),
                ("applying <= commit", self._applying <= self.commit),
                ("commit <= last", self.commit <= log.last_index),
                ("base <= snapshot", log.base_index <= self.snapshot.index),
                ("snapshot <= commit", self.snapshot.index <= self.commit),
                ("base <= persisted <= last", log.base_index <= log.persisted <= log.last_index),
                ("last term <= term", log.last_term <= self.term),
                ("saved term <= term", self._saved_hard_state.term <= self.term),
                ("leads iff leader is itself", leads == (self.leader == self.config.id)),
                ("leads iff replicates", leads == (self.replication is not None)),
                ("candidate has its vote", self._may_have_role()),
                ("forwards only to a leader", self.leader != NOBODY or not self._forwarded_reads),
            )
            if not holds
        ]
        if broken:
            raise InvariantError(f"member {self.config.id}: {', '.join(broken)}")
        if self.replication is not None:
            for progress in self.replication.progress.values():
                progress.check(log.last_index)
            waiting = sum(len(entry.data) for entry in log.slice(self.commit + 1, log.last_index))
            if waiting != self.replication.uncommitted_bytes:
                raise InvariantError(
                    f"{waiting} bytes are uncommitted, not {self.replication.uncommitted_bytes}"
                )

    def _may_have_role(self) -> bool:
        return self.role not in (Role.CANDIDATE, Role.LEADER) or self.vote == self.config.id

    # ------------------------------------------------------------------ roles and terms

    def _hears_leader(self) -> bool:
        election = self._election
        return self.leader != NOBODY and not (election.is_past_minimum or election.is_hurried)

    def _raise_term(self, term: int) -> None:
        self.term = term
        self.vote = NOBODY
        self._outbox.forget_messages()

    def _become_follower(self, term: int, leader: MemberId) -> None:
        if term > self.term:
            self._raise_term(term)
        self._drop_waiting_reads()
        self.replication = None
        self.role = Role.FOLLOWER
        self.leader = leader
        self._election.reset()

    def _drop_waiting_reads(self) -> None:
        self._outbox.drop_reads(self._forwarded_reads.drop())
        if self.replication is not None:
            self._outbox.drop_reads(self.replication.reads.contexts_of(self.config.id))

    def _follow(self, leader: MemberId) -> None:
        """Take note of a sign of life of the leader of the present term."""
        if self.role is Role.LEADER or self.leader not in (NOBODY, leader):
            raise InvariantError(
                f"members {self.leader} and {leader} both lead in term {self.term}"
            )
        if self.leader == leader:
            self._election.heard()
        else:
            self._become_follower(self.term, leader)

    # ------------------------------------------------------------------ elections

    @property
    def _may_campaign(self) -> bool:
        """Whether an election may need this member: it is a voter, or was, for all it knows.

        A configuration without it that may not be committed can lack a leader but for it: with
        the voters 1 and 2, once 1 has appended its own removal, 2 must not vote against 1's longer
        log and cannot win without 1's vote (thesis 4.2.2).
        """
        me = self.config.id
        return any(c.is_voter(me) for c in self._configurations.since(self.commit))

    def _campaign(self, role: Role, transfer: bool = False) -> None:
        """Ask for votes (§5.2), or first whether they would be given (thesis 9.6)."""
        self._drop_waiting_reads()
        self._election.reset()
        self.leader = NOBODY
        self.role = role
        pre_vote = role is Role.PRE_CANDIDATE
        if not pre_vote:
            self._raise_term(self.term + 1)
            self.vote = self.config.id
        self._count_vote(self.config.id, granted=True)
        if self.role is not role:
            return
        term = self.term + 1 if pre_vote else self.term
        last_index, last_term = self.log.last_index, self.log.last_term
        for member in self.configuration.ids():
            if member != self.config.id and self.configuration.is_voter(member):
                self._outbox.send_after_persist(
                    VoteRequest(
                        self.config.id, member, term, pre_vote, last_index, last_term, transfer
                    )
                )

    def _count_vote(self, member: MemberId, granted: bool) -> None:
        result = self._election.record(member, granted, self.configuration)
        if result is VoteResult.LOST:
            self._become_follower(self.term, NOBODY)
        elif result is VoteResult.WON and self.role is Role.PRE_CANDIDATE:
            self._campaign(Role.CANDIDATE)
        elif result is VoteResult.WON:
            self._become_leader()

    def _become_leader(self) -> None:
        self.role = Role.LEADER
        self.leader = self.config.id
        self._election.reset()
        self.replication = Replication(
            self.config.id, self.term, self.configuration, self.log, self._outbox, self._limits
        )
        self.replication.uncommitted_bytes = sum(
            len(entry.data) for entry in self.log.slice(self.commit + 1, self.log.last_index)
        )
        # An entry of its own term lets it commit those before it (§5.4.2) and serve reads (§8).
        self.log.append([Entry(self.log.last_index + 1, self.term, EntryKind.NOOP, b"")])

    # ------------------------------------------------------------------ the commit index

    def _commit_to(self, index: int) -> None:
        if index <= self.commit:
            return
        if index > self.log.last_index:
            raise InvariantError(
                f"{index} is said to be committed, but the log ends at {self.log.last_index}: "
                "acknowledged entries are gone from this member's disk"
            )
        if self.replication is not None:
            self.replication.uncommitted_bytes -= sum(
                len(entry.data) for entry in self.log.slice(self.commit + 1, index)
            )
        self.commit = index


def _restore_log(snapshot: SnapshotMeta, entries: Sequence[Entry]) -> Log:
    """Return the log that follows from a snapshot and the entries on disk."""
    if not entries or entries[-1].index < snapshot.index or entries[0].index > snapshot.index:
        following = [entry for entry in entries if entry.index > snapshot.index]
        return Log(snapshot.index, snapshot.term, following)
    # The first of the trailing margin gives the term that comes before the others.
    log = Log(entries[0].index, entries[0].term, entries[1:])
    if log.term_at(snapshot.index) != snapshot.term:
        raise InvariantError(f"the log has another entry {snapshot.index} than the snapshot")
    return log
