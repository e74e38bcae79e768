"""What a start of bubblewrap does when the agent is told to end meanwhile."""

import asyncio
import os
import threading
from pathlib import Path

import pytest
from prism.sandbox.v1 import sandbox_pb2

from prism_agent.data_directory import DataDirectory
from prism_agent.journal import Journal
from prism_agent.record import Record
from prism_agent.runtime.bubblewrap import BubblewrapRuntime
from prism_agent.runtime.spawn import Child


class Slow(BubblewrapRuntime):
    """Makes nothing, as slowly as a test wants."""

    def __init__(self, data: DataDirectory) -> None:
        super().__init__(data, Journal(data.sandboxes), None)
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.told = -1

    def _make(
        self, record: Record, asked: sandbox_pb2.Limits, renamable: bool
    ) -> tuple[int, Child]:
        self.begun.set()
        self.may_end.wait(10)
        self.told, write = os.pipe2(os.O_CLOEXEC)
        os.close(write)
        return self.told, Child(0)


async def test_a_start_that_is_cancelled_ends_when_nothing_more_is_made(tmp_path: Path) -> None:
    data = DataDirectory(tmp_path / "data")
    runtime = Slow(data)
    record = Record.unassigned("sb-1", "sb-1", "bubblewrap")
    async with asyncio.TaskGroup() as group:
        start = group.create_task(runtime.prepare(record, sandbox_pb2.SandboxSpec()))
        await asyncio.to_thread(runtime.begun.wait, 10)
        start.cancel()
        done, _ = await asyncio.wait({start}, timeout=0.05)
        # Its caller would remove what is made only afterwards.
        assert not done
        runtime.may_end.set()
        await asyncio.wait({start}, timeout=10)
    assert start.cancelled()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(runtime.told)
    data.close()
