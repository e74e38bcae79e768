"""The agent's session with the leader: found, kept, and obeyed only while it may be obeyed."""

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio
import msgspec
from google.protobuf import duration_pb2, timestamp_pb2
from prism.agent.v1 import agent_pb2, agent_pb2_grpc
from prism.node.v1 import node_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent.data_directory import DataDirectory
from prism_agent.journal import is_safe_id
from prism_agent.metrics import AgentMetrics
from prism_agent.reconcile import Assignment, Desired
from prism_agent.registration import registration_messages
from prism_agent.reports import ReportQueue
from prism_agent.sandboxes import Sandboxes
from prism_agent.starts import first_of
from prism_common import __version__
from prism_common import limits as common_limits
from prism_common.addresses import parse_address
from prism_common.channels import open_channel
from prism_common.errors import PrismError
from prism_common.names import shorten
from prism_common.status import from_rpc_error

logger = logging.getLogger(__name__)

_DESIRED: Final = {
    agent_pb2.DESIRED_STATE_RUNNING: Desired.RUNNING,
    agent_pb2.DESIRED_STATE_STOPPED: Desired.STOPPED,
    agent_pb2.DESIRED_STATE_DELETED: Desired.DELETED,
    agent_pb2.DESIRED_STATE_PAUSED: Desired.PAUSED,
}
#: A leader that accepts the connection and then says nothing is not one.
_WELCOME_TIMEOUT_S: Final = 5.0
_ADDRESSES_MAX: Final = 32


class SessionRefusedError(PrismError):
    """This session must not go on: the leader is of an older term, or of another cluster."""

    reason = "SESSION_REFUSED"


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """What a registration says of this node."""

    name: str = ""
    address: str = ""
    capacity: node_pb2.ResourceAmounts = field(default_factory=node_pb2.ResourceAmounts)
    runtimes: list[node_pb2.RuntimeStatus] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    egress: node_pb2.EgressStatus = field(default_factory=node_pb2.EgressStatus)


class Session:
    """Keeps one session with the leader, for as long as the agent runs.

    Args:
        control: host:port of control nodes; those that the leader names are added.
        data: Keeps the term, the cluster and the lease.
        sandboxes: Obeys.
        reports: What to tell.
        load: Measures the node, for heartbeats: what is used, and load per core.
        metrics: Shows whether there is a session.
    """

    def __init__(
        self,
        control: list[str],
        data: DataDirectory,
        sandboxes: Sandboxes,
        reports: ReportQueue,
        load: Callable[[], tuple[node_pb2.ResourceAmounts, float]],
        metrics: AgentMetrics,
    ) -> None:
        self._configured = list(control)
        self._identity = NodeIdentity()
        self._data = data
        self._sandboxes = sandboxes
        self._reports = reports
        self._load = load
        self._metrics = metrics
        self._incarnation = secrets.token_hex(8)
        #: Addresses to try, the likeliest leader first.
        self._candidates = list(control)
        self._heartbeat_interval_s = 1.0
        self._lease_s = 0.0
        #: Monotonic time until which the leader counts this node as alive; None: it never did.
        self._lease_until_s: float | None = None
        self._fenced = False
        self._sent: dict[int, float] = {}
        #: The first assignments of a session until they are complete; None: they are.
        self._first: list[Assignment] | None = []
        self.connected_to = ""
        self.last_error = "no session yet"

    # ── finding the leader ──

    async def run(self, identity: NodeIdentity) -> None:
        """Keep a session until cancelled, registered as `identity`."""
        self._identity = identity
        await self._sandboxes.started.wait()
        self._restore_lease()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_lease())
            await self._keep()

    async def _keep(self) -> None:
        attempt = 0
        while True:
            address = self._candidates.pop(0) if self._candidates else ""
            if not address:
                self._candidates = list(self._configured)
                delay_s = min(
                    common_limits.RECONNECT_MIN_S * 2 ** min(attempt, 10),
                    common_limits.RECONNECT_MAX_S,
                )
                attempt += 1
                # Jitter: a restarted leader is not met by all its agents at once.
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))  # noqa: S311
                continue
            served = await self._try(address)
            attempt = 0 if served else attempt

    async def _try(self, address: str) -> bool:
        """Hold one session with one address; True: it was the leader and welcomed us."""
        channel = open_channel(address)
        self.connected_to = ""
        failure: BaseException | None = None
        try:
            await self._hold(agent_pb2_grpc.AgentGatewayStub(channel), address)
        except* (grpc.aio.AioRpcError, PrismError, TimeoutError) as group:
            failure = first_of(group)
        finally:
            await channel.close()
        served, self.connected_to = bool(self.connected_to), ""
        self._metrics.control_session.set(0)
        self._learn(address, failure)
        return served

    def _learn(self, address: str, failure: BaseException | None) -> None:
        """Remember why there is no session, and where the leader is said to be."""
        leader = ""
        text = str(failure or "it ended the session")
        if isinstance(failure, grpc.aio.AioRpcError):
            remote = from_rpc_error(failure)
            text = remote.message or remote.code
            leader = remote.metadata.get("leader", "")
        elif isinstance(failure, TimeoutError):
            text = "it did not answer in time"
        self.last_error = f"{address}: {text}"
        logger.info("no session", extra={"control": address, "why": text, "leader": leader})
        if leader and leader != address and _is_address(leader):
            self._candidates = [leader, *(each for each in self._candidates if each != leader)]

    # ── one session ──

    async def _hold(self, stub: "agent_pb2_grpc.AgentGatewayAsyncStub", address: str) -> None:
        call = stub.Session()
        try:
            sent_s = time.monotonic()
            async with asyncio.timeout(_WELCOME_TIMEOUT_S):
                for message in registration_messages(self._registration()):
                    await call.write(message)
                first = await _read_one(call)
            if first is None:
                await _raise_status(call)
                raise SessionRefusedError("it ended the session without a welcome")
            self._welcome(first, address, sent_s)
            self._reports.resend()
            async with asyncio.TaskGroup() as group:
                write = _Writer(call).write
                group.create_task(self._send_heartbeats(write))
                group.create_task(self._send_reports(write))
                await self._read(call)
        finally:
            call.cancel()

    def _registration(self) -> agent_pb2.Register:
        identity = self._identity
        return agent_pb2.Register(
            node_id=self._data.state.node_id,
            name=identity.name,
            incarnation=self._incarnation,
            address=identity.address,
            capacity=identity.capacity,
            runtimes=identity.runtimes,
            labels=identity.labels,
            version=__version__,
            egress=identity.egress,
            term=self._sandboxes.reconciler.term,
            sandboxes=self._sandboxes.reports(),
        )

    def _welcome(self, first: agent_pb2.SessionResponse, address: str, sent_s: float) -> None:
        """Accept a leader, or refuse one that may not be obeyed.

        Raises:
            SessionRefusedError: Its term is older than one seen, or its cluster is another.
        """
        if first.WhichOneof("response") != "welcome":
            raise SessionRefusedError("its first message is not a welcome")
        welcome = first.welcome
        state = self._data.state
        if state.cluster_id not in ("", welcome.cluster_id):
            raise SessionRefusedError(
                f"it is of the cluster {welcome.cluster_id}; this node belongs to "
                f"{state.cluster_id} (give a new --data-dir to join another)"
            )
        self._accept_term(welcome.term)
        if state.cluster_id != welcome.cluster_id:
            self._promise(cluster_id=welcome.cluster_id)
        self._heartbeat_interval_s = max(0.05, welcome.heartbeat_interval.ToNanoseconds() / 1e9)
        self._lease_s = welcome.lease.ToNanoseconds() / 1e9
        self._sent.clear()
        self._first = []
        self._lease_until_s = None
        self._renew_lease(sent_s)
        known = [each for each in welcome.control_addresses if _is_address(each)]
        others = dict.fromkeys([address, *known[:_ADDRESSES_MAX], *self._configured])
        self._candidates = list(others)
        self.connected_to, self.last_error = address, ""
        self._metrics.control_session.set(1)
        logger.info("session", extra={"control": address, "term": welcome.term})

    def _accept_term(self, term: int) -> None:
        """Obey this term from now on, and keep that promise on disk before obeying.

        Raises:
            SessionRefusedError: A higher one was seen.
        """
        known = self._sandboxes.reconciler.term
        if not self._sandboxes.reconciler.accepts_term(term):
            raise SessionRefusedError(f"its term {term} is older than {known}, which was seen")
        if term != self._data.state.term:
            self._promise(term=term)

    def _promise(self, **changes: Any) -> None:
        """Keep a promise on disk.

        Raises:
            SessionRefusedError: The disk does not take it, so it is not given.
        """
        before = self._data.state
        self._data.state = msgspec.structs.replace(before, **changes)
        try:
            self._data.save(durable=True)
        except OSError as error:
            self._data.state = before
            raise SessionRefusedError(f"it cannot be promised anything: {error}") from None

    async def _read(self, call: "_Call") -> None:
        while True:
            response = await _read_one(call)
            if response is None:
                await _raise_status(call)
                raise SessionRefusedError("it ended the session")
            match response.WhichOneof("response"):
                case "assignments":
                    self._obey(response.assignments)
                case "heartbeat_ack":
                    sent_s = self._sent.pop(response.heartbeat_ack.sequence, None)
                    if sent_s is not None:
                        self._renew_lease(sent_s)
                case "report_ack":
                    self._sandboxes.acknowledge(response.report_ack.sequence)
                case _:
                    # A newer leader may say more than we know.
                    pass

    def _obey(self, batch: agent_pb2.AssignmentBatch) -> None:
        self._accept_term(batch.term)
        assignments = [
            _assignment_of(each) for each in batch.assignments if _is_usable(each.sandbox_id)
        ]
        if self._first is not None:
            # All that the leader has may take several batches, of which the last is `complete`.
            self._first += assignments
            if not batch.complete:
                return
            assignments, self._first = self._first, None
        self._sandboxes.assign(batch.term, assignments, batch.complete)

    async def _send_heartbeats(self, write: "_Write") -> None:
        sequence = 0
        while True:
            sequence += 1
            used, load_per_core = self._load()
            # The lease begins when the heartbeat was sent, so before it is.
            self._sent[sequence] = time.monotonic()
            if len(self._sent) > 1000:
                del self._sent[min(self._sent)]
            heartbeat = agent_pb2.Heartbeat(
                sequence=sequence, used=used, load_per_core=load_per_core
            )
            await write(agent_pb2.SessionRequest(heartbeat=heartbeat))
            await asyncio.sleep(self._heartbeat_interval_s)

    async def _send_reports(self, write: "_Write") -> None:
        while True:
            batch = await self._reports.take()
            await write(agent_pb2.SessionRequest(reports=batch))

    # ── the lease ──

    def _restore_lease(self) -> None:
        """Before the first session: the lease is what the process before us was given."""
        lease_until_s = self._data.state.lease_until_s
        if lease_until_s:
            self._lease_until_s = time.monotonic() + (lease_until_s - time.time())
            self._sandboxes.restore_lease(self._lease_until_s)

    def _renew_lease(self, sent_s: float) -> None:
        if self._lease_s <= 0:
            return
        self._lease_until_s = max(sent_s + self._lease_s, self._lease_until_s or 0.0)
        self._fenced = False
        self._sandboxes.renew_lease(self._lease_until_s)
        self._data.state.lease_until_s = time.time() + (self._lease_until_s - time.monotonic())
        try:
            self._data.save(durable=False)
        except OSError as error:
            # A full disk must not end the agent. A process after this one knows an older lease,
            # and starts less from the journal.
            logger.warning("cannot keep the lease", extra={"error": str(error)})

    async def _watch_lease(self) -> None:
        """Fence once whenever the lease runs out."""
        while True:
            now_s = time.monotonic()
            if self._lease_until_s is not None and now_s >= self._lease_until_s:
                if not self._fenced:
                    self._fenced = True
                    logger.warning("the lease has run out")
                    self._sandboxes.lease_expired()
                await asyncio.sleep(0.1)
            else:
                left_s = (self._lease_until_s or now_s + 0.1) - now_s
                await asyncio.sleep(min(max(left_s, 0.005), 0.5))


_Call = grpc.aio.StreamStreamCall[agent_pb2.SessionRequest, agent_pb2.SessionResponse]
_Write = Callable[[agent_pb2.SessionRequest], Awaitable[None]]


class _Writer:
    """Heartbeats and reports share one stream; a stream takes one write at a time."""

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._lock = asyncio.Lock()

    async def write(self, request: agent_pb2.SessionRequest) -> None:
        async with self._lock:
            try:
                await self._call.write(request)
            except asyncio.InvalidStateError:
                # The stream has ended; its status says why, and where the leader is.
                await _raise_status(self._call)
                raise SessionRefusedError("it ended the session") from None


async def _read_one(call: _Call) -> agent_pb2.SessionResponse | None:
    """Return the leader's next message; None: there is none any more."""
    response = await call.read()
    return response if isinstance(response, agent_pb2.SessionResponse) else None


async def _raise_status(call: _Call) -> None:
    """Raise the status that a stream ended with, if it is not OK."""
    code = await call.code()
    if code is not grpc.StatusCode.OK:
        raise grpc.aio.AioRpcError(
            code,
            await call.initial_metadata(),
            await call.trailing_metadata(),
            details=await call.details(),
        )


def _is_address(text: str) -> bool:
    try:
        parse_address(text, "control")
    except PrismError:
        return False
    return True


def _is_usable(sandbox_id: str) -> bool:
    """Ids become names of directories and cgroups, so one that could leave them is not obeyed."""
    if is_safe_id(sandbox_id):
        return True
    logger.error("an assignment with a malformed id", extra={"sandbox": shorten(sandbox_id)})
    return False


def _seconds_of(time_or_span: timestamp_pb2.Timestamp | duration_pb2.Duration) -> float:
    return time_or_span.seconds + time_or_span.nanos / 1e9


def _assignment_of(message: agent_pb2.Assignment) -> Assignment:
    grace_s = common_limits.GRACE_S_DEFAULT
    if message.HasField("grace_period"):
        grace_s = _seconds_of(message.grace_period)
    # Each look at a field of a message makes an object.
    spec = message.spec if message.HasField("spec") else None
    return Assignment(
        message.sandbox_id,
        message.generation,
        _DESIRED.get(message.desired, Desired.STOPPED),
        message.start_count,
        message.name,
        # The same bytes for the same spec: a change of it is seen by them.
        b"" if spec is None else spec.SerializeToString(deterministic=True),
        _seconds_of(message.expire_time) if message.HasField("expire_time") else 0.0,
        min(max(grace_s, 0.0), common_limits.GRACE_S_MAX),
        spec is not None and spec.on_node_loss == sandbox_pb2.ON_NODE_LOSS_RESCHEDULE,
    )
