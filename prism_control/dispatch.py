"""The edge of dispatch: agents' sessions on the leader. `scheduler.assignments` decides."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from prism.agent.v1 import agent_pb2

from prism_common.errors import InvalidArgumentError, NotLeaderError, PrismError, WrongStateError
from prism_common.signal import Signal
from prism_control.assignment_bytes import batch_bytes
from prism_control.metrics import LeaderMetrics
from prism_control.rows import amounts_of, duration, node_labels, runtime_of
from prism_control.scheduler.assignments import AgentDispatch, Assignment, Dispatch
from prism_control.scheduler.liveness import Liveness
from prism_control.state import commands
from prism_control.state.commands import Command, Report
from prism_control.state.events import Event
from prism_control.state.machine import Machine
from prism_control.state.model import ObservedState
from prism_control.state.results import Refused, Result

logger = logging.getLogger(__name__)

#: Batches of reports of one agent that may wait for their commit; then its stream is not read.
_REPORTS_IN_FLIGHT_MAX: Final = 16
_REPORTS_MAX: Final = 1000
#: Between two messages of assignments to one agent, and where they have followed each other …
_PAUSE_S: Final = 0.005
_PAUSE_BUSY_S: Final = 0.04
#: … unless all agents together are sent fewer than so many in a second, and in a row.
_AT_ONCE_PER_S: Final = 200.0
_AT_ONCE_MAX: Final = 64.0
#: What one commit has for more agents than these is sent to so many in a second: the next commit
#: has something for most of them too, and shares the messages (docs/adr/0030).
_AGENTS_AT_ONCE: Final = 64
_AGENTS_PER_S: Final = 1000.0
#: Less than what some loops count in: who waits for less waits for nothing, again and again.
_TIME_STEP_S: Final = 0.0005
#: Registrations arrive together after a change of leader; each is proposed within this time.
_REGISTER_TIMEOUT_S: Final = 10.0
#: What an agent says of a sandbox goes into the replicated state and to every user.
_REASON_LENGTH_MAX: Final = 64
_MESSAGE_LENGTH_MAX: Final = 1024
_OBSERVED: Final = {int(state): state for state in ObservedState}

#: Takes a message, or one that is encoded already.
Write = Callable[[agent_pb2.SessionResponse | bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Office:
    """What a leader's sessions need for as long as it leads.

    Attributes:
        term: Fences everything that is sent.
        heard_load: Told each node's load per core.
    """

    cluster_id: str
    term: int
    machine: Machine
    liveness: Liveness
    submit: Callable[[Command, int], Awaitable[Result]]
    heard_load: Callable[[str, float], None]
    control_addresses: Sequence[str]


class _Session:
    """One agent's session: what ends it, and what wakes its sender."""

    def __init__(self, agent: AgentDispatch, incarnation: str) -> None:
        self.agent = agent
        self.incarnation = incarnation
        self.wake = Signal()
        self.ended: PrismError | None = None
        #: Loop time before which nothing is sent; 0: there is nothing to send, or it goes now.
        self.due_s = 0.0

    def tell(self, due_s: float) -> None:
        """There is something to send at `due_s`, or with what waits already."""
        if not self.due_s:
            self.due_s = due_s
            self.wake.notify()

    def end(self, error: PrismError) -> None:
        """Let the session end with this error."""
        if self.ended is None:
            self.ended = error
        self.wake.notify()


class _Writer:
    """Acknowledgements and assignments share one stream; gRPC takes one write at a time."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._lock = asyncio.Lock()

    async def __call__(self, response: agent_pb2.SessionResponse | bytes) -> None:
        async with self._lock:
            await self._write(response)


class _AtOnce:
    """Counts messages that need not wait for company: where there are few, each goes at once."""

    def __init__(self) -> None:
        self._left = _AT_ONCE_MAX
        self._at_s = 0.0

    def take(self, now_s: float) -> bool:
        """Count one; False: there are many."""
        earned = (now_s - self._at_s) * _AT_ONCE_PER_S
        self._left = min(self._left + earned, _AT_ONCE_MAX)
        self._at_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Dispatcher:
    """All sessions of this member; there are some only while it leads."""

    def __init__(self, metrics: LeaderMetrics) -> None:
        self._metrics = metrics
        self._office: Office | None = None
        self._dispatch = Dispatch()
        self._sessions: dict[str, _Session] = {}
        self._at_once = _AtOnce()

    # ── Office ───────────────────────────────────────────────────────────────────────────────

    def open(self, office: Office) -> None:
        """Begin to take sessions."""
        self._office = office
        self._dispatch = Dispatch()

    def leave(self, error: PrismError) -> None:
        """End all sessions: another member leads, and the agents go there."""
        self._office = None
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            session.end(error)

    def close(self) -> None:
        """End all sessions: this member is stopping."""
        self.leave(NotLeaderError("this member is stopping", retry_after_s=0.5))

    def observe(self, events: Sequence[Event]) -> None:
        """Take over committed changes, and wake the sessions that have something to send."""
        now_s = asyncio.get_running_loop().time()
        for number, node_id in enumerate(self._dispatch.observe(events)):
            session = self._sessions.get(node_id)
            if session is not None:
                session.tell(now_s + max(number - _AGENTS_AT_ONCE, 0) / _AGENTS_PER_S)

    # ── One session ──────────────────────────────────────────────────────────────────────────

    async def serve(
        self,
        register: agent_pb2.Register,
        requests: AsyncIterator[agent_pb2.SessionRequest],
        write: Write,
    ) -> None:
        """Serve one agent until its stream ends, another session takes its place, or we leave.

        Raises:
            NotLeaderError: This member does not lead (any more).
            WrongStateError: The agent has seen a leader of a higher term.
            AlreadyExistsError: Its name belongs to another live node.
        """
        office = self._office
        if office is None:
            raise NotLeaderError("this member is taking office", retry_after_s=0.1)
        if register.term > office.term:
            raise WrongStateError(
                f"the agent has seen term {register.term}; this leader's is {office.term}"
            )
        heartbeat_ms, lease_ms = office.liveness.terms()
        await self._register(office, register, heartbeat_ms, lease_ms)
        session = self._begin(office, register)
        write = _Writer(write)
        try:
            await write(_welcome(office, heartbeat_ms, lease_ms))
            async with asyncio.TaskGroup() as tasks:
                sender = tasks.create_task(self._send(office, session, write))
                tasks.create_task(self._receive(office, session, requests, write, sender))
        finally:
            self._end(session)
        if session.ended is not None:
            raise session.ended

    async def _register(
        self, office: Office, register: agent_pb2.Register, heartbeat_ms: int, lease_ms: int
    ) -> None:
        command = commands.RegisterNode(
            node_id=register.node_id,
            name=register.name,
            incarnation=register.incarnation,
            address=register.address,
            capacity=amounts_of(register.capacity),
            runtimes=tuple(runtime_of(runtime) for runtime in register.runtimes),
            labels=node_labels(dict(register.labels), register.egress),
            version=register.version,
            lease_ms=lease_ms,
            heartbeat_ms=heartbeat_ms,
            reports=_reports(register.sandboxes),
        )
        size = register.ByteSize()
        office.liveness.registering(register.node_id, _monotonic_ms())
        async with asyncio.timeout(_REGISTER_TIMEOUT_S):
            result = await office.submit(command, size)
        if isinstance(result, Refused):
            raise result.error()
        office.liveness.registered(register.node_id, _monotonic_ms())

    def _begin(self, office: Office, register: agent_pb2.Register) -> _Session:
        if self._office is not office:
            raise NotLeaderError("this member does not lead any more", retry_after_s=0.1)
        node_id = register.node_id
        before = self._sessions.get(node_id)
        if before is not None:
            before.end(WrongStateError(f"node {register.name} has another session now"))
        rows = office.machine.sandboxes_on(node_id)
        has = {report.sandbox_id for report in register.sandboxes}
        session = _Session(AgentDispatch(node_id, rows, has), register.incarnation)
        self._sessions[node_id] = session
        self._dispatch.open(session.agent)
        logger.info(
            "node %s (%s) has a session with %d sandboxes",
            register.name, node_id, len(register.sandboxes),
        )  # fmt: skip
        return session

    def _end(self, session: _Session) -> None:
        self._dispatch.close(session.agent)
        if self._sessions.get(session.agent.node_id) is session:
            del self._sessions[session.agent.node_id]
            logger.info("the session of node %s has ended", session.agent.node_id)

    async def _send(self, office: Office, session: _Session, write: Write) -> None:
        """Send all assignments first, and then changes as they come."""
        *parts, last = session.agent.complete()
        for part in parts:
            await write(self._batch(office, part, complete=False))
        await write(self._batch(office, last, complete=True))
        loop = asyncio.get_running_loop()
        busy = False
        while session.ended is None:
            wait_s = session.due_s - loop.time()
            if wait_s > _TIME_STEP_S:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await session.wake.wait()
                continue
            session.due_s = 0.0
            assignments = session.agent.take()
            if assignments:
                await write(self._batch(office, assignments, complete=False))
                if not self._at_once.take(loop.time()):
                    # What comes meanwhile shares the next message: each costs as much as tens of
                    # assignments do. The first one went at once.
                    await asyncio.sleep(_PAUSE_BUSY_S if busy else _PAUSE_S)
                    busy = True
            else:
                busy = False
                await session.wake.wait()

    def _batch(self, office: Office, assignments: list[Assignment], complete: bool) -> bytes:
        self._metrics.dispatch_size.observe(len(assignments))
        return batch_bytes(office.term, assignments, complete=complete)

    async def _receive(
        self,
        office: Office,
        session: _Session,
        requests: AsyncIterator[agent_pb2.SessionRequest],
        write: Write,
        sender: asyncio.Task[None],
    ) -> None:
        """Take heartbeats and reports until the stream ends or the session is told to end."""
        room = asyncio.Semaphore(_REPORTS_IN_FLIGHT_MAX)
        async with asyncio.TaskGroup() as tasks:
            under_way: set[asyncio.Task[None]] = set()

            def report(batch: agent_pb2.ReportBatch) -> None:
                task = tasks.create_task(self._report(office, session, batch, write, room))
                under_way.add(task)
                task.add_done_callback(under_way.discard)

            reader = tasks.create_task(self._read(office, session, requests, write, report, room))
            await asyncio.wait((reader, sender), return_when=asyncio.FIRST_COMPLETED)
            # The agent reports again what was not acknowledged.
            for task in (reader, sender, *under_way):
                task.cancel()

    async def _read(
        self,
        office: Office,
        session: _Session,
        requests: AsyncIterator[agent_pb2.SessionRequest],
        write: Write,
        report: Callable[[agent_pb2.ReportBatch], None],
        room: asyncio.Semaphore,
    ) -> None:
        async for request in requests:
            match request.WhichOneof("request"):
                case "heartbeat":
                    await self._heard(office, session, request.heartbeat, write)
                case "reports":
                    await room.acquire()
                    report(request.reports)
                case _:
                    raise InvalidArgumentError("a session registers once, with its first message")

    async def _heard(
        self, office: Office, session: _Session, heartbeat: agent_pb2.Heartbeat, write: Write
    ) -> None:
        node_id = session.agent.node_id
        if not office.liveness.heard(node_id, session.incarnation, _monotonic_ms()):
            session.end(WrongStateError("this node is LOST or was registered anew: register"))
            return
        office.heard_load(node_id, heartbeat.load_per_core)
        await write(
            agent_pb2.SessionResponse(
                heartbeat_ack=agent_pb2.HeartbeatAck(sequence=heartbeat.sequence)
            )
        )

    async def _report(
        self,
        office: Office,
        session: _Session,
        batch: agent_pb2.ReportBatch,
        write: Write,
        room: asyncio.Semaphore,
    ) -> None:
        """Propose a batch of reports; acknowledge it once it is committed.

        A batch that is not committed ends the session: the agent registers again with all it has.
        """
        try:
            if len(batch.reports) > _REPORTS_MAX:
                raise InvalidArgumentError(
                    f"reports: {len(batch.reports)} in one batch; at most {_REPORTS_MAX}"
                )
            command = commands.ReportSandboxes(
                node_id=session.agent.node_id,
                incarnation=session.incarnation,
                reports=_reports(batch.reports),
            )
            await office.submit(command, batch.ByteSize())
            await write(
                agent_pb2.SessionResponse(report_ack=agent_pb2.ReportAck(sequence=batch.sequence))
            )
        except PrismError as error:
            session.end(error)
        finally:
            room.release()


def _monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def _welcome(office: Office, heartbeat_ms: int, lease_ms: int) -> agent_pb2.SessionResponse:
    return agent_pb2.SessionResponse(
        welcome=agent_pb2.Welcome(
            term=office.term,
            heartbeat_interval=duration(heartbeat_ms),
            lease=duration(lease_ms),
            cluster_id=office.cluster_id,
            control_addresses=office.control_addresses,
        )
    )


def _reports(protos: Iterable[agent_pb2.SandboxReport]) -> tuple[Report, ...]:
    """Return reports to propose; one of a state that this version does not know is left out."""
    reports: list[Report] = []
    for proto in protos:
        state = _OBSERVED.get(proto.state)
        if state is not None:
            time_ = proto.time
            reports.append(
                Report(
                    proto.sandbox_id,
                    proto.generation,
                    state,
                    proto.reason[:_REASON_LENGTH_MAX],
                    proto.message[:_MESSAGE_LENGTH_MAX],
                    proto.runtime[:_REASON_LENGTH_MAX],
                    proto.start_count,
                    time_.seconds * 1000 + time_.nanos // 1_000_000,
                )
            )
    return tuple(reports)
