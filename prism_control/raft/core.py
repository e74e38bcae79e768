"""The Raft state machine of one member: messages and ticks in, `Ready` out.

`Core` is pure and deterministic. It reads no clock, does no I/O and draws from no randomness but
what it is given, so the simulator can replay any run from a seed. Time is ticks.

Contract with the driver, the only caller, which repeats this:

1. Drain what has arrived: `step`, `propose`, `read_index`, `tick`, reports.
2. `ready = core.take_ready()`; None means that there is nothing to do.
3. Send `ready.messages_now`, and then write `hard_state`, `snapshot` and `entries` in *one*
   atomic, synchronous transaction (skip it unless `needs_persist`). If the write fails, stop for
   good. The core must not be touched meanwhile; arrivals wait in the inbox.
4. `core.persisted(ready)`, always, even if there was nothing to write.
5. Send `ready.messages_after_persist`.
6. Load `ready.snapshot` into the state machine, apply `ready.committed` in order, then call
   `core.applied(index)` with the last of them (or the snapshot's index).
7. Serve `ready.reads` whose index is applied; fail or ask again `ready.reads_dropped`. Tell who
   waits for it about `ready.transfer`.

After a pause, deliver one tick and not all that were missed: an old clock must not depose a
leader whose messages wait in the inbox. Any message may be lost, repeated, reordered or late.

Snapshots: at an applied index the driver writes the state machine under
`core.snapshot_meta(index)`, calls `core.snapshot_saved(meta)` once that is durable, then
`core.compact(index)` with a trailing margin, and deletes the same entries from disk. A
`SnapshotRequest` among the messages is for the transport of snapshots, which ends with
`core.report_snapshot`.

Membership: `propose_configuration` begins a change on the leader, which the core completes by
itself; learners that have caught up are promoted by the leader at a tick. The configuration in
force is `core.configuration`, and connections follow it from the moment it changes. A new
member starts with an empty disk and no configuration, and waits to be spoken to. `transfer`
hands leadership over. `raft.recovery` is for when a majority is lost.

An `InvariantError` or `CorruptEntryError` out of any method means that the member must stop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prism_control.raft.errors import (
    InvariantError,
    LeavingError,
    NotLeaderError,
    ProposalDroppedError,
)
from prism_control.raft.leader import LeaderState
from prism_control.raft.types import (
    AppendReply,
    AppendRequest,
    Entry,
    EntryKind,
    HardState,
    Heartbeat,
    HeartbeatReply,
    ReadIndexReply,
    ReadIndexRequest,
    Ready,
    Role,
    SnapshotMeta,
    SnapshotRequest,
    SoftState,
    TimeoutNow,
    TransferResult,
    VoteReply,
    VoteRequest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prism_control.raft.config import CoreConfig, RandomSource
    from prism_control.raft.types import MemberId, Message


class Core(LeaderState):
    """One member's part in the consensus. See the module for how to drive it."""

    __slots__ = ("_handlers", "_transfer_result")

    def __init__(
        self,
        config: CoreConfig,
        random: RandomSource,
        hard_state: HardState,
        snapshot: SnapshotMeta,
        entries: Sequence[Entry],
    ) -> None:
        """Start from what the disk holds, as `MemberState` says."""
        super().__init__(config, random, hard_state, snapshot, entries)
        self._handlers: dict[type, Callable[..., None]] = {
            VoteRequest: self._handle_vote_request,
            VoteReply: self._handle_vote_reply,
            AppendRequest: self._handle_append_request,
            AppendReply: self._handle_append_reply,
            Heartbeat: self._handle_heartbeat,
            HeartbeatReply: self._handle_heartbeat_reply,
            SnapshotRequest: self._handle_snapshot_request,
            ReadIndexRequest: self._handle_read_index_request,
            ReadIndexReply: self._handle_read_index_reply,
            TimeoutNow: self._handle_timeout_now,
        }
        self._transfer_result: TransferResult | None = None
        others = {*self.configuration.ids()} - {config.id, *self.configuration.learners}
        if not others and self.configuration.is_voter(config.id):
            # Nobody else could lead, or be disturbed.
            self._campaign(Role.PRE_CANDIDATE)

    # ------------------------------------------------------------------ what happens to it

    def tick(self) -> None:
        """Let one unit of time pass."""
        self._election.elapsed += 1
        if self._transfer is not None:
            self._end_transfer(self._transfer.tick())
        if self.replication is not None:
            self._tick_leader(self.replication)
            return
        self._outbox.drop_reads(self._forwarded_reads.tick())
        if self._election.is_due and self._may_campaign:
            self._campaign(Role.PRE_CANDIDATE)

    def step(self, message: Message) -> None:
        """Take in a message from another member.

        Raises:
            InvariantError: Something that Raft rules out has happened.
            CorruptEntryError: A CONFIGURATION entry holds none.
        """
        if message.receiver != self.config.id:
            return
        if message.term < self.term:
            self._answer_stale(message)
            return
        if message.term > self.term and not self._adopt_term(message):
            return
        self._handlers[type(message)](message)
        if self._transfer is not None:
            self._end_transfer(self._transfer.led_by(self.leader, self.term))

    def _end_transfer(self, result: TransferResult | None) -> None:
        if result is not None:
            self._transfer_result = result
            self._transfer = None

    def propose(self, datas: Sequence[bytes]) -> range:
        """Append commands to the leader's log.

        Returns:
            Their indexes. Each is committed iff an entry with its index and the *present* `term`
            comes out of `Ready.committed`; another term there means that it is lost.

        Raises:
            NotLeaderError: This member does not lead.
            ProposalDroppedError: Too much is waiting to be committed, or (LeavingError) this
                leader hands over to another.
        """
        replication = self.replication
        if replication is None:
            raise NotLeaderError(self.leader)
        if self._transfer is not None:
            raise LeavingError(f"leadership is handed over to member {self._transfer.to:016x}")
        size_bytes = sum(map(len, datas))
        waiting_bytes = replication.uncommitted_bytes
        if waiting_bytes and waiting_bytes + size_bytes > self._limits.uncommitted_bytes_max:
            raise ProposalDroppedError(f"{waiting_bytes} bytes are waiting to be committed")
        return self._append(replication, EntryKind.NORMAL, datas)

    def read_index(self, context: int) -> None:
        """Ask for an index from which the state machine may serve a read (thesis 6.4).

        The answer comes as `Ready.reads` or `Ready.reads_dropped`, or not at all if this
        member is cut off for good; the caller keeps a deadline.

        Args:
            context: Names the read, or a batch of reads that have all arrived. Never used
                before in this cluster, not even before a restart: answers may be very late.
        """
        if self.replication is not None:
            self._add_read(self.replication, self.config.id, context)
        elif self.leader and len(self._forwarded_reads) < self._limits.reads_waiting_max:
            self._forwarded_reads.add(context)
            self._outbox.send_now(ReadIndexRequest(self.config.id, self.leader, self.term, context))
        else:
            self._outbox.drop_reads([context])

    def report_unreachable(self, member: MemberId) -> None:
        """Take note that messages to `member` were lost; a hint, which may be wrong."""
        if self.replication is not None:
            self.replication.report_unreachable(member)

    def report_disconnected(self, member: MemberId) -> None:
        """Take note that a connection to `member` has ended, as all do when its process ends.

        A hint, which may be wrong. A follower whose leader it is asks for pre-votes soon instead
        of after an election timeout, and no longer keeps others from it (docs/adr/0015). Who
        still hears the leader refuses them, so a broken connection deposes nobody.
        """
        if self.role is Role.FOLLOWER and member == self.leader and self._may_campaign:
            others = [id_ for id_ in self.configuration.ids() if id_ != member]
            voters = [id_ for id_ in others if self.configuration.is_voter(id_)]
            self._election.hurry(sum(id_ < self.config.id for id_ in voters))

    def report_snapshot(self, member: MemberId, ok: bool) -> None:
        """Take note how a `SnapshotRequest` has ended. Every one must be reported."""
        if self.replication is not None:
            self.replication.report_snapshot(member, ok)

    # ------------------------------------------------------------------ what it wants done

    def take_ready(self) -> Ready | None:
        """Return what must be done, or None. Each must be `persisted` before the next.

        Raises:
            InvariantError: The last one was not.
        """
        if self._unpersisted_ready is not None:
            raise InvariantError("the last Ready was not persisted yet")
        if self.replication is not None:
            self._send_as_leader(self.replication)
        soft_state = self._changed_soft_state()
        hard_state = self._changed_hard_state()
        entries = self.log.slice(self.log.persisted + 1, self.log.last_index)
        if not (
            soft_state
            or hard_state
            or entries
            or self._outbox
            or self._received_snapshot
            or self._transfer_result
            or self._applying < self.commit
        ):
            return None
        saved = self._saved_hard_state
        term_is_durable = saved.term == self.term and saved.vote == self.vote
        messages_now, messages_after_persist = self._outbox.take_messages(term_is_durable)
        committed, _ = self.log.bounded_slice(
            self._applying + 1, self.commit, self._limits.committed_bytes_max
        )
        self._applying += len(committed)
        reads, reads_dropped = self._outbox.take_reads()
        self._unpersisted_ready = Ready(
            soft_state=soft_state,
            messages_now=messages_now,
            hard_state=hard_state,
            snapshot=self._received_snapshot,
            entries=entries,
            messages_after_persist=messages_after_persist,
            committed=committed,
            reads=reads,
            reads_dropped=reads_dropped,
            transfer=self._transfer_result,
        )
        self._transfer_result = None
        self._received_snapshot = None
        return self._unpersisted_ready

    def persisted(self, ready: Ready) -> None:
        """Take note that all of `ready` is durable.

        Raises:
            InvariantError: It is not what was taken last.
        """
        if ready is not self._unpersisted_ready:
            raise InvariantError("persisted something that is not the last Ready")
        self._unpersisted_ready = None
        if ready.hard_state is not None:
            self._saved_hard_state = ready.hard_state
        if ready.entries:
            self.log.persisted_to(ready.entries[-1].index)
            if self.replication is not None:
                self.replication.persisted(self.log.persisted)
                self._commit_by_quorum(self.replication)

    def applied(self, index: int) -> None:
        """Take note that the state machine is at `index`.

        Raises:
            InvariantError: It went back, or past what was handed out.
        """
        if not self._applied <= index <= self._applying:
            raise InvariantError(
                f"applied went from {self._applied} to {index}; handed out was {self._applying}"
            )
        self._applied = index

    # ------------------------------------------------------------------ snapshots of its own

    def snapshot_meta(self, index: int) -> SnapshotMeta:
        """Return what to store beside a snapshot of the state machine at `index` (§7).

        Raises:
            InvariantError: That is not applied, or is compacted away.
        """
        term = self.log.term_at(index)
        if term is None or not self.snapshot.index <= index <= self._applied:
            raise InvariantError(
                f"no snapshot at {index}: the last is at {self.snapshot.index}, "
                f"applied is {self._applied}"
            )
        return SnapshotMeta(index, term, self._configurations.at(index))

    def snapshot_saved(self, meta: SnapshotMeta) -> None:
        """Take note that a snapshot is durable; an older one than the newest is ignored."""
        if meta.index > self.snapshot.index:
            self.snapshot = meta
            self._configurations.compact(meta.index)

    def compact(self, index: int) -> None:
        """Drop entries up to `index`. Those that slow followers still want are better kept.

        Raises:
            InvariantError: They are not in the newest snapshot, or not applied.
        """
        if index > min(self.snapshot.index, self._applied):
            raise InvariantError(
                f"cannot compact to {index}: the snapshot is at {self.snapshot.index}"
            )
        self.log.compact(index)

    # ------------------------------------------------------------------ what it tells

    @property
    def applied_index(self) -> int:
        """What the state machine has applied."""
        return self._applied

    # ------------------------------------------------------------------ the next Ready

    def _changed_soft_state(self) -> SoftState | None:
        shown = self._shown_soft_state
        if shown.role is self.role and shown.leader == self.leader and shown.term == self.term:
            return None
        self._shown_soft_state = SoftState(self.role, self.leader, self.term)
        return self._shown_soft_state

    def _changed_hard_state(self) -> HardState | None:
        """Return what to write; a new commit index alone waits for something worth a write."""
        saved = self._saved_hard_state
        if saved.term == self.term and saved.vote == self.vote:
            worth_a_write = (
                self.log.persisted < self.log.last_index or self._received_snapshot is not None
            )
            if saved.commit == self.commit or not worth_a_write:
                return None
        return HardState(self.term, self.vote, self.commit)
