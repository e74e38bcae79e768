"""A network that loses, delays, reorders and repeats messages, and falls apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random


@dataclass
class NetworkFaults:
    """How bad the network is. Probabilities are per message; all times in microseconds."""

    drop: float = 0.0
    duplicate: float = 0.0
    #: A late message may arrive in another term, or after its sender has restarted.
    late: float = 0.0
    delay_min_us: int = 200
    delay_max_us: int = 2_000
    late_max_us: int = 3_000_000


class Network:
    """Decides the fate of each message; does not keep them."""

    def __init__(self, random: Random, faults: NetworkFaults) -> None:
        self._random = random
        self.faults = faults
        #: Ordered pairs (sender, receiver) that cannot talk.
        self._blocked: set[tuple[int, int]] = set()
        #: All that is sent to this member is late; 0 is nobody.
        self.slow_receiver = 0

    def delays_us(self, sender: int, receiver: int) -> list[int]:
        """Return after how long each copy of a message arrives; none if it is lost."""
        random, faults = self._random, self.faults
        if self.is_blocked(sender, receiver) or random.random() < faults.drop:
            return []
        copies = 2 if random.random() < faults.duplicate else 1
        if receiver == self.slow_receiver:
            return [random.randrange(100_000, 400_000) for _ in range(copies)]
        return [self._delay_us() for _ in range(copies)]

    def is_blocked(self, sender: int, receiver: int) -> bool:
        return (sender, receiver) in self._blocked

    def partition(self, members: Sequence[int], one_side: Iterable[int]) -> None:
        """Cut all links between `one_side` and everybody else, both ways."""
        side = set(one_side)
        for sender in members:
            for receiver in members:
                if (sender in side) != (receiver in side):
                    self._blocked.add((sender, receiver))

    def block(self, sender: int, receiver: int) -> None:
        """Cut one direction of one link."""
        self._blocked.add((sender, receiver))

    def heal(self) -> None:
        """Restore all links."""
        self._blocked.clear()
        self.slow_receiver = 0

    def _delay_us(self) -> int:
        faults = self.faults
        if self._random.random() < faults.late:
            return self._random.randrange(faults.delay_max_us, faults.late_max_us)
        return self._random.randrange(faults.delay_min_us, faults.delay_max_us + 1)
