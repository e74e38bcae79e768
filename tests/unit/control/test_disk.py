"""The thread that writes to the disk: in order, beside the loop, and finished before it ends."""

import asyncio
import threading

import pytest

from prism_control.node.disk import DiskThread


async def test_work_is_done_in_order_beside_the_loop() -> None:
    disk, done = DiskThread(), list[int]()
    threads = set[threading.Thread]()

    def write(number: int) -> int:
        done.append(number)
        threads.add(threading.current_thread())
        return number

    assert await asyncio.gather(*(disk.run(write, n) for n in range(100))) == list(range(100))
    disk.close()
    assert done == list(range(100))
    (thread,) = threads
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


async def test_a_failure_is_told_to_who_asked_and_the_next_write_is_done() -> None:
    disk = DiskThread()

    def fail() -> None:
        raise OSError("no space")

    failing, working = disk.run(fail), disk.run(lambda: 7)
    with pytest.raises(OSError, match="no space"):
        await failing
    assert await working == 7
    disk.close()


async def test_what_was_asked_for_is_finished_though_nobody_waits_for_it_any_more() -> None:
    disk, may_go_on, done = DiskThread(), threading.Event(), list[int]()

    def write() -> None:
        may_go_on.wait(10)
        done.append(1)

    under_way, waiting = disk.run(write), disk.run(done.append, 2)
    under_way.cancel()
    waiting.cancel()
    may_go_on.set()
    disk.close()
    assert done == [1, 2]
    # Their outcome comes to the loop now, and finds nobody.
    await asyncio.sleep(0)
    assert under_way.cancelled()


async def test_once_closed_it_takes_no_more() -> None:
    disk = DiskThread()
    disk.close()
    with pytest.raises(RuntimeError, match="closed"):
        disk.run(print)
