"""One bounded queue of requests: whose turn it is, whether it batches, and when to come again."""

import asyncio
import random
from collections.abc import Container
from dataclasses import dataclass
from typing import Final, Protocol

from prism_common.errors import PrismError, QueueFullError
from prism_control.fair_queue import FairQueue
from prism_control.state.commands import Command, CreateSandbox, DeleteSandbox
from prism_control.state.results import Result

#: Up to so many go all together: one entry, one round. One who is alone waits for nobody.
_COMPANY_ALL: Final = 32
#: Of more that are waiting or under way, so many go: the others' entry is on its way meanwhile.
_COMPANY_SHARE: Final = 0.5
#: What a request costs at least, in bytes, in its client's turn.
_COST_MIN: Final = 256
#: With each entry that has ended.
_CROWD_FADES: Final = 0.98
#: Before anything was measured.
_RETRY_DEFAULT_S: Final = 0.25
_RETRY_MIN_S: Final = 0.05
_RETRY_MAX_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class BatchingSettings:
    """The flags of batching; the defaults took a burst of 10,000 sandboxes.

    Attributes:
        enabled: False: every request is an entry of its own.
        create_queue_size: Creates that may wait.
        delete_queue_size: Deletes that may wait.
        threshold: Batch when more than so many wait.
        interval_ms: Batch when requests come less than this apart.
    """

    enabled: bool = True
    create_queue_size: int = 12_000
    delete_queue_size: int = 22_000
    threshold: int = 50
    interval_ms: int = 250


class Caller(Protocol):
    """Who waits for an answer; a future is one."""

    def done(self) -> bool:
        """Whether it waits no more."""

    def set_result(self, result: Result, /) -> None:
        """Answer it."""

    def set_exception(self, error: Exception, /) -> None:
        """Tell it what went wrong."""


class Group:
    """The answers to a group of commands: one future for all, since each costs."""

    def __init__(self, count: int) -> None:
        self._answers: list[Result | PrismError | None] = [None] * count
        self._left = count
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def settle(self, position: int, answer: Result | PrismError) -> None:
        """Note an answer."""
        self._answers[position] = answer
        self._left -= 1
        if not self._left and not self.future.done():
            self.future.set_result(None)

    async def results(self) -> list[Result | PrismError]:
        """Return all answers, once they are there."""
        if self._left:
            await self.future
        return [answer for answer in self._answers if answer is not None]


class Member:
    """One of a group, as who waits."""

    __slots__ = ("_group", "_position")

    def __init__(self, group: Group, position: int) -> None:
        self._group = group
        self._position = position

    def done(self) -> bool:
        """Whether the group waits no more."""
        return self._group.future.done()

    def set_result(self, result: Result) -> None:
        """Note the answer."""
        self._group.settle(self._position, result)

    def set_exception(self, error: Exception) -> None:
        """Note what went wrong; what is no PrismError is a bug, and ends the whole group."""
        if isinstance(error, PrismError):
            self._group.settle(self._position, error)
        else:
            self._group.future.set_exception(error)


@dataclass(slots=True)
class Item:
    """A command that waits, and who wait for its answer: more than one where it was sent again."""

    command: Command
    size: int
    callers: list[Caller]

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits."""
        callers = self.callers
        if len(callers) == 1:  # nearly always
            return not callers[0].done()
        return any(not caller.done() for caller in callers)

    def resolve(self, result: Result) -> None:
        """Answer all who wait."""
        for caller in self.callers:
            if not caller.done():
                caller.set_result(result)

    def fail(self, error: Exception) -> None:
        """Tell all who wait."""
        for caller in self.callers:
            if not caller.done():
                caller.set_exception(error)


#: What has a queue of its own, and a request id.
_USERS: Final = (CreateSandbox, DeleteSandbox)


def _is_repeat(command: CreateSandbox | DeleteSandbox, waiting: Command) -> bool:
    """Whether a command asks for the same as one that waits under the same request id.

    Another content under a used request id is for the state machine to refuse.
    """
    return type(command) is type(waiting) and command.fingerprint == waiting.fingerprint


class RequestQueue:
    """One bounded queue, and whether it batches."""

    def __init__(self, op: str, capacity: int, settings: BatchingSettings) -> None:
        self.op = op
        self.capacity = capacity
        #: Of many clients, in turn.
        self.items: FairQueue[Item] = FairQueue()
        #: Those of them that have a request id, by it.
        self._by_request: dict[str, Item] = {}
        self._settings = settings
        self._last_arrival = float("-inf")
        self._interval_s = float("inf")
        #: Requests a second that left, smoothed; 0: not measured.
        self.drain_rate = 0.0
        self._drained_at = 0.0
        #: Requests that were taken and are not answered yet.
        self.under_way = 0
        #: Requests at once, waiting or under way: the most that were seen, and it fades.
        self._crowd = 0.0
        #: When the oldest that waits came.
        self.first_arrival = 0.0

    def put(
        self, command: Command, size: int, caller: Caller, now: float, client: str = ""
    ) -> Item | None:
        """Add a request; one that waits already gets another to answer, and takes no more room.

        Args:
            command: What is asked for.
            size: About how many bytes it takes.
            caller: Who waits for the answer.
            now: The monotonic time.
            client: Whose it is: the queue is fair between clients.

        Returns:
            What had to make room, of the client that has most: to be told `full`.

        Raises:
            QueueFullError: With when to retry, from the measured drain rate, plus jitter.
        """
        request_id = ""
        if isinstance(command, _USERS):
            request_id = command.request_id
            waiting = self._by_request.get(request_id)
            if waiting is not None and _is_repeat(command, waiting.command):
                waiting.callers.append(caller)
                return None
        shed = None
        if len(self.items) >= self.capacity:
            shed = self.items.shed(client)
            if shed is None:
                raise self.full()
            self._forget(shed)
        self._interval_s = now - self._last_arrival
        self._last_arrival = now
        if not self.items:
            self.first_arrival = now
        item = Item(command, size, [caller])
        self.items.push(client, item, max(size, _COST_MIN))
        if request_id:
            self._by_request.setdefault(request_id, item)
        return shed

    def pop(self, held: Container[str] = ()) -> Item | None:
        """Take out whose turn it is; None if all that wait are of clients that are `held` back."""
        item = self.items.pop(held)
        if item is not None:
            self._forget(item)
        return item

    def _forget(self, item: Item) -> None:
        if isinstance(item.command, _USERS):
            request_id = item.command.request_id
            if self._by_request.get(request_id) is item:
                del self._by_request[request_id]

    def full(self) -> QueueFullError:
        """Return what is told to who finds no room."""
        return QueueFullError(
            f"the {self.op} queue is full: {self.capacity} requests wait",
            retry_after_s=self._retry_after_s(),
        )

    def batching(self, now: float) -> bool:
        """Whether requests are batched at present; it switches back by itself."""
        if not self._settings.enabled:
            return False
        if len(self.items) > self._settings.threshold:
            return True
        interval_s = max(self._interval_s, now - self._last_arrival)
        return interval_s * 1000 < self._settings.interval_ms

    @property
    def company(self) -> float:
        """How many should wait to go together, sooner than after the longest wait.

        Clients that wait for their answers send no more: most of them wait here then, and would
        all wait for nothing.
        """
        return min(self._crowd, max(_COMPANY_ALL, _COMPANY_SHARE * self._crowd))

    def leave(self, count: int) -> None:
        """Take note that so many were taken out, to be proposed."""
        self.under_way += count
        self._crowd = max(self._crowd, len(self.items) + self.under_way)

    def ended(self, count: int) -> None:
        """Take note that so many of them have been answered, or failed."""
        self.under_way -= count
        self._crowd *= _CROWD_FADES

    def drained(self, count: int, now: float) -> None:
        """Take note that so many requests have been answered."""
        elapsed_s = now - self._drained_at
        self._drained_at = now
        if 0 < elapsed_s < 1:
            self.drain_rate += 0.2 * (count / elapsed_s - self.drain_rate)

    def _retry_after_s(self) -> float:
        # A tenth of the queue must have left before one more request is worth the trip.
        wait_s = self.capacity / 10 / self.drain_rate if self.drain_rate else _RETRY_DEFAULT_S
        wait_s = min(max(wait_s, _RETRY_MIN_S), _RETRY_MAX_S)
        return wait_s * random.uniform(1.0, 1.5)  # noqa: S311
