"""Prepared sandboxes: made while the node has nothing else to do, and taken by starts that fit.

The journal does not know them, so what an agent leaves that is killed is swept by the next one.
A start that takes one writes to the journal what it was called, before anything of it is touched.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prism.node.v1 import node_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent.cgroups import Cgroups
from prism_agent.journal import Journal, boot_id
from prism_agent.metrics import AgentMetrics
from prism_agent.record import Record
from prism_agent.runtime import host, reshape, warm_policy
from prism_agent.runtime.base import Probe, Process, Running, Runtime, StartError, Usage
from prism_agent.runtime.bubblewrap import SOCKET, BubblewrapRuntime
from prism_agent.runtime.shape import (
    cgroup_limits,
    limits_of,
    small_bytes,
    workspace_bytes,
    write_names,
)
from prism_agent.supervisor.client import SupervisorClient
from prism_common.errors import SandboxGoneError, StartupError
from prism_common.names import generate_id

logger = logging.getLogger(__name__)

#: After one that could not be made.
_RETRY_S: Final = 5.0
_SPEC: Final = sandbox_pb2.SandboxSpec()
#: The limits that it is made with.
_PREPARED: Final = limits_of(_SPEC)
#: The file systems in memory that only a sandbox's own namespace has.
_INSIDE: Final = ("tmp", "dev/shm")


@dataclass(frozen=True, slots=True)
class _Member:
    record: Record
    running: Running
    process: Process


class WarmRuntime:
    """Bubblewrap with a pool.

    Args:
        inner: Makes the sandboxes, prepared or not.
        journal: Of all sandboxes.
        cgroups: Where they are; without there is no pool.
    """

    def __init__(self, inner: BubblewrapRuntime, journal: Journal, cgroups: Cgroups | None) -> None:
        self._inner = inner
        self._journal = journal
        self._cgroups = cgroups
        self.name = inner.name
        self._size = 0
        self._free_slots: Callable[[], int] = lambda: 0
        self._metrics: AgentMetrics | None = None
        self._ready: deque[_Member] = deque()
        self._making = 0
        self._starts = 0
        self._last_start_s = 0.0
        #: Held by the start that syncs the journal: for all that wait then, by one thread.
        self._sync_lock = asyncio.Lock()
        #: Something changed that may let the pool be filled.
        self._changed = asyncio.Event()

    # ── the pool ──

    def reserve(
        self, size: int, offered: node_pb2.ResourceAmounts, working: Mapping[str, Runtime]
    ) -> None:
        """Take what a pool uses off what the node offers.

        Raises:
            StartupError: Sandboxes cannot be prepared here, or not so many.
        """
        taken_bytes = size * warm_policy.MEMBER_BYTES
        problem = ""
        if self.name not in working:
            problem = f"they are of the runtime {self.name}, which does not run here"
        elif os.geteuid() != 0 or self._cgroups is None:
            problem = "it needs root and cgroups"
        elif size > offered.slots or taken_bytes > offered.memory_bytes // 2:
            problem = (
                f"too many for {offered.slots} slots and {offered.memory_bytes >> 20} MiB of memory"
            )
        if problem:
            raise StartupError(f"--warm-pool: {size} sandboxes cannot be prepared: {problem}")
        offered.memory_bytes -= taken_bytes

    async def fill(self, size: int, free_slots: Callable[[], int], metrics: AgentMetrics) -> None:
        """Keep prepared sandboxes ready until cancelled.

        Args:
            size: How many.
            free_slots: How many sandboxes the node has room for now.
            metrics: Counts.
        """
        self._size, self._free_slots, self._metrics = size, free_slots, metrics
        metrics.warm.labels("ready").set_function(lambda: len(self._ready))
        metrics.warm.labels("making").set_function(lambda: self._making)
        try:
            while True:
                self._changed.clear()
                view = self._view()
                count = warm_policy.decide(view)
                if count > 0:
                    await self._add()
                elif count < 0:
                    # One at a time: a start may take another meanwhile.
                    await self._discard(self._ready.popleft())
                else:
                    await self._wait(warm_policy.wait_s(view))
        finally:
            self._size = 0

    def _view(self) -> warm_policy.View:
        return warm_policy.View(
            size=self._size,
            ready=len(self._ready),
            making=self._making,
            free_slots=self._free_slots(),
            starts=self._starts,
            quiet_s=time.monotonic() - self._last_start_s,
        )

    async def _wait(self, delay_s: float) -> None:
        """Return after a start, or a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._changed.wait()

    async def _add(self) -> None:
        self._making += 1
        try:
            self._ready.append(await self._prepare())
        except (StartError, SandboxGoneError, OSError) as error:
            logger.warning("cannot prepare a sandbox", extra={"error": str(error)})
            await asyncio.sleep(_RETRY_S)
        finally:
            self._making -= 1

    async def _prepare(self) -> _Member:
        """Make one, and return once its supervisor answers."""
        name = generate_id("warm")
        record = Record.unassigned(name, name, "bubblewrap")
        running: Running | None = None
        client = SupervisorClient(lambda _: None, lambda: None)
        try:
            running = await self._inner.prepare(record, _SPEC)
            if running.process is None or running.control_socket is None:
                raise StartError("it has no supervisor")
            await client.connect(running.control_socket)
            # Kept for the start that takes it, which need not meet it again.
            running.client = client
        except BaseException:
            # Also when the agent is told to stop meanwhile.
            client.close()
            await self._remove(record, running)
            raise
        return _Member(record, running, running.process)

    async def _discard(self, member: _Member) -> None:
        await self._remove(member.record, member.running)

    async def _remove(self, record: Record, running: Running | None) -> None:
        if running is not None:
            running.close()
        try:
            await self._inner.delete(record)
            await asyncio.to_thread(self._journal.remove, record.sandbox_id)
        except OSError as error:
            logger.warning(
                "cannot remove a prepared sandbox yet: the next start of the agent does",
                extra={"sandbox": record.sandbox_id, "error": str(error)},
            )

    # ── starts ──

    async def start(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> Running:
        """Take a prepared one if there is one that fits; else make it."""
        with self._start_under_way():
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._sync())
                    starting = group.create_task(self._take_or_make(record, spec))
            except* (StartError, OSError) as failed:
                raise StartError("; ".join(str(each) for each in failed.exceptions)) from None
            return starting.result()

    async def _sync(self) -> None:
        """Have the record on disk by the time that the sandbox runs, which is told only then."""
        target = self._journal.position
        async with self._sync_lock:
            if self._journal.synced < target:
                # What fails here is tried again, and waited for, where it is told.
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(self._journal.sync)

    async def _take_or_make(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> Running:
        if self._size:
            is_first = not record.uid and not record.mounted
            if not warm_policy.fits(spec, is_first, bool(record.device)):
                self._count("unfit")
            else:
                running = await self._claim(record, spec)
                self._count("prepared" if running else "none_ready")
                if running is not None:
                    return running
        return await self._inner.start(record, spec)

    @contextlib.contextmanager
    def _start_under_way(self) -> Iterator[None]:
        self._starts += 1
        self._last_start_s = time.monotonic()
        try:
            yield
        finally:
            self._starts -= 1
            self._last_start_s = time.monotonic()
            self._changed.set()

    def _count(self, result: str) -> None:
        if self._metrics is not None:
            self._metrics.warm_starts.labels(result).inc()

    async def _claim(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> Running | None:
        """Make a prepared sandbox that one which is started; None: there is none."""
        while self._ready:
            member = self._ready.popleft()
            if member.process.ended():
                await self._discard(member)
                continue
            _take(record, member.record)
            try:
                await asyncio.to_thread(self._adapt, record, limits_of(spec), member)
                socket = self._journal.directory(record.sandbox_id) / SOCKET
                return Running(member.process, socket, client=member.running.take_client())
            except OSError as error:
                logger.warning(
                    "a prepared sandbox could not be used",
                    extra={"sandbox": record.sandbox_id, "error": str(error)},
                )
                member.running.close()
                await self._give_back(record, member.record)
                return None
        return None

    async def _give_back(self, record: Record, prepared: Record) -> None:
        """Leave nothing of a prepared sandbox that became the start's only by half."""
        await self._inner.delete(record)
        await self._remove(prepared, None)
        record.uid = record.pid = record.pid_start_ticks = 0

    def _adapt(self, record: Record, asked: sandbox_pb2.Limits, member: _Member) -> None:
        """Give it its name, its limits, and the sandbox's directory; blocks, for a thread."""
        # From here on its processes and cgroup can be found by this record.
        self._journal.save(record)
        old = self._journal.directory(member.record.sandbox_id)
        new = self._journal.directory(record.sandbox_id)
        name = record.name or record.sandbox_id
        if asked != _PREPARED:
            if self._cgroups is not None:
                self._cgroups.limit(record.cgroup, cgroup_limits(asked))
            _resize(member.process, small_bytes(asked))
            host.resize_tmpfs(old / "workspace", workspace_bytes(asked))
        _rename(member.process, name)
        write_names(old, name)
        # Over the empty one that the journal has made; what is mounted in it stays so.
        old.rename(new)

    # ── as it is ──

    async def probe(self) -> Probe:
        """Start one sandbox, run something in it, remove it."""
        return await self._inner.probe()

    def explain(self, record: Record) -> str:
        """Return what was said when it was started last."""
        return self._inner.explain(record)

    async def adopt(self, record: Record) -> Running | None:
        """Find it again after a restart of the agent."""
        return await self._inner.adopt(record)

    async def pause(self, record: Record) -> None:
        """Freeze every process of it."""
        await self._inner.pause(record)

    async def resume(self, record: Record) -> None:
        """Let every process of it run."""
        await self._inner.resume(record)

    async def resize(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> None:
        """Hold it to the limits of a spec."""
        await self._inner.resize(record, spec)

    async def kill(self, record: Record) -> None:
        """Kill every process of it."""
        await self._inner.kill(record)

    async def delete(self, record: Record) -> None:
        """Remove all of it."""
        await self._inner.delete(record)

    def usage(self, record: Record) -> Usage:
        """Measure it now."""
        return self._inner.usage(record)

    def oom_kills(self, record: Record) -> int:
        """Return how many of its processes the kernel has killed for memory."""
        return self._inner.oom_kills(record)

    async def sweep(self, keep: set[str]) -> list[str]:
        """Remove what belongs to no sandbox in `keep`."""
        return await self._inner.sweep(keep)

    async def close(self) -> None:
        """Remove what is prepared, and what nobody uses."""
        while self._ready:
            await self._discard(self._ready.popleft())
        await self._inner.close()


def _take(record: Record, prepared: Record) -> None:
    """Write down that a sandbox is what was prepared."""
    record.prepared_as = prepared.sandbox_id
    record.uid, record.cgroup, record.mounted = prepared.uid, prepared.cgroup, prepared.mounted
    record.pid, record.pid_start_ticks = prepared.pid, prepared.pid_start_ticks
    record.boot_id = boot_id()


def _rename(process: Process, name: str) -> None:
    namespace = process.open_hostname()
    try:
        reshape.set_hostname(namespace, name)
    finally:
        os.close(namespace)


def _resize(process: Process, size_bytes: int) -> None:
    root = process.open_root()
    try:
        for path in _INSIDE:
            reshape.resize_inside(root, path, size_bytes)
    finally:
        os.close(root)
