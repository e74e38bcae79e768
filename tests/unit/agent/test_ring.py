"""Rings as whoever has taken over a sandbox's own kernel may have written them."""

import os
import struct
from pathlib import Path

import pytest

from prism_agent.exec_record import Exec, ExecRecord
from prism_agent.output_room import OutputRoom
from prism_agent.supervisor.protocol import (
    MAGIC,
    RECORDS_MAX,
    ProtocolError,
    RingHeader,
    State,
    decode_records,
)
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


def test_output_of_byte_after_byte_is_read_some_thousand_records_at_a_time() -> None:
    record, count = struct.Struct("=IIQQ"), RECORDS_MAX + 100
    content = b"".join(record.pack(1, 1, number + 1, 0) + b"x" for number in range(count))
    first = decode_records(content, 0)
    assert len(first) == RECORDS_MAX
    end = first[-1].offset
    rest = decode_records(content[end:], end)
    assert [each.sequence for each in first + rest] == list(range(1, count + 1))
    assert rest[-1].offset == len(content)


def test_an_unreadable_ring_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = ExecRecord(
        exec_id="ex-1", number=1, request_id="rq-1", digest="", argv=["true"],
        start_time_s=0.0, oom_kills=0, stdin=False,
    )  # fmt: skip
    each = Exec(OutputRoom(tmp_path), record)
    each.ring_path.write_bytes(b"short")
    for _ in range(3):
        assert each.refresh() is None
    assert [told.message for told in caplog.records] == ["unreadable output"]
