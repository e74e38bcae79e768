"""The journal and the data directory: what is written is found again, or is known to be missing."""

from pathlib import Path

import pytest

from prism_agent.data_directory import DataDirectory
from prism_agent.journal import Journal, Record, is_safe_id, record_of
from prism_agent.reconcile import Assignment, Desired, Phase, Sandbox
from prism_common.errors import StartupError


def make(sandbox_id: str = "sb-1") -> Record:
    wanted = Assignment(sandbox_id, 3, Desired.RUNNING, 2, "name", b"\x00spec", 12.5, 7.0, True)
    return record_of(Sandbox(wanted, Phase.READY, 2, "bubblewrap"))


def test_record_is_read_as_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    record = make()
    record.pid, record.pid_start_ticks, record.uid = 77, 8888, 300_000
    journal.save(record)
    journal.sync("sb-1")
    assert journal.load() == ({"sb-1": record}, [])
    sandbox = record.to_sandbox()
    assert sandbox.wanted.spec == b"\x00spec"
    assert (sandbox.generation, sandbox.start_count, sandbox.phase) == (3, 2, Phase.READY)


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": 99}', b"\xff" * 100])
def test_broken_record_is_a_stray(tmp_path: Path, content: bytes) -> None:
    journal = Journal(tmp_path)
    journal.save(make())
    (tmp_path / "sb-1" / "record").write_bytes(content)
    (tmp_path / "sb-2").mkdir()
    assert journal.load() == ({}, ["sb-1", "sb-2"])


def test_half_written_record_does_not_replace_the_old(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.save(make())
    (tmp_path / "sb-1" / ".record.new").write_bytes(b"half")
    assert list(journal.load()[0]) == ["sb-1"]


def test_remove_is_idempotent(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.save(make())
    journal.remove("sb-1")
    journal.remove("sb-1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sandbox_id", ["", "..", ".", "a/b", "a.b", "x" * 200, "é", "a\0"])
def test_ids_that_could_leave_the_directory_are_refused(tmp_path: Path, sandbox_id: str) -> None:
    assert not is_safe_id(sandbox_id)
    with pytest.raises(ValueError, match="not a sandbox id"):
        Journal(tmp_path).directory(sandbox_id)


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
