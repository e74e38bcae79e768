"""From requests to entries: when they share one, and whose turn it is."""

import asyncio
from collections.abc import Sequence
from itertools import pairwise

import pytest

from prism_common.errors import (
    DiskFullError,
    NoLeaderError,
    QueueFullError,
)
from prism_control.request_queue import BatchingSettings, Item
from prism_control.state import commands
from prism_control.state.commands import (
    AssignSandboxes,
    Command,
    DeleteSandbox,
    Placement,
    StopSandbox,
)
from prism_control.state.results import Assigned, Ok, Refused, Result
from tests.unit.control.batching import Bench, Clock, as_client, create, names, settle


async def test_at_low_load_a_request_is_an_entry_at_once(clock: Clock) -> None:
    bench = Bench(BatchingSettings())
    for number in range(3):
        task = bench.submit(create(f"s{number}"))
        await settle()
        assert bench.wakes == number + 1
        batches = bench.batcher.take()
        assert names(batches) == [[f"s{number}"]]
        bench.commit(batches)
        assert isinstance(await task, Ok)
        clock.now += 1.0


async def test_it_batches_under_load_and_passes_through_again(clock: Clock) -> None:
    bench = Bench(BatchingSettings(threshold=50, interval_ms=250))
    assert bench.batcher.queues()["create"] == (0, 12_000, False)
    tasks = [bench.submit(create(f"s{n}")) for n in range(100)]
    await settle()
    assert bench.batcher.queues()["create"] == (100, 12_000, True)
    clock.now += 0.02
    batches = bench.batcher.take()
    assert [len(batch) for batch in names(batches)] == [100]
    bench.commit(batches)
    await asyncio.gather(*tasks)
    assert bench.batcher.queues()["create"][2] is True
    clock.now += 0.3
    assert bench.batcher.queues()["create"][2] is False
    bench.submit(create("later"))
    await settle()
    assert names(bench.batcher.take()) == [["later"]]
    bench.batcher.close()


async def test_more_than_the_threshold_waiting_is_load_even_if_slow(clock: Clock) -> None:
    bench = Bench(BatchingSettings(threshold=5, interval_ms=0))
    tasks = []
    for number in range(6):
        tasks.append(bench.submit(create(f"s{number}")))
        await settle()
        clock.now += 1.0
        assert bench.batcher.queues()["create"][2] is (number == 5)
    assert [len(batch) for batch in names(bench.batcher.take())] == [6]
    bench.batcher.close()
    for task in tasks:
        task.cancel()


async def test_disabled_it_never_batches(clock: Clock) -> None:
    bench = Bench(BatchingSettings(enabled=False))
    tasks = [bench.submit(create(f"s{n}")) for n in range(100)]
    await settle()
    taken = []
    while batches := bench.batcher.take():
        taken += names(batches)
        bench.commit(batches)
    assert taken == [[f"s{n}"] for n in range(100)]
    await asyncio.gather(*tasks)


async def test_a_batch_is_bounded_in_items_and_bytes(clock: Clock) -> None:
    bench = Bench(BatchingSettings())
    for number in range(2500):
        bench.submit(create(f"s{number}"))
    await settle()
    first = bench.batcher.take()
    assert [len(batch) for batch in names(first)] == [1000, 1000]
    assert bench.batcher.take() == []  # until some of them are answered
    wakes = bench.wakes
    clock.now += 0.05
    bench.commit(first)
    assert bench.wakes > wakes
    last = bench.batcher.take()
    assert [len(batch) for batch in names(last)] == [500]
    bench.commit(last)
    for number in range(30):
        bench.submit(create(f"t{number}"), 100_000)
    await settle()
    clock.now += 0.04
    sizes = [len(batch) for batch in names(bench.batcher.take())]
    assert sum(sizes) == 30
    assert max(sizes) <= 11
    bench.batcher.close()


async def test_what_the_leader_proposes_itself_is_bounded_by_how_long_it_takes_to_apply(
    clock: Clock,
) -> None:
    bench = Bench(BatchingSettings())
    reports = [bench.submit(StopSandbox("", b"f", f"s{number}"), 40_000) for number in range(10)]
    await settle()
    clock.now += 0.05
    batches = bench.batcher.take()
    assert [len(batch) for batch in names(batches)] == [3, 3, 3, 1]
    bench.commit(batches)
    assert all(isinstance(answer, Refused) for answer in await asyncio.gather(*reports))
    bench.batcher.close()


async def test_each_caller_gets_the_answer_of_its_own_item(clock: Clock) -> None:
    bench = Bench(BatchingSettings())
    wanted = ["a", "b", "a", "c"]
    tasks = [bench.submit(create(name, f"r{i}")) for i, name in enumerate(wanted)]
    twice = bench.submit(create("c", "r3"))
    await settle()
    clock.now += 0.02
    bench.commit(bench.batcher.take())
    results = await asyncio.gather(*tasks)
    assert [isinstance(result, Ok) for result in results] == [True, True, False, True]
    assert isinstance(results[2], Refused)
    assert await twice == results[3]


async def test_a_delete_never_overtakes_a_create(clock: Clock) -> None:
    bench = Bench(BatchingSettings())
    # Creates are under load and linger; the delete that comes after them is alone.
    tasks = [bench.submit(create(f"s{n}")) for n in range(60)]
    await settle()
    tasks.append(bench.submit(DeleteSandbox("", b"", "s59")))
    await settle()
    applied: list[str] = []
    for _ in range(10):
        for batch in names(batches := bench.batcher.take()):
            applied += batch
        bench.commit(batches)
        clock.now += 0.003
    results = await asyncio.gather(*tasks)
    assert applied.count("s59") == 2
    assert isinstance(results[-1], Ok)


async def test_a_full_queue_says_when_to_come_again(clock: Clock) -> None:
    bench = Bench(BatchingSettings(create_queue_size=10, delete_queue_size=1))
    tasks = [bench.submit(create(f"s{n}")) for n in range(10)]
    await settle()
    with pytest.raises(QueueFullError) as caught:
        await bench.batcher.submit(create("eleventh"))
    assert 0.05 <= (caught.value.retry_after_s or 0) <= 15
    rejected = bench.registry.get_sample_value("prism_batcher_rejected_total", {"op": "create"})
    assert rejected == 1
    # The other queues have room of their own.
    delete = bench.submit(DeleteSandbox("", b"", "s1"))
    stop = bench.submit(StopSandbox("", b"", "s2"))
    await settle()
    clock.now += 0.02
    bench.commit(bench.batcher.take())
    await asyncio.gather(*tasks, delete, stop)


async def test_the_retry_hint_follows_the_measured_rate(clock: Clock) -> None:
    bench = Bench(BatchingSettings(create_queue_size=1000))
    hints = []
    for gap_s in (0.5, 0.012):
        for turn in range(30):
            tasks = [bench.submit(create(f"s{gap_s}-{turn}-{n}")) for n in range(20)]
            await settle()
            clock.now += gap_s
            bench.commit(bench.batcher.take())
            await asyncio.gather(*tasks)
        hints.append(bench.batcher._creates._retry_after_s())
    slow, fast = hints
    assert slow > 2 * fast


async def test_without_room_on_the_disk_nothing_is_queued(clock: Clock) -> None:
    bench = Bench(BatchingSettings())
    bench.room = False
    with pytest.raises(DiskFullError) as caught:
        await bench.batcher.submit(create("a"))
    assert caught.value.retry_after_s
    assert bench.batcher.queues()["create"][0] == 0
    bench.room = True
    task = bench.submit(create("a"))
    await settle()
    bench.commit(bench.batcher.take())
    assert isinstance(await task, Ok)


async def test_the_clock_of_entries_never_goes_back(clock: Clock) -> None:
    bench = Bench(BatchingSettings(enabled=False))
    times = []
    for step in (1.0, -5.0, 0.5, 10.0):
        clock.now += step
        task = bench.submit(create(f"s{clock.now}"))
        await settle()
        batches = bench.batcher.take()
        times += [commands.decode(batch.data).at_ms for batch in batches]
        bench.commit(batches)
        await task
    assert all(earlier <= later for earlier, later in pairwise(times))


async def test_what_lingers_is_taken_without_another_request() -> None:
    """The batcher itself wakes the driver once what waits is due."""
    bench = Bench(BatchingSettings())
    tasks = [bench.submit(create(f"s{n}")) for n in range(200)]
    async with asyncio.timeout(5):
        while not all(task.done() for task in tasks):
            bench.commit(bench.batcher.take())
            seen = bench.wakes
            # The driver's event would wake it; here a counter stands for it.
            while bench.wakes == seen and not all(task.done() for task in tasks):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    assert bench.machine.sandbox_count == 200


async def test_what_waits_for_company_rides_along_with_what_is_due(clock: Clock) -> None:
    bench = Bench(BatchingSettings(threshold=0))
    before = [bench.submit(create(f"s{n}")) for n in range(200)]
    await settle()
    bench.commit(bench.batcher.take())
    await asyncio.gather(*before)
    creates = [bench.submit(create(f"t{n}")) for n in range(20)]
    await settle()
    clock.now += 0.006
    stop = bench.submit(StopSandbox("", b"f", "s1", 0))
    await settle()
    assert bench.batcher.take() == []
    clock.now += 0.03
    batches = bench.batcher.take()
    assert sorted(len(batch) for batch in names(batches)) == [1, 20]
    bench.commit(batches)
    await asyncio.gather(stop, *creates)


async def test_between_creates_in_quick_succession_other_commands_wait_for_the_next(
    clock: Clock,
) -> None:
    """A placement of one create would keep the next one waiting for a turn of its own."""
    bench = Bench(BatchingSettings())
    for number in range(60):
        made = bench.submit(create(f"s{number}"))
        await settle()
        # At this rate no create waits for company.
        bench.commit(batches := bench.batcher.take())
        assert names(batches) == [[f"s{number}"]]
        await made
        clock.now += 0.005
    alone = bench.submit(StopSandbox("", b"f", "s0", 0))
    await settle()
    bench.commit(bench.batcher.take())
    await alone
    stop = bench.submit(StopSandbox("", b"f", "s1", 0))
    await settle()
    assert bench.batcher.take() == []
    clock.now += 0.001
    made = bench.submit(create("next"))
    await settle()
    batches = bench.batcher.take()
    assert names(batches) == [["s1"], ["next"]]
    bench.commit(batches)
    await asyncio.gather(stop, made)


async def test_most_of_a_crowd_goes_at_once_and_does_not_wait_for_the_rest(clock: Clock) -> None:
    """Clients that wait for their answers send no more: waiting for them is in vain."""
    bench = Bench(BatchingSettings(threshold=0))
    first = [bench.submit(create(f"s{n}")) for n in range(100)]
    await settle()
    bench.commit(bench.batcher.take())
    await asyncio.gather(*first)
    few = [bench.submit(create(f"t{n}")) for n in range(40)]
    await settle()
    assert bench.batcher.take() == []
    most = [bench.submit(create(f"u{n}")) for n in range(20)]
    await settle()
    batches = bench.batcher.take()
    assert [len(batch) for batch in names(batches)] == [60]
    bench.commit(batches)
    await asyncio.gather(*few, *most)


@pytest.mark.parametrize("writers", [1, 2, 8, 30])
async def test_a_few_who_wait_for_their_answers_go_together_as_soon_as_all_are_there(
    clock: Clock, writers: int
) -> None:
    """However fast they come: there is nobody else to wait for."""
    bench = Bench(BatchingSettings(threshold=0))
    for turn in range(500):
        tasks = [bench.submit(create(f"s{turn}-{n}")) for n in range(writers - 1)]
        await settle()
        if turn > 200:  # before, they come too seldom for anybody to wait
            assert bench.batcher.take() == []
        tasks.append(bench.submit(create(f"s{turn}-last")))
        await settle()
        batches = bench.batcher.take()
        assert sum(map(len, names(batches))) == writers
        bench.commit(batches)
        await asyncio.gather(*tasks)
        clock.now += 0.002


async def test_who_waits_for_a_delete_is_not_waited_for(clock: Clock) -> None:
    bench = Bench(BatchingSettings(threshold=0))
    for command in (create, lambda name: DeleteSandbox("", b"f", name)):
        first = [bench.submit(command(f"a{n}")) for n in range(30)]
        await settle()
        clock.now += 0.05
        bench.commit(bench.batcher.take())
        await asyncio.gather(*first)
    bench.batcher._load.add(1000, clock.now)  # it goes on like this
    creates = [bench.submit(create(f"t{n}")) for n in range(15)]
    await settle()
    assert bench.batcher.take() == []
    with as_client("another"):
        deletes = [bench.submit(DeleteSandbox("", b"f", f"b{n}")) for n in range(15)]
    await settle()
    batches = bench.batcher.take()
    assert [len(batch) for batch in names(batches)] == [15, 15]
    bench.commit(batches)
    await asyncio.gather(*creates, *deletes)


async def test_what_the_leader_adds_to_creates_is_applied_after_them_and_answered(
    clock: Clock,
) -> None:
    bench = Bench(BatchingSettings(threshold=0))
    asked: list[Sequence[Command]] = []
    added: list[asyncio.Future[Result]] = []

    def accompany(creates: Sequence[Command]) -> list[Item]:
        asked.append(creates)
        added.append(asyncio.get_running_loop().create_future())
        return [Item(AssignSandboxes((Placement("s0", 1, "nobody"),)), 64, [added[-1]])]

    bench.batcher.accompany = accompany
    made = [bench.submit(create(f"s{number}")) for number in range(60)]
    stop = bench.submit(StopSandbox("", b"f", "s1", 0))
    await settle()
    batches = bench.batcher.take()
    assert [len(commands.decode(batch.data).items) for batch in batches] == [1, 61]
    bench.commit(batches)
    await asyncio.gather(*made)
    assert await added[0] == Assigned(("s0",))
    assert [len(creates) for creates in asked] == [60]
    assert isinstance(await stop, Refused)  # it went in an entry before
    clock.now += 1.0
    last = bench.submit(create("last"))
    await settle()
    for batch in bench.batcher.take():
        batch.fail(NoLeaderError("lost"))
    with pytest.raises(NoLeaderError):
        await added[1]
    with pytest.raises(NoLeaderError):
        await last


async def test_a_client_with_much_waiting_delays_another_by_a_batch_at_most(clock: Clock) -> None:
    bench = Bench(BatchingSettings())
    with as_client("many"):
        many = [bench.submit(create(f"m{number}")) for number in range(10_000)]
    with as_client("one"):
        one = bench.submit(create("lone"))
    await settle()
    first = bench.batcher.take()
    assert "lone" in names(first)[0]
    bench.commit(first)
    assert isinstance(await one, Ok)
    while batches := bench.batcher.take():
        bench.commit(batches)
        clock.now += 0.05
    await asyncio.gather(*many)


async def test_a_full_queue_makes_room_for_who_has_less_waiting(clock: Clock) -> None:
    bench = Bench(BatchingSettings(create_queue_size=4))
    with as_client("many"):
        many = [bench.submit(create(f"m{number}", f"r{number}")) for number in range(5)]
    await settle()
    assert isinstance(many[4].exception(), QueueFullError)  # its own are the most
    with as_client("one"):
        one = bench.submit(create("lone"))
    await settle()
    assert isinstance(many[3].exception(), QueueFullError)
    assert not one.done()
    with as_client("many"):
        again = bench.submit(create("m3", "r3"))  # what was refused may come again
    await settle()
    assert isinstance(again.exception(), QueueFullError)
    assert bench.registry.get_sample_value("prism_batcher_rejected_total", {"op": "create"}) == 3
    while batches := bench.batcher.take():
        bench.commit(batches)
        clock.now += 0.05
    assert isinstance(await one, Ok)
    assert all(isinstance(result, Ok) for result in await asyncio.gather(*many[:3]))


async def test_a_clients_delete_waits_for_its_creates_and_not_for_those_of_others(
    clock: Clock,
) -> None:
    bench = Bench(BatchingSettings())
    with as_client("many"):
        tasks = [bench.submit(create(f"m{number}")) for number in range(2500)]
        tasks.append(bench.submit(DeleteSandbox("", b"", "m2499")))
    with as_client("one"):
        tasks.append(bench.submit(DeleteSandbox("", b"", "gone")))
    await settle()
    first = bench.batcher.take()
    assert names(first)[-1] == ["gone"]
    assert bench.batcher.take() == []
    clock.now += 0.05
    bench.commit(first)
    second = bench.batcher.take()
    assert names(second)[-1] == ["m2499"]
    bench.commit(second)
    results = await asyncio.gather(*tasks)
    assert [isinstance(result, Ok) for result in results[-2:]] == [True, False]
