"""Leases of what is frozen, with a supervisor that reads nothing while it is."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from prism_agent.journal import Journal
from prism_agent.metrics import AgentMetrics
from prism_agent.model import Assignment, Desired, Phase
from prism_agent.reconcile import Reconciler
from prism_agent.record import Record
from prism_agent.reports import ReportQueue
from prism_agent.runtime.base import Process, Running
from prism_agent.sandboxes import Sandboxes
from prism_agent.supervisor import protocol
from prism_agent.supervisor.protocol import Event, Message, Request
from tests.unit.agent.test_sandboxes import SANDBOX, Node, OneProcess, child, record_in

__all__ = ["child"]


class Freezable(OneProcess):
    """A runtime whose sandbox was frozen by an earlier agent, and its supervisor."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        #: What was done to the supervisor, and what it read, in this order.
        self.log: list[str] = []
        self._frozen = True
        self._pid = 0
        self._path = directory / "control"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self._path))
        self._listener.listen(1)
        self._connection: socket.socket | None = None

    def close_sockets(self) -> None:
        """Let go of them, within the loop that has watched them."""
        self._watch(on=False)
        self._listener.close()
        if self._connection is not None:
            self._connection.close()

    async def adopt(self, record: Record) -> Running | None:
        self._pid = record.pid
        return Running(Process(record.pid), self._path)

    async def pause(self, record: Record) -> None:
        self._frozen = True
        self._watch(on=False)
        self.log.append("freeze")

    async def resume(self, record: Record) -> None:
        if not self._frozen:
            return
        self._frozen = False
        self.log.append("thaw")
        while self._read():
            """What was said meanwhile comes before the clock, and before anything else runs."""
        self.log.append("run")
        self._watch(on=True)

    def _watch(self, *, on: bool) -> None:
        loop = asyncio.get_running_loop()
        for each, act in ((self._listener, self._accept), (self._connection, self._read)):
            if each is not None and on:
                loop.add_reader(each, act)
            elif each is not None:
                loop.remove_reader(each)

    def _accept(self) -> None:
        self._connection, _ = self._listener.accept()
        self._connection.setblocking(False)
        self._watch(on=True)

    def _read(self) -> bool:
        if self._connection is None:
            return False
        try:
            packet = self._connection.recv(protocol.MESSAGE_BYTES)
        except BlockingIOError:
            return False
        if not packet:
            self._watch(on=False)
            return False
        message = protocol.decode_message(packet)
        if message.kind == Request.HELLO:
            self._connection.send(Message(Event.HELLO, 0, protocol.VERSION).encode())
        elif message.kind == Request.LEASE:
            self.log.append("lease" if message.a else "no lease")
        elif message.kind == Request.TERMINATE:
            os.kill(self._pid, signal.SIGTERM)
        return True


class FreezableNode(Node):
    """A node whose journal knows a sandbox that was being frozen when its agent was killed."""

    def __init__(self, path: Path, child: subprocess.Popen[bytes], *, fenced: bool = False) -> None:
        directory = path / "sandboxes"
        directory.mkdir()
        journal = Journal(directory)
        record = record_in(Phase.PAUSING, Freezable.name, child.pid)
        record.desired, record.reschedules = Desired.PAUSED, True
        journal.save(record)
        self.freezable = self.runtime = Freezable(path)
        self.reconciler = Reconciler(1, fenced=fenced)
        runtimes = {self.runtime.name: self.runtime}
        self.sandboxes = Sandboxes(
            journal,
            runtimes,
            runtimes,
            self.reconciler,
            ReportQueue(),
            AgentMetrics(CollectorRegistry()),
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        try:
            async with super().running():
                await self.sandboxes.started.wait()
                yield
        finally:
            self.freezable.close_sockets()


@pytest.mark.parametrize(
    ("desired", "phase"), [(Desired.RUNNING, Phase.READY), (Desired.STOPPED, Phase.STOPPED)]
)
async def test_a_thaw_is_told_to_a_supervisor_before_it_looks_at_its_clock(
    tmp_path: Path, child: subprocess.Popen[bytes], desired: Desired, phase: Phase
) -> None:
    node = FreezableNode(tmp_path, child)
    async with node.running():
        await node.until(Phase.PAUSED)
        node.sandboxes.renew_lease(time.monotonic() + 10)
        wanted = Assignment(SANDBOX, 1, desired, grace_s=10.0, reschedules=True)
        node.sandboxes.assign(1, [wanted], complete=False)
        await node.until(phase)
    # It is thawed once so that it can be spoken to, within the lease that it had.
    again = ["freeze", "thaw", "no lease", "lease", "run"]
    assert node.freezable.log == ["thaw", "run", *again]


async def test_what_was_being_frozen_is_not_thawed_once_it_may_run_elsewhere(
    tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    node = FreezableNode(tmp_path, child, fenced=True)
    async with node.running():
        await node.until(Phase.FAILED)
    assert node.freezable.log == []
