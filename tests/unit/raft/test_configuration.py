from __future__ import annotations

import pytest

from prism_control.raft.configuration import ConfigurationHistory, bootstrap
from prism_control.raft.entry_codec import encode_configuration
from prism_control.raft.errors import CorruptEntryError
from prism_control.raft.types import Configuration, Entry, EntryKind, SnapshotMeta
from tests.unit.raft.harness import entry

A, B, C = (Configuration(voters=voters) for voters in ((1,), (1, 2), (1, 2, 3)))


def configures(index: int, configuration: Configuration) -> Entry:
    return Entry(index, 1, EntryKind.CONFIGURATION, encode_configuration(configuration))


def make_history() -> ConfigurationHistory:
    history = ConfigurationHistory(SnapshotMeta(2, 1, A))
    history.append([entry(3, 1), configures(4, B), entry(5, 1), configures(6, C)])
    return history


def test_a_configuration_is_in_force_once_it_is_in_the_log() -> None:
    """§6: a server always uses the latest configuration in its log, committed or not."""
    assert make_history().current == C


def test_truncation_brings_the_configuration_before_back() -> None:
    """Thesis 4.1."""
    history = make_history()
    history.truncate(7)
    assert history.current == C
    history.truncate(6)
    assert history.current == B
    history.truncate(3)
    assert history.current == A


def test_a_snapshot_carries_the_configuration_of_its_index() -> None:
    history = make_history()
    assert [history.at(index) for index in range(2, 8)] == [A, A, B, B, C, C]
    history.compact(5)
    assert [history.at(index) for index in range(5, 8)] == [B, C, C]
    history.truncate(6)
    assert history.current == B


def test_an_entry_that_holds_no_configuration_stops_the_member() -> None:
    with pytest.raises(CorruptEntryError):
        make_history().append([Entry(7, 1, EntryKind.CONFIGURATION, b"")])


def test_all_first_members_write_the_same() -> None:
    hard_state, first = bootstrap(C)
    assert (hard_state.term, hard_state.vote, hard_state.commit) == (1, 0, 1)
    assert (first.index, first.term) == (1, 1)
    history = ConfigurationHistory(SnapshotMeta())
    history.append([first])
    assert history.current == C
    assert bootstrap(C) == (hard_state, first)
