"""A queue that is fair between flows: whoever has little waiting is not behind who has much.

Deficit round robin (Shreedhar and Varghese 1995), in the variant that lets a flow go into debt:
each flow in turn may take out what costs about a quantum. Within a flow first in, first out. All
operations take constant time, but for flows that are held back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator
from typing import Final, Generic, TypeVar

#: Of a flow in one round, in the unit of costs: some tens of small commands, in bytes.
_QUANTUM: Final = 4096

T = TypeVar("T")


class _Flow(Generic[T]):
    """What one flow has waiting."""

    __slots__ = ("credit", "items", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        #: Never empty while the queue knows the flow.
        self.items: deque[tuple[T, int]] = deque()
        #: What it may still take in this round; at most a quantum, and negative in debt.
        self.credit = _QUANTUM


class FairQueue(Generic[T]):
    """Items of many flows. It has no bound of its own: see `shed`."""

    def __init__(self) -> None:
        self._flows: dict[str, _Flow[T]] = {}
        #: The same in the order of their turns.
        self._turns: deque[_Flow[T]] = deque()
        self._length = 0
        #: Flows by how many items they have, so that the longest is at hand.
        self._by_length: dict[int, dict[str, _Flow[T]]] = {}
        self._longest = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        return (item for flow in self._turns for item, _ in flow.items)

    def __contains__(self, flow: object) -> bool:
        """Whether a flow has anything waiting."""
        return flow in self._flows

    def can_pop(self, held: Container[str] = ()) -> bool:
        """Whether anything waits that is not held back."""
        return any(name not in held for name in self._flows)

    def push(self, flow: str, item: T, cost: int) -> None:
        """Add an item behind its flow's others.

        Args:
            flow: Whose it is.
            item: What waits.
            cost: Above 0, against the quantum.
        """
        known = self._flows.get(flow)
        if known is None:
            known = self._flows[flow] = _Flow(flow)
            self._turns.append(known)
        known.items.append((item, cost))
        self._length += 1
        self._moved(known, len(known.items) - 1)

    def pop(self, held: Container[str] = ()) -> T | None:
        """Take out the next item; None if there is none but of flows that are `held` back."""
        turns = self._turns
        passed = 0
        while passed < len(turns):
            flow = turns[0]
            if flow.name in held:
                turns.rotate(-1)
                passed += 1
                continue
            if flow.credit > 0:
                item, cost = flow.items.popleft()
                flow.credit -= cost
                self._length -= 1
                self._moved(flow, len(flow.items) + 1)
                return item
            # Once a round, so that what is in debt by many quanta waits for as many rounds.
            flow.credit += _QUANTUM
            turns.rotate(-1)
            passed = 0
        return None

    def shed(self, flow: str) -> T | None:
        """Take out the newest item of the flow that has most, to make room for one of `flow`.

        Returns:
            The item; None if `flow` would then have as much waiting itself.
        """
        own = self._flows.get(flow)
        if self._longest <= (0 if own is None else len(own.items)) + 1:
            return None
        longest = next(iter(self._by_length[self._longest].values()))
        item, _ = longest.items.pop()
        self._length -= 1
        self._moved(longest, len(longest.items) + 1)
        return item

    def clear(self) -> None:
        """Take out everything."""
        self._flows.clear()
        self._turns.clear()
        self._by_length.clear()
        self._length = self._longest = 0

    def check(self) -> None:
        """Verify the invariants of the fields.

        Raises:
            AssertionError: One of them is broken.
        """
        lengths = {name: len(flow.items) for name, flow in self._flows.items()}
        filed = {name: size for size, flows in self._by_length.items() for name in flows}
        if not (
            filed == lengths
            and 0 not in lengths.values()
            and self._length == sum(lengths.values())
            and self._longest == max(lengths.values(), default=0)
            and sorted(flow.name for flow in self._turns) == sorted(self._flows)
            and all(flow.credit <= _QUANTUM for flow in self._turns)
        ):
            raise AssertionError(f"the queue is broken: {lengths}, {filed}")

    def _moved(self, flow: _Flow[T], before: int) -> None:
        """File a flow under its new length, which is one more or one less than `before`."""
        length = len(flow.items)
        if before:
            same = self._by_length[before]
            del same[flow.name]
            if not same:
                del self._by_length[before]
        if length:
            self._by_length.setdefault(length, {})[flow.name] = flow
        else:
            # It is the first, whose turn it was: what is shed never empties a flow.
            del self._flows[flow.name]
            self._turns.popleft()
        if length > self._longest or (before == self._longest and before not in self._by_length):
            self._longest = length
