"""One survivor becomes the whole cluster."""

from __future__ import annotations

from random import Random

import pytest

from prism_control.raft.config import CoreConfig
from prism_control.raft.configuration import bootstrap
from prism_control.raft.core import Core
from prism_control.raft.errors import InvalidRequestError
from prism_control.raft.recovery import recover
from prism_control.raft.types import Configuration, HardState, Member, Role, SnapshotMeta
from tests.unit.raft.harness import drain, entry, role_of

MEMBERS = tuple(Member(id_, f"n{id_}", f"h{id_}:1", "") for id_ in (1, 2, 3))
BEFORE = Configuration(voters=(1, 2, 3), members=MEMBERS)


def test_the_survivor_leads_alone_and_keeps_its_whole_log() -> None:
    _, first = bootstrap(BEFORE)
    stored = [first, entry(2, 1), entry(3, 4)]
    recovery = recover(HardState(7, 3, 2), SnapshotMeta(), stored, 2)
    assert recovery.before == BEFORE
    assert recovery.after == Configuration(voters=(2,), members=MEMBERS[1:2])
    assert recovery.last == (4, 3)
    assert recovery.uncommitted_entries == 1
    assert recovery.hard_state == HardState(8, 0, 2)
    core = Core(
        CoreConfig(2), Random(2), recovery.hard_state, SnapshotMeta(), [*stored, *recovery.entries]
    )
    drain(core)
    assert role_of(core) is Role.LEADER
    assert core.configuration == recovery.after
    assert core.commit == core.log.last_index == 5
    assert core.term == 9


def test_a_log_that_is_all_in_the_snapshot_is_enough() -> None:
    meta = SnapshotMeta(10, 3, BEFORE)
    recovery = recover(HardState(3, 1, 10), meta, [], 1)
    assert [(e.index, e.term) for e in recovery.entries] == [(11, 4)]
    trailing = recover(HardState(3, 1, 10), meta, [entry(9, 3), entry(10, 3)], 1)
    assert trailing == recovery


def test_a_member_that_was_in_no_configuration_cannot_be_recovered() -> None:
    with pytest.raises(InvalidRequestError, match="not in the configuration"):
        recover(HardState(), SnapshotMeta(), [], 1)
