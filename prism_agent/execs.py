"""The execs of one sandbox: started once, followed by any number of clients, never just lost."""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from prism.sandbox.v1 import sandbox_pb2

from prism_agent import limits
from prism_agent.activity import Activity
from prism_agent.exec_launch import launch
from prism_agent.exec_record import Exec, ExecRecord, digest_of
from prism_agent.exec_table import ExecTable
from prism_agent.metrics import AgentMetrics
from prism_agent.output_room import OutputRoom
from prism_agent.runtime.base import Running
from prism_agent.shared_files import SharedFiles
from prism_agent.supervisor import protocol
from prism_agent.supervisor.client import SupervisorClient
from prism_agent.supervisor.protocol import Event, Message, Reason, Request, State
from prism_common.errors import (
    QueueFullError,
    SandboxGoneError,
    WrongStateError,
)
from prism_common.names import generate_id

logger = logging.getLogger(__name__)

#: Ends the input of a terminal as Ctrl-D does.
_END_OF_INPUT = b"\x04"
_SIGKILL = 9


class Execs:
    """All execs of one sandbox, those of before a restart too.

    Args:
        directory: The sandbox's directory on the host; execs are kept below it.
        spec: The sandbox's; its env is every exec's.
        oom_kills: Says how many processes of it the kernel has killed for memory.
        lease_left_s: Says for how long it may go on without its agent; None: for ever.
        metrics: Counts.
    """

    def __init__(
        self,
        directory: Path,
        spec: sandbox_pb2.SandboxSpec,
        oom_kills: Callable[[], int],
        lease_left_s: Callable[[], float | None],
        metrics: AgentMetrics,
    ) -> None:
        self.directory = directory / "execs"
        self._spec = spec
        self._oom_kills = oom_kills
        self._metrics = metrics
        self._lease_left_s = lease_left_s
        self._client: SupervisorClient | None = None
        #: What execs come in where no descriptor can be passed.
        self._shared: SharedFiles | None = None
        self._room = OutputRoom(self.directory)
        self._table = ExecTable(self._room)
        #: Numbers that the supervisor has named since we connected; it has no more at once.
        self._known: set[int] = set()
        self._known_changed = asyncio.Event()
        #: The connection broke. The sandbox may have ended, or not: its process says which.
        self.disconnected = asyncio.Event()
        self.activity = Activity()
        self._oom_kills_seen = 0
        #: Connections to ports that the supervisor was asked for.
        self._relays = 0
        #: Set, and replaced, when any exec of the sandbox starts or changes: for logs.
        self.changed = asyncio.Event()

    # ── the sandbox's life ──

    async def connect(self, running: Running, since_s: float | None) -> None:
        """Speak to the sandbox's supervisor, and take over the execs that it has.

        Args:
            running: What runs.
            since_s: When it was last used, as far as is known. None: we spoke to it before. That a
                connection breaks is no use of it: what has taken its kernel over may do so.

        Raises:
            SandboxGoneError: It does not answer.
        """
        if since_s is not None:
            self.activity.begin(since_s)
        self.disconnected.clear()
        if running.control_socket is None:
            return
        self.directory.mkdir(mode=0o700, exist_ok=True)
        self._room.look()
        self._known.clear()
        client = running.take_client()
        if client is not None:
            # A prepared sandbox, which has no execs that it could name.
            client.serve(self._on_event, self._on_lost)
            self._client = client
        else:
            client = await self._meet(running.control_socket)
        if running.shared is not None:
            self._shared = SharedFiles(running.shared, self._room.directory)
            self._shared.sweep()
        self._oom_kills_seen = self._oom_kills()
        if client.version >= protocol.VERSION_LIMITS:
            bounds = self._spec.limits
            client.send(
                Message(Request.LIMITS, 0, bounds.open_files_max, bounds.output_bytes_per_second)
            )
        left_s = self._lease_left_s()
        if left_s is not None:
            self.set_lease(left_s)
        for each in self._table.all():
            self._take_over(each)

    async def _meet(self, control_socket: Path) -> SupervisorClient:
        """Connect, and return once the supervisor has named all its execs."""
        client = SupervisorClient(self._on_event, self._on_lost)
        hello = await client.connect(control_socket)
        self._client = client
        try:
            async with asyncio.timeout(limits.SUPERVISOR_TIMEOUT_S):
                while len(self._known) < hello.b:
                    self._known_changed.clear()
                    await self._known_changed.wait()
        except TimeoutError:
            raise SandboxGoneError("the sandbox's supervisor does not name its execs") from None
        return client

    def _take_over(self, each: Exec) -> None:
        """Settle an exec of before: it runs on, has ended, was lost, or was never started."""
        is_new = each.header is None
        header = each.refresh()
        if header is not None and header.state >= State.EXITED:
            if is_new:
                self.activity.note(header.exit_s)
            self.settle(each)
            # Else something in the background holds its pipes.
            each.forgotten = each.record.number not in self._known
        elif each.record.number in self._known:
            if each.readers:
                # Clients that have read on while nobody could be told.
                self._send(Message(Request.WINDOW, each.record.number, each.window))
            self._release_later(each)
        elif header is None and each.record.settled:
            # It ran, and its output was given up since: it must not run again.
            each.lost = True
        elif header is None or header.state is State.NEW:
            # The supervisor answers one agent at a time, so what it does not know now it never
            # started: the same request id may run.
            self._table.drop(each)
        else:
            each.lost = True

    def _on_lost(self) -> None:
        self._client = None
        self.disconnected.set()
        self._notify()

    @property
    def connected(self) -> bool:
        """The supervisor can be spoken to."""
        return self._client is not None

    def detach(self) -> None:
        """Stop speaking to the supervisor; the sandbox and its execs go on."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
        for each in self._table.all():
            each.input.close()
            if each.release is not None:
                each.release.cancel()
                each.release = None

    def lose(self) -> None:
        """The sandbox's processes are gone: what had not ended has no exit status."""
        self.detach()
        for each in self._table.all():
            if not each.running:
                continue
            header = each.refresh()
            if header is not None and header.state >= State.EXITED:
                self.settle(each)
                each.forgotten = True
            else:
                each.lost = True
                self._metrics.execs.labels("lost").inc()
            each.notify()
        self._notify()

    async def leave_memory(self) -> None:
        """It has failed, and none of it runs: keep its output elsewhere than in the node's memory.

        The control plane counts no memory of it any more.
        """
        self._room.look()
        if not self._room.in_memory:
            return
        try:
            await asyncio.to_thread(self._room.leave_memory)
        except OSError as error:
            logger.warning(
                "memory of a failed sandbox is not given back",
                extra={"path": str(self.directory), "error": str(error)},
            )
        for each in self._table.all():
            each.ring_path = self._room.ring(each.record.number)

    def set_lease(self, left_s: float) -> None:
        """Have the supervisor end all after so many seconds, unless told anew; 0: never.

        For a sandbox that is placed again when its node is lost. It ends in time even if this
        process was killed and nobody starts it again. An older supervisor is not told.
        """
        client = self._client
        if client is not None and client.version >= protocol.VERSION_LEASE:
            left_s = min(left_s, protocol.LEASE_S_MAX)
            self._send(Message(Request.LEASE, 0, int(left_s * 1e9)))

    def new_relay(self) -> int:
        """Return a number that no connection to a port of this sandbox has had from this agent."""
        self._relays += 1
        return self._relays

    def relay(self, number: int, port: int) -> None:
        """Have the supervisor connect a socket of the shared directory to a port.

        Raises:
            WrongStateError: It cannot: an older agent has started it.
            SandboxGoneError: The sandbox ended.
        """
        client = self._client
        if client is None:
            raise SandboxGoneError("the sandbox ended")
        if client.version < protocol.VERSION_RELAY:
            raise WrongStateError(
                "the sandbox was started by an older agent and its ports are not reached; stop and "
                "start it",
                reason="SUPERVISOR_TOO_OLD",
            )
        client.send(Message(Request.RELAY, number, port))

    def terminate(self) -> bool:
        """Send SIGTERM to every process; False: there is nobody to ask."""
        if self._client is None:
            return False
        try:
            self._client.send(Message(Request.TERMINATE))
        except SandboxGoneError:
            return False
        return True

    @property
    def busy(self) -> bool:
        """An exec runs, a client follows one, or a file call is under way."""
        return self.activity.in_call or any(
            each.running or each.readers for each in self._table.all()
        )

    def idle_s(self) -> float:
        """Return for how long nothing has run in the sandbox."""
        return 0.0 if self.busy else self.activity.idle_s()

    def ran_out_of_memory(self) -> bool:
        """The kernel killed a process for memory, and no exec's end explains it."""
        return self._oom_kills() > self._oom_kills_seen

    # ── events ──

    def _notify(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    def _on_event(self, message: Message) -> None:
        each = self._table.numbered(message.exec_number)
        if message.kind == Event.UPDATE:
            if len(self._known) < protocol.EXECS_MAX:
                self._known.add(message.exec_number)
            self._known_changed.set()
            if each is not None:
                self._on_update(each, protocol.decode_state(message.b), message.b >> 8)
            elif message.b & 0xFF == State.DRAINED:
                self._send(Message(Request.FORGET, message.exec_number))
            self._notify()
        elif message.kind == Event.ERROR and message.b == Request.EXEC and each is not None:
            each.refused = message.a
            each.notify()

    def _on_update(self, each: Exec, state: State, open_pipes: int) -> None:
        each.refresh()
        if state >= State.EXITED:
            self.settle(each)
        if state is State.DRAINED and not open_pipes:
            each.forgotten = True
            self._send(Message(Request.FORGET, each.record.number))
        each.notify()

    def _send(self, message: Message) -> None:
        """Send where a supervisor that is gone needs no answer: `lose` says it to everybody."""
        if self._client is not None and self._client.connected:
            try:
                self._client.send(message)
            except SandboxGoneError:
                return

    def settle(self, each: Exec) -> None:
        """Decide once why an exec ended. The kernel says SIGKILL; the cgroup says for memory."""
        header, record = each.header, each.record
        if record.settled or header is None:
            return
        record.settled = True
        killed = header.signal == _SIGKILL or header.exit_code == 128 + _SIGKILL
        if killed and header.reason is Reason.NONE and not header.killed:
            oom_kills = self._oom_kills()
            record.out_of_memory = oom_kills > record.oom_kills
            self._oom_kills_seen = max(self._oom_kills_seen, oom_kills)
        self.activity.note(header.exit_s)
        each.input.close()
        try:
            each.save()
        except OSError as error:
            # A full disk: how it ended is in its ring, and a restarted agent settles it again.
            logger.warning(
                "cannot write an exec's record",
                extra={"path": str(each.record_path), "error": str(error)},
            )
        self._metrics.execs.labels(each.result()).inc()

    # ── starting ──

    def find_request(self, start: sandbox_pb2.ExecStart) -> Exec | None:
        """Return the exec that this request has started already.

        Raises:
            RequestIdReusedError: It was another request that had this id.
        """
        return self._table.find_request(start)

    async def start(self, start: sandbox_pb2.ExecStart) -> Exec:
        """Run a command, or return the exec that the same request has started before.

        Raises:
            QueueFullError: The sandbox has no room for another process now.
            SandboxGoneError: The sandbox ended.
        """
        each = self.find_request(start)
        if each is None:
            each = self._launch(start)
        async with asyncio.timeout(limits.SUPERVISOR_TIMEOUT_S):
            while each.header is None and not each.refused and not each.lost:
                await each.changed.wait()
        if each.refused:
            error = os.strerror(each.refused)
            self._table.drop(each)
            raise QueueFullError(f"the sandbox cannot start a process: {error}", retry_after_s=1.0)
        return each

    def _launch(self, start: sandbox_pb2.ExecStart) -> Exec:
        """Write the record, then have the supervisor run it. No await: one request, one run."""
        if self._client is None:
            raise SandboxGoneError("the sandbox ended")
        if len(self._table.running()) >= limits.EXECS_RUNNING_MAX:
            raise QueueFullError(
                f"{limits.EXECS_RUNNING_MAX} execs run in this sandbox", retry_after_s=1.0
            )
        if start.HasField("terminal") and self._client.version < protocol.VERSION_TERMINAL:
            raise WrongStateError(
                "the sandbox was started by an older agent and has no terminals; stop and start it",
                reason="SUPERVISOR_TOO_OLD",
            )
        self._table.prune()
        record = ExecRecord(
            exec_id=generate_id("ex"),
            number=self._table.next_number,
            request_id=start.request_id or generate_id("rq"),
            digest=digest_of(start),
            argv=list(start.argv),
            start_time_s=time.time(),
            oom_kills=self._oom_kills(),
            stdin=start.stdin,
            terminal=start.HasField("terminal"),
        )
        each = Exec(self._room, record)
        each.ring_bytes = self._room.ring_bytes(its.ring_bytes for its in self._table.written())
        self._table.add(each)
        try:
            spare = self._table.take_spare()
            launch(each, start, self._spec.env, self._client, self._shared, spare)
        except BaseException:
            self._table.drop(each)
            raise
        return each

    # ── for clients ──

    def get(self, exec_id: str) -> Exec:
        """Return an exec.

        Raises:
            NotFoundError: The sandbox has none of this id.
        """
        return self._table.get(exec_id)

    def all(self) -> list[Exec]:
        """Return all execs in order of their start."""
        return self._table.all()

    def signal(self, each: Exec, number: int) -> None:
        """Signal all processes of an exec.

        Raises:
            WrongStateError: It has ended.
            SandboxGoneError: The sandbox ended.
        """
        if not each.running:
            raise WrongStateError(f"exec {each.record.exec_id} has ended", reason="EXEC_ENDED")
        if self._client is None:
            raise SandboxGoneError("the sandbox ended")
        self._client.send(Message(Request.SIGNAL, each.record.number, number))

    def resize(self, each: Exec, rows: int, columns: int) -> None:
        """Give an exec's terminal another size.

        Raises:
            WrongStateError: It has none.
        """
        if not each.record.terminal:
            raise WrongStateError(
                f"exec {each.record.exec_id} has no terminal", reason="NO_TERMINAL"
            )
        if each.running:
            self._send(Message(Request.RESIZE, each.record.number, rows, columns))

    async def write_stdin(self, each: Exec, data: bytes) -> None:
        """Write to an exec's standard input, as fast as it reads. What it never reads is lost."""
        await each.input.write(data, lambda: self._open_input(each))

    async def _open_input(self, each: Exec) -> int:
        """Return a descriptor of an exec's standard input; -1: it has none, or was closed."""
        if not each.running or not each.record.stdin or self._client is None:
            return -1
        if self._shared is not None:
            return self._shared.open_input(each.record.number)
        return await self._client.open_stdin(each.record.number)

    async def close_stdin(self, each: Exec) -> None:
        """End an exec's standard input after what was written."""
        if each.record.terminal and each.record.stdin:
            await self.write_stdin(each, _END_OF_INPUT)
        await each.input.close_in_turn(lambda: self._end_input(each))

    def _end_input(self, each: Exec) -> None:
        if self._shared is not None:
            self._shared.end_input(each.record.number)
        self._send(Message(Request.CLOSE_STDIN, each.record.number))

    def want_more(self, each: Exec, offset: int) -> None:
        """Have `changed` of the exec set once it has output beyond an offset."""
        if not each.forgotten and not each.lost:
            self._send(Message(Request.WAIT, each.record.number, offset))

    # ── windows ──

    def hold(self, each: Exec, token: object, offset: int) -> None:
        """A client has read up to `offset` and must miss nothing: bound the exec by it."""
        each.readers[token] = offset
        if each.release is not None:
            each.release.cancel()
            each.release = None
        window = min(each.readers.values()) + each.ring_bytes
        if each.window < 0 or window - each.window >= each.ring_bytes // 4:
            each.window = window
            self._send(Message(Request.WINDOW, each.record.number, window))

    def let_go(self, each: Exec, token: object) -> None:
        """A client is gone. After a while without any, old output gives way to new."""
        each.readers.pop(token, None)
        self.activity.touch()
        if not each.readers:
            self._release_later(each)

    def _release_later(self, each: Exec) -> None:
        if each.running and each.release is None:
            loop = asyncio.get_running_loop()
            each.release = loop.call_later(limits.ATTACH_GRACE_S, self._release, each)

    def _release(self, each: Exec) -> None:
        each.release = None
        if not each.readers:
            each.window = protocol.OVERWRITE
            self._send(Message(Request.WINDOW, each.record.number, protocol.OVERWRITE))
