"""Who hears whom, and how late."""

from __future__ import annotations

from random import Random


class Links:
    """Between members, and between agents and members; each direction by itself."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._blocked: set[tuple[str, str]] = set()
        self.drop = 0.0
        self.delay_max_s = 0.005

    def block(self, sender: str, receiver: str) -> None:
        """Let `receiver` hear nothing of `sender`."""
        self._blocked.add((sender, receiver))

    def isolate(self, name: str, others: list[str]) -> None:
        """Cut one off from others, both ways."""
        for other in others:
            self.block(name, other)
            self.block(other, name)

    def heal(self) -> None:
        """Let all hear all."""
        self._blocked.clear()
        self.drop, self.delay_max_s = 0.0, 0.005

    def passes(self, sender: str, receiver: str) -> bool:
        """Whether the link is open."""
        return (sender, receiver) not in self._blocked

    def delay_s(self, sender: str, receiver: str) -> float | None:
        """Return how long a message takes; None: it is lost."""
        if not self.passes(sender, receiver) or self._random.random() < self.drop:
            return None
        return self._random.uniform(0.0001, self.delay_max_s)
