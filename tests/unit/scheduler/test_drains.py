"""What leaves a node that drains, and when."""

from __future__ import annotations

from prism_control.scheduler import drains as drains_module
from prism_control.scheduler.drains import Drains
from prism_control.state import commands as c
from prism_control.state.model import OnNodeLoss, SandboxState
from tests.unit.state.builders import Driver


def due(driver: Driver, drains: Drains, after_ms: int = 0) -> tuple[str, ...]:
    driver.now_ms += after_ms
    command = drains.due(driver.machine, driver.now_ms)
    return () if command is None else command.sandbox_ids


def test_movable_sandboxes_leave_at_once_and_the_others_at_the_deadline():
    driver, drains = Driver(), Drains()
    driver.bring(SandboxState.READY, "s1", on_node_loss=OnNodeLoss.RESCHEDULE)
    driver.bring(SandboxState.READY, "s2")
    driver.bring(SandboxState.STOPPED, "s3", on_node_loss=OnNodeLoss.RESCHEDULE)
    driver.bring(SandboxState.DELETING, "s4")
    assert due(driver, drains) == ()
    driver.run(c.DrainNode("n1", 5000))
    assert due(driver, drains) == ("s1",)
    driver.run(c.MoveSandboxes("n1", ("s1",)))
    assert due(driver, drains) == ()
    assert due(driver, drains, after_ms=5000) == ("s2", "s3")


def test_one_command_is_bounded(monkeypatch):
    monkeypatch.setattr(drains_module, "MOVES_MAX", 2)
    driver, drains = Driver(), Drains()
    for key in ("s1", "s2", "s3"):
        driver.bring(SandboxState.READY, key)
    driver.run(c.DrainNode("n1"))
    assert due(driver, drains) == ("s1", "s2")
