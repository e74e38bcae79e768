"""Work that does not wait shares a task; work that waits holds up no other."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from prism_agent.works import Works


class Bench:
    def __init__(self) -> None:
        self.done: list[int] = []
        self.tasks: set[object] = set()
        self.idle = 0
        self.works = Works(self.on_idle)
        self.gate = asyncio.Event()

    def on_idle(self) -> None:
        self.idle += 1

    async def quick(self, number: int) -> None:
        self.tasks.add(asyncio.current_task())
        self.done.append(number)

    async def slow(self, number: int) -> None:
        await self.gate.wait()
        await self.quick(number)

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.done) < count:  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    async with asyncio.TaskGroup() as group:
        bench.works.open(group)
        yield bench
        bench.works.close()


async def test_a_batch_that_does_not_wait_takes_few_tasks(bench: Bench) -> None:
    for number in range(1000):
        bench.works.add(bench.quick(number))
    await bench.until(1000)
    assert bench.done == list(range(1000))
    # One, and another whenever it lets others have their turn.
    assert len(bench.tasks) <= 3
    assert bench.idle >= 1


async def test_what_waits_holds_up_no_other(bench: Bench) -> None:
    for number in range(50):
        bench.works.add(bench.slow(number))
        bench.works.add(bench.quick(100 + number))
    await bench.until(50)
    assert sorted(bench.done) == list(range(100, 150))
    bench.gate.set()
    await bench.until(100)
    assert sorted(bench.done[50:]) == list(range(50))


async def test_others_have_their_turn_within_a_batch(bench: Bench) -> None:
    for number in range(5000):
        bench.works.add(bench.quick(number))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert 0 < len(bench.done) < 5000
    await bench.until(5000)


async def test_work_added_when_all_is_done_is_done_too(bench: Bench) -> None:
    def add_one() -> None:
        if len(bench.done) < 5:
            works.add(bench.quick(len(bench.done)))

    works = Works(add_one)
    async with asyncio.TaskGroup() as group:
        works.open(group)
        works.add(bench.quick(0))
        await bench.until(5)
    assert bench.done == list(range(5))
    assert len(bench.tasks) == 1


async def test_nothing_is_begun_after_the_end() -> None:
    bench = Bench()
    async with asyncio.TaskGroup() as group:
        bench.works.open(group)
        bench.works.add(bench.quick(1))
        bench.works.close()
        bench.works.add(bench.quick(2))
    assert bench.done == []
