"""The journal and the data directory: what is written is found again, or is known to be missing."""

import errno
import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from prism_agent import journal as journal_module
from prism_agent.data_directory import DataDirectory
from prism_agent.journal import Journal, is_safe_id
from prism_agent.reconcile import Assignment, Desired, Phase, Sandbox
from prism_agent.record import Record, record_of
from prism_common.errors import StartupError

#: What prism-agent 0.0 wrote to sandboxes/sb-1/record.
OLD_RECORD = (
    b'{"version":1,"sandbox_id":"sb-1","name":"name","generation":3,"start_count":2,'
    b'"phase":"ready","desired":"running","wanted_start_count":2,"spec":"AHNwZWM=",'
    b'"expire_time_s":12.5,"grace_s":7.0,"reschedules":true,"runtime":"bubblewrap","reason":"",'
    b'"message":"","phase_time_s":1.5,"boot_id":"b","uid":300000,"pid":77,"pid_start_ticks":8888,'
    b'"cgroup":"sb-1","mounted":true}'
)


def make(sandbox_id: str = "sb-1") -> Record:
    wanted = Assignment(sandbox_id, 3, Desired.RUNNING, 2, "name", b"\x00spec", 12.5, 7.0, True)
    return record_of(Sandbox(wanted, Phase.READY, 2, "bubblewrap"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "sandboxes"
    path.mkdir()
    return path


def file_of(path: Path) -> Path:
    return path.with_name("journal")


def read(path: Path) -> tuple[dict[str, Record], list[str]]:
    """Return what a process that comes later reads."""
    return Journal(path).load()


def test_record_is_read_as_written(path: Path) -> None:
    journal = Journal(path)
    record = make()
    record.pid, record.pid_start_ticks, record.uid = 77, 8888, 300_000
    journal.save(record)
    journal.sync("sb-1")
    assert read(path) == ({"sb-1": record}, [])
    sandbox = record.to_sandbox()
    assert sandbox.wanted.spec == b"\x00spec"
    assert (sandbox.generation, sandbox.start_count, sandbox.phase) == (3, 2, Phase.READY)


def test_what_is_put_is_written_by_the_next_flush_in_one_write(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path)
    journal.save(make("sb-0"))
    writes: list[bytes] = []
    append = journal_module.append
    monkeypatch.setattr(
        journal_module, "append", lambda fd, data: (writes.append(data), append(fd, data))
    )
    records = [make(f"sb-{number}") for number in range(1, 4)]
    for record in records:
        journal.put(record)
    journal.forget("sb-0")
    records[0].pid = 5
    assert list(read(path)[0]) == ["sb-0"]
    journal.flush()
    journal.flush()
    assert len(writes) == 1
    assert read(path)[0] == {record.sandbox_id: record for record in records}


def test_only_a_runtime_makes_a_directory(path: Path) -> None:
    journal = Journal(path)
    journal.put(make())
    journal.flush()
    assert list(path.iterdir()) == []
    journal.save(make())
    assert [each.name for each in path.iterdir()] == ["sb-1"]


def test_a_directory_without_a_record_is_a_stray(path: Path) -> None:
    journal = Journal(path)
    journal.save(make())
    (path / "sb-2").mkdir()
    assert read(path)[1] == ["sb-2"]
    file_of(path).unlink()
    assert read(path) == ({}, ["sb-1", "sb-2"])


def test_a_torn_end_is_cut_off_and_written_over(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(path)
    journal.save(make("sb-1"))
    whole = file_of(path).stat().st_size
    journal.save(make("sb-2"))
    journal.close()
    os.truncate(file_of(path), file_of(path).stat().st_size - 1)
    later = Journal(path)
    assert list(later.load()[0]) == ["sb-1"]
    assert file_of(path).stat().st_size == whole
    assert "not whole" in caplog.text
    later.save(make("sb-3"))
    assert list(read(path)[0]) == ["sb-1", "sb-3"]


def test_a_journal_of_another_version_is_one_line(path: Path) -> None:
    file_of(path).write_bytes(b"PRISMJ9\n")
    with pytest.raises(StartupError, match=r"--data-dir: .*journal"):
        Journal(path).load()


def test_remove_is_idempotent(path: Path) -> None:
    journal = Journal(path)
    journal.save(make())
    journal.remove("sb-1")
    journal.remove("sb-1")
    assert list(path.iterdir()) == []
    assert read(path) == ({}, [])


@pytest.mark.parametrize("sandbox_id", ["", "..", ".", "a/b", "a.b", "x" * 200, "é", "a\0"])
def test_ids_that_could_leave_the_directory_are_refused(path: Path, sandbox_id: str) -> None:
    assert not is_safe_id(sandbox_id)
    with pytest.raises(ValueError, match="not a sandbox id"):
        Journal(path).directory(sandbox_id)


# ── damage ──


def write_damaged(path: Path) -> None:
    """Have a journal of three sandboxes, of which the second's newer record has rotted."""
    journal = Journal(path)
    for name in ("sb-1", "sb-2", "sb-2", "sb-3"):
        begin = file_of(path).stat().st_size if file_of(path).exists() else 0
        record = make(name)
        record.pid = begin
        journal.save(record)
        journal.sync()
        if name == "sb-2":
            region = begin, file_of(path).stat().st_size
    journal.close()
    data = bytearray(file_of(path).read_bytes())
    data[region[0] + 20 : region[1] - 20] = bytes(region[1] - region[0] - 40)
    file_of(path).write_bytes(data)


def test_a_damaged_part_costs_what_is_in_it_and_no_more(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_damaged(path)
    journal = Journal(path)
    records = journal.load()[0]
    assert {name: each.uncertain for name, each in records.items()} == {
        "sb-1": False,
        "sb-2": True,
        "sb-3": False,
    }
    assert "1 records are lost, with the newest of 1 sandboxes" in journal.problem
    (line,) = [each for each in caplog.records if each.message == "the journal is damaged"]
    assert line.__dict__["sandboxes"] == "sb-2"
    journal.close()
    # The file is whole again, and says still of whom something was lost.
    later = Journal(path)
    assert later.load()[0] == records
    assert later.problem == ""
    record = make("sb-2")
    later.save(record)
    assert read(path)[0]["sb-2"] == record


def test_death_while_a_damaged_file_is_replaced_loses_no_doubt(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_damaged(path)
    before = file_of(path).read_bytes()

    def die(new: Path, old: Path) -> None:
        raise OSError(errno.EIO, "died")

    with monkeypatch.context() as broken:
        broken.setattr(journal_module, "replace", die)
        with pytest.raises(StartupError):
            Journal(path).load()
    assert file_of(path).read_bytes() == before
    assert read(path)[0]["sb-2"].uncertain


# ── a version before ──


def old_frame(key: str, content: bytes) -> bytes:
    payload = b"\x01" + bytes([len(key)]) + key.encode() + content
    checksum = zlib.crc32(payload, len(payload))
    return len(payload).to_bytes(4, "little") + checksum.to_bytes(4, "little") + payload


def test_a_file_of_the_version_before_is_read_and_replaced(path: Path) -> None:
    records = {name: make(name) for name in ("sb-1", "sb-2")}
    frames = [old_frame(name, msgspec.msgpack.encode(each)) for name, each in records.items()]
    file_of(path).write_bytes(b"PRISMJ1\n" + b"".join(frames))
    assert read(path)[0] == records
    assert file_of(path).read_bytes().startswith(b"PRISMJ2\n")
    assert read(path)[0] == records


def write_old(path: Path, name: str = "sb-1", content: bytes = OLD_RECORD) -> Path:
    (path / name).mkdir()
    (path / name / "record").write_bytes(content)
    (path / name / "workspace").mkdir()
    return path / name / "record"


def test_records_of_the_version_before_are_taken_over_once(path: Path) -> None:
    old = write_old(path)
    record, strays = read(path)[0]["sb-1"], read(path)[1]
    assert (record.generation, record.phase, record.spec) == (3, Phase.READY, b"\x00spec")
    assert (record.uid, record.pid, record.pid_start_ticks) == (300_000, 77, 8888)
    assert (record.cgroup, record.mounted, record.boot_id) == ("sb-1", True, "b")
    assert (strays, old.exists(), (path / "sb-1" / "workspace").is_dir()) == ([], False, True)


def test_taking_over_goes_on_where_it_was_broken_off(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_old(path)
    write_old(path, "sb-2", OLD_RECORD.replace(b"sb-1", b"sb-2"))

    def die(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, "died")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "unlink", die)
        with pytest.raises(StartupError):
            Journal(path).load()
    assert (path / "sb-1" / "record").exists()
    assert sorted(read(path)[0]) == ["sb-1", "sb-2"]
    assert not (path / "sb-1" / "record").exists()


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": 99}', b"\xff" * 100])
def test_an_old_record_that_cannot_be_read_is_a_stray(path: Path, content: bytes) -> None:
    write_old(path, content=content)
    assert read(path) == ({}, ["sb-1"])


# ── disks ──


def failing(
    monkeypatch: pytest.MonkeyPatch, after_bytes: int, number: int = errno.ENOSPC
) -> Callable[[], None]:
    """Let the disk be full once so many bytes more are written; return what makes room."""
    append = journal_module.append
    room = [after_bytes]

    def full(descriptor: int, data: bytes) -> None:
        part = data[: room[0]]
        append(descriptor, part)
        room[0] -= len(part)
        if len(part) < len(data):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(journal_module, "append", full)
    return lambda: monkeypatch.setattr(journal_module, "append", append)


def test_a_full_disk_leaves_what_was_there_and_writes_the_rest_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path)
    journal.save(make("sb-1"))
    make_room = failing(monkeypatch, after_bytes=100)
    for name in ("sb-2", "sb-3"):
        journal.put(make(name))
    with pytest.raises(OSError, match="No space left"):
        journal.flush()
    assert journal.failure("sb-1") is None
    assert isinstance(journal.failure("sb-2"), OSError)
    with pytest.raises(OSError, match="No space left"):
        journal.sync("sb-2")
    assert list(read(path)[0]) == ["sb-1"]
    make_room()
    journal.flush()
    assert journal.failure("sb-2") is None
    assert list(read(path)[0]) == ["sb-1", "sb-2", "sb-3"]


def test_what_is_put_again_after_a_failure_has_the_last_word(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path)
    journal.save(make("sb-1"))
    make_room = failing(monkeypatch, after_bytes=0)
    journal.forget("sb-1")
    with pytest.raises(OSError, match="No space left"):
        journal.flush()
    make_room()
    record = make("sb-1")
    record.generation = 4
    journal.save(record)
    journal.flush()
    assert read(path)[0] == {"sb-1": record}


def test_a_failed_fsync_is_not_believed_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path)
    journal.save(make("sb-1"))
    position = journal.position

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="broken"):
            journal.sync()
    assert journal.synced < position
    assert journal.wants_sync
    inode = file_of(path).stat().st_ino
    with pytest.raises(OSError, match="being replaced"):
        journal.save(make("sb-2"))
    journal.sync()
    assert journal.synced >= position
    assert file_of(path).stat().st_ino != inode
    journal.flush()
    assert list(read(path)[0]) == ["sb-1", "sb-2"]


def test_the_file_stays_short_and_a_rewrite_loses_nothing(path: Path) -> None:
    journal = Journal(path)
    stop = threading.Event()

    def sync() -> None:
        while not stop.is_set():
            journal.sync()

    syncing = threading.Thread(target=sync)
    syncing.start()
    try:
        for number in range(6000):
            record = make(f"sb-{number % 50}")
            record.pid, record.message = number, "x" * 500
            journal.put(record)
            journal.flush()
            if number >= 100:
                journal.forget(f"sb-{50 + number % 20}")
    finally:
        stop.set()
        syncing.join()
    journal.flush()
    journal.sync()
    assert journal.synced == journal.position > 3 << 20
    assert file_of(path).stat().st_size < 2 << 20
    records = read(path)[0]
    assert sorted(record.pid for record in records.values()) == list(range(5950, 6000))


def test_a_rewrite_that_finds_no_room_keeps_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path)
    record = make()
    record.message = "x" * 100_000
    while not journal.wants_sync:
        journal.save(record)
    failing(monkeypatch, after_bytes=10)
    journal.sync()
    assert journal.synced == journal.position
    assert not journal.wants_sync
    assert not file_of(path).with_name("journal.new").exists()
    assert read(path)[0] == {"sb-1": record}


# ── the data directory ──


def test_data_directory_keeps_its_promises(tmp_path: Path) -> None:
    first = DataDirectory(tmp_path / "data")
    node_id = first.state.node_id
    first.state.term = 9
    first.save(durable=True)
    with pytest.raises(StartupError, match="in use by another prism-agent"):
        DataDirectory(tmp_path / "data")
    first.close()
    second = DataDirectory(tmp_path / "data")
    assert (second.state.node_id, second.state.term) == (node_id, 9)
    second.close()


def test_unreadable_identity_is_one_line(tmp_path: Path) -> None:
    DataDirectory(tmp_path).close()
    (tmp_path / "node").write_text("{")
    with pytest.raises(StartupError, match="cannot be read"):
        DataDirectory(tmp_path)
