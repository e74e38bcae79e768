"""A batcher with a clock of its own, and what a driver would do with it."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry

from prism_common import caller
from prism_control.batcher import Batcher, EntryBatch
from prism_control.metrics import BatcherMetrics
from prism_control.node.upgrade import VersionGate
from prism_control.request_queue import BatchingSettings
from prism_control.state import commands
from prism_control.state.commands import Command, CreateSandbox
from prism_control.state.machine import Machine
from prism_control.state.model import Spec
from prism_control.state.results import Result


class Clock:
    """Stands in for the monotonic clock of the batcher."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)


class Bench:
    """A batcher, and what a driver would do with it."""

    def __init__(self, settings: BatchingSettings) -> None:
        self.registry = CollectorRegistry()
        self.wakes = 0
        self.room = True
        self.machine = Machine()
        self.batcher = Batcher(
            settings,
            BatcherMetrics(self.registry),
            self._wake,
            lambda: self.room,
            VersionGate(lambda: self.machine).check,
        )

    def _wake(self) -> None:
        self.wakes += 1

    def submit(self, command: Command, size: int = 256) -> asyncio.Task[Result]:
        return asyncio.get_running_loop().create_task(self.batcher.submit(command, size))

    def commit(self, batches: Sequence[EntryBatch]) -> None:
        for batch in batches:
            results, _ = self.machine.apply(self.machine.applied_index + 1, batch.data)
            batch.resolve(results)


def spec() -> Spec:
    return Spec("host", 100, 2**28, 2**28, 64, 1024)


def create(name: str, request_id: str = "") -> CreateSandbox:
    return CreateSandbox(request_id, b"f", f"sb-{name}", name, spec())


def names(batches: Sequence[EntryBatch]) -> list[list[str]]:
    return [
        [getattr(item, "name", None) or item.sandbox for item in commands.decode(b.data).items]  # type: ignore[union-attr]
        for b in batches
    ]


@contextmanager
def as_client(name: str) -> Iterator[None]:
    token = caller.client.set(name)
    try:
        yield
    finally:
        caller.client.reset(token)


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)
