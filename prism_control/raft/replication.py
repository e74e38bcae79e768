"""A leader's view of its followers; lives as long as its leadership (§5.3, figure 2).

A new leader makes a new one, so nothing of an earlier term can be left over in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prism_control.raft import quorum
from prism_control.raft.errors import InvariantError
from prism_control.raft.progress import Progress, ProgressState
from prism_control.raft.reads import LeaderReads
from prism_control.raft.types import AppendRequest, Heartbeat, SnapshotRequest

if TYPE_CHECKING:
    from prism_control.raft.config import Limits
    from prism_control.raft.log import Log
    from prism_control.raft.outbox import Outbox
    from prism_control.raft.types import (
        AppendReply,
        Configuration,
        Entry,
        HeartbeatReply,
        MemberId,
        SnapshotMeta,
    )


class Replication:
    """Brings every follower's log up to the leader's, and tells what a quorum has."""

    __slots__ = (
        "_configuration",
        "_heartbeat_elapsed",
        "_id",
        "_limits",
        "_log",
        "_outbox",
        "_term",
        "announces_commit",
        "progress",
        "reads",
        "uncommitted_bytes",
    )

    def __init__(
        self,
        id: MemberId,
        term: int,
        configuration: Configuration,
        log: Log,
        outbox: Outbox,
        limits: Limits,
    ) -> None:
        self._id = id
        self._term = term
        self._configuration = configuration
        self._log = log
        self._outbox = outbox
        self._limits = limits
        self._heartbeat_elapsed = 0
        #: Everybody in the configuration; and the leader, even when it is removed (§6), whose
        #: match is what it has on disk.
        self.progress: dict[MemberId, Progress] = {
            member: Progress(log.last_index + 1) for member in sorted({*configuration.ids(), id})
        }
        self.progress[id].accepted(log.persisted)
        #: Reads that wait for a quorum to confirm this leadership.
        self.reads = LeaderReads()
        #: Data of all entries past the commit index.
        self.uncommitted_bytes = 0
        #: Followers are told of the commit index now, though no entry goes to them.
        self.announces_commit = False

    def configure(self, configuration: Configuration) -> None:
        """Use `configuration`, which the leader has just appended, from now on (§6)."""
        self._configuration = configuration
        # A new member is sent the configuration that names it, without waiting for another entry.
        known, next_index = self.progress, self._log.last_index
        self.progress = {
            member: known.get(member) or Progress(next_index)
            for member in sorted({*configuration.ids(), self._id})
        }

    def most_advanced_voter(self) -> MemberId:
        """Return the other voter with the longest log; the first of them if several have it."""
        others = [member for member in self._configuration.voters if member != self._id]
        return max(others, key=lambda member: self.progress[member].match)

    def persisted(self, index: int) -> None:
        """Take note that the leader's own log is durable up to `index` (thesis 10.2.1)."""
        self.progress[self._id].accepted(index)

    def quorum_index(self) -> int:
        """Return the greatest index that a quorum has on disk."""
        progress = self.progress
        return quorum.reached_index(self._configuration, lambda member: progress[member].match)

    def quorum_read_round(self) -> int:
        """Return the newest round of reads that a quorum, the leader included, has confirmed."""
        progress = self.progress
        progress[self._id].read_round = self.reads.number
        return quorum.reached_index(self._configuration, lambda member: progress[member].read_round)

    def take_quorum_active(self) -> bool:
        """Return whether a quorum was heard since the last call (check-quorum, thesis 6.2)."""
        active = {
            member: progress.recent_active or member == self._id
            for member, progress in self.progress.items()
        }
        for progress in self.progress.values():
            progress.recent_active = False
        return quorum.vote_result(self._configuration, active) is quorum.VoteResult.WON

    def tick(self, heartbeat_ticks: int, commit: int) -> None:
        """Let a tick pass; send heartbeats when they are due."""
        for progress in self.progress.values():
            progress.silent_ticks += 1
        self._heartbeat_elapsed += 1
        if self._heartbeat_elapsed < heartbeat_ticks:
            return
        self._heartbeat_elapsed = 0
        for member, progress in self.progress.items():
            if member != self._id:
                progress.retry_due = True
                self._send_heartbeat(member, progress, commit)

    def start_read_round(self, commit: int) -> None:
        """Ask everybody at once to confirm this leadership, if reads wait for it."""
        if self.reads.start_round(commit):
            for member, progress in self.progress.items():
                if member != self._id:
                    self._send_heartbeat(member, progress, commit)

    def send_all(self, commit: int, snapshot: SnapshotMeta) -> None:
        """Send each follower what it lacks, as far as its window allows."""
        for member, progress in self.progress.items():
            if member != self._id:
                self._send_entries(member, progress, commit, snapshot)
                if self.announces_commit and min(progress.match, commit) > progress.commit_sent:
                    self._send_heartbeat(member, progress, commit)
        self.announces_commit = False

    def append_replied(self, reply: AppendReply) -> bool:
        """Take note of a follower's answer; return whether its match has gone up.

        Raises:
            InvariantError: It claims entries that the leader does not have.
        """
        progress = self.progress.get(reply.sender)
        if progress is None:
            return False
        progress.heard()
        if reply.rejected:
            if not progress.is_stale_rejection(reply.index):
                agreed = self._log.last_index_of_term(reply.hint_index, reply.hint_term)
                progress.become_probe(min(agreed + 1, reply.index))
            return False
        if reply.index > self._log.last_index:
            raise InvariantError(
                f"member {reply.sender} acknowledges {reply.index}, past {self._log.last_index}"
            )
        if not progress.accepted(reply.index):
            return False
        # It has the snapshot, or no longer needs it; the transport's report may come later.
        has_snapshot = reply.index >= min(progress.pending_snapshot, self._log.base_index)
        if progress.state is ProgressState.PROBE or (
            progress.state is ProgressState.SNAPSHOT and has_snapshot
        ):
            progress.become_replicate()
        return True

    def heartbeat_replied(self, reply: HeartbeatReply) -> None:
        """Take note that a follower is there, and of the round of reads that it confirms."""
        progress = self.progress.get(reply.sender)
        if progress is None:
            return
        progress.heard()
        progress.read_round = max(progress.read_round, reply.read_context)
        progress.command_version = reply.command_version
        if progress.take_retry() and progress.match < self._log.last_index:
            # If what was sent ahead is lost, then the follower will reject this.
            previous_term = self._log.term_at(progress.next - 1)
            if previous_term is None:
                progress.become_probe(progress.match + 1)
            else:
                self._send_append(reply.sender, progress, previous_term, (), 0)

    def report_unreachable(self, member: MemberId) -> None:
        """Stop sending ahead: the transport has lost messages to `member`."""
        progress = self.progress.get(member)
        if progress is not None and progress.state is ProgressState.REPLICATE:
            progress.become_probe(progress.match + 1)

    def report_snapshot(self, member: MemberId, ok: bool) -> None:
        """Go on after a snapshot was sent, or was not; the next heartbeat's answer starts it."""
        progress = self.progress.get(member)
        if progress is not None and progress.state is ProgressState.SNAPSHOT:
            progress.become_probe(progress.pending_snapshot + 1 if ok else progress.match + 1)
            progress.probe_sent = True

    def _send_entries(
        self, member: MemberId, progress: Progress, commit: int, snapshot: SnapshotMeta
    ) -> None:
        log, limits = self._log, self._limits
        while progress.next <= log.last_index and progress.may_send(
            limits.inflight_messages_max, limits.inflight_bytes_max
        ):
            previous_term = log.term_at(progress.next - 1)
            if previous_term is None:
                self._send_snapshot(member, progress, snapshot)
                return
            entries, size_bytes = log.bounded_slice(
                progress.next, log.last_index, limits.append_bytes_max
            )
            self._send_append(member, progress, previous_term, entries, commit)
            progress.sent(entries[-1].index, size_bytes)

    def _send_append(
        self,
        member: MemberId,
        progress: Progress,
        previous_term: int,
        entries: tuple[Entry, ...],
        commit: int,
    ) -> None:
        previous_index = progress.next - 1
        self._outbox.send_now(
            AppendRequest(
                self._id, member, self._term, previous_index, previous_term, entries, commit
            )
        )
        told = min(commit, previous_index + len(entries))
        progress.commit_sent = max(progress.commit_sent, told)

    def _send_heartbeat(self, member: MemberId, progress: Progress, commit: int) -> None:
        # Past its match a follower may hold other entries, which are not committed at all.
        told = min(progress.match, commit)
        progress.commit_sent = max(progress.commit_sent, told)
        self._outbox.send_now(Heartbeat(self._id, member, self._term, told, self.reads.number))

    def _send_snapshot(self, member: MemberId, progress: Progress, meta: SnapshotMeta) -> None:
        # One that is not there would only keep the transport busy.
        if progress.recent_active:
            progress.become_snapshot(meta.index)
            self._outbox.send_now(SnapshotRequest(self._id, member, self._term, meta))
