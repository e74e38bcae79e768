"""What the leader is to be told: the latest report of each sandbox, until it is acknowledged."""

import asyncio
import contextlib
import math
from typing import Final

from prism.agent.v1 import agent_pb2

from prism_agent import limits

#: What a sandbox is only on its way through: mostly something better can be said soon.
_PASSING: Final = frozenset({agent_pb2.OBSERVED_STATE_STARTING, agent_pb2.OBSERVED_STATE_STOPPING})
#: Nobody waits to use it.
_ENDED: Final = frozenset({agent_pb2.OBSERVED_STATE_STOPPED, agent_pb2.OBSERVED_STATE_DELETED})
#: Sequence of a report that was not sent yet.
_UNSENT: Final = 0
#: Where reports that somebody waits for come closer than this in the mean, many come: one after the
#: other, a client makes and removes no more than some fifty sandboxes a second.
_CLOSE_S: Final = 0.016
#: Longest time between two that is counted; and what share of the mean one of them is.
_GAP_MAX_S: Final = 0.1
_GAP_SHARE: Final = 0.05


class ReportQueue:
    """Bounded by the number of sandboxes: a newer report of one replaces the older.

    A message costs much more than a report in it, so reports wait for company: not at all if none
    was sent just now, else a moment, and longer where many come. That one is READY waits only for
    others that are; that one has ended waits for any; and one that only passes through a state
    waits to see whether it stays there, also where others go.

    #: Invariant: a report is in `_pending`, in one batch of `_sent`, or was acknowledged.
    """

    def __init__(self) -> None:
        self._pending: dict[str, agent_pb2.SandboxReport] = {}
        self._sent: dict[int, dict[str, agent_pb2.SandboxReport]] = {}
        #: Loop time when a pending report of a state that is passed through is to go, by sandbox.
        self._passing: dict[str, float] = {}
        #: Invariant: names the batch that has the latest report of each sandbox.
        self._latest: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._sequence = 0
        #: Loop time when the pending reports are to go.
        self._due_s = math.inf
        #: When the last message went; and when the last with a report that somebody waits for.
        self._taken_s = self._urgent_s = -math.inf
        #: When the last such report came, and the mean time between two.
        self._came_s, self._gap_s = -math.inf, _GAP_MAX_S

    def put(self, report: agent_pb2.SandboxReport) -> None:
        """Add a report, or replace the one of the same sandbox that was not yet sent."""
        sandbox_id = report.sandbox_id
        self._pending[sandbox_id] = report
        self._latest[sandbox_id] = _UNSENT
        due_s = self._due_of(report.state, asyncio.get_running_loop().time())
        if report.state in _PASSING:
            self._passing[sandbox_id] = due_s
        else:
            self._passing.pop(sandbox_id, None)
        if due_s < self._due_s or len(self._pending) == limits.REPORTS_MAX:
            self._due_s = min(due_s, self._due_s)
            self._changed.set()

    def _due_of(self, state: agent_pb2.ObservedState.ValueType, now_s: float) -> float:
        if state in _PASSING:
            return now_s + limits.REPORT_PASSING_S
        if state in _ENDED:
            return max(now_s, self._taken_s + limits.REPORT_LINGER_MAX_S)
        self._gap_s += _GAP_SHARE * (min(now_s - self._came_s, _GAP_MAX_S) - self._gap_s)
        self._came_s = now_s
        many = self._gap_s < _CLOSE_S
        linger_s = limits.REPORT_LINGER_MAX_S if many else limits.REPORT_LINGER_S
        return max(now_s, self._urgent_s + linger_s)

    async def take(self) -> agent_pb2.ReportBatch:
        """Wait for reports, and return as many as a message holds."""
        await self._until_due()
        batch: dict[str, agent_pb2.SandboxReport] = {}
        self._sequence += 1
        for sandbox_id in self._ripe()[: limits.REPORTS_MAX]:
            batch[sandbox_id] = self._pending.pop(sandbox_id)
            self._passing.pop(sandbox_id, None)
            self._latest[sandbox_id] = self._sequence
        self._sent[self._sequence] = batch
        self._note(batch)
        return agent_pb2.ReportBatch(sequence=self._sequence, reports=batch.values())

    def _ripe(self) -> list[str]:
        """Return of which sandboxes to tell now: all, but those that may soon be in a better state.

        Each report is a change on every control node, also where the message goes anyway.
        """
        now_s = asyncio.get_running_loop().time()
        ripe = [key for key in self._pending if self._passing.get(key, now_s) <= now_s]
        # A full queue must give way.
        return ripe or list(self._pending)

    def _note(self, batch: dict[str, agent_pb2.SandboxReport]) -> None:
        """Remember what went and when: the next wait accordingly."""
        self._taken_s = asyncio.get_running_loop().time()
        self._due_s = min(
            (self._passing.get(key, self._taken_s) for key in self._pending), default=math.inf
        )
        if any(each.state not in _PASSING and each.state not in _ENDED for each in batch.values()):
            self._urgent_s = self._taken_s

    async def _until_due(self) -> None:
        while not self._pending or (
            len(self._pending) < limits.REPORTS_MAX
            and self._due_s > asyncio.get_running_loop().time()
        ):
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._due_s if self._pending else None):
                    await self._changed.wait()

    def acknowledge(self, sequence: int) -> list[agent_pb2.SandboxReport]:
        """Drop a batch; return its reports that are still the latest of their sandbox."""
        last: list[agent_pb2.SandboxReport] = []
        for sandbox_id, report in self._sent.pop(sequence, {}).items():
            if self._latest.get(sandbox_id) == sequence:
                del self._latest[sandbox_id]
                last.append(report)
        return last

    def resend(self) -> None:
        """A new session begins: what was sent and not acknowledged is to be sent again."""
        again: dict[str, agent_pb2.SandboxReport] = {}
        for sequence, batch in self._sent.items():
            again.update({k: v for k, v in batch.items() if self._latest.get(k) == sequence})
        self._sent.clear()
        self._sequence = 0
        self._pending = {**again, **self._pending}
        self._latest = dict.fromkeys(self._pending, _UNSENT)
        self._passing.clear()
        if self._pending:
            self._due_s = -math.inf
            self._changed.set()
