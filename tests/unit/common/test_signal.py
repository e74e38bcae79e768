import asyncio

import pytest

from prism_common.signal import KeyedSignal, Signal


async def test_a_notify_wakes_all_who_wait_and_nobody_who_comes_later() -> None:
    signal = Signal()
    waiters = [asyncio.ensure_future(signal.wait()) for _ in range(3)]  # noqa: TID251
    await asyncio.sleep(0)
    signal.notify()
    await asyncio.gather(*waiters)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await signal.wait()


async def test_a_waiter_that_gave_up_is_forgotten() -> None:
    signal = Signal()
    for _ in range(10):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await signal.wait()
    assert not signal._waiters
    signal.notify()


async def test_a_keyed_notify_wakes_only_who_waits_for_that_key() -> None:
    signal = KeyedSignal()
    async with asyncio.TaskGroup() as tasks:
        mine = [tasks.create_task(signal.wait("a")) for _ in range(3)]
        other = tasks.create_task(signal.wait("b"))
        await asyncio.sleep(0)
        signal.notify("a")
        await asyncio.gather(*mine)
        assert not other.done()
        signal.notify_all()
    assert not signal._waiters


async def test_a_keyed_waiter_that_gave_up_is_forgotten() -> None:
    signal = KeyedSignal()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await signal.wait("a")
    assert not signal._waiters
    signal.notify("a")
