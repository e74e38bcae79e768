"""What is kept of execs that have ended."""

from pathlib import Path

import pytest
from prism.sandbox.v1 import sandbox_pb2

from prism_agent import limits
from prism_agent.exec_record import Exec, ExecRecord, digest_of
from prism_agent.exec_table import ExecTable
from prism_agent.output_room import OutputRoom
from prism_agent.supervisor.protocol import Reason, RingHeader, State
from prism_agent.supervisor.ring import Ring

START = sandbox_pb2.ExecStart(argv=["true"])


def header(state: State) -> RingHeader:
    return RingHeader(state, 4096, 0, 0, 0, 0, 1.0, 2.0, 0, 0, Reason.NONE, 0, False)


def start(table: ExecTable, directory: Path, output_bytes: int = 1) -> Exec:
    """Add one that runs and has written something."""
    number = table.next_number
    record = ExecRecord(
        exec_id=f"ex-{number}", number=number, request_id=f"rq-{number}",
        digest=digest_of(START), argv=["true"], start_time_s=1.0, oom_kills=0, stdin=False,
    )  # fmt: skip
    each = Exec(OutputRoom(directory), record)
    table.add(each)
    each.save()
    each.ring_path.write_bytes(b"x" * output_bytes)
    each.header = header(State.RUNNING)
    return each


def prune(table: ExecTable) -> None:
    """Prune, and wait for what is removed beside."""
    table.prune()
    spare = table.take_spare()
    if spare is not None:
        spare.unlink()
    table.removals.flush()


def end(each: Exec, forgotten: bool = True) -> Exec:
    each.header = header(State.DRAINED)
    each.forgotten = forgotten
    return each


def request(number: int) -> sandbox_pb2.ExecStart:
    return sandbox_pb2.ExecStart(argv=["true"], request_id=f"rq-{number}")


def test_output_of_the_oldest_gives_way_and_their_requests_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "EXECS_KEPT_MAX", 2)
    table = ExecTable(OutputRoom(tmp_path))
    execs = [end(start(table, tmp_path)) for _ in range(4)]
    running = start(table, tmp_path)
    prune(table)
    assert [each.ring_path.exists() for each in execs] == [False, False, True, True]
    assert table.find_request(request(1)) is execs[0]
    assert table.running() == [running]
    assert table.all() == [*execs, running]


def test_requests_are_forgotten_in_the_end_with_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "EXECS_KEPT_MAX", 1)
    monkeypatch.setattr(limits, "REQUESTS_KEPT_MAX", 3)
    table = ExecTable(OutputRoom(tmp_path))
    for _ in range(5):
        end(start(table, tmp_path))
    prune(table)
    assert [each.record.number for each in table.all()] == [3, 4, 5]
    assert table.find_request(request(2)) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "3.json", "4.json", "5.json", "5.ring",
    ]  # fmt: skip
    assert ExecTable(OutputRoom(tmp_path)).next_number == 6


def test_so_many_bytes_are_kept_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "EXECS_BYTES_MAX", 300_000)
    table = ExecTable(OutputRoom(tmp_path))
    execs = [end(start(table, tmp_path, 128 * 1024)) for _ in range(3)]
    prune(table)
    assert [each.ring_path.exists() for each in execs] == [False, True, True]
    table.drop(execs[1])
    execs.append(end(start(table, tmp_path, 128 * 1024)))
    prune(table)
    assert [each.ring_path.exists() for each in execs] == [False, False, True, True]


def test_what_a_client_reads_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "EXECS_KEPT_MAX", 1)
    table = ExecTable(OutputRoom(tmp_path))
    read, other, last = (end(start(table, tmp_path)) for _ in range(3))
    read.readers[object()] = 0
    prune(table)
    assert read.ring_path.exists()
    assert not other.ring_path.exists()
    assert not last.ring_path.exists()


def test_what_has_ended_is_measured_once_unless_its_output_may_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def disk_bytes(each: Exec) -> int:
        measured.append(each.record.number)
        return 0

    monkeypatch.setattr(Exec, "disk_bytes", disk_bytes)
    table = ExecTable(OutputRoom(tmp_path))
    end(start(table, tmp_path))
    growing = end(start(table, tmp_path), forgotten=False)
    for _ in range(3):
        prune(table)
    assert measured == [1, 2, 2, 2]
    growing.forgotten = True
    for _ in range(3):
        prune(table)
    assert measured == [1, 2, 2, 2, 2]


def test_room_is_held_for_what_is_left_running_also_when_its_output_was_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "EXECS_KEPT_MAX", 0)
    table = ExecTable(OutputRoom(tmp_path))
    running, ended = start(table, tmp_path), end(start(table, tmp_path))
    left = end(start(table, tmp_path), forgotten=False)
    assert table.written() == [running, left]
    prune(table)
    assert not left.ring_path.exists()
    assert table.written() == [running, left]
    left.forgotten = True
    assert table.written() == [running]
    table.drop(running)
    assert table.written() == []
    assert table.all() == [ended, left]


def test_the_ring_of_one_that_was_given_up_is_the_next_ones_unless_somebody_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "EXECS_KEPT_MAX", 0)
    table = ExecTable(OutputRoom(tmp_path))
    for readers in (0, 1):
        each = end(start(table, tmp_path, 100_000 if readers else 100))
        each.ring_path.write_bytes(b"x" * 5000)
        table.prune()
        each.log_readers = readers
        spare = table.take_spare()
        assert (spare is None) == bool(readers)
        if spare is not None:
            new = tmp_path / "next.ring"
            ring = Ring.reuse(spare, new, 1 << 20)
            assert not spare.exists()
            assert ring.header().state is State.NEW
            assert ring.read(0) == ([], 0)
            ring.close()
    table.removals.flush()
    assert not each.ring_path.exists()
    # One that may yet be written to is nobody else's.
    end(start(table, tmp_path), forgotten=False)
    table.prune()
    assert table.take_spare() is None


def test_a_record_that_was_written_by_half_leaves_the_one_before(tmp_path: Path) -> None:
    table = ExecTable(OutputRoom(tmp_path))
    each = end(start(table, tmp_path))
    with each.record_path.open("ab") as file:
        file.write(b'\n{"version":1,"exec_id":"ex-')
    assert ExecTable(OutputRoom(tmp_path)).get("ex-1").record == each.record
    each.record.settled = True
    each.save()
    assert ExecTable(OutputRoom(tmp_path)).get("ex-1").record.settled


def test_an_exec_without_a_whole_record_keeps_its_number(tmp_path: Path) -> None:
    table = ExecTable(OutputRoom(tmp_path))
    each = start(table, tmp_path)
    each.record_path.write_bytes(b'\n{"version":1')
    again = ExecTable(OutputRoom(tmp_path))
    assert again.all() == []
    assert again.next_number == 2
