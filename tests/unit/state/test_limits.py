"""Limits that change while a sandbox lives: what its node must have room for, and what is told."""

from __future__ import annotations

import msgspec
import pytest

from prism_control.state import commands as c
from prism_control.state.machine import Machine
from prism_control.state.model import Amounts, ObservedState, SandboxState
from prism_control.state.results import RefusalKind
from prism_control.state.snapshot import encode_snapshot
from tests.unit.state.builders import MIB, Driver, create, register, spec

S = SandboxState


def resize(sandbox: str = "s1", request_id: str = "", **limits: int) -> c.UpdateSandbox:
    return c.UpdateSandbox(request_id, b"f", sandbox, **limits)


@pytest.mark.parametrize(
    "state", [S.SCHEDULED, S.STARTING, S.READY, S.STOPPING, S.STOPPED], ids=lambda one: one.name
)
def test_new_limits_are_promised_by_the_node_at_once(state):
    driver = Driver()
    driver.bring(state)
    row = driver.one(resize(cpu_millicores=1500, memory_bytes=512 * MIB, processes_max=9)).sandbox
    assert (row.spec.cpu_millicores, row.spec.memory_bytes) == (1500, 512 * MIB)
    assert (row.spec.processes_max, row.spec.disk_bytes) == (9, 256 * MIB)
    assert row.state is state
    assert driver.machine.allocated("n1") == Amounts(1500, 512 * MIB, 256 * MIB, 1)
    revision = row.revision
    assert driver.one(resize(cpu_millicores=1500)).sandbox.revision == revision


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"cpu_millicores": 3501}, "3001m more of CPU: 3000m is free"),
        ({"memory_bytes": 1793 * MIB}, "1537 MiB more of memory: 1536 MiB is free"),
        ({"disk_bytes": 3841 * MIB}, "3585 MiB more of disk: 3584 MiB is free"),
    ],
)
def test_what_its_node_has_no_room_for_is_refused_whole(limits, text):
    driver = Driver()
    driver.bring(S.READY)
    driver.bring(S.READY, "s2")
    refused = driver.one(c.UpdateSandbox("", b"", "s1", (("a", "1"),), 99, **limits))
    assert (refused.kind, refused.reason) == (RefusalKind.NO_CAPACITY, "NO_CAPACITY")
    assert text in refused.message
    assert (driver.sandbox().spec.labels, driver.sandbox().expire_ms) == ((), 0)
    ((name, most),) = limits.items()
    least = 1 if name == "cpu_millicores" else MIB
    assert getattr(driver.one(resize(**{name: most - least})).sandbox.spec, name) == most - least


def test_a_node_that_lost_capacity_lets_limits_go_down_only():
    driver = Driver()
    driver.bring(S.READY)
    driver.run(register(incarnation="i2", capacity=Amounts(100, MIB, MIB, 1), reports=(
        c.Report("s1", 1, ObservedState.READY),)))  # fmt: skip
    assert driver.one(resize(cpu_millicores=501)).kind is RefusalKind.NO_CAPACITY
    assert driver.one(resize(memory_bytes=64 * MIB)).sandbox.spec.memory_bytes == 64 * MIB
    assert driver.one(resize(processes_max=500)).sandbox.spec.processes_max == 500


@pytest.mark.parametrize(
    "state", [S.PENDING, S.FAILED, S.LOST, S.DELETING], ids=lambda one: one.name
)
def test_one_that_holds_no_room_gets_no_other_limits(state):
    driver = Driver()
    driver.bring(state)
    before = driver.sandbox()
    assert driver.one(resize(cpu_millicores=100)).kind is RefusalKind.WRONG_STATE
    assert driver.sandbox() == before


def test_a_repeat_with_its_request_id_gets_the_first_answer():
    driver = Driver()
    driver.bring(S.READY)
    first = driver.one(resize(request_id="r", memory_bytes=32 * MIB))
    driver.run(resize(memory_bytes=64 * MIB))
    assert driver.one(resize(request_id="r", memory_bytes=32 * MIB)) == first
    assert driver.sandbox().spec.memory_bytes == 64 * MIB


def test_a_restored_member_holds_the_same_room():
    driver = Driver()
    driver.bring(S.READY)
    driver.run(create("s2"), resize(cpu_millicores=700))
    copy = Machine.from_snapshot(encode_snapshot(driver.machine.snapshot_view()))
    assert copy.allocated("n1") == driver.machine.allocated("n1")
    assert copy.digest() == driver.machine.digest()


def test_that_limits_are_not_held_comes_and_goes_while_it_runs():
    driver = Driver()
    ready_ms = driver.bring(S.READY).ready_ms
    driver.report(ObservedState.READY, reason="LIMITS_NOT_HELD", message="in use")
    row = driver.sandbox()
    assert (row.state, row.reason, row.message) == (S.READY, "LIMITS_NOT_HELD", "in use")
    revision = row.revision
    driver.report(ObservedState.READY, reason="LIMITS_NOT_HELD", message="in use")
    assert driver.sandbox().revision == revision
    driver.report(ObservedState.READY)
    row = driver.sandbox()
    assert (row.reason, row.message, row.ready_ms) == ("", "", ready_ms)


def test_other_reasons_of_what_is_known_change_nothing():
    driver = Driver()
    revision = driver.bring(S.READY).revision
    driver.report(ObservedState.READY, reason="PAUSE_FAILED", message="x")
    assert driver.sandbox().revision == revision


def test_only_limits_need_members_of_the_new_version():
    assert c.version_of(c.UpdateSandbox("", b"", "s1", (("a", "b"),), 5)) == 2
    for name in ("cpu_millicores", "memory_bytes", "disk_bytes", "processes_max"):
        assert c.version_of(resize(**{name: 1})) == 4
    reports = (c.Report("s1", 1, ObservedState.READY, "LIMITS_NOT_HELD"),)
    assert c.version_of(c.ReportSandboxes("n1", "i1", reports)) == 4
    paused = (c.Report("s1", 1, ObservedState.READY), c.Report("s2", 1, ObservedState.PAUSED))
    assert c.version_of(c.ReportSandboxes("n1", "i1", paused)) == 2


def test_a_rate_of_output_needs_members_of_the_new_version():
    plain = spec()
    assert c.version_of(c.CreateSandbox("", b"", "s1", "one", plain)) == 1
    limited = msgspec.structs.replace(plain, output_bytes_per_second=1024)
    assert c.version_of(c.CreateSandbox("", b"", "s1", "one", limited)) == 4


def test_an_entry_of_an_older_member_changes_no_limits():
    old = msgspec.msgpack.encode([2, 5, [[13, "r", b"f", "s1", [["a", "b"]], 7]]])
    assert c.decode(old).items == (c.UpdateSandbox("r", b"f", "s1", (("a", "b"),), 7),)
