from __future__ import annotations

import pytest

from prism_control.raft.errors import InvariantError
from prism_control.raft.progress import Progress, ProgressState


def replicating(match: int = 0) -> Progress:
    progress = Progress(match + 1)
    progress.accepted(match)
    progress.become_replicate()
    return progress


def test_a_probe_waits_for_its_answer() -> None:
    progress = Progress(5)
    assert progress.may_send(9, 9)
    progress.sent(5, 10)
    assert not progress.may_send(9, 9)
    assert progress.accepted(5)
    assert progress.may_send(9, 9)


def test_the_window_is_bounded_in_messages() -> None:
    progress = replicating()
    progress.sent(1, 10)
    progress.sent(2, 10)
    assert progress.inflight_messages == 2
    assert not progress.may_send(2, 1000)
    assert progress.accepted(1)
    assert progress.may_send(2, 1000)
    assert progress.next == 3


def test_the_window_is_bounded_in_bytes() -> None:
    progress = replicating()
    progress.sent(3, 60)
    assert progress.may_send(9, 61)
    assert not progress.may_send(9, 60)
    progress.accepted(3)
    assert progress.inflight_bytes == 0
    assert progress.may_send(9, 60)


def test_one_answer_acknowledges_all_before_it() -> None:
    progress = replicating()
    for index in (1, 2, 3):
        progress.sent(index, 10)
    assert progress.accepted(2)
    assert (progress.inflight_messages, progress.inflight_bytes) == (1, 10)


def test_a_message_without_entries_takes_no_room() -> None:
    progress = replicating()
    progress.sent(0, 0)
    assert (progress.inflight_messages, progress.next) == (0, 1)


def test_match_never_goes_down() -> None:
    progress = replicating(7)
    assert not progress.accepted(5)
    assert not progress.accepted(7)
    assert progress.match == 7
    progress.become_probe(3)
    assert progress.next == 8


def test_rejections_of_messages_that_no_longer_matter_are_stale() -> None:
    progress = replicating(7)
    assert progress.is_stale_rejection(7)
    assert not progress.is_stale_rejection(8)
    progress.become_probe(9)
    assert progress.is_stale_rejection(7)
    assert not progress.is_stale_rejection(8)
    progress.become_snapshot(20)
    assert progress.is_stale_rejection(8)
    assert not progress.may_send(9, 9)


def test_a_retry_is_due_once_per_heartbeat() -> None:
    progress = Progress(1)
    progress.sent(1, 10)
    assert not progress.take_retry()
    assert progress.probe_sent
    progress.retry_due = True
    assert not progress.take_retry()
    assert not progress.probe_sent
    progress = replicating()
    progress.retry_due = True
    assert progress.take_retry()
    assert not progress.take_retry()


def test_broken_fields_are_noticed() -> None:
    progress = replicating(3)
    progress.check(3)
    with pytest.raises(InvariantError, match=r"progress is broken: Progress\(REPLICATE, match=3"):
        progress.check(2)
    progress.state = ProgressState.SNAPSHOT
    with pytest.raises(InvariantError):
        progress.check(3)
