"""Nouns of the Raft core: entries, configurations, messages and `Ready`.

Everything here is immutable and free of behaviour, so that a message can be kept, sent
twice or compared in a test without anybody changing it underneath.

"§" is the Raft paper (Ongaro and Ousterhout 2014, extended version), "thesis" is Ongaro's
dissertation of 2014.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TypeAlias

#: A random unsigned 64-bit integer, chosen once when a member is created; 0 is nobody.
MemberId: TypeAlias = int

#: The id that stands for no member: no vote given, no leader known.
NOBODY: MemberId = 0


class EntryKind(enum.IntEnum):
    """What an entry means to the core; the numbers are on disk and on the wire."""

    #: A command of the state machine, opaque to the core.
    NORMAL = 0
    #: What a new leader appends to commit the entries before it (§8, thesis 6.4).
    NOOP = 1
    #: An encoded `Configuration`, in force from the moment it is in the log (§6).
    CONFIGURATION = 2


class Role(enum.IntEnum):
    """What a member is at the moment (§5.1; pre-candidate: thesis 9.6)."""

    FOLLOWER = 0
    PRE_CANDIDATE = 1
    CANDIDATE = 2
    LEADER = 3


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the log (§5.3).

    Attributes:
        index: Position in the log; the first entry has index 1.
        term: Term of the leader that created it.
        kind: Who reads `data`.
        data: The payload, empty for a NOOP.
        encoded: Memo of `entry_codec.encode`, so that disk and wire share one encoding.
            Empty until somebody asks for it; not part of the entry's identity.
    """

    index: int
    term: int
    kind: EntryKind
    data: bytes
    encoded: bytes = field(default=b"", compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class HardState:
    """What must be on disk before anybody hears of it (§5.1, figure 2).

    `commit` need not be durable for safety; it rides along so that a restart applies
    at once what was known to be committed.
    """

    term: int = 0
    vote: MemberId = NOBODY
    commit: int = 0


@dataclass(frozen=True, slots=True)
class SoftState:
    """What the driver may show and log, and which is never stored."""

    role: Role
    leader: MemberId
    term: int


@dataclass(frozen=True, slots=True)
class Member:
    """One member and where it can be reached."""

    id: MemberId
    name: str
    raft_address: str
    api_address: str


@dataclass(frozen=True, slots=True)
class Configuration:
    """Who decides (§6, thesis chapter 4). The addresses travel with it.

    Attributes:
        voters: The incoming majority; the only one outside a joint configuration.
        voters_outgoing: The outgoing majority; the configuration is joint iff not empty.
        learners: Receive entries and count in no majority (thesis 4.2.1).
        members: Addresses of everybody named above.
    """

    voters: tuple[MemberId, ...] = ()
    voters_outgoing: tuple[MemberId, ...] = ()
    learners: tuple[MemberId, ...] = ()
    members: tuple[Member, ...] = ()

    @property
    def is_joint(self) -> bool:
        """Whether a change is half done and both majorities must agree."""
        return bool(self.voters_outgoing)

    def is_voter(self, member: MemberId) -> bool:
        """Whether `member` counts in one of the majorities."""
        return member in self.voters or member in self.voters_outgoing

    def ids(self) -> tuple[MemberId, ...]:
        """Return everybody who receives entries: each id once, in ascending order."""
        return tuple(sorted({*self.voters, *self.voters_outgoing, *self.learners}))


@dataclass(frozen=True, slots=True)
class SnapshotMeta:
    """What a snapshot covers (§7, figure 13): all entries up to and including `index`."""

    index: int = 0
    term: int = 0
    configuration: Configuration = Configuration()


@dataclass(frozen=True, slots=True)
class VoteRequest:
    """Asks for a vote (§5.2), or whether one would be given (pre-vote, thesis 9.6).

    A pre-vote carries the term the sender *would* campaign in; nobody adopts that term.
    `transfer` says that the leader itself asked for this election, so its lease does not
    protect it (thesis 4.2.3).
    """

    sender: MemberId
    receiver: MemberId
    term: int
    pre_vote: bool
    last_index: int
    last_term: int
    transfer: bool = False


@dataclass(frozen=True, slots=True)
class VoteReply:
    """Answers a `VoteRequest`.

    A granted pre-vote carries the term of the request, every other reply the term of its sender.
    """

    sender: MemberId
    receiver: MemberId
    term: int
    pre_vote: bool
    granted: bool


@dataclass(frozen=True, slots=True)
class AppendRequest:
    """Replicates entries (§5.3); without entries it probes, or tells of the commit index."""

    sender: MemberId
    receiver: MemberId
    term: int
    previous_index: int
    previous_term: int
    entries: tuple[Entry, ...]
    commit: int


@dataclass(frozen=True, slots=True)
class AppendReply:
    """Answers an `AppendRequest` or a `SnapshotRequest`.

    Attributes:
        sender: Who answers.
        receiver: The leader.
        term: Term of the sender.
        rejected: Whether the entry before the new ones was missing or another.
        index: If accepted: sender's log is durable and equal to the leader's up to here.
            If rejected: the `previous_index` that did not match.
        hint_index: If rejected: an index above which the logs cannot agree (end of §5.3).
        hint_term: If rejected: the term of the sender's entry at `hint_index`.
    """

    sender: MemberId
    receiver: MemberId
    term: int
    rejected: bool
    index: int
    hint_index: int = 0
    hint_term: int = 0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Keeps the leader's authority, tells of the commit index and confirms reads.

    `commit` never exceeds what the receiver has acknowledged. `read_context` numbers the
    leader's newest round of reads; 0 before the first.
    """

    sender: MemberId
    receiver: MemberId
    term: int
    commit: int
    read_context: int = 0


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """Answers a `Heartbeat`, returning its `read_context`.

    `command_version` is the highest version of commands that the sender can apply; 0: its release
    does not tell.
    """

    sender: MemberId
    receiver: MemberId
    term: int
    read_context: int = 0
    command_version: int = 0


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """Hands a snapshot to a follower that is behind the leader's log (§7).

    On the leader it asks the transport to stream its newest snapshot, at `meta` or later,
    on a call of its own, and then to `report_snapshot`. On the follower the driver steps
    it, with the meta of what has arrived, once the bytes are complete. The answer is an
    `AppendReply`.
    """

    sender: MemberId
    receiver: MemberId
    term: int
    meta: SnapshotMeta


@dataclass(frozen=True, slots=True)
class ReadIndexRequest:
    """A follower asks the leader from which index it may serve a read (thesis 6.4)."""

    sender: MemberId
    receiver: MemberId
    term: int
    context: int


@dataclass(frozen=True, slots=True)
class ReadIndexReply:
    """Answers a `ReadIndexRequest` after the leader has confirmed that it still leads."""

    sender: MemberId
    receiver: MemberId
    term: int
    context: int
    index: int


@dataclass(frozen=True, slots=True)
class TimeoutNow:
    """Tells an up-to-date voter to campaign at once (leadership transfer, thesis 3.10)."""

    sender: MemberId
    receiver: MemberId
    term: int


Message: TypeAlias = (
    VoteRequest
    | VoteReply
    | AppendRequest
    | AppendReply
    | Heartbeat
    | HeartbeatReply
    | SnapshotRequest
    | ReadIndexRequest
    | ReadIndexReply
    | TimeoutNow
)


@dataclass(frozen=True, slots=True)
class ReadState:
    """The read asked with `context` may be served once `index` is applied (thesis 6.4)."""

    context: int
    index: int


@dataclass(frozen=True, slots=True)
class TransferResult:
    """How a transfer of leadership has ended (thesis 3.10).

    Attributes:
        to: Who should lead.
        succeeded: Whether it does. If not, this member may lead still, or somebody else.
    """

    to: MemberId
    succeeded: bool


@dataclass(frozen=True, slots=True)
class Ready:
    """What the driver must now do, in the order of the fields (see `core`).

    Attributes:
        soft_state: The new role, leader or term, if one of them changed.
        messages_now: May be sent at once, while the disk writes (thesis 10.2.1).
        hard_state: To be written, or None if nothing of it must be. A change of the commit
            index alone is not worth a write; it rides along with the next one.
        snapshot: A received snapshot to install. It replaces the whole log on disk, and
            comes before `entries`.
        entries: To be written; first cut the log on disk before `entries[0].index`.
        messages_after_persist: To be sent once all of the above is durable, not before.
        committed: To be applied, in order, after the write; first load `snapshot`.
        reads: Reads that may be served once their index is applied.
        reads_dropped: Contexts of reads that will not be answered; ask again.
        transfer: How a transfer that this member began has ended.
    """

    soft_state: SoftState | None
    messages_now: tuple[Message, ...]
    hard_state: HardState | None
    snapshot: SnapshotMeta | None
    entries: tuple[Entry, ...]
    messages_after_persist: tuple[Message, ...]
    committed: tuple[Entry, ...]
    reads: tuple[ReadState, ...]
    reads_dropped: tuple[int, ...]
    transfer: TransferResult | None = None

    @property
    def needs_persist(self) -> bool:
        """Whether there is anything to write."""
        return bool(self.hard_state or self.snapshot or self.entries)
