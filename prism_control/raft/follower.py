"""What a member does with what a leader or a candidate sends it (§5.2, §5.3, §7).

`leader.LeaderState` adds what it does while it leads, `core.Core` what the driver calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prism_control.raft.configuration import ConfigurationHistory
from prism_control.raft.errors import InvariantError
from prism_control.raft.member import MemberState
from prism_control.raft.types import (
    NOBODY,
    AppendReply,
    AppendRequest,
    Heartbeat,
    HeartbeatReply,
    ReadIndexReply,
    ReadState,
    Role,
    SnapshotRequest,
    VoteReply,
    VoteRequest,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prism_control.raft.types import Entry, MemberId, Message, SnapshotMeta, TimeoutNow

#: Only a leader of its term sends these.
_FROM_LEADER = (AppendRequest, Heartbeat, SnapshotRequest)


class FollowerState(MemberState):
    """Answers candidates, and follows a leader."""

    __slots__ = ()

    # ------------------------------------------------------------------ terms

    def _adopt_term(self, message: Message) -> bool:
        """Deal with a term above one's own (§5.1); return whether to go on with the message."""
        if isinstance(message, VoteRequest):
            # A member that was removed or cut off must not depose a leader that others hear
            # (thesis 4.2.3 and 9.6), unless that leader wants it.
            if self._hears_leader() and not message.transfer:
                return False
            if message.pre_vote:
                return True
        elif isinstance(message, VoteReply):
            if message.pre_vote and message.granted:
                return True
            # A refusal of a campaign that is over: since then somebody was elected. If the sender
            # is still needed, its answers to the leader say its term as well.
            if self._hears_leader():
                return False
        elif isinstance(message, AppendReply | HeartbeatReply) and self._has_removed(
            message.sender
        ):
            # It answers what it was sent before. It may have campaigned once, and the others would
            # have to elect anew for nothing.
            return False
        leader = message.sender if isinstance(message, _FROM_LEADER) else NOBODY
        self._become_follower(message.term, leader)
        return True

    def _has_removed(self, member: MemberId) -> bool:
        """Whether this member leads, and `member` belongs to the cluster no more."""
        return self.role is Role.LEADER and member not in self.configuration.ids()

    def _answer_stale(self, message: Message) -> None:
        """Answer a sender of an old term, so that it learns the present one (§5.1).

        Without it a member that campaigned in vain while cut off would ignore the leader of
        the older term for ever, and pre-vote and lease would keep it from being elected.
        """
        me, sender = self.config.id, message.sender
        if isinstance(message, VoteRequest):
            reply: Message = VoteReply(me, sender, self.term, message.pre_vote, granted=False)
        elif isinstance(message, _FROM_LEADER):
            reply = HeartbeatReply(me, sender, self.term)
        else:
            return
        self._outbox.send_after_persist(reply)

    # ------------------------------------------------------------------ votes

    def _handle_vote_request(self, message: VoteRequest) -> None:
        if message.pre_vote:
            may_vote = message.term > self.term
        else:
            may_vote = self.vote == message.sender or (
                self.vote == NOBODY and self.leader == NOBODY
            )
        granted = may_vote and self.log.is_up_to_date(message.last_index, message.last_term)
        if granted and not message.pre_vote:
            self.vote = message.sender
            self._election.elapsed = 0
        term = message.term if granted else self.term
        self._outbox.send_after_persist(
            VoteReply(self.config.id, message.sender, term, message.pre_vote, granted)
        )

    def _handle_vote_reply(self, message: VoteReply) -> None:
        if message.pre_vote:
            if self.role is not Role.PRE_CANDIDATE:
                return
            if message.granted and message.term != self.term + 1:
                return
        elif self.role is not Role.CANDIDATE:
            return
        self._count_vote(message.sender, message.granted)

    def _handle_timeout_now(self, message: TimeoutNow) -> None:
        if message.sender == self.leader and self._may_campaign:
            self._campaign(Role.CANDIDATE, transfer=True)

    # ------------------------------------------------------------------ following

    def _handle_append_request(self, message: AppendRequest) -> None:
        self._follow(message.sender)
        log = self.log
        previous_index, entries = message.previous_index, message.entries
        if previous_index < self.commit:
            # What is committed is equal everywhere, and may be compacted away here.
            entries = entries[self.commit - previous_index :]
            previous_index = self.commit
        elif log.term_at(previous_index) != message.previous_term:
            self._reject_append(message)
            return
        known = log.first_conflict(entries)
        if known < len(entries):
            self._write(entries[known:])
        last_new = previous_index + len(entries)
        self._commit_to(min(message.commit, last_new))
        self._outbox.send_after_persist(
            AppendReply(self.config.id, message.sender, self.term, rejected=False, index=last_new)
        )

    def _write(self, entries: Sequence[Entry]) -> None:
        """Append a leader's entries, first cutting what conflicts with them (§5.3)."""
        first = entries[0].index
        if first <= self.commit:
            raise InvariantError(f"entry {first} is committed, yet the leader has another")
        if first <= self.log.last_index:
            self.log.truncate(first)
            self._configurations.truncate(first)
        self.log.append(entries)
        self._configurations.append(entries)

    def _reject_append(self, message: AppendRequest) -> None:
        """Refuse entries that do not join the log, with a hint where they may (end of §5.3)."""
        hint_index = self.log.last_index_of_term(message.previous_index, message.previous_term)
        hint_index = max(hint_index, self.commit)
        hint_term = self.log.term_at(hint_index)
        if hint_term is None:
            raise InvariantError(f"the term of entry {hint_index} is unknown")
        self._outbox.send_after_persist(
            AppendReply(
                self.config.id,
                message.sender,
                self.term,
                rejected=True,
                index=message.previous_index,
                hint_index=hint_index,
                hint_term=hint_term,
            )
        )

    def _handle_heartbeat(self, message: Heartbeat) -> None:
        self._follow(message.sender)
        self._commit_to(message.commit)
        self._outbox.send_after_persist(
            HeartbeatReply(
                self.config.id,
                message.sender,
                self.term,
                message.read_context,
                self.config.command_version,
            )
        )

    def _handle_snapshot_request(self, message: SnapshotRequest) -> None:
        self._follow(message.sender)
        meta = message.meta
        if meta.index > self.commit:
            if self.log.term_at(meta.index) == meta.term:
                self._commit_to(meta.index)
            else:
                self._restore(meta)
        self._outbox.send_after_persist(
            AppendReply(
                self.config.id, message.sender, self.term, rejected=False, index=self.commit
            )
        )

    def _restore(self, meta: SnapshotMeta) -> None:
        """Let a snapshot take the place of the log and of the state machine (§7)."""
        self.log.reset(meta.index, meta.term)
        self._configurations = ConfigurationHistory(meta)
        self.snapshot = meta
        self._received_snapshot = meta
        self.commit = meta.index
        self._applying = meta.index

    def _handle_read_index_reply(self, message: ReadIndexReply) -> None:
        if self._forwarded_reads.answered(message.context):
            self._outbox.read(ReadState(message.context, message.index))
