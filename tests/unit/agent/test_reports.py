"""Reports: the latest of each sandbox, in few messages, until the leader has it."""

import asyncio

import pytest
from prism.agent.v1 import agent_pb2

from prism_agent import limits
from prism_agent.reports import ReportQueue

STARTING = agent_pb2.OBSERVED_STATE_STARTING
READY = agent_pb2.OBSERVED_STATE_READY
DELETED = agent_pb2.OBSERVED_STATE_DELETED


def report(sandbox_id: str, state: agent_pb2.ObservedState.ValueType) -> agent_pb2.SandboxReport:
    return agent_pb2.SandboxReport(sandbox_id=sandbox_id, state=state)


async def take(queue: ReportQueue) -> tuple[int, dict[str, int]]:
    async with asyncio.timeout(10):
        batch = await queue.take()
    return batch.sequence, {each.sandbox_id: each.state for each in batch.reports}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits long enough to be told from none."""
    monkeypatch.setattr(limits, "REPORT_LINGER_S", 0.3)
    monkeypatch.setattr(limits, "REPORT_LINGER_MAX_S", 0.6)


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits that no test sees the end of: what is taken did not wait."""
    monkeypatch.setattr(limits, "REPORT_LINGER_S", 100.0)
    monkeypatch.setattr(limits, "REPORT_LINGER_MAX_S", 100.0)


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def test_the_first_goes_at_once(endless: None) -> None:
    queue = ReportQueue()
    queue.put(report("a", READY))
    assert await take(queue) == (1, {"a": READY})


async def test_the_next_wait_for_company(slow: None) -> None:
    queue = ReportQueue()
    began_s = now_s()
    queue.put(report("a", READY))
    await take(queue)
    queue.put(report("b", READY))
    asyncio.get_running_loop().call_later(0.1, queue.put, report("c", READY))
    assert await take(queue) == (2, {"b": READY, "c": READY})
    assert now_s() - began_s >= 0.3


async def test_where_many_come_more_are_waited_for(slow: None) -> None:
    queue = ReportQueue()
    began_s = now_s()
    for number in range(100):
        queue.put(report(f"sb-{number}", READY))
    await take(queue)
    queue.put(report("b", READY))
    await take(queue)
    assert now_s() - began_s >= 0.6


async def test_ready_does_not_wait_because_another_has_ended(endless: None) -> None:
    queue = ReportQueue()
    queue.put(report("a", DELETED))
    await take(queue)
    queue.put(report("b", READY))
    assert await take(queue) == (2, {"b": READY})


async def test_an_end_goes_with_what_is_urgent(endless: None) -> None:
    queue = ReportQueue()
    queue.put(report("a", DELETED))
    await take(queue)
    queue.put(report("b", DELETED))
    queue.put(report("c", READY))
    assert await take(queue) == (2, {"b": DELETED, "c": READY})


async def test_an_end_waits_for_company(slow: None) -> None:
    queue = ReportQueue()
    began_s = now_s()
    queue.put(report("a", DELETED))
    await take(queue)
    queue.put(report("b", DELETED))
    assert await take(queue) == (2, {"b": DELETED})
    assert now_s() - began_s >= 0.6


async def test_what_only_passes_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REPORT_PASSING_S", 100.0)
    queue = ReportQueue()
    queue.put(report("a", STARTING))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await queue.take()
    queue.put(report("a", READY))
    assert await take(queue) == (1, {"a": READY})


async def test_what_stays_in_passing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REPORT_PASSING_S", 0.05)
    queue = ReportQueue()
    queue.put(report("a", STARTING))
    assert await take(queue) == (1, {"a": STARTING})


async def test_what_passes_does_not_ride_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REPORT_PASSING_S", 2.0)
    queue = ReportQueue()
    queue.put(report("a", STARTING))
    queue.put(report("b", STARTING))
    queue.put(report("c", READY))
    assert await take(queue) == (1, {"c": READY})
    queue.put(report("b", READY))
    assert await take(queue) == (2, {"b": READY})
    assert await take(queue) == (3, {"a": STARTING})


async def test_a_full_message_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REPORT_LINGER_S", 100.0)
    monkeypatch.setattr(limits, "REPORT_PASSING_S", 100.0)
    queue = ReportQueue()
    queue.put(report("first", READY))
    await take(queue)
    async with asyncio.TaskGroup() as group:
        taking = group.create_task(take(queue))
        await asyncio.sleep(0)
        for number in range(limits.REPORTS_MAX):
            queue.put(report(f"sb-{number}", STARTING))
    assert len(taking.result()[1]) == limits.REPORTS_MAX


async def test_only_the_latest_report_is_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REPORT_LINGER_S", 0.0)
    monkeypatch.setattr(limits, "REPORT_LINGER_MAX_S", 0.0)
    queue = ReportQueue()
    for state in (READY, DELETED):
        queue.put(report("a", state))
        await take(queue)
    assert queue.acknowledge(1) == []
    queue.put(report("b", READY))
    assert [each.sandbox_id for each in queue.acknowledge(2)] == ["a"]
    assert queue.acknowledge(2) == []
    assert queue.acknowledge(99) == []


async def test_a_new_session_hears_the_latest_of_what_was_not_acknowledged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "REPORT_LINGER_S", 0.0)
    monkeypatch.setattr(limits, "REPORT_LINGER_MAX_S", 0.0)
    queue = ReportQueue()
    queue.put(report("a", READY))
    queue.put(report("b", READY))
    await take(queue)
    queue.put(report("a", DELETED))
    queue.put(report("c", READY))
    await take(queue)
    queue.acknowledge(2)
    queue.put(report("d", READY))
    queue.resend()
    # Of a the leader has a later one than what it has not acknowledged.
    assert await take(queue) == (1, {"b": READY, "d": READY})
