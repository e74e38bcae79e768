"""Requests to proposals: bounded queues, pass-through at low load, group commit under load.

The driver takes what waits once a turn, that is, when the previous entries have left for the disk:
a batch is whatever arrived meanwhile, and nobody sleeps through a fixed window.
"""

import asyncio
import math
import time
from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import Final

from prism_common import caller
from prism_common.errors import (
    DiskFullError,
    NoLeaderError,
    PrismError,
    QueueFullError,
    StoppingError,
    UpgradeNeededError,
)
from prism_control.metrics import BatcherMetrics
from prism_control.request_queue import BatchingSettings, Caller, Group, Item, Member, RequestQueue
from prism_control.state import commands
from prism_control.state.commands import Command, CreateSandbox, DeleteSandbox
from prism_control.state.results import Result

#: Together with the bytes bound: one entry is applied in one go, in about 10 ms with placements.
_BATCH_ITEMS_MAX: Final = 1000
_BATCH_BYTES_MAX: Final = 1 * 2**20
#: Of what the leader itself proposes, where one item may be a thousand reports of some 60 bytes:
#: without it an entry held those of all agents, and was applied in 70 ms.
_OTHER_BYTES_MAX: Final = 96 * 2**10
#: In pass-through each request is an entry of its own; so many fit into one turn.
_ENTRIES_A_TURN_MAX: Final = 64
#: Stop, start, and what the leader itself proposes. Bounded by its callers; this is the backstop.
_OTHER_QUEUE_SIZE: Final = 20_000
#: Under load a request waits this long for others to share its entry: each entry costs the leader,
#: its followers and the disk as much as some tens of requests do. A lone request never waits.
_LINGER_CREATE_S: Final = 0.005
#: … and longer the more of them come, up to this: what a turn costs is shared by more, and in a
#: burst they wait for each other far longer anyway.
_LINGER_BURST_S: Final = 0.03
_LINGER_BURST_RATE: Final = 2500.0
#: Placements and reports: each is the work of a whole pass, and one commit serves them all.
_LINGER_OTHER_S: Final = 0.01
#: How often it is looked whether they are due.
_TICK_S: Final = 0.0025
#: Requests of a queue that are proposed and not answered: one batch on its way, and one that is
#: written meanwhile. What comes then is behind these, and not behind all that waits: its client's
#: turn comes among those of the others.
_UNDER_WAY_MAX: Final = 2 * _BATCH_ITEMS_MAX
#: Load: more than so many users' requests a second, averaged over the window.
_BUSY_RATE: Final = 400.0
#: What the leader proposes by itself shares entries sooner: each create is followed by a placement
#: and a report, and the next one would wait behind the turns that those take.
_BUSY_RATE_OTHER: Final = 150.0
_BUSY_WINDOW_S: Final = 0.1


def _room(queue: RequestQueue) -> int:
    """Return how many more of a queue's requests may be proposed now."""
    return max(_UNDER_WAY_MAX - queue.under_way, 0)


class EntryBatch:
    """One entry to be proposed, and the callers that wait for its items."""

    def __init__(self, items: Sequence[Item], at_ms: int, ended: Callable[[bool], None]) -> None:
        self._items = items
        self._ended = ended
        self.data = commands.encode(
            commands.propose(at_ms, tuple([item.command for item in items]))
        )

    def resolve(self, result: object) -> None:
        """Give each caller the result of its own item."""
        results: Sequence[Result] = result  # type: ignore[assignment]
        for item, answer in zip(self._items, results, strict=True):
            item.resolve(answer)
        self._ended(True)

    def fail(self, error: Exception) -> None:
        """Tell every caller."""
        for item in self._items:
            item.fail(error)
        self._ended(False)


class _Load:
    """How many requests users make a second, as an average that fades."""

    def __init__(self) -> None:
        self._level = 0.0
        self._at = float("-inf")

    def add(self, count: int, now: float) -> None:
        """Take note of requests."""
        self._level = self._faded(now) + count
        self._at = now

    def rate(self, now: float) -> float:
        """Return requests a second."""
        return self._faded(now) / _BUSY_WINDOW_S

    def _faded(self, now: float) -> float:
        return self._level * math.exp((self._at - now) / _BUSY_WINDOW_S)


class Batcher:
    """Between the API and the driver, on the leader.

    Args:
        settings: The flags.
        metrics: What is counted.
        wake: Tells the driver that something waits.
        has_room: Whether the disk takes more.
        check: Raises a PrismError for a command that must not be proposed now.
    """

    def __init__(
        self,
        settings: BatchingSettings,
        metrics: BatcherMetrics,
        wake: Callable[[], None],
        has_room: Callable[[], bool],
        check: Callable[[Command], None],
    ) -> None:
        self._check = check
        self._metrics = metrics
        self._wake = wake
        self._has_room = has_room
        self._creates = RequestQueue("create", settings.create_queue_size, settings)
        self._deletes = RequestQueue("delete", settings.delete_queue_size, settings)
        self._others = RequestQueue("other", _OTHER_QUEUE_SIZE, settings)
        self._queues = (self._others, self._creates, self._deletes)
        #: Returns what the leader adds to an entry of creates, to be applied after them.
        self.accompany: Callable[[Sequence[Command]], Sequence[Item]] | None = None
        self._closed: PrismError | None = None
        self._last_ms = 0
        self._load = _Load()
        self._timer: asyncio.TimerHandle | None = None
        for queue in self._queues:
            metrics.rejected.labels(queue.op)
            metrics.batch_size.labels(queue.op)

    async def submit(self, command: Command, size: int = 256) -> Result:
        """Propose a command; return its own result once it is committed and applied.

        Args:
            command: What to propose.
            size: About how many bytes it takes.

        Raises:
            QueueFullError, DiskFullError, StoppingError, NoLeaderError: Nothing was proposed.
            UpgradeNeededError: The same: some member could not apply it.
            OutcomeUnknownError: It may yet commit.
        """
        self._check_open()
        self._check(command)
        return await self._put(command, size)

    async def submit_all(self, group: Sequence[tuple[Command, int]]) -> list[Result | PrismError]:
        """Propose a group of commands with their sizes; return each one's own result or failure.

        They wait together: where the queue has no room for all, the last of them are refused.
        """
        self._check_open()
        waiting = Group(len(group))
        now = time.monotonic()
        touched: dict[RequestQueue, None] = {}
        for position, (command, size) in enumerate(group):
            queue = self._queue_of(command)
            touched[queue] = None
            try:
                self._check(command)
                self._add(queue, command, size, Member(waiting, position), now)
            except (UpgradeNeededError, NoLeaderError) as error:
                waiting.settle(position, error)
            except QueueFullError as error:
                self._metrics.rejected.labels(queue.op).inc()
                waiting.settle(position, error)
        self._load.add(len(group), now)
        for queue in touched:
            self._wake_for(queue, now)
        return await waiting.results()

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed
        if not self._has_room():
            raise DiskFullError(
                "the leader's disk is full: writes are refused until there is room; reads and "
                "running sandboxes go on",
                retry_after_s=5.0,
            )

    def _put(self, command: Command, size: int) -> asyncio.Future[Result]:
        queue = self._queue_of(command)
        now = time.monotonic()
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        if queue is not self._others:
            self._load.add(1, now)
        try:
            self._add(queue, command, size, future, now)
        except QueueFullError:
            self._metrics.rejected.labels(queue.op).inc()
            raise
        self._wake_for(queue, now)
        return future

    def _add(
        self, queue: RequestQueue, command: Command, size: int, waits: Caller, now: float
    ) -> None:
        shed = queue.put(command, size, waits, now, caller.client.get())
        if shed is not None:
            self._metrics.rejected.labels(queue.op).inc()
            shed.fail(queue.full())

    @property
    def waits(self) -> bool:
        """Whether anything waits."""
        return any(queue.items for queue in self._queues)

    def take(self) -> Sequence[EntryBatch]:
        """Return the entries of this turn. No client's delete overtakes a create of its own."""
        now = time.monotonic()
        batches: list[EntryBatch] = []
        # What waits for company rides along with what goes: a turn costs more than an entry.
        # So creates go no later than the deletes that came after them.
        if not any(self._goes(queue, now) for queue in self._queues):
            return batches
        for queue in self._queues:
            items_max = _BATCH_ITEMS_MAX if queue.batching(now) else 1
            while len(batches) < _ENTRIES_A_TURN_MAX:
                items = self._take_items(queue, min(items_max, _room(queue)))
                if not items:
                    break
                self._metrics.batch_size.labels(queue.op).observe(len(items))
                queue.leave(len(items))
                ended = partial(self._ended, queue, len(items))
                if queue is self._creates and self.accompany is not None:
                    items += self.accompany([item.command for item in items])
                batches.append(EntryBatch(items, self._now_ms(), ended))
        for queue in self._queues:
            self._wake_for(queue, now)
        return batches

    def _goes(self, queue: RequestQueue, now: float) -> bool:
        """Whether a queue's requests leave in this turn."""
        return self._may_leave(queue) and (not queue.batching(now) or self._due(queue, now))

    def _may_leave(self, queue: RequestQueue) -> bool:
        """Whether anything waits, and is not held back."""
        # Asked for each queue in each turn of the driver, and mostly nothing waits.
        if not queue.items or not _room(queue):
            return False
        return queue.items.can_pop(self._held_of(queue))

    def _held_of(self, queue: RequestQueue) -> Container[str]:
        """Return the clients whose requests must wait: a delete of a client's last create."""
        return self._creates.items if queue is self._deletes else ()

    def _due(self, queue: RequestQueue, now: float) -> bool:
        """Whether a queue's requests have waited for company as long as they should."""
        rate = self._load.rate(now)
        busy_rate = _BUSY_RATE_OTHER if queue is self._others else _BUSY_RATE
        if rate <= busy_rate or len(queue.items) >= _BATCH_ITEMS_MAX:
            return True
        if queue is self._others:
            linger_s = _LINGER_OTHER_S
        elif len(self._creates.items) + len(self._deletes.items) >= queue.company:
            # Who waits for the answer to a delete sends no create, and the other way about.
            return True
        else:
            share = min(rate / _LINGER_BURST_RATE, 1.0)
            linger_s = max(_LINGER_CREATE_S, _LINGER_BURST_S * share)
        return now >= queue.first_arrival + linger_s

    def _wake_for(self, queue: RequestQueue, now: float) -> None:
        """Have the driver take a queue's requests now, or once they are due."""
        if self._goes(queue, now):
            self._wake()
        elif self._timer is None and self._may_leave(queue):
            self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._ring)

    def _ring(self) -> None:
        self._timer = None
        now = time.monotonic()
        waiting = [queue for queue in self._queues if self._may_leave(queue)]
        if any(self._due(queue, now) for queue in waiting):
            self._wake()
        elif waiting:
            self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._ring)

    def fail_all(self, error: PrismError) -> None:
        """Fail what waits: it was not proposed, and is safe to retry."""
        for queue in self._queues:
            while (item := queue.pop()) is not None:
                item.fail(error)

    def close(self) -> None:
        """Refuse from now on, and fail what waits."""
        self._closed = StoppingError(
            "this member is stopping; nothing was proposed", retry_after_s=0.5
        )
        self.fail_all(self._closed)

    def queues(self) -> dict[str, tuple[int, int, bool]]:
        """Return for each op its queue's length, capacity, and whether it batches."""
        now = time.monotonic()
        return {q.op: (len(q.items), q.capacity, q.batching(now)) for q in self._queues}

    def _queue_of(self, command: Command) -> RequestQueue:
        match command:
            case CreateSandbox():
                return self._creates
            case DeleteSandbox():
                return self._deletes
            case _:
                return self._others

    def _take_items(self, queue: RequestQueue, count_max: int) -> list[Item]:
        items: list[Item] = []
        size, size_max = 0, _OTHER_BYTES_MAX if queue is self._others else _BATCH_BYTES_MAX
        while len(items) < count_max and size < size_max:
            item = queue.pop(self._held_of(queue))
            if item is None:
                break
            # A caller that has gone gets no sandbox that nobody would know of.
            if item.wanted:
                items.append(item)
                size += item.size
        return items

    def _ended(self, queue: RequestQueue, count: int, answered: bool) -> None:
        """Take note that an entry with so many of a queue's requests has ended."""
        now = time.monotonic()
        queue.ended(count)
        if answered:
            queue.drained(count, now)
        for each in self._queues:
            self._wake_for(each, now)

    def _now_ms(self) -> int:
        """The wall clock in milliseconds; it never goes back within one leadership."""
        self._last_ms = max(self._last_ms, time.time_ns() // 1_000_000)
        return self._last_ms
