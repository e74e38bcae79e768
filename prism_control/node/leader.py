"""A leader's duties: place what waits, watch the nodes, end what is due, serve the agents."""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from prism_common.addresses import parse_address
from prism_common.errors import NotLeaderError, PrismError
from prism_common.signal import Signal
from prism_control.batcher import Batcher
from prism_control.dispatch import Dispatcher, Office
from prism_control.metrics import LeaderMetrics
from prism_control.node.driver import Driver
from prism_control.node.replica import Replica
from prism_control.node.upgrade import VersionGate
from prism_control.raft.errors import InvalidRequestError, NotReadyError
from prism_control.raft.errors import NotLeaderError as RaftNotLeaderError
from prism_control.raft.types import Member
from prism_control.request_queue import Item
from prism_control.scheduler.core import Scheduler
from prism_control.scheduler.deadlines import Deadlines
from prism_control.scheduler.drains import Drains
from prism_control.scheduler.liveness import Liveness
from prism_control.state.commands import AssignSandboxes, Command, CreateSandbox
from prism_control.state.events import Event, SandboxChanged
from prism_control.state.model import SandboxState
from prism_control.state.results import Assigned, Result

logger = logging.getLogger(__name__)

#: How often silence and deadlines are looked at.
_WATCH_INTERVAL_S: Final = 0.25
#: About what one of them takes in the log.
_COMMAND_BYTES: Final = 256
#: A leader whose disk has been full for so long hands over, and not again before the pause is over:
#: the others' disks may be full as well.
_FULL_PATIENCE_S: Final = 0.5
_HAND_OVER_PAUSE_S: Final = 10.0
_HAND_OVER_TIMEOUT_S: Final = 5.0
#: After a failed proposal, before the next one: as long as its error says, within these.
_PAUSE_MIN_S: Final = 0.1
_PAUSE_MAX_S: Final = 2.0


def monotonic_ms() -> int:
    """Return the monotonic clock in milliseconds."""
    return time.monotonic_ns() // 1_000_000


def wall_ms() -> int:
    """Return the wall clock in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class _DecidedAhead:
    """Decisions on an entry's creates, as who waits for what becomes of the entry.

    Args:
        in_vain: How many of the creates found no node.
        settle: Told of a result.
        wake: Has the scheduler decide anew.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        command: AssignSandboxes,
        in_vain: int,
        settle: Callable[[Scheduler, AssignSandboxes, Result], None],
        wake: Callable[[], None],
    ) -> None:
        self._scheduler = scheduler
        self._command = command
        self._in_vain = in_vain
        self._settle = settle
        self._wake = wake

    def done(self) -> bool:
        """It waits to the end."""
        return False

    def set_result(self, result: Result) -> None:
        """Have it decide anew on those that are void."""
        self._settle(self._scheduler, self._command, result)
        self._end()

    def set_exception(self, error: Exception) -> None:
        """Give all room back; the creates' callers are told why."""
        self._scheduler.forget_all(self._command)
        self._end()

    def _end(self) -> None:
        self._scheduler.end_ahead(self._in_vain)
        # Others may wait for the room of what was not created, and no event says that it is free.
        self._wake()


class Leadership:
    """Takes office when this member leads and has applied all that was committed before."""

    def __init__(
        self,
        cluster_id: str,
        me: Member,
        driver: Driver,
        replica: Replica,
        batcher: Batcher,
        dispatcher: Dispatcher,
        metrics: LeaderMetrics,
        has_room: Callable[[], bool],
        gate: VersionGate,
    ) -> None:
        self._gate = gate
        self._has_room = has_room
        self._cluster_id = cluster_id
        self._me = me
        self._driver = driver
        self._replica = replica
        self._batcher = batcher
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._scheduler: Scheduler | None = None
        self._liveness: Liveness | None = None
        self._deadlines: Deadlines | None = None
        #: Notified when there may be something to place.
        self._placeable = Signal()

    def last_seen_ms(self, node_id: str) -> int:
        """Return when a node was last heard, by wall time; 0: this member does not know."""
        silence_ms = self._liveness.silence_ms(node_id, monotonic_ms()) if self._liveness else None
        return 0 if silence_ms is None else wall_ms() - silence_ms

    async def run(self) -> None:
        """Take and leave office as leadership comes and goes, until cancelled."""
        while True:
            if not self._driver.leads:
                await self._driver.changed.wait()
                continue
            await self._hold_office(self._driver.core.term)

    async def _hold_office(self, term: int) -> None:
        machine = self._replica.machine
        host = parse_address(self._me.api_address, "api").host
        self._scheduler = Scheduler.from_machine(
            machine,
            random.Random().random,  # noqa: S311 - spreading is no secret
            leader_host=host,
        )
        self._liveness = Liveness(machine.nodes(), monotonic_ms())
        self._deadlines = Deadlines(machine.sandboxes())
        self._replica.listener = self._observe
        self._batcher.accompany = partial(self._place_ahead, self._scheduler)
        self._dispatcher.open(
            Office(
                cluster_id=self._cluster_id,
                term=term,
                machine=machine,
                liveness=self._liveness,
                submit=self._batcher.submit,
                heard_load=self._scheduler.heard_load,
                control_addresses=[m.api_address for m in self._driver.configuration.members],
            )
        )
        logger.info("leading: %d nodes, %d sandboxes wait", len(machine.nodes()),
                    self._scheduler.waiting_count)  # fmt: skip
        try:
            async with asyncio.TaskGroup() as duties:
                tasks = [
                    duties.create_task(self._place(self._scheduler)),
                    duties.create_task(self._watch(self._liveness, self._deadlines)),
                    duties.create_task(self._make_way_when_full()),
                ]
                while self._driver.leads and self._driver.core.term == term:
                    await self._driver.changed.wait()
                for task in tasks:
                    task.cancel()
        finally:
            self._replica.listener = None
            self._batcher.accompany = None
            self._scheduler = self._liveness = self._deadlines = None
            error = NotLeaderError("this member does not lead any more", retry_after_s=0.5)
            self._batcher.fail_all(error)
            leader = self._driver.leader
            if leader is not None and leader.id != self._me.id:
                error.metadata["leader"] = leader.api_address
            self._dispatcher.leave(error)

    def _observe(self, events: list[Event]) -> None:
        if self._scheduler is None or self._liveness is None or self._deadlines is None:
            return
        self._scheduler.observe(events)
        self._liveness.observe(events, monotonic_ms())
        self._deadlines.observe(events)
        self._dispatcher.observe(events)
        self._measure(events)
        # Whoever waits for what has just been applied is answered first.
        asyncio.get_running_loop().call_soon(self._placeable.notify)

    def _measure(self, events: list[Event]) -> None:
        ready = SandboxState.READY
        for event in events:
            if not isinstance(event, SandboxChanged) or event.row.state is not ready:
                continue
            row = event.row
            if event.previous_state is not ready and row.start_count == 1:
                self._metrics.ready_seconds.observe((row.ready_ms - row.create_ms) / 1000)

    async def _place(self, scheduler: Scheduler) -> None:
        """Place all that waits, one proposal a pass: what came meanwhile goes into the next."""
        while True:
            command = scheduler.decide(monotonic_ms())
            if command is None:
                await self._wait_for_work(scheduler)
                continue
            await self._propose_placements(scheduler, command)

    async def _wait_for_work(self, scheduler: Scheduler) -> None:
        now_ms = monotonic_ms()
        next_ms = scheduler.next_ms(now_ms)
        timeout_s = None if next_ms is None else max((next_ms - now_ms) / 1000, 0.01)
        try:
            async with asyncio.timeout(timeout_s):
                await self._placeable.wait()
        except TimeoutError:
            return

    async def _propose_placements(self, scheduler: Scheduler, command: AssignSandboxes) -> None:
        try:
            result = await self._batcher.submit(command, 64 * len(command.placements) + 256)
        except PrismError as error:
            logger.warning("placements were not committed: %s", error)
            scheduler.forget_all(command)
            await _pause(error)
            return
        self._settle(scheduler, command, result)

    def _settle(self, scheduler: Scheduler, command: AssignSandboxes, result: Result) -> None:
        """Have the scheduler decide anew on what was void when it was applied."""
        if isinstance(result, Assigned):
            scheduler.forget(result.refused)
            self._metrics.placements.labels("refused").inc(len(result.refused))
            committed = len(command.placements) - len(result.refused)
            self._metrics.placements.labels("committed").inc(committed)

    def _place_ahead(self, scheduler: Scheduler, commands: Sequence[Command]) -> Sequence[Item]:
        """Place sandboxes in the entry that creates them: that saves one, and its round."""
        creates = [command for command in commands if isinstance(command, CreateSandbox)]
        command, in_vain = scheduler.decide_ahead(creates)
        if not command.placements and not in_vain:
            return ()
        wake = self._placeable.notify
        decided = _DecidedAhead(scheduler, command, in_vain, self._settle, wake)
        return (Item(command, _COMMAND_BYTES, [decided]),)

    async def _watch(self, liveness: Liveness, deadlines: Deadlines) -> None:
        """Propose what silence, deadlines and drains ask for."""
        drains = Drains()
        while True:
            due: list[Command | None] = [
                *liveness.tick(monotonic_ms(), wall_ms()),
                deadlines.due(wall_ms()),
                drains.due(self._replica.machine, wall_ms()),
                self._gate.due(),
            ]
            # What some member could not apply has to wait until it is upgraded.
            ready = [command for command in due if command is not None and self._gate.may(command)]
            # All at once: a loss that is judged now must not be proposed after the node was heard.
            await self._propose(ready)
            await asyncio.sleep(_WATCH_INTERVAL_S)

    async def _propose(self, commands: list[Command]) -> None:
        """Propose commands that will be asked for again if they are not committed."""
        try:
            outcomes = await self._batcher.submit_all([(each, _COMMAND_BYTES) for each in commands])
        except PrismError as error:
            outcomes = [error for _ in commands]
        for command, outcome in zip(commands, outcomes, strict=True):
            if isinstance(outcome, PrismError):
                logger.warning("%s was not committed: %s", type(command).__name__, outcome)
        failed = [outcome for outcome in outcomes if isinstance(outcome, PrismError)]
        if failed:
            await _pause(failed[0])

    async def _make_way_when_full(self) -> None:
        """Hand leadership over when this disk takes no more: others may have room."""
        full_s = 0.0
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            full_s = 0.0 if self._has_room() else full_s + _WATCH_INTERVAL_S
            successor = self._successor() if full_s > _FULL_PATIENCE_S else None
            if successor is None:
                continue
            logger.warning("the disk is full: leadership is handed to %s", successor.name)
            try:
                async with asyncio.timeout(_HAND_OVER_TIMEOUT_S):
                    await self._driver.transfer_leadership(successor.id)
            except (RaftNotLeaderError, InvalidRequestError, NotReadyError, TimeoutError) as error:
                logger.warning("leadership was not handed over: %s", error)
            await asyncio.sleep(_HAND_OVER_PAUSE_S)

    def _successor(self) -> Member | None:
        """Return the other voter that has most of the log."""
        core = self._driver.core
        if core.replication is None:
            return None
        progress = core.replication.progress
        voters = [
            member
            for member in core.configuration.members
            if member.id != self._me.id and member.id in core.configuration.voters
        ]
        return max(voters, key=lambda member: progress[member.id].match, default=None)


async def _pause(error: PrismError) -> None:
    """Let pass what must before a proposal can succeed, such as until there is room."""
    await asyncio.sleep(min(max(error.retry_after_s or 0.0, _PAUSE_MIN_S), _PAUSE_MAX_S))
