"""Rings as whoever has taken over a sandbox's own kernel may have written them."""

import os
import struct
from pathlib import Path

import pytest

from prism_agent.supervisor.protocol import MAGIC, ProtocolError, RingHeader, State
from prism_agent.supervisor.ring import Ring

_HEADER = struct.Struct("=QIIQQQQQQQiiiiiiQ")


@pytest.mark.parametrize(("capacity", "head"), [(0, 100), (2**64 - 1, 2**63), (2**33, 100)])
def test_a_ring_of_impossible_size_is_refused(tmp_path: Path, capacity: int, head: int) -> None:
    ring = Ring.create(tmp_path / "ring", 4096)
    numbers = (2, MAGIC, State.RUNNING, capacity, head, head - 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2)
    os.pwrite(ring.fileno(), _HEADER.pack(*numbers), 0)
    with pytest.raises(ProtocolError):
        ring.read(0)
    ring.close()


class _Running(Ring):
    """One whose tail is always ahead of its reader."""

    looks = 0

    def header(self) -> RingHeader:
        self.looks += 1
        end = self.looks * 1000
        return RingHeader(
            State.RUNNING, 4096, end + 500, end, 0, 0, 0, 0, 0, 0, super().header().reason, 0, False
        )


def test_a_ring_that_runs_away_holds_its_reader_up_no_longer_than_it_must(tmp_path: Path) -> None:
    Ring.create(tmp_path / "ring", 4096).close()
    ring = _Running.open(tmp_path / "ring")
    with pytest.raises(ProtocolError, match="faster"):
        ring.read(0)
    ring.close()
