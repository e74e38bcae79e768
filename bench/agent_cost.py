"""What a sandbox costs its agent: processor time for each create and delete, with nothing run.

    .venv/bin/python bench/agent_cost.py --count=10000 --batch=500
    .venv/bin/python bench/agent_cost.py --count=2000 --batch=1 --rate=500 --agents=20

The agents are those of bench/simulated_agents.py, in a process of their own: real sessions,
reconcilers and journals, and the fake runtime. This process plays the leader, and nothing else, so
that the figure is the agents' alone. User and system time, not wall time: a busy machine changes it
little. The figures are those of one process; each agent on a machine of its own pays the same.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from prism.agent.v1 import agent_pb2, agent_pb2_grpc
from prism.sandbox.v1 import sandbox_pb2
from prometheus_client import CollectorRegistry

from prism_common.addresses import Address
from prism_common.calls import CallMetrics
from prism_common.server import RpcServer
from tests.integration import harness

START_S = 30.0
#: Ten thousand sandboxes take seconds; what takes so long hangs.
STEP_S = 300.0


@dataclass
class Leader(agent_pb2_grpc.AgentGatewayServicer):
    """Hands out assignments, counts reports, and acknowledges them."""

    readers: asyncio.TaskGroup
    outboxes: list[asyncio.Queue[agent_pb2.SessionResponse]] = field(default_factory=list)
    states: dict[str, int] = field(default_factory=dict)
    counts: Counter[int] = field(default_factory=Counter)
    messages: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def Session(  # noqa: N802  # as gRPC names it
        self, request_iterator: AsyncIterator[agent_pb2.SessionRequest], context: Any
    ) -> AsyncIterator[agent_pb2.SessionResponse]:
        """One agent's session."""
        await anext(request_iterator)
        outbox: asyncio.Queue[agent_pb2.SessionResponse] = asyncio.Queue()
        welcome = agent_pb2.Welcome(term=1, cluster_id="cost")
        welcome.heartbeat_interval.FromSeconds(10)
        welcome.lease.FromSeconds(60)
        yield agent_pb2.SessionResponse(welcome=welcome)
        everything = agent_pb2.AssignmentBatch(term=1, complete=True)
        yield agent_pb2.SessionResponse(assignments=everything)
        self.readers.create_task(self._read(request_iterator, outbox))
        self.outboxes.append(outbox)
        self.changed.set()
        while True:
            yield await outbox.get()

    async def _read(
        self,
        requests: AsyncIterator[agent_pb2.SessionRequest],
        outbox: asyncio.Queue[agent_pb2.SessionResponse],
    ) -> None:
        async for request in requests:
            if request.HasField("heartbeat"):
                ack = agent_pb2.HeartbeatAck(sequence=request.heartbeat.sequence)
                outbox.put_nowait(agent_pb2.SessionResponse(heartbeat_ack=ack))
            elif request.HasField("reports"):
                self.messages += 1
                for report in request.reports.reports:
                    self.counts[self.states.get(report.sandbox_id, 0)] -= 1
                    self.counts[report.state] += 1
                    self.states[report.sandbox_id] = report.state
                self.changed.set()
                done = agent_pb2.ReportAck(sequence=request.reports.sequence)
                outbox.put_nowait(agent_pb2.SessionResponse(report_ack=done))

    async def until(self, what: str, reached: Any) -> None:
        """Wait for a condition on what agents have said."""
        try:
            async with asyncio.timeout(STEP_S):
                while not reached():
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            raise SystemExit(f"{what}: not within {STEP_S:g} s") from None


def create(number: int) -> agent_pb2.Assignment:
    """Return an assignment as `prismctl bench` makes them."""
    limits = sandbox_pb2.Limits(cpu_millicores=100, memory_bytes=64 << 20, disk_bytes=8 << 20)
    assignment = agent_pb2.Assignment(
        sandbox_id=f"sb-{number:020x}",
        generation=1,
        desired=agent_pb2.DESIRED_STATE_RUNNING,
        spec=sandbox_pb2.SandboxSpec(image="host", limits=limits, env={"JOB": str(number)}),
        name=f"bench-{number}",
        start_count=1,
    )
    assignment.grace_period.FromSeconds(5)
    return assignment


def delete(number: int) -> agent_pb2.Assignment:
    """Return the assignment that ends it."""
    assignment = agent_pb2.Assignment(
        sandbox_id=f"sb-{number:020x}",
        generation=1,
        desired=agent_pb2.DESIRED_STATE_DELETED,
        name=f"bench-{number}",
        start_count=1,
    )
    assignment.grace_period.FromSeconds(0)
    return assignment


@dataclass
class Load:
    """The same for creates and deletes."""

    leader: Leader
    process: psutil.Process
    batch: int
    rate: float

    async def run(self, what: str, make: Any, count: int, state: int) -> float:
        """Assign all, wait until all are in a state, and return the agents' seconds for each."""
        began_cpu_s, began_s, messages = self._cpu_s(), time.perf_counter(), self.leader.messages
        agents = len(self.leader.outboxes)
        for first in range(0, count, self.batch):
            if self.rate:
                due_s = began_s + first / self.rate
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            outbox = self.leader.outboxes[first // self.batch % agents]
            numbers = range(first, min(first + self.batch, count))
            batch = agent_pb2.AssignmentBatch(term=1, assignments=[make(each) for each in numbers])
            outbox.put_nowait(agent_pb2.SessionResponse(assignments=batch))
            if not self.rate:
                # One batch under way for each agent, as a leader's commits pace it.
                allowed = first + self.batch - agents * self.batch
                await self.leader.until(what, lambda n=allowed: self.leader.counts[state] >= n)
        await self.leader.until(what, lambda: self.leader.counts[state] >= count)
        cpu_s, wall_s = self._cpu_s() - began_cpu_s, time.perf_counter() - began_s
        print(
            f"  {what}: {cpu_s / count * 1e3:.3f} ms each (wall {wall_s:.2f} s; "
            f"{(self.leader.messages - messages) / count:.3f} messages of reports each)"
        )
        return cpu_s / count

    def _cpu_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)


async def measure(options: argparse.Namespace, directory: Path) -> None:
    """Start agents, create and delete, and print what it took them."""
    async with asyncio.TaskGroup() as readers:
        await measure_with(Leader(readers), options, directory)


async def measure_with(leader: Leader, options: argparse.Namespace, directory: Path) -> None:
    """See `measure`."""
    server = RpcServer(Address("127.0.0.1", 0), "--api", CallMetrics(CollectorRegistry()))
    server.add(agent_pb2_grpc.add_AgentGatewayServicer_to_server, leader)
    address = server.bind()
    await server.start(["prism.agent.v1.AgentGateway"])
    program = str(harness.ROOT / "bench" / "simulated_agents.py")
    child = subprocess.Popen(  # noqa: ASYNC220
        [
            sys.executable, program, f"--control={address}",
            f"--agents={options.agents}", f"--data-dir={directory}",
        ],
        env=harness.environment(), stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(START_S):
            await leader.until("sessions", lambda: len(leader.outboxes) == options.agents)
        load = Load(leader, psutil.Process(child.pid), options.batch, options.rate)
        print(
            f"{options.count} sandboxes on {options.agents} agents, {options.batch} a message"
            + (f", {options.rate:g} a second" if options.rate else "")
        )
        ready, deleted = agent_pb2.OBSERVED_STATE_READY, agent_pb2.OBSERVED_STATE_DELETED
        both = await load.run("create", create, options.count, ready)
        both += await load.run("delete", delete, options.count, deleted)
        print(f"  both: {both * 1e3:.3f} ms; resident {load.process.memory_info().rss >> 20} MiB")
    finally:
        child.terminate()
        child.wait()
        await server.stop(0)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="sandboxes")
    parser.add_argument("--batch", type=int, default=500, help="assignments in one message")
    parser.add_argument("--rate", type=float, default=0.0, help="a second; default: as fast as can")
    parser.add_argument("--agents", type=int, default=1, help="agents, all in one process")
    parser.add_argument("--data-dir", type=Path, help="on which disk; default: memory, if there is")
    options = parser.parse_args()
    shared = Path("/dev/shm")
    where = options.data_dir or (shared if shared.is_dir() else None)
    with tempfile.TemporaryDirectory(dir=where) as name:
        asyncio.run(measure(options, Path(name)))


if __name__ == "__main__":
    sys.exit(main())
