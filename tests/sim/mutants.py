"""Known bugs of real systems, as patches to the core; the simulator must find each of them.

Within `active()` the core is wrong in one way. `seeds_max` is within how many seeds, from 0 on, the
simulator must have found it. One bug cannot be found here: a leader that counts itself before
its own write, because this driver never touches the core during a write; a unit test has it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from prism_control.raft import confchange, quorum
from prism_control.raft.configuration import ConfigurationHistory
from prism_control.raft.core import Core
from prism_control.raft.log import Log
from prism_control.raft.member import MemberState
from prism_control.raft.outbox import Outbox
from prism_control.raft.progress import Progress
from prism_control.raft.replication import Replication
from prism_control.raft.transfer import Transfer
from prism_control.raft.types import (
    NOBODY,
    Configuration,
    Entry,
    EntryKind,
    HardState,
    Heartbeat,
    HeartbeatReply,
    Ready,
    Role,
    SnapshotMeta,
    VoteReply,
    VoteRequest,
)
from prism_control.state.tables import Tables
from tests.sim.disk import Disk, Image, Snapshot, Transaction
from tests.sim.faults import Faults
from tests.sim.mutant import Mutant
from tests.sim.node import Node
from tests.sim.options import Options
from tests.sim.plane.mutants import PLANE_MUTANTS


def _acknowledge_before_persist(original: Any) -> Callable[..., Any]:
    def take_messages(self: Outbox, term_is_durable: bool) -> Any:
        now, after = original(self, term_is_durable)
        return now + after, ()

    return take_messages


def _count_earlier_terms(original: Any) -> Callable[..., Any]:
    def commit_by_quorum(self: Core, replication: Replication) -> None:
        self._commit_to(replication.quorum_index())

    return commit_by_quorum


def _commit_without_quorum(original: Any) -> Callable[..., Any]:
    def quorum_index(self: Replication) -> int:
        return self.progress[self._id].match

    return quorum_index


def _vote_not_persisted(original: Any) -> Callable[..., Any]:
    def changed_hard_state(self: Core) -> HardState | None:
        state = original(self)
        return state and HardState(state.term, NOBODY, state.commit)

    return changed_hard_state


def _refusal_counts_as_vote(original: Any) -> Callable[..., Any]:
    def count_vote(self: Core, member: int, granted: bool) -> None:
        original(self, member, True)

    return count_vote


def _pre_vote_counts_as_vote(original: Any) -> Callable[..., Any]:
    def handle_vote_reply(self: Core, message: VoteReply) -> None:
        if message.granted and message.pre_vote:
            self._count_vote(message.sender, True)
        else:
            original(self, message)

    return handle_vote_reply


def _always_truncate(original: Any) -> Callable[..., Any]:
    return lambda self, entries: 0


def _truncate_committed(original: Any) -> Callable[..., Any]:
    def write(self: Core, entries: Any) -> None:
        if entries[0].index <= self.log.last_index:
            # Without looking whether what is cut is committed.
            self.log.truncate(max(self.log.base_index + 1, entries[0].index - 2))
            entries = entries[:0]
        self.log.append(entries)
        self.commit = min(self.commit, self.log.last_index)

    return write


def _vote_twice(original: Any) -> Callable[..., Any]:
    def handle_vote_request(self: Core, message: VoteRequest) -> None:
        if not message.pre_vote and self.role is Role.FOLLOWER:
            self.vote = NOBODY
        original(self, message)

    return handle_vote_request


def _vote_for_an_old_log(original: Any) -> Callable[..., Any]:
    return lambda self, last_index, last_term: True


def _keep_messages_of_an_old_term(original: Any) -> Callable[..., Any]:
    def raise_term(self: MemberState, term: int) -> None:
        self.term = term
        self.vote = NOBODY

    return raise_term


def _send_in_a_term_not_durable(original: Any) -> Callable[..., Any]:
    return lambda self, term_is_durable: original(self, True)


def _late_answer_confirms_newer_reads(original: Any) -> Callable[..., Any]:
    def heartbeat_replied(self: Replication, reply: HeartbeatReply) -> None:
        original(self, HeartbeatReply(reply.sender, reply.receiver, reply.term, self.reads.number))

    return heartbeat_replied


def _read_without_confirmation(original: Any) -> Callable[..., Any]:
    return lambda self: self.reads.number


def _read_before_commit_in_own_term(original: Any) -> Callable[..., Any]:
    def send_as_leader(self: Core, replication: Replication) -> None:
        replication.start_read_round(self.commit)
        self._release_reads(replication)
        original(self, replication)

    return send_as_leader


def _heartbeat_commits_past_match(original: Any) -> Callable[..., Any]:
    def send_heartbeat(self: Replication, member: int, progress: Progress, commit: int) -> None:
        told = min(commit, progress.next - 1)
        self._outbox.send_now(Heartbeat(self._id, member, self._term, told, self.reads.number))

    return send_heartbeat


def _append_without_consistency_check(original: Any) -> Callable[..., Any]:
    def handle_append_request(self: Core, message: Any) -> None:
        term = self.log.term_at(message.previous_index)
        if term is not None and message.previous_index >= self.commit:
            object.__setattr__(message, "previous_term", term)
        original(self, message)

    return handle_append_request


def _commit_past_the_new_entries(original: Any) -> Callable[..., Any]:
    def handle_append_request(self: Core, message: Any) -> None:
        original(self, message)
        if message.previous_index >= self.log.base_index:
            self._commit_to(min(message.commit, self.log.last_index))

    return handle_append_request


def _learners_count(original: Any) -> Callable[..., Any]:
    def reached_index(self: Replication) -> int:
        progress = self.progress
        voters = self._configuration.ids()
        return quorum.majority_index(voters, lambda member: progress[member].match)

    return reached_index


def _only_the_incoming_majority_counts(original: Any) -> Callable[..., Any]:
    def reached_index(self: Replication) -> int:
        progress = self.progress
        voters = self._configuration.voters
        return quorum.majority_index(voters, lambda member: progress[member].match)

    return reached_index


def _pre_vote_raises_the_term(original: Any) -> Callable[..., Any]:
    def adopt_term(self: Core, message: Any) -> bool:
        if isinstance(message, VoteRequest):
            self._become_follower(message.term, NOBODY)
            return True
        adopted: bool = original(self, message)
        return adopted

    return adopt_term


def _transfer_to_anybody(original: Any) -> Callable[..., Any]:
    def transfer(self: Core, to: int) -> None:
        if self.replication is not None and to != self.config.id and self._transfer is None:
            self._transfer = Transfer(to, self.term, self.config.election_ticks)

    return transfer


def _transfer_before_caught_up(original: Any) -> Callable[..., Any]:
    def is_due(self: Transfer, replication: Replication, last_index: int) -> bool:
        sent, self._is_sent = self._is_sent, True
        return not sent

    return is_due


def _removed_leader_counts_itself(original: Any) -> Callable[..., Any]:
    def quorum_index(self: Replication) -> int:
        progress, voters = self.progress, {*self._configuration.voters, self._id}
        index = quorum.majority_index(sorted(voters), lambda member: progress[member].match)
        return index if not self._configuration.is_joint else original(self)

    return quorum_index


def _stale_membership_after_a_snapshot(original: Any) -> Callable[..., Any]:
    def restore(self: Core, meta: SnapshotMeta) -> None:
        before = self.configuration
        original(self, meta)
        self._configurations = ConfigurationHistory(replace(meta, configuration=before))

    return restore


def _membership_not_rolled_back(original: Any) -> Callable[..., Any]:
    return lambda self, index: None


def _snapshot_with_a_later_membership(original: Any) -> Callable[..., Any]:
    return lambda self, index: replace(original(self, index), configuration=self.configuration)


def _change_without_joint(original: Any) -> Callable[..., Any]:
    def enter(self: Core, replication: Replication, configuration: Configuration) -> int:
        index: int = original(self, replication, replace(configuration, voters_outgoing=()))
        return index

    return enter


def _leave_joint_before_it_is_committed(original: Any) -> Callable[..., Any]:
    def finish_change(self: Core, replication: Replication) -> None:
        if self.configuration.is_joint:
            self._enter(replication, confchange.leave(self.configuration))

    return finish_change


def _joint_is_never_left(original: Any) -> Callable[..., Any]:
    return lambda self, replication: None


def _removed_member_never_campaigns(original: Any) -> Any:
    return property(lambda self: self.configuration.is_voter(self.config.id))


def _removed_leader_stays(original: Any) -> Callable[..., Any]:
    return lambda self, replication: None


def _snapshot_moves_backwards(original: Any) -> Callable[..., Any]:
    def snapshot_saved(self: Core, meta: SnapshotMeta) -> None:
        self.snapshot = meta

    return snapshot_saved


def _go_on_after_a_failed_write(original: Any) -> Callable[..., Any]:
    def write_failed(self: Node, core: Core, ready: Ready, transaction: Transaction) -> None:
        self.disk._written.remove(transaction)
        self._persisted(core, ready, transaction)

    return write_failed


def _entries_not_verified(original: Any) -> Callable[..., Any]:
    def read_entries(self: Disk) -> list[Entry]:
        image = self.synced
        return [
            Entry(index, term, EntryKind.CONFIGURATION if kind == 2 else EntryKind(kind & 1), data)
            for index, (term, kind, data) in enumerate(
                ((t, e[1], e[24:]) for t, e in zip(image.terms, image.encoded, strict=True)),
                image.first_index,
            )
        ]

    return read_entries


def _wiped_member_keeps_its_id(original: Any) -> Callable[..., Any]:
    def wipe(self: Faults, node: Node) -> None:
        if node.core is not None and self._cluster.may_lose(node):
            node.crash()
            empty = Snapshot(SnapshotMeta(), self._cluster._fresh().freeze())
            node.disk.synced = Image(HardState(), empty, first_index=1)
            node.start()

    return wipe


def _request_ids_forgotten(original: Any) -> Callable[..., Any]:
    return lambda self, row: None


MUTANTS = (
    Mutant("acknowledge before persist", 5, Outbox, "take_messages", _acknowledge_before_persist),
    Mutant(
        "count earlier terms",
        300,
        Core,
        "_commit_by_quorum",
        _count_earlier_terms,
        Options.storm(3, "short_reigns"),
    ),
    Mutant("commit without quorum", 5, Replication, "quorum_index", _commit_without_quorum),
    Mutant(
        "vote not persisted",
        200,
        Core,
        "_changed_hard_state",
        _vote_not_persisted,
        Options.storm(5, "crash_in_election"),
    ),
    Mutant("refusal counts as vote", 20, MemberState, "_count_vote", _refusal_counts_as_vote),
    Mutant("pre-vote counts as vote", 50, Core, "_handle_vote_reply", _pre_vote_counts_as_vote),
    Mutant("old append truncates", 20, Log, "first_conflict", _always_truncate),
    Mutant("truncate committed entries", 20, Core, "_write", _truncate_committed),
    Mutant("vote twice in a term", 50, Core, "_handle_vote_request", _vote_twice),
    Mutant("vote for an old log", 50, Log, "is_up_to_date", _vote_for_an_old_log),
    Mutant(
        "keep messages of an old term",
        200,
        MemberState,
        "_raise_term",
        _keep_messages_of_an_old_term,
        Options.storm(5, "short_reigns"),
    ),
    Mutant("send in a term not durable", 20, Outbox, "take_messages", _send_in_a_term_not_durable),
    Mutant(
        "late answer confirms newer reads",
        200,
        Replication,
        "heartbeat_replied",
        _late_answer_confirms_newer_reads,
        replace(Options.storm(3, "isolate_leader", "short_reigns"), clients=5, pause_us=5_000),
    ),
    Mutant(
        "read without confirmation",
        100,
        Replication,
        "quorum_read_round",
        _read_without_confirmation,
        replace(Options.storm(3, "isolate_leader", "short_reigns"), clients=5, pause_us=5_000),
    ),
    Mutant(
        "read before a commit in its own term",
        200,
        Core,
        "_send_as_leader",
        _read_before_commit_in_own_term,
        replace(Options.storm(3, "isolate_leader", "short_reigns"), clients=5, pause_us=5_000),
    ),
    Mutant(
        "heartbeat commits past match",
        50,
        Replication,
        "_send_heartbeat",
        _heartbeat_commits_past_match,
    ),
    Mutant(
        "append without consistency check",
        50,
        Core,
        "_handle_append_request",
        _append_without_consistency_check,
    ),
    Mutant(
        "commit past the new entries",
        200,
        Core,
        "_handle_append_request",
        _commit_past_the_new_entries,
    ),
    Mutant(
        "learners count",
        200,
        Replication,
        "quorum_index",
        _learners_count,
        replace(Options.changes(2, "partition", "slow_disk"), promotes_learners=False),
    ),
    Mutant(
        "only the incoming majority counts",
        200,
        Replication,
        "quorum_index",
        _only_the_incoming_majority_counts,
    ),
    Mutant(
        "transfer to anybody",
        100,
        Core,
        "transfer",
        _transfer_to_anybody,
        replace(Options.changes(3), transfers=0.6, promotes_learners=False),
    ),
    Mutant(
        "transfer before the other has caught up",
        100,
        Transfer,
        "is_due",
        _transfer_before_caught_up,
        replace(Options.changes(3, "slow_disk"), transfers=0.6, pause_us=3_000),
    ),
    Mutant(
        "removed leader counts itself",
        200,
        Replication,
        "quorum_index",
        _removed_leader_counts_itself,
        Options.changes(3, "slow_disk", "partition"),
    ),
    Mutant(
        "stale membership after a snapshot",
        50,
        Core,
        "_restore",
        _stale_membership_after_a_snapshot,
    ),
    Mutant(
        "membership is not rolled back",
        200,
        ConfigurationHistory,
        "truncate",
        _membership_not_rolled_back,
        Options.changes(5, "isolate_leader"),
    ),
    Mutant(
        "snapshot with a later membership",
        200,
        Core,
        "snapshot_meta",
        _snapshot_with_a_later_membership,
        replace(Options.changes(3, "slow_disk"), snapshot_entries=5),
    ),
    Mutant("change without a joint configuration", 20, Core, "_enter", _change_without_joint),
    Mutant(
        "joint configuration left before it is committed",
        100,
        Core,
        "_finish_change",
        _leave_joint_before_it_is_committed,
        Options.changes(3, "partition", "slow_disk"),
    ),
    Mutant("joint configuration is never left", 20, Core, "_finish_change", _joint_is_never_left),
    Mutant(
        "removed member never campaigns",
        400,
        Core,
        "_may_campaign",
        _removed_member_never_campaigns,
        replace(Options.changes(2, "strike_changes"), promotes_learners=False),
    ),
    Mutant(
        "removed leader stays", 20, Core, "_hand_over", _removed_leader_stays, Options.changes(3)
    ),
    Mutant(
        "pre-vote of a removed member raises the term",
        50,
        Core,
        "_adopt_term",
        _pre_vote_raises_the_term,
        Options.changes(3),
    ),
    Mutant(
        "snapshot moves backwards",
        300,
        Core,
        "snapshot_saved",
        _snapshot_moves_backwards,
        replace(Options.changes(3, "isolate_leader", "slow_disk"), snapshot_entries=5),
    ),
    Mutant(
        "go on after a failed write",
        50,
        Node,
        "write_failed",
        _go_on_after_a_failed_write,
        Options.storm(3, "fail_disk", "crash"),
    ),
    Mutant(
        "entries not verified",
        100,
        Disk,
        "read_entries",
        _entries_not_verified,
        Options.storm(5, "flip_bit"),
    ),
    Mutant(
        "wiped member keeps its id",
        50,
        Faults,
        "wipe",
        _wiped_member_keeps_its_id,
        Options.storm(3, "wipe", "crash"),
    ),
    Mutant(
        "request ids forgotten",
        20,
        Tables,
        "remember",
        _request_ids_forgotten,
        replace(Options.storm(3, "crash"), with_prism=True),
    ),
)


ALL = (*MUTANTS, *PLANE_MUTANTS)


def main() -> int:
    """Try all mutants; return 1 if one survives."""
    survivors = 0
    for mutant in ALL:
        needed = mutant.seeds_needed()
        survivors += needed == 0
        print(f"{mutant.title:50} {needed or 'SURVIVED':>8} of {mutant.seeds_max}", flush=True)
    print(f"{len(ALL) - survivors} of {len(ALL)} found")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
