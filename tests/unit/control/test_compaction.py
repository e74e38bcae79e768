"""When snapshots are due, and how they are written beside the loop."""

import itertools

import pytest

from prism_control.node import compaction
from prism_control.node.compaction import paced, share_of


def test_no_two_voters_take_their_snapshots_at_the_same_entry():
    voters = (70, 10, 60, 20, 90, 50, 80, 30, 40)
    shares = sorted(share_of(voter, voters) for voter in voters)
    assert all(after - before > 0.05 for before, after in itertools.pairwise(shares))
    assert shares[0] == compaction._SHARE_MIN
    assert shares[-1] == share_of(99, voters) == 1


def test_a_large_snapshot_lets_others_have_their_turns(monkeypatch: pytest.MonkeyPatch):
    pauses: list[float] = []
    monkeypatch.setattr(compaction.time, "sleep", pauses.append)
    small = [b"header", b"x" * 1000, b"end"]
    assert list(paced(small)) == small
    assert not pauses
    large = [bytes(100_000)] * 100
    assert list(paced(large)) == large
    assert len(pauses) == 33
