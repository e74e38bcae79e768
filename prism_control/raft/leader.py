"""What a member does while it leads (§5.3, §5.4, §6, §8, thesis 3.10).

Changes of the configuration, in short: only one at a time, only by a leader that has committed an
entry of its own term, and a change of voters always by way of a joint configuration, which
the leader leaves as soon as it is committed. Learners that have caught up become voters by
themselves. A leader that is not in the configuration which it has committed hands over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prism_control.raft import confchange, entry_codec, quorum
from prism_control.raft.confchange import ConfigurationChange
from prism_control.raft.errors import (
    InvalidRequestError,
    NotLeaderError,
    NotReadyError,
)
from prism_control.raft.follower import FollowerState
from prism_control.raft.transfer import Transfer
from prism_control.raft.types import (
    NOBODY,
    Entry,
    EntryKind,
    ReadIndexReply,
    ReadState,
    TimeoutNow,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prism_control.raft.replication import Replication
    from prism_control.raft.types import (
        AppendReply,
        Configuration,
        HeartbeatReply,
        MemberId,
        ReadIndexRequest,
    )


class LeaderState(FollowerState):
    """Replicates, commits, confirms reads, changes the configuration, and hands over."""

    __slots__ = ()

    # ------------------------------------------------------------------ leading

    def _tick_leader(self, replication: Replication) -> None:
        if self._election.is_past_minimum:
            self._election.elapsed = 0
            if not replication.take_quorum_active():
                self._become_follower(self.term, NOBODY)
                return
        replication.tick(self.config.heartbeat_ticks, self.commit)
        if self.config.promotes_learners:
            self._promote_learners(replication)

    def _handle_append_reply(self, message: AppendReply) -> None:
        replication = self.replication
        if replication is not None and replication.append_replied(message):
            self._commit_by_quorum(replication)

    def _handle_heartbeat_reply(self, message: HeartbeatReply) -> None:
        if self.replication is not None:
            self.replication.heartbeat_replied(message)

    def _commit_by_quorum(self, replication: Replication) -> None:
        """Commit what a quorum has on disk, if it is of this leader's own term (§5.4.2).

        Copies of an earlier term's entry prove nothing: a later leader may still replace it
        (figure 8). It is committed along with an entry of the present term.
        """
        index = replication.quorum_index()
        if index > self.commit and self.log.term_at(index) == self.term:
            self._commit_to(index)

    def _send_as_leader(self, replication: Replication) -> None:
        if self._has_committed_in_own_term:
            # Before that, committed entries of earlier terms may still be unknown here.
            replication.start_read_round(self.commit)
            self._release_reads(replication)
            self._finish_change(replication)
        if self._is_removed:
            # It lets go below, and the others must know by then what is committed.
            replication.announces_commit = True
        replication.send_all(self.commit, self.snapshot)
        if self._transfer is not None and self._transfer.is_due(replication, self.log.last_index):
            self._outbox.send_now(TimeoutNow(self.config.id, self._transfer.to, self.term))
        if self._is_removed:
            self._hand_over(replication)

    def announce_commit(self) -> None:
        """Tell followers of the commit index, unless entries have carried it to them by now.

        They learn it from the next entries or heartbeat anyway. To tell each of every commit at
        once would double the messages: under load the next entries follow at once.
        """
        if self.replication is not None:
            self.replication.announces_commit = True

    @property
    def _has_committed_in_own_term(self) -> bool:
        return self.log.term_at(self.commit) == self.term

    def _append(self, replication: Replication, kind: EntryKind, datas: Sequence[bytes]) -> range:
        """Append entries of this leader's term; return their indexes."""
        first, term = self.log.last_index + 1, self.term
        entries = [Entry(index, term, kind, data) for index, data in enumerate(datas, first)]
        self.log.append(entries)
        replication.uncommitted_bytes += sum(map(len, datas))
        return range(first, first + len(datas))

    # ------------------------------------------------------------------ the configuration

    def propose_configuration(self, change: ConfigurationChange) -> int:
        """Begin to change who decides (§6, thesis 4.3).

        Returns:
            The index of the first entry of the change. Once an entry with this index and the
            *present* `term` comes out of `Ready.committed`, the change is decided: this
            leader or a later one completes it. Another term there means that it is lost.
            `is_settled` tells when it is complete.

        Raises:
            NotLeaderError: This member does not lead.
            InvalidRequestError: The change makes no sense in the present configuration.
            NotReadyError: Not now; nothing was proposed. Try again later.
        """
        replication = self.replication
        if replication is None:
            raise NotLeaderError(self.leader)
        if self._transfer is not None:
            raise NotReadyError("leadership is being handed over")
        # The known fix of changes by two leaders in turn, which also makes this leader know
        # whether the change before its term was committed.
        if not self._has_committed_in_own_term:
            raise NotReadyError("this leader has not committed an entry of its term yet")
        if not self.is_settled:
            raise NotReadyError("another change of the configuration is under way")
        configuration = confchange.begin(self.configuration, change)
        for member in change.promote:
            if not self._is_caught_up(replication, member):
                raise NotReadyError(f"learner {member:016x} has not caught up")
        if not self._is_quorum_alive(replication, configuration):
            raise NotReadyError("most voters of the new configuration are not heard of")
        return self._enter(replication, configuration)

    @property
    def is_settled(self) -> bool:
        """Whether the configuration in force is committed, and no change is half done."""
        is_committed = self._configurations.current_index <= self.commit
        return is_committed and not self.configuration.is_joint

    def caught_up_learners(self) -> tuple[MemberId, ...]:
        """Return the learners that may be promoted now; none unless this member leads."""
        replication = self.replication
        if replication is None:
            return ()
        learners = self.configuration.learners
        return tuple(member for member in learners if self._is_caught_up(replication, member))

    def _is_caught_up(self, replication: Replication, member: MemberId) -> bool:
        progress = replication.progress[member]
        lag_entries = self.log.last_index - progress.match
        return (
            progress.silent_ticks <= self.config.election_ticks
            and progress.match > 0
            and lag_entries <= self._limits.promotion_lag_entries_max
        )

    def _is_quorum_alive(self, replication: Replication, configuration: Configuration) -> bool:
        """Whether a change to `configuration` can be expected to commit (thesis 4.2.2)."""
        known = replication.progress
        alive = {
            member: member == self.config.id
            or (member in known and known[member].silent_ticks <= self.config.election_ticks)
            for member in configuration.ids()
        }
        return quorum.vote_result(configuration, alive) is quorum.VoteResult.WON

    def _enter(self, replication: Replication, configuration: Configuration) -> int:
        """Append a configuration, which is in force at once."""
        data = entry_codec.encode_configuration(configuration)
        index = self._append(replication, EntryKind.CONFIGURATION, [data]).start
        self._configurations.append(self.log.slice(index, index))
        replication.configure(configuration)
        return index

    def _promote_learners(self, replication: Replication) -> None:
        """Make voters of the learners that have caught up, if nothing else is under way."""
        learners = self.caught_up_learners()
        if not learners or self._transfer is not None:
            return
        if not (self._has_committed_in_own_term and self.is_settled):
            return
        change = ConfigurationChange(promote=learners)
        configuration = confchange.begin(self.configuration, change)
        if self._is_quorum_alive(replication, configuration):
            self._enter(replication, configuration)

    def _finish_change(self, replication: Replication) -> None:
        """Leave a joint configuration that is committed (§6); any leader may, and must."""
        is_committed = self._configurations.current_index <= self.commit
        if self.configuration.is_joint and is_committed and self._transfer is None:
            self._enter(replication, confchange.leave(self.configuration))

    @property
    def _is_removed(self) -> bool:
        """Whether the configuration without this member is committed (§6, thesis 4.2.2)."""
        is_committed = self._configurations.current_index <= self.commit
        return is_committed and not self.configuration.is_voter(self.config.id)

    def _hand_over(self, replication: Replication) -> None:
        """Let go: the others have been told, and the best of them need not wait."""
        heir = replication.most_advanced_voter()
        self._outbox.send_now(TimeoutNow(self.config.id, heir, self.term))
        self._become_follower(self.term, NOBODY)

    # ------------------------------------------------------------------ transfer

    def transfer(self, to: MemberId) -> None:
        """Begin to hand leadership over (thesis 3.10).

        Until it ends, proposals are refused, which lets the other member catch up with this
        one's last entry. The end comes as `Ready.transfer`, within an election timeout.

        Raises:
            NotLeaderError: This member does not lead.
            InvalidRequestError: `to` leads already, or is no voter.
            NotReadyError: Another transfer, or a change, is under way, or `to` is not heard of.
        """
        replication = self.replication
        if replication is None:
            raise NotLeaderError(self.leader)
        if to == self.config.id:
            raise InvalidRequestError("this member leads already")
        if to not in self.configuration.voters:
            raise InvalidRequestError(f"member {to:016x} is no voter")
        if self._transfer is not None:
            raise NotReadyError("leadership is being handed over already")
        if not self.is_settled:
            raise NotReadyError("a change of the configuration is under way")
        if not self._is_caught_up(replication, to):
            raise NotReadyError(f"member {to:016x} is not heard of, or far behind")
        self._transfer = Transfer(to, self.term, self.config.election_ticks)

    # ------------------------------------------------------------------ reads

    def _add_read(self, replication: Replication, requester: MemberId, context: int) -> None:
        if replication.reads.length < self._limits.reads_waiting_max:
            replication.reads.add(requester, context)
        elif requester == self.config.id:
            self._outbox.drop_reads([context])

    def _release_reads(self, replication: Replication) -> None:
        if not replication.reads.length:
            return
        for read, index in replication.reads.confirm(replication.quorum_read_round()):
            if read.requester == self.config.id:
                self._outbox.read(ReadState(read.context, index))
            else:
                self._outbox.send_now(
                    ReadIndexReply(self.config.id, read.requester, self.term, read.context, index)
                )

    def _handle_read_index_request(self, message: ReadIndexRequest) -> None:
        if self.replication is not None:
            self._add_read(self.replication, message.sender, message.context)
