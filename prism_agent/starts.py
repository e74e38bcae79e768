"""Starts sandboxes: on disk before they run, and on disk again before they are called READY."""

import logging
import time

from prism_agent.edge import Edge
from prism_agent.hosted import Hosted
from prism_agent.journal import boot_id
from prism_agent.reconcile import Phase
from prism_agent.runtime.base import Runtime, StartError
from prism_agent.watches import Watches, kill
from prism_common.errors import SandboxGoneError

logger = logging.getLogger(__name__)


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first exception of a group of groups."""
    inner = group.exceptions[0]
    return first_of(inner) if isinstance(inner, BaseExceptionGroup) else inner


class Starts:
    """Performs `Start`."""

    def __init__(self, edge: Edge, watches: Watches) -> None:
        self._edge = edge
        self._watches = watches

    def begin(self, sandbox_id: str) -> None:
        """Write that it starts, then start it."""
        edge = self._edge
        sandbox = edge.reconciler.sandboxes[sandbox_id]
        old = edge.hosted.get(sandbox_id)
        if old is not None and old.record.generation != sandbox.generation:
            del edge.hosted[sandbox_id]
        hosted = edge.save(sandbox_id)
        if hosted is not None:
            hosted.record.boot_id = boot_id()
            edge.begin_when_written(self._start(hosted, time.perf_counter()))

    async def _start(self, hosted: Hosted, began_s: float) -> None:
        record = hosted.record
        failure: BaseException | None = None
        try:
            unwritten = self._edge.journal.failure(record.sandbox_id)
            if unwritten is not None:
                raise unwritten
            hosted.start_position = self._edge.journal.position
            runtime = self._choose(hosted)
            record.runtime = runtime.name
            hosted.running = await runtime.start(record, hosted.spec)
            if hosted.running.control_socket is not None:
                await hosted.execs.connect(hosted.running, time.time())
        except* (StartError, OSError, SandboxGoneError) as group:
            failure = first_of(group)
        if failure is not None:
            await self._fail(hosted, failure)
            return
        # Before it is called READY: a restarted agent finds what runs by this record only.
        record.phase, record.phase_time_s = Phase.READY, time.time()
        self._edge.put(record)
        self._edge.begin_when_written(self._settle(hosted, began_s))

    def _choose(self, hosted: Hosted) -> Runtime:
        working = self._edge.working
        asked = hosted.record.runtime or hosted.spec.runtime
        if asked:
            if asked not in working:
                raise StartError(f"runtime {asked} does not work on this node")
            return working[asked]
        for best in working.values():
            return best
        raise StartError("no runtime works on this node")

    async def _settle(self, hosted: Hosted, began_s: float) -> None:
        """It runs, and its record was to be written: say so, or undo it."""
        edge, record = self._edge, hosted.record
        failure = edge.journal.failure(record.sandbox_id)
        if failure is not None:
            await self._fail(hosted, failure)
            return
        edge.metrics.start.labels(record.runtime).observe(time.perf_counter() - began_s)
        actions = edge.reconciler.started(record.sandbox_id, record.runtime)
        self._watches.watch(hosted)
        edge.perform(actions)

    async def _fail(self, hosted: Hosted, error: BaseException) -> None:
        sandbox_id = hosted.record.sandbox_id
        logger.warning("start failed", extra={"sandbox": sandbox_id, "error": str(error)})
        edge = self._edge
        runtime = edge.runtimes.get(hosted.record.runtime)
        message = str(error)
        if runtime is not None:
            await kill(runtime, hosted.record)
            if isinstance(error, SandboxGoneError):
                message = f"{message}: {runtime.explain(hosted.record)}"
        if hosted.running is not None:
            hosted.running.close()
            hosted.running = None
        hosted.record.pid = 0
        await hosted.execs.leave_memory()
        edge.perform(edge.reconciler.start_failed(sandbox_id, "START_FAILED", message))
