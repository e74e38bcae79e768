"""What the leader is to be told: the latest report of each sandbox, until it is acknowledged."""

import asyncio

from prism.agent.v1 import agent_pb2

from prism_agent import limits


class ReportQueue:
    """Bounded by the number of sandboxes: a newer report of one replaces the older.

    #: Invariant: a report is in `_pending`, in one batch of `_sent`, or was acknowledged.
    """

    def __init__(self) -> None:
        self._pending: dict[str, agent_pb2.SandboxReport] = {}
        self._sent: dict[int, dict[str, agent_pb2.SandboxReport]] = {}
        self._changed = asyncio.Event()
        self._sequence = 0

    def put(self, report: agent_pb2.SandboxReport) -> None:
        """Add a report, or replace the one of the same sandbox that was not yet sent."""
        self._pending[report.sandbox_id] = report
        self._changed.set()

    async def take(self) -> agent_pb2.ReportBatch:
        """Wait for reports, and return as many as a message holds."""
        while not self._pending:
            self._changed.clear()
            await self._changed.wait()
        batch: dict[str, agent_pb2.SandboxReport] = {}
        for sandbox_id in list(self._pending)[: limits.REPORTS_MAX]:
            batch[sandbox_id] = self._pending.pop(sandbox_id)
        self._sequence += 1
        self._sent[self._sequence] = batch
        return agent_pb2.ReportBatch(sequence=self._sequence, reports=batch.values())

    def acknowledge(self, sequence: int) -> list[agent_pb2.SandboxReport]:
        """Drop a batch; return its reports that are still the latest of their sandbox."""
        batch = self._sent.pop(sequence, {})
        newer = set(self._pending).union(*self._sent.values())
        return [report for sandbox_id, report in batch.items() if sandbox_id not in newer]

    def resend(self) -> None:
        """A new session begins: what was sent and not acknowledged is to be sent again."""
        again: dict[str, agent_pb2.SandboxReport] = {}
        for sequence in sorted(self._sent):
            again.update(self._sent[sequence])
        self._sent.clear()
        self._sequence = 0
        self._pending = {**again, **self._pending}
        if self._pending:
            self._changed.set()
