"""Notices that a sandbox ends without being asked to, and keeps speaking to its supervisor."""

import asyncio

from prism_agent import limits
from prism_agent.edge import Edge, warn
from prism_agent.hosted import Hosted
from prism_agent.record import Record
from prism_agent.runtime.base import Running, Runtime
from prism_common.errors import SandboxGoneError


class Watches:
    """One task for each sandbox that has processes; what has none cannot end by itself."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    def watch(self, hosted: Hosted) -> None:
        """Watch a sandbox that runs."""
        running, group = hosted.running, self._edge.group
        if group is not None and running is not None and running.process is not None:
            hosted.watch = group.create_task(self._watch(hosted, running))

    async def _watch(self, hosted: Hosted, running: Running) -> None:
        record = hosted.record
        await self._stay_connected(hosted, running)
        out_of_memory = hosted.execs.ran_out_of_memory()
        async with hosted.freezing:
            hosted.execs.lose()
            await hosted.end_calls()
            await kill(self._edge.runtimes[record.runtime], record)
            await hosted.execs.leave_memory()
            running.close()
            hosted.running, hosted.watch, record.pid = None, None, 0
            reason, message = "SUPERVISOR_DIED", "the sandbox's first process ended"
            if out_of_memory:
                reason, message = "OUT_OF_MEMORY", "the sandbox used up its memory"
            edge = self._edge
            edge.perform(edge.reconciler.died(record.sandbox_id, reason, message))

    async def _stay_connected(self, hosted: Hosted, running: Running) -> None:
        """Return once the sandbox has ended; until then keep speaking to its supervisor."""
        async with asyncio.TaskGroup() as group:
            ended = group.create_task(running.wait())
            while not ended.done():
                broken = group.create_task(hosted.execs.disconnected.wait())
                await asyncio.wait({ended, broken}, return_when=asyncio.FIRST_COMPLETED)
                broken.cancel()
                if not ended.done():
                    await self._reconnect(hosted, running)

    async def _reconnect(self, hosted: Hosted, running: Running) -> None:
        try:
            await hosted.execs.connect(running, None)
        except (OSError, SandboxGoneError):
            # It ends just now, most likely; else it is asked again.
            await asyncio.sleep(limits.RECONNECT_S)


async def kill(runtime: Runtime, record: Record) -> None:
    """Return once nothing of a sandbox runs; what hangs in the kernel is tried again."""
    while True:
        try:
            await runtime.kill(record)
        except OSError as error:
            warn("cannot kill a sandbox yet", record, error)
            await asyncio.sleep(limits.DELETE_RETRY_S)
        else:
            return
