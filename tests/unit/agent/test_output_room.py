"""How much output execs may have where it is kept in memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from prism.sandbox.v1 import sandbox_pb2

from prism_agent import limits
from prism_agent.exec_record import Exec, ExecRecord
from prism_agent.output_move import move_rings
from prism_agent.output_room import MEMORY, OutputRoom, memory_bytes
from prism_agent.runtime import host
from prism_agent.supervisor.protocol import RING_BYTES_MIN, RING_HEADER_BYTES
from prism_agent.supervisor.ring import Ring
from prism_common.errors import QueueFullError
from prism_common.limits import MIB


@pytest.fixture(params=[8 * MIB, 64 * MIB, 2048 * MIB])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """The size of a file system for output, of what is in `tmp_path`."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    (tmp_path / MEMORY).mkdir()
    host.mount_tmpfs(tmp_path / MEMORY, request.param, 0)
    yield request.param
    host.unmount(tmp_path / MEMORY)


def test_on_the_disk_each_exec_has_the_same_and_none_is_refused(tmp_path: Path) -> None:
    room = OutputRoom(tmp_path)
    assert room.directory == tmp_path
    assert room.ring_bytes([limits.RING_BYTES] * 10_000) == limits.RING_BYTES
    assert room.kept_bytes_max() == limits.EXECS_BYTES_MAX


def test_in_memory_all_fit_together_and_one_too_many_is_refused(
    memory: int, tmp_path: Path
) -> None:
    room = OutputRoom(tmp_path)
    assert room.directory == tmp_path / MEMORY
    given: list[int] = []
    while len(given) < 10_000:
        try:
            given.append(room.ring_bytes(given))
        except QueueFullError:
            break
    assert min(given) >= RING_BYTES_MIN
    assert max(given) == given[0] <= limits.RING_BYTES
    # Beside them is what ended ones keep, and room for what is to be run.
    taken = sum(given) + len(given) * RING_HEADER_BYTES + room.kept_bytes_max()
    assert memory // 2 < taken <= memory * 7 // 8 or len(given) >= limits.EXECS_RUNNING_MAX
    assert len(given) >= 24
    # One that ends makes room.
    assert room.ring_bytes(given[1:]) >= RING_BYTES_MIN


def test_its_size_follows_the_memory_of_the_sandbox_up_to_a_bound() -> None:
    assert memory_bytes(sandbox_pb2.Limits(memory_bytes=256 * MIB)) == 64 * MIB
    assert memory_bytes(sandbox_pb2.Limits(memory_bytes=1 << 40)) == 4096 * MIB


def test_what_fails_keeps_its_newest_output_on_the_disk_and_no_memory(
    memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "EXECS_BYTES_MAX", 100_000)
    room = OutputRoom(tmp_path)
    for number in (1, 2, 10):
        ring = Ring.create(room.ring(number))
        # Behind a hole of megabytes.
        os.pwrite(ring.fileno(), bytes([number]) * 40_000, 8 * MIB if memory > 8 * MIB else MIB)
        ring.close()
    expected = {number: room.ring(number).read_bytes() for number in (2, 10)}
    (room.directory / "11.ring").symlink_to("/etc/passwd")
    os.mkfifo(room.directory / "12.ring")
    room.leave_memory()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10.ring", "2.ring"]
    assert not room.in_memory
    for number, content in expected.items():
        assert room.ring(number).read_bytes() == content
        assert room.ring(number).stat().st_blocks * 512 <= 50_000
    # It is started again.
    (tmp_path / MEMORY).mkdir()
    host.mount_tmpfs(tmp_path / MEMORY, memory, 0)
    room.look()
    assert room.ring(2) == tmp_path / "2.ring"
    assert room.ring(13) == tmp_path / MEMORY / "13.ring"


def test_output_is_found_while_it_is_taken_out_of_memory(tmp_path: Path) -> None:
    """Another thread does so, and tells only when it is done."""
    (tmp_path / MEMORY).mkdir()
    room = OutputRoom(tmp_path)
    record = ExecRecord(
        exec_id="ex-1",
        number=1,
        request_id="rq",
        digest="",
        argv=["true"],
        start_time_s=1.0,
        oom_kills=0,
        stdin=False,
    )
    each = Exec(room, record)
    in_memory = each.ring_path
    Ring.create(in_memory).close()
    move_rings(room.directory, tmp_path)
    in_memory.unlink()
    ring = each.open_ring()
    assert ring is not None
    ring.close()
    assert each.ring_path == tmp_path / "1.ring"
    each.ring_path.unlink()
    assert each.open_ring() is None
