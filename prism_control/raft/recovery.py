"""Making one member the whole cluster after the others are lost for good.

This is no part of Raft, and it is not safe: what the other members had committed and this one had
not yet received is lost, though it was acknowledged; what this one holds beyond what it knew
to be committed becomes committed, though perhaps another entry was. If one of the others still
runs, or is started again with its old disk, there are two clusters. So it is for people, offline,
when a majority of the voters will never come back, on the surviving member whose log ends last
(compare term first, then index: `Recovery.last`). All other disks must be wiped, and their
members added again under new ids; writing a new cluster id keeps forgotten ones out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prism_control.raft import entry_codec
from prism_control.raft.configuration import ConfigurationHistory
from prism_control.raft.errors import InvalidRequestError
from prism_control.raft.types import NOBODY, Configuration, Entry, EntryKind, HardState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prism_control.raft.types import MemberId, SnapshotMeta


@dataclass(frozen=True, slots=True)
class Recovery:
    """What to write, in one transaction, and what to tell whoever asked.

    Attributes:
        hard_state: Replaces the stored one.
        entries: To append to the stored log, none of which is cut.
        before: The configuration that was in force.
        after: The one that is: this member, and nobody else.
        last: Term and index of the last entry that was stored; the survivor with the greatest is
            the one to recover.
        uncommitted_entries: How many stored entries were not known to be committed, and will be.
    """

    hard_state: HardState
    entries: tuple[Entry, ...]
    before: Configuration
    after: Configuration
    last: tuple[int, int]
    uncommitted_entries: int


def recover(
    hard_state: HardState, snapshot: SnapshotMeta, entries: Sequence[Entry], member: MemberId
) -> Recovery:
    """Return what makes `member`, whose disk holds the rest, the only voter.

    The log stays as it is, and a configuration entry of a new term comes after it. At its next
    start the member is the only voter, so that it leads and commits all of it at once.

    Args:
        hard_state: As stored.
        snapshot: The newest one stored, or `SnapshotMeta()`.
        entries: All that are stored, ascending, decoded and thereby verified.
        member: The id on that disk.

    Raises:
        InvalidRequestError: Nothing is stored, or `member` was not in the configuration.
        CorruptEntryError: A CONFIGURATION entry holds none.
    """
    history = ConfigurationHistory(snapshot)
    history.append(entry for entry in entries if entry.index > snapshot.index)
    before = history.current
    if member not in before.ids():
        raise InvalidRequestError(f"member {member:016x} is not in the configuration it has stored")
    last_term, last_index = snapshot.term, snapshot.index
    if entries and entries[-1].index > last_index:
        last_term, last_index = entries[-1].term, entries[-1].index
    after = Configuration(
        voters=(member,), members=tuple(m for m in before.members if m.id == member)
    )
    # Above every term in which this member has voted, so that its vote is free.
    term = max(hard_state.term, last_term) + 1
    commit = max(hard_state.commit, snapshot.index)
    data = entry_codec.encode_configuration(after)
    return Recovery(
        hard_state=HardState(term, NOBODY, commit),
        entries=(Entry(last_index + 1, term, EntryKind.CONFIGURATION, data),),
        before=before,
        after=after,
        last=(last_term, last_index),
        uncommitted_entries=last_index - commit,
    )
