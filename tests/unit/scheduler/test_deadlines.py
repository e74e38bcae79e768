"""The leader ends what no agent ends."""

from __future__ import annotations

from prism_control.scheduler.deadlines import Deadlines
from prism_control.state import commands as c
from prism_control.state.model import ObservedState, SandboxState
from tests.unit.state.builders import Driver, create


def test_pending_is_due_at_its_ttl_and_what_an_agent_holds_later():
    driver = Driver()
    driver.bring(SandboxState.READY, "s1", ttl_ms=1000)
    driver.run(create("s2", ttl_ms=1000), create("s3"))
    deadlines = Deadlines(driver.machine.sandboxes())
    begin_ms = driver.now_ms
    assert len(deadlines) == 2
    assert deadlines.next_ms() == begin_ms + 1000
    assert deadlines.due(begin_ms + 999) is None
    assert deadlines.due(begin_ms + 1000) == c.ExpireSandboxes(("s2",))
    assert deadlines.due(begin_ms + 1000) is None
    assert deadlines.due(begin_ms + 11_000) == c.ExpireSandboxes(("s2", "s1"))


def test_what_is_gone_is_not_due():
    driver = Driver()
    deadlines = Deadlines(())
    driver.run(create("s1", ttl_ms=1000), create("s2"))
    deadlines.observe(driver.events)
    driver.run(c.DeleteSandbox("", b"", "s1"))
    deadlines.observe(driver.events)
    assert len(deadlines) == 0
    assert deadlines.due(driver.now_ms + 9999) is None
    assert deadlines.next_ms() is None


def test_a_placement_puts_the_deadline_off():
    driver = Driver()
    driver.bring(SandboxState.SCHEDULED, ttl_ms=1000)
    deadlines = Deadlines(driver.machine.sandboxes())
    driver.report(ObservedState.READY)
    deadlines.observe(driver.events)
    assert deadlines.due(driver.now_ms + 1000) is None
    driver.run(c.LoseNode("n1", "i1", 5))
    deadlines.observe(driver.events)
    assert deadlines.due(driver.now_ms + 1000) == c.ExpireSandboxes(("s1",))


def test_due_is_bounded_and_dead_entries_are_swept():
    driver = Driver()
    deadlines = Deadlines(())
    for begin in range(0, 1500, 100):
        driver.run(*(create(f"s{k}", ttl_ms=1 + k) for k in range(begin, begin + 100)))
        deadlines.observe(driver.events)
    found = deadlines.due(driver.now_ms + 5000)
    assert len(found.sandbox_ids) == 1000
    for begin in range(0, 1500, 100):
        driver.run(*(c.DeleteSandbox("", b"", f"s{k}") for k in range(begin, begin + 100)))
        deadlines.observe(driver.events)
    assert len(deadlines) == 0
    assert len(deadlines._heap) <= 1000
