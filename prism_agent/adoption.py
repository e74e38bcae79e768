"""Takes over what an earlier process has started, and removes what nobody knows."""

import asyncio
import contextlib
import logging
import time

from prism_agent.edge import Edge, warn
from prism_agent.journal import boot_id
from prism_agent.reconcile import UP, Phase
from prism_agent.record import Record
from prism_agent.runtime.base import process_start_ticks
from prism_common.errors import SandboxGoneError

logger = logging.getLogger(__name__)


class Adoption:
    """Once in a process, before anything else is done with a sandbox."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    async def adopt(self) -> None:
        """Take over what the journal knows, and remove what it does not know."""
        journal = self._edge.journal
        records, strays = journal.load()
        for record in [each for each in records.values() if each.uncertain]:
            if not self._confirm(record):
                del records[record.sandbox_id]
                strays.append(record.sandbox_id)
        for runtime in self._edge.runtimes.values():
            for found in await runtime.sweep(set(records)):
                logger.warning("removed a leftover", extra={"leftover": found})
        for name in strays:
            logger.warning("removed a leftover", extra={"leftover": f"directory {name}"})
            await asyncio.to_thread(journal.remove, name)
        for record in records.values():
            await self._adopt(record)

    def _confirm(self, record: Record) -> bool:
        """Whether what was true of a sandbox once is true still: its newest record was lost.

        It is if the supervisor of then lives: each later start has another. What runs no more may
        have been started again, stopped or removed since. It must not begin anew as if nothing
        had been, so the leader is told that nothing of it is here, and says that it is lost.
        """
        ran = record.boot_id == boot_id() and record.phase in UP | {Phase.STOPPING, Phase.DELETING}
        if ran and _is_alive(record):
            record.uncertain = False
            self._edge.journal.put(record)
            return True
        logger.error("lost: its newest record was damaged", extra={"sandbox": record.sandbox_id})
        return False

    async def _adopt(self, record: Record) -> None:
        self._check_boot(record)
        hosted = self._edge.host(record)
        runtime = self._edge.runtimes.get(record.runtime)
        ran = record.phase in UP | {Phase.STOPPING, Phase.DELETING}
        if runtime is not None and ran and not self._may_run_elsewhere(record):
            hosted.running = await runtime.adopt(record)
        # What is frozen cannot answer: it is spoken to when it is thawed.
        if hosted.running is not None and not await self._frozen(record):
            try:
                await hosted.execs.connect(hosted.running, record.phase_time_s)
            except (OSError, SandboxGoneError):
                hosted.running.close()
                hosted.running = None
        if hosted.running is None and runtime is not None and record.phase is not Phase.DELETED:
            try:
                await runtime.kill(record)
            except OSError as error:
                # One that hangs in the kernel must not keep the others from being adopted. It runs
                # nothing more, and whatever is made of the sandbox next meets it again.
                warn("cannot kill a sandbox yet", record, error)
            record.pid = 0
        if hosted.running is None:
            hosted.execs.lose()
            if record.phase in UP | {Phase.FAILED}:
                await hosted.execs.leave_memory()
        logger.info(
            "adopted",
            extra={
                "sandbox": record.sandbox_id,
                "phase": record.phase.value,
                "alive": hosted.running is not None,
            },
        )

    def _may_run_elsewhere(self, record: Record) -> bool:
        """Return whether one that was being frozen had to be thawed after its lease."""
        fenced = self._edge.reconciler.fenced and record.reschedules
        return fenced and record.phase is Phase.PAUSING

    async def _frozen(self, record: Record) -> bool:
        """Return whether an adopted sandbox is to stay frozen; thaw one that is to be spoken to.

        That is one that is to end, and one that was being frozen: its supervisor may not have been
        told yet that its lease does not count while it is frozen, and would end all when it is
        thawed one day. It is frozen again as soon as it is told.
        """
        if record.phase in (Phase.PAUSED, Phase.RESUMING):
            return True
        if record.phase in (Phase.PAUSING, Phase.STOPPING, Phase.DELETING):
            with contextlib.suppress(OSError):
                await self._edge.runtimes[record.runtime].resume(record)
        return False

    def _check_boot(self, record: Record) -> None:
        """After a reboot nothing runs, and what was mounted is gone: that is not made up for."""
        if record.boot_id in ("", boot_id()):
            return
        record.pid = 0
        if record.phase in UP | {Phase.STARTING, Phase.STOPPING, Phase.STOPPED}:
            record.phase, record.phase_time_s = Phase.FAILED, time.time()
            record.reason = "NODE_REBOOTED"
            record.message = "its node was rebooted; its processes and files are gone"


def _is_alive(record: Record) -> bool:
    try:
        return process_start_ticks(record.pid) == record.pid_start_ticks
    except ProcessLookupError:
        return False
