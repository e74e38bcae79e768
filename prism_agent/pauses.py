"""Freezes and thaws sandboxes."""

import contextlib
import time
from collections.abc import Awaitable

from prism_agent.edge import Edge
from prism_agent.hosted import Hosted
from prism_agent.reconcile import Phase
from prism_agent.runtime.base import Running
from prism_common.errors import SandboxGoneError


class Pauses:
    """Performs `Pause` and `Resume`."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    def begin_pause(self, sandbox_id: str) -> None:
        """Write that it is being frozen, then freeze it."""
        hosted = self._edge.save(sandbox_id)
        if hosted is not None:
            self._edge.begin_when_written(self._pause(hosted))

    def begin_resume(self, sandbox_id: str) -> None:
        """Write that it is being thawed, then thaw it."""
        hosted = self._edge.save(sandbox_id)
        if hosted is not None:
            self._edge.begin_when_written(self._resume(hosted))

    async def _pause(self, hosted: Hosted) -> None:
        edge, record = self._edge, hosted.record
        async with hosted.freezing:
            if not self._is(hosted, Phase.PAUSING):
                return
            failure = await _try(edge.runtimes[record.runtime].pause(record))
            if failure:
                await self._reach(hosted)
                edge.perform(edge.reconciler.pause_failed(record.sandbox_id, failure))
            else:
                # It reads that when it is thawed: what is frozen runs nowhere, however long.
                hosted.execs.set_lease(0)
                edge.perform(edge.reconciler.paused(record.sandbox_id))

    async def _resume(self, hosted: Hosted) -> None:
        edge, record = self._edge, hosted.record
        async with hosted.freezing:
            if not self._is(hosted, Phase.RESUMING):
                return
            # It reads that first: were we killed in between, it would run without a lease.
            edge.extend_lease(hosted)
            failure = await _try(edge.runtimes[record.runtime].resume(record))
            if failure:
                edge.perform(edge.reconciler.resume_failed(record.sandbox_id, failure))
                return
            await self._reach(hosted)
            hosted.execs.activity.touch()
            edge.perform(edge.reconciler.resumed(record.sandbox_id))

    def _is(self, hosted: Hosted, phase: Phase) -> bool:
        """Return whether it is still in a phase: it may have ended while we waited."""
        sandbox = self._edge.reconciler.sandboxes.get(hosted.record.sandbox_id)
        return sandbox is not None and sandbox.phase is phase

    async def _reach(self, hosted: Hosted) -> None:
        """Speak to the supervisor of a sandbox that was adopted while it was frozen."""
        if hosted.running is not None and not hosted.execs.connected:
            try:
                await hosted.execs.connect(hosted.running, time.time())
            except (OSError, SandboxGoneError):
                # Whoever watches it tries again, or sees that it has ended.
                hosted.execs.disconnected.set()

    async def wake(self, hosted: Hosted, running: Running) -> None:
        """Thaw what may be frozen, so that it can end by itself; else it is killed later."""
        self._edge.extend_lease(hosted)
        with contextlib.suppress(OSError, SandboxGoneError):
            await self._edge.runtimes[hosted.record.runtime].resume(hosted.record)
            if not hosted.execs.connected and running.control_socket is not None:
                await hosted.execs.connect(running, time.time())


async def _try(work: Awaitable[None]) -> str:
    """Return why it failed; empty: it did not."""
    try:
        await work
    except OSError as error:
        return error.strerror or str(error)
    return ""
