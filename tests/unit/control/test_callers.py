"""Who waits for the batcher's answers: callers that go, repeat themselves, or ask for many."""

import asyncio

import pytest

from prism_common.errors import (
    NotLeaderError,
    OutcomeUnknownError,
    QueueFullError,
    StoppingError,
)
from prism_control.request_queue import BatchingSettings
from prism_control.state.commands import CreateSandbox, DeleteSandbox
from prism_control.state.results import Ok, Refused
from tests.unit.control.batching import Bench, Clock, create, names, settle, spec


async def test_callers_that_have_gone_get_no_sandbox(clock: Clock) -> None:
    bench = Bench(BatchingSettings())
    tasks = [bench.submit(create(f"s{n}")) for n in range(4)]
    await settle()
    tasks[1].cancel()
    tasks[3].cancel()
    await settle()
    clock.now += 0.02
    batches = bench.batcher.take()
    assert names(batches) == [["s0", "s2"]]
    bench.commit(batches)
    await asyncio.gather(tasks[0], tasks[2])
    assert bench.batcher.take() == []


async def test_a_caller_that_goes_later_does_not_disturb_the_others(clock: Clock) -> None:
    bench = Bench(BatchingSettings())
    tasks = [bench.submit(create(f"s{n}")) for n in range(3)]
    await settle()
    clock.now += 0.02
    batches = bench.batcher.take()
    tasks[1].cancel()
    await settle()
    bench.commit(batches)
    assert isinstance(await tasks[2], Ok)


async def test_a_failed_entry_fails_all_its_callers(clock: Clock) -> None:
    bench = Bench(BatchingSettings())
    tasks = [bench.submit(create(f"s{n}")) for n in range(3)]
    await settle()
    clock.now += 0.02
    (batch,) = bench.batcher.take()
    batch.fail(OutcomeUnknownError("leadership was lost"))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [OutcomeUnknownError] * 3


@pytest.mark.parametrize("how", ["close", "fail_all"])
async def test_nothing_hangs_when_it_ends(clock: Clock, how: str) -> None:
    bench = Bench(BatchingSettings())
    tasks = [bench.submit(create(f"s{n}")) for n in range(100)]
    group = asyncio.get_running_loop().create_task(
        bench.batcher.submit_all([(create("g1"), 1), (DeleteSandbox("", b"", "x"), 1)])
    )
    await settle()
    if how == "close":
        bench.batcher.close()
        expected: type[Exception] = StoppingError
    else:
        bench.batcher.fail_all(NotLeaderError("not here"))
        expected = NotLeaderError
    async with asyncio.timeout(5):
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {expected}
        assert {type(result) for result in await group} == {expected}
    assert bench.batcher.take() == []
    if how == "close":
        with pytest.raises(StoppingError):
            await bench.batcher.submit(create("late"))


async def test_a_group_has_a_result_for_each_and_room_for_what_fits(clock: Clock) -> None:
    bench = Bench(BatchingSettings(create_queue_size=2))
    group = asyncio.get_running_loop().create_task(
        bench.batcher.submit_all([(create(name), 1) for name in ("a", "b", "c")])
    )
    await settle()
    clock.now += 0.02
    bench.commit(bench.batcher.take())
    first, second, third = await group
    assert isinstance(first, Ok)
    assert isinstance(second, Ok)
    assert isinstance(third, QueueFullError)


async def test_a_request_sent_again_while_it_waits_is_proposed_once(clock: Clock) -> None:
    bench = Bench(BatchingSettings(threshold=0, create_queue_size=1))
    tasks = [bench.submit(create("a", "r1")) for _ in range(3)]
    await settle()
    assert bench.batcher.queues()["create"][0] == 1
    batches = bench.batcher.take()
    assert names(batches) == [["a"]]
    bench.commit(batches)
    answers = await asyncio.gather(*tasks)
    assert len({answer.sandbox.id for answer in answers if isinstance(answer, Ok)}) == 1
    assert all(isinstance(answer, Ok) for answer in answers)


async def test_a_request_whose_first_caller_has_gone_is_still_proposed(clock: Clock) -> None:
    bench = Bench(BatchingSettings(threshold=0))
    first, second = (bench.submit(create("a", "r1")) for _ in range(2))
    await settle()
    first.cancel()
    await settle()
    bench.commit(bench.batcher.take())
    assert isinstance(await second, Ok)


async def test_a_used_request_id_with_other_contents_is_refused_by_the_machine(
    clock: Clock,
) -> None:
    bench = Bench(BatchingSettings(threshold=0))
    tasks = [
        bench.submit(CreateSandbox("r1", digest, f"sb-{name}", name, spec()))
        for digest, name in ((b"f", "a"), (b"g", "b"))
    ]
    await settle()
    clock.now += 0.02
    bench.commit(bench.batcher.take())
    first, second = await asyncio.gather(*tasks)
    assert isinstance(first, Ok)
    assert isinstance(second, Refused)


async def test_a_group_hears_of_each_item_and_of_a_failure_for_all(clock: Clock) -> None:
    bench = Bench(BatchingSettings(threshold=0))
    group = asyncio.get_running_loop().create_task(
        bench.batcher.submit_all([(create("a"), 1), (create("a"), 1), (create("b"), 1)])
    )
    await settle()
    clock.now += 0.02
    bench.commit(bench.batcher.take())
    first, second, third = await group
    assert isinstance(first, Ok)
    assert isinstance(second, Refused)
    assert isinstance(third, Ok)
    lost = asyncio.get_running_loop().create_task(
        bench.batcher.submit_all([(create("c"), 1), (create("d"), 1)])
    )
    await settle()
    clock.now += 0.02
    for batch in bench.batcher.take():
        batch.fail(OutcomeUnknownError("leadership was lost"))
    assert [type(answer) for answer in await lost] == [OutcomeUnknownError] * 2
    assert await bench.batcher.submit_all([]) == []


async def test_a_group_whose_caller_has_gone_is_not_proposed(clock: Clock) -> None:
    bench = Bench(BatchingSettings(threshold=0))
    group = asyncio.get_running_loop().create_task(
        bench.batcher.submit_all([(create("a"), 1), (create("b"), 1)])
    )
    await settle()
    group.cancel()
    await settle()
    clock.now += 0.02
    assert bench.batcher.take() == []
