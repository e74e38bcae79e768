"""A control plane for tests: one leader, in this process, that says what the test wants."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from prism.agent.v1 import agent_pb2, agent_pb2_grpc
from prism.sandbox.v1 import sandbox_pb2
from prometheus_client import CollectorRegistry

from prism_common.addresses import Address
from prism_common.calls import CallMetrics
from prism_common.errors import NotLeaderError
from prism_common.server import RpcServer


class Gateway(agent_pb2_grpc.AgentGatewayServicer):
    """Keeps assignments, hands them out, and remembers what agents report."""

    def __init__(self) -> None:
        self.term = 1
        self.cluster_id = "test"
        self.lease_s = 30.0
        self.heartbeat_s = 0.2
        self.acknowledges = True
        #: Set: refuse sessions, and name this leader.
        self.leader: str | None = None
        self.assignments: dict[str, agent_pb2.Assignment] = {}
        self.reports: dict[str, agent_pb2.SandboxReport] = {}
        self.history: list[agent_pb2.SandboxReport] = []
        self.registrations: list[agent_pb2.Register] = []
        self.heartbeats: list[agent_pb2.Heartbeat] = []
        self.changed = asyncio.Condition()
        self._outboxes: list[asyncio.Queue[agent_pb2.SessionResponse]] = []
        self._calls: list[Any] = []
        self._server: RpcServer | None = None
        self.address = ""

    async def start(self, port: int = 0) -> None:
        address = Address("127.0.0.1", port)
        self._server = RpcServer(address, "--api", CallMetrics(CollectorRegistry()))
        self._server.add(agent_pb2_grpc.add_AgentGatewayServicer_to_server, self)
        self.address = str(self._server.bind())
        await self._server.start(["prism.agent.v1.AgentGateway"])

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)

    async def Session(
        self, request_iterator: AsyncIterator[agent_pb2.SessionRequest], context: Any
    ) -> AsyncIterator[agent_pb2.SessionResponse]:
        if self.leader is not None:
            raise NotLeaderError("not the leader", metadata={"leader": self.leader})
        first = await anext(request_iterator, None)
        if first is None:
            # The agent died before it said who it is.
            return
        outbox: asyncio.Queue[agent_pb2.SessionResponse] = asyncio.Queue()
        self._outboxes.append(outbox)
        welcome = agent_pb2.Welcome(
            term=self.term, cluster_id=self.cluster_id, control_addresses=[self.address]
        )
        welcome.heartbeat_interval.FromNanoseconds(int(self.heartbeat_s * 1e9))
        welcome.lease.FromNanoseconds(int(self.lease_s * 1e9))
        yield agent_pb2.SessionResponse(welcome=welcome)
        everything = agent_pb2.AssignmentBatch(
            term=self.term, assignments=self.assignments.values(), complete=True
        )
        yield agent_pb2.SessionResponse(assignments=everything)
        for report in first.register.sandboxes:
            await self._take(report)
        await self._note(lambda: self.registrations.append(first.register))
        reader = asyncio.get_running_loop().create_task(self._read(request_iterator, outbox))
        try:
            while True:
                yield await outbox.get()
        finally:
            reader.cancel()
            self._outboxes.remove(outbox)

    async def _read(
        self,
        requests: AsyncIterator[agent_pb2.SessionRequest],
        outbox: asyncio.Queue[agent_pb2.SessionResponse],
    ) -> None:
        async for request in requests:
            if request.HasField("heartbeat"):
                sequence = request.heartbeat.sequence
                self.heartbeats.append(request.heartbeat)
                if self.acknowledges:
                    ack = agent_pb2.HeartbeatAck(sequence=sequence)
                    outbox.put_nowait(agent_pb2.SessionResponse(heartbeat_ack=ack))
            elif request.HasField("reports"):
                for report in request.reports.reports:
                    await self._take(report)
                if self.acknowledges:
                    done = agent_pb2.ReportAck(sequence=request.reports.sequence)
                    outbox.put_nowait(agent_pb2.SessionResponse(report_ack=done))

    async def _take(self, report: agent_pb2.SandboxReport) -> None:
        def keep() -> None:
            self.reports[report.sandbox_id] = report
            self.history.append(report)

        await self._note(keep)

    async def _note(self, change: Callable[[], None]) -> None:
        async with self.changed:
            change()
            self.changed.notify_all()

    # ── for tests ──

    def send(self, *assignments: agent_pb2.Assignment, term: int | None = None) -> None:
        batch = agent_pb2.AssignmentBatch(
            term=self.term if term is None else term, assignments=assignments
        )
        for outbox in self._outboxes:
            outbox.put_nowait(agent_pb2.SessionResponse(assignments=batch))

    def assign(self, sandbox_id: str, **fields: Any) -> agent_pb2.Assignment:
        """Want a sandbox to run."""
        spec = sandbox_pb2.SandboxSpec()
        spec.CopyFrom(fields.pop("spec", spec))
        assignment = agent_pb2.Assignment(
            sandbox_id=sandbox_id,
            generation=fields.pop("generation", 1),
            desired=agent_pb2.DESIRED_STATE_RUNNING,
            spec=spec,
            name=fields.pop("name", sandbox_id),
            start_count=fields.pop("start_count", 1),
        )
        ttl_s = fields.pop("ttl_s", 0.0)
        if ttl_s:
            assignment.expire_time.FromNanoseconds(int((time.time() + ttl_s) * 1e9))
        if fields:
            raise TypeError(f"unknown: {fields}")
        self.assignments[sandbox_id] = assignment
        self.send(assignment)
        return assignment

    def want(self, sandbox_id: str, desired: int, grace_s: float = 1.0, **fields: Any) -> None:
        """Want something else of a sandbox."""
        old = self.assignments[sandbox_id]
        assignment = agent_pb2.Assignment(
            sandbox_id=sandbox_id,
            generation=fields.get("generation", old.generation),
            desired=agent_pb2.DesiredState.ValueType(desired),
            name=old.name,
            start_count=fields.get("start_count", old.start_count),
        )
        if desired == agent_pb2.DESIRED_STATE_RUNNING:
            assignment.spec.CopyFrom(old.spec)
        assignment.grace_period.FromNanoseconds(int(grace_s * 1e9))
        self.assignments[sandbox_id] = assignment
        self.send(assignment)

    async def wait(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        async with asyncio.timeout(timeout_s), self.changed:
            await self.changed.wait_for(condition)

    async def wait_for(
        self, sandbox_id: str, state: int, timeout_s: float = 60.0
    ) -> agent_pb2.SandboxReport:
        """Wait until a sandbox is reported to be in a state."""

        def reached() -> bool:
            report = self.reports.get(sandbox_id)
            return report is not None and report.state == state

        try:
            await self.wait(reached, timeout_s)
        except TimeoutError:
            raise AssertionError(f"{sandbox_id}: {self.reports.get(sandbox_id)}") from None
        return self.reports[sandbox_id]

    async def wait_registrations(self, count: int) -> None:
        await self.wait(lambda: len(self.registrations) >= count)
