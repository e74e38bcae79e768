"""A known bug, and how many seeds the simulator takes to find it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.sim.options import Options
from tests.sim.run import run_plane, run_seed


@dataclass(frozen=True)
class Mutant:
    """A bug: replace `owner.name` by what `make` makes of the original."""

    title: str
    seeds_max: int
    owner: type
    name: str
    make: Callable[[Any], Callable[..., Any]]
    #: The shape of cluster in which to look for it; else each seed chooses.
    options: Options | None = None
    #: Whether it is looked for in the whole control plane, and not only in its core.
    in_plane: bool = False

    @property
    def is_quick(self) -> bool:
        """Whether it is found so soon that every test run can afford it."""
        return self.seeds_max <= 20

    @contextmanager
    def active(self) -> Iterator[None]:
        """Have the bug within this context."""
        owner = next(base for base in self.owner.__mro__ if self.name in base.__dict__)
        original = owner.__dict__[self.name]
        setattr(owner, self.name, self.make(original))
        try:
            yield
        finally:
            setattr(owner, self.name, original)

    def seeds_needed(self) -> int:
        """Return how many seeds it takes to find it; 0 if it survives `seeds_max`."""
        with self.active():
            for seed in range(self.seeds_max):
                result = run_plane(seed) if self.in_plane else run_seed(seed, self.options)
                if result.failure:
                    return seed + 1
        return 0
