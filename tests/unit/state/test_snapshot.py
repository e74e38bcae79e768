"""A snapshot holds everything that decides, and damage to one is noticed."""

from __future__ import annotations

import struct

import msgspec
import pytest

from prism_control.state import commands as c
from prism_control.state import snapshot
from prism_control.state.machine import Machine
from prism_control.state.model import PlacementRefusal, SandboxState
from prism_control.state.snapshot import SnapshotError, encode_snapshot
from prism_control.state.tables import TOMBSTONE_KEPT_MS
from tests.unit.state.builders import Driver, check, create, register


@pytest.fixture
def driver() -> Driver:
    driver = Driver()
    driver.run(register("n1"), register("n2"), c.LoseNode("n2", "i1", 5))
    for number, state in enumerate(SandboxState):
        if state not in (SandboxState.LOST, SandboxState.PAUSED):
            driver.bring(state, f"s{number}", env=(("A", "é" * 50),))
    refusals = (PlacementRefusal("n1", "name-n1", "full"),)
    driver.run(create("w1", "r1"), create("w2", "r2"), create("w3", "r3", name="name-w1"))
    driver.run(c.AssignSandboxes((), (c.Explanation(("w1", "w2"), "no room", refusals),)))
    driver.run(c.DeleteSandbox("r4", b"d", "w2"), c.StopSandbox("r5", b"s", "w1"))
    return driver


def chunks_of(driver: Driver) -> list[bytes]:
    return list(encode_snapshot(driver.machine.snapshot_view()))


@pytest.mark.parametrize("size", [1, 7, 100, 10**6])
def test_restores_from_any_cut(driver, size):
    data = b"".join(chunks_of(driver))
    cut = [data[begin : begin + size] for begin in range(0, len(data), size)]
    restored = Machine.from_snapshot(cut)
    check(restored)
    assert restored.digest() == driver.machine.digest()
    assert restored.snapshot_view() == driver.machine.snapshot_view()


def test_a_restored_machine_answers_as_the_first(driver):
    restored = Machine.from_snapshot(chunks_of(driver))
    items = (create("x", "r1", name="name-w1"), c.DeleteSandbox("r4", b"d", "w2"), create("y"))
    proposal = c.Proposal(1, driver.now_ms + 5, items)
    index = len(driver.log) + 1
    assert restored.apply(index, proposal) == driver.machine.apply(index, proposal)
    assert restored.digest() == driver.machine.digest()


def test_answers_outlive_the_sandboxes_that_they_are_about(driver):
    driver.run(after_ms=TOMBSTONE_KEPT_MS + 1)
    assert driver.machine.sandbox("w2") is None
    restored = Machine.from_snapshot(chunks_of(driver))
    (result,), _ = restored.apply(99, c.Proposal(1, 1, (create("x", "r2", name="name-w2"),)))
    assert (result.sandbox.id, result.sandbox.state) == ("w2", SandboxState.PENDING)


def test_a_restored_machine_keeps_no_events(driver):
    restored = Machine.from_snapshot(chunks_of(driver))
    assert restored.changes_since(restored.revision) == []
    with pytest.raises(Exception, match="list again"):
        restored.changes_since(restored.revision - 1)


def test_equal_explanations_are_written_once():
    driver = Driver()
    driver.run(*(create(f"s{k}") for k in range(50)))
    refusals = tuple(PlacementRefusal(f"n{k}", "n", "reason " * 20) for k in range(16))
    ids = tuple(f"s{k}" for k in range(50))
    driver.run(c.AssignSandboxes((), (c.Explanation(ids, "no room", refusals),)))
    chunks = chunks_of(driver)
    assert sum(map(len, chunks)) < 20_000
    restored = Machine.from_snapshot(chunks)
    assert restored.sandbox("s0").placement == refusals
    assert restored.sandbox("s0").placement is restored.sandbox("s49").placement


def test_chunks_have_a_bound(monkeypatch):
    monkeypatch.setattr(snapshot, "_FRAME_BYTES", 300)
    driver = Driver()
    driver.run(*(create(f"s{k}") for k in range(50)))
    chunks = chunks_of(driver)
    assert len(chunks) > 10
    assert max(map(len, chunks)) < 600
    assert Machine.from_snapshot(chunks).digest() == driver.machine.digest()


def test_view_does_not_change_with_the_machine(driver):
    view = driver.machine.snapshot_view()
    before = list(encode_snapshot(view))
    driver.run(create("later", "r9"), c.DeleteSandbox("", b"", "w1"))
    assert list(encode_snapshot(view)) == before


def frame(kind: int, body: bytes) -> bytes:
    return struct.pack(">BI", kind, len(body)) + body


def header(version: int = 1, sandboxes: int = 0, command_version: int = 2) -> bytes:
    return frame(
        1, msgspec.msgpack.encode([version, 1, 1, 1, sandboxes, 0, 0, command_version, "later"])
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begin with its header"),
        (frame(6, b""), "begin with its header"),
        (header(3) + frame(6, b""), "of format 3.*upgrade it"),
        (header(2, command_version=99) + frame(6, b""), "commands of version 99.*upgrade it"),
        (header(), "its end is missing"),
        (header(sandboxes=1) + frame(6, b""), "header promises"),
        (header() + frame(99, b""), "unknown kind 99"),
        (header() + frame(2, b"\x91\x01"), "cannot be read"),
        (header() + frame(3, msgspec.msgpack.encode([[], ["s1"]])), "explains 's1'"),
        (header() + struct.pack(">BI", 2, 2**31), "damaged"),
    ],
)
def test_damage_is_noticed(data, message):
    with pytest.raises(SnapshotError, match=message):
        Machine.from_snapshot([data])


def test_a_cut_stream_is_noticed_wherever_it_is_cut(driver):
    data = b"".join(chunks_of(driver))
    for length in range(0, len(data), 97):
        with pytest.raises(SnapshotError):
            Machine.from_snapshot([data[:length]])
