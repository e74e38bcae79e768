"""What every runtime does. The agent knows no more of a backend than this."""

import asyncio
import os
import select
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prism.sandbox.v1 import sandbox_pb2

from prism_agent.record import Record
from prism_agent.supervisor.client import SupervisorClient


@dataclass(frozen=True, slots=True)
class Usage:
    """What a sandbox uses now, and what has happened to it."""

    memory_bytes: int = 0
    processes: int = 0
    #: Processes that the kernel has killed because the sandbox's memory was used up.
    oom_kills: int = 0
    #: Processor time since it was made here; None: nothing counts it.
    cpu_ns: int | None = None
    #: What the kernel holds it to; 0: nothing does.
    memory_limit_bytes: int = 0


class Process:
    """One process of the host, told from a later one with its pid by its start time.

    Raises:
        ProcessLookupError: There is no such process any more.
    """

    def __init__(self, pid: int, start_ticks: int = 0) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        try:
            self.start_ticks = process_start_ticks(pid)
            if start_ticks not in (0, self.start_ticks):
                raise ProcessLookupError(pid)
        except BaseException:
            os.close(self._pidfd)
            raise

    async def wait(self) -> None:
        """Return once it has ended; it need not be our child."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        descriptor = os.dup(self._pidfd)
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)

    def ended(self) -> bool:
        """Return whether it has ended."""
        look = select.poll()
        look.register(self._pidfd, select.POLLIN)
        return bool(look.poll(0))

    def open_root(self) -> int:
        """Return a descriptor of its root directory, as only this process sees it.

        Raises:
            ProcessLookupError: It has ended.
        """
        return self._open("root", os.O_PATH | os.O_DIRECTORY)

    def open_network(self) -> int:
        """Return a descriptor of its network namespace.

        Raises:
            ProcessLookupError: It has ended.
        """
        return self._open("ns/net", os.O_RDONLY)

    def open_hostname(self) -> int:
        """Return a descriptor of its UTS namespace.

        Raises:
            ProcessLookupError: It has ended.
        """
        return self._open("ns/uts", os.O_RDONLY)

    def _open(self, name: str, flags: int) -> int:
        try:
            descriptor = os.open(f"/proc/{self.pid}/{name}", flags | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ProcessLookupError(self.pid) from None
        try:
            # Looked at afterwards: no other process had this pid when it was opened.
            if process_start_ticks(self.pid) != self.start_ticks:
                raise ProcessLookupError(self.pid)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def close(self) -> None:
        """Forget it; it goes on."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def process_start_ticks(pid: int) -> int:
    """Return when a process started, in clock ticks since boot."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    # The name in parentheses may hold anything; the fields after the last one are numbers.
    return int(stat.rpartition(")")[2].split()[19])


@dataclass(frozen=True, slots=True)
class Shared:
    """A directory that a sandbox and the agent share, where no descriptor can be passed into it."""

    directory: Path
    #: The host's user that its supervisor is.
    uid: int


@dataclass(slots=True)
class Running:
    """A sandbox that accepts execs. `process` is None where nothing really runs."""

    process: Process | None = None
    control_socket: Path | None = None
    #: What execs come in; None: descriptors.
    shared: Shared | None = None
    #: Whose root is the sandbox's tree of files; None: that of `process`.
    files: Process | None = None
    #: Speaks to its supervisor already, and nothing was asked of it; None: nobody does.
    client: SupervisorClient | None = None

    def take_client(self) -> SupervisorClient | None:
        """Return the connection that there is to its supervisor: from now on the caller's."""
        client, self.client = self.client, None
        return client if client is not None and client.connected else None

    def open_root(self) -> int:
        """Return a descriptor of the sandbox's root directory.

        Raises:
            ProcessLookupError: It has ended, or nothing really runs.
        """
        process = self.files or self.process
        if process is None:
            raise ProcessLookupError
        return process.open_root()

    async def wait(self) -> None:
        """Return once its PID 1 has ended."""
        if self.process is None:
            await asyncio.Event().wait()
        else:
            await self.process.wait()

    def close(self) -> None:
        """Forget it; it goes on."""
        if self.client is not None:
            self.client.close()
        for process in (self.process, self.files):
            if process is not None:
                process.close()


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether a runtime works here: a sandbox was really started with it."""

    ready: bool
    message: str = ""
    version: str = ""


class StartError(Exception):
    """A sandbox could not be started; the text says why, for people."""


class Runtime(Protocol):
    """One way to isolate. All calls are idempotent, and know a sandbox by its journal record."""

    name: str

    async def probe(self) -> Probe:
        """Start one sandbox, run something in it, remove it."""

    async def start(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> Running:
        """Make it, or start it again with its files; fills in what runs, and journals it.

        Raises:
            StartError: Nothing of it runs.
        """

    def explain(self, record: Record) -> str:
        """Return what was said when it was started last; empty: nothing."""

    async def adopt(self, record: Record) -> Running | None:
        """Find it again after a restart of the agent; None: it does not run."""

    async def pause(self, record: Record) -> None:
        """Freeze every process of it, and return once they are.

        Raises:
            OSError: They run on; the text says why.
        """

    async def resume(self, record: Record) -> None:
        """Let every process of it run; they may be running.

        Raises:
            OSError: They are frozen still.
        """

    async def resize(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> None:
        """Hold it, while it runs or is frozen, to the limits of a spec.

        Raises:
            OSError: It is not held to all of them, and the text says why; EOPNOTSUPP: nor will it
                be before it is started again.
        """

    async def kill(self, record: Record) -> None:
        """Kill every process of it, and return once none is left."""

    async def delete(self, record: Record) -> None:
        """Remove its mounts, cgroups and files except for the record; kills it first."""

    def usage(self, record: Record) -> Usage:
        """Measure it now."""

    def oom_kills(self, record: Record) -> int:
        """Return how many of its processes the kernel has killed for memory: asked at each exec."""

    async def sweep(self, keep: set[str]) -> list[str]:
        """Remove what belongs to no sandbox in `keep`; return what was found, in words."""

    async def close(self) -> None:
        """Remove what the runtime itself has made and nobody uses."""
