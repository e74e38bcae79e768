"""Ends sandboxes: a grace period, then a kill; and a delete leaves nothing."""

import asyncio

from prism_agent import limits
from prism_agent.edge import Edge, warn
from prism_agent.hosted import Hosted
from prism_agent.pauses import Pauses
from prism_agent.reconcile import Delete, Hurry, Phase, Stop
from prism_agent.runtime.base import Running


class Endings:
    """Performs `Stop`, `Delete` and `Hurry`."""

    def __init__(self, edge: Edge, pauses: Pauses) -> None:
        self._edge = edge
        self._pauses = pauses

    def begin(self, action: Stop | Delete) -> None:
        """Write that it ends, then end it."""
        hosted = self._edge.save(action.sandbox_id)
        if hosted is None:
            return
        # Set at once: a hurry may follow in the same moment.
        hosted.kill_at_s = asyncio.get_running_loop().time() + action.grace_s
        hosted.hurried.clear()
        delete = isinstance(action, Delete)
        if not delete:
            self._edge.tell(action.sandbox_id)
        self._edge.begin_when_written(self._end(hosted, delete))

    def hurry(self, action: Hurry) -> None:
        """Shorten the grace period of the end under way."""
        hosted = self._edge.hosted.get(action.sandbox_id)
        if hosted is not None:
            deadline = asyncio.get_running_loop().time() + action.grace_s
            hosted.kill_at_s = min(hosted.kill_at_s, deadline)
            hosted.hurried.set()

    async def _end(self, hosted: Hosted, delete: bool) -> None:
        """Stop or delete. What cannot be removed now is tried again, and never called removed."""
        edge = self._edge
        watch = hosted.watch
        hosted.unwatch()
        edge.disarm(hosted)
        if watch is not None:
            # It may be about to wait for the process that is let go of below.
            await asyncio.wait({watch})
        runtime = edge.runtimes.get(hosted.record.runtime)
        while True:
            try:
                await self._terminate(hosted)
                if runtime is not None:
                    await runtime.kill(hosted.record)
                    hosted.record.pid = 0
                    if delete:
                        await runtime.delete(hosted.record)
                break
            except OSError as error:
                warn("cannot end a sandbox yet", hosted.record, error)
                await asyncio.sleep(limits.DELETE_RETRY_S)
        if delete:
            self._finish_delete(hosted)
        else:
            sandbox = edge.reconciler.sandboxes.get(hosted.record.sandbox_id)
            if sandbox is not None and sandbox.reason:
                # It counts as failed.
                await hosted.execs.leave_memory()
            edge.perform(edge.reconciler.stopped(hosted.record.sandbox_id))

    def _finish_delete(self, hosted: Hosted) -> None:
        edge = self._edge
        sandbox_id = hosted.record.sandbox_id
        actions = edge.reconciler.deleted(sandbox_id)
        sandbox = edge.reconciler.sandboxes.get(sandbox_id)
        if sandbox is None or sandbox.phase is not Phase.DELETED:
            # A successor takes its place, with a record of its own.
            edge.drop(sandbox_id)
        hosted.detach()
        edge.perform(actions)

    async def _terminate(self, hosted: Hosted) -> None:
        """SIGTERM to all; return when all have ended or the grace period is over."""
        running = hosted.running
        if running is None:
            return
        loop = asyncio.get_running_loop()
        graceful = running.process is not None and loop.time() < hosted.kill_at_s
        if graceful:
            await self._pauses.wake(hosted, running)
        if graceful and hosted.execs.terminate():
            await self._until_ended(hosted, running)
        hosted.lose_execs()
        running.close()
        hosted.running = None
        await hosted.end_calls()

    async def _until_ended(self, hosted: Hosted, running: Running) -> None:
        """Return when its first process has ended, or its grace period is over."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            ended = group.create_task(running.wait())
            while not ended.done() and loop.time() < hosted.kill_at_s:
                hurried = group.create_task(hosted.hurried.wait())
                await asyncio.wait(
                    {ended, hurried},
                    timeout=hosted.kill_at_s - loop.time(),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                hosted.hurried.clear()
                hurried.cancel()
            ended.cancel()
