"""Long batches leave turns of the loop to others."""

import asyncio
from collections.abc import Sequence
from itertools import pairwise

from prism_control.api.batches import _SLICE_ITEMS, _Slices


async def test_ten_batches_do_one_slice_in_a_turn_of_the_loop() -> None:
    slices = _Slices()
    done: list[int] = []

    async def others() -> list[int]:
        """Return how much was done between two turns of somebody else."""
        seen = [0]
        while len(done) < 10 * 300:
            await asyncio.sleep(0)
            seen.append(len(done))
        return [after - before for before, after in pairwise(seen)]

    def do(items: Sequence[int]) -> list[int]:
        done.extend(items)
        return [-item for item in items]

    async with asyncio.TaskGroup() as tasks:
        turns = tasks.create_task(others())
        batches = [tasks.create_task(slices.map(do, range(300))) for _ in range(10)]
    assert 0 < max(turns.result()) <= _SLICE_ITEMS < 300
    assert [batch.result() for batch in batches] == [[-item for item in range(300)]] * 10


async def test_a_batch_of_nothing_is_nothing() -> None:
    assert await _Slices().map(list, []) == []
