"""Both sides of an agent's session: a leader that commits at once, and an agent."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prism.agent.v1 import agent_pb2
from prism.node.v1 import node_pb2
from prometheus_client import CollectorRegistry

from prism_common.errors import (
    PrismError,
)
from prism_control.dispatch import Dispatcher, Office
from prism_control.metrics import LeaderMetrics
from prism_control.rows import amounts_of, runtime_of
from prism_control.scheduler.liveness import Liveness
from prism_control.state import commands
from prism_control.state.commands import Command, Placement
from prism_control.state.machine import Machine
from prism_control.state.model import ObservedState
from prism_control.state.results import Result
from tests.unit.state.builders import create

READY = agent_pb2.OBSERVED_STATE_READY


class Control:
    """The leader's side: a machine that commits at once, or not, as a test has it."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.dispatcher = Dispatcher(LeaderMetrics(CollectorRegistry()))
        self.submitted: list[Command] = []
        self.refusal: PrismError | None = None
        self.hang = False
        self.loads: dict[str, float] = {}
        self.liveness = Liveness((), 0)
        self.open(3)

    def open(self, term: int) -> None:
        self.liveness = Liveness(self.machine.nodes(), 0)
        self.dispatcher.open(
            Office(
                cluster_id="cl-1",
                term=term,
                machine=self.machine,
                liveness=self.liveness,
                submit=self.submit,
                heard_load=self.loads.__setitem__,
                control_addresses=["a:1", "b:2"],
            )
        )

    async def submit(self, command: Command, size: int) -> Result:
        assert size > 0
        self.submitted.append(command)
        if self.hang:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if self.refusal is not None:
            raise self.refusal
        return self.run(command)

    def run(self, command: Command) -> Result:
        index = self.machine.applied_index + 1
        proposal = commands.Proposal(1, 1000 + index, (command,))
        (result,), events = self.machine.apply(index, commands.encode(proposal))
        self.liveness.observe(events, 0)
        self.dispatcher.observe(events)
        return result

    def place(self, sandbox_id: str, node_id: str = "node-1") -> None:
        self.run(create(sandbox_id))
        self.run(commands.AssignSandboxes((Placement(sandbox_id, 1, node_id),)))


def register(term: int = 0, incarnation: str = "i1", *has: str) -> agent_pb2.Register:
    return agent_pb2.Register(
        node_id="node-1",
        name="worker",
        incarnation=incarnation,
        address="127.0.0.1:7117",
        capacity=node_pb2.ResourceAmounts(
            cpu_millicores=64_000, memory_bytes=2**40, disk_bytes=2**40, slots=1000
        ),
        runtimes=[node_pb2.RuntimeStatus(name="fake", ready=True)],
        version="0.1.0",
        term=term,
        sandboxes=[
            agent_pb2.SandboxReport(sandbox_id=key, generation=1, state=READY, start_count=1)
            for key in has
        ],
    )


def node_of(message: agent_pb2.Register) -> commands.RegisterNode:
    return commands.RegisterNode(
        message.node_id, message.name, message.incarnation, message.address,
        amounts_of(message.capacity), tuple(map(runtime_of, message.runtimes)), (),
        message.version, 15_000, 5_000,
    )  # fmt: skip


def report_ready(sandbox_id: str) -> commands.ReportSandboxes:
    seen = commands.Report(sandbox_id, 1, ObservedState.READY, runtime="fake")
    return commands.ReportSandboxes("node-1", "i1", (seen,))


class Agent:
    """The agent's side of one session."""

    def __init__(self, control: Control, message: agent_pb2.Register) -> None:
        self._requests: asyncio.Queue[agent_pb2.SessionRequest | None] = asyncio.Queue()
        self._responses: asyncio.Queue[agent_pb2.SessionResponse] = asyncio.Queue()
        self._writing = False
        self.task = asyncio.get_running_loop().create_task(
            control.dispatcher.serve(message, self._read(), self._write)
        )

    async def _read(self) -> AsyncIterator[agent_pb2.SessionRequest]:
        while (request := await self._requests.get()) is not None:
            yield request

    async def _write(self, response: agent_pb2.SessionResponse | bytes) -> None:
        if isinstance(response, bytes):
            response = agent_pb2.SessionResponse.FromString(response)
        # As gRPC has it: one write at a time.
        assert not self._writing
        self._writing = True
        await asyncio.sleep(0)
        self._writing = False
        self._responses.put_nowait(response)

    def send(self, request: agent_pb2.SessionRequest | None) -> None:
        self._requests.put_nowait(request)

    def report(self, sequence: int, *items: agent_pb2.SandboxReport) -> None:
        batch = agent_pb2.ReportBatch(sequence=sequence, reports=items)
        self.send(agent_pb2.SessionRequest(reports=batch))

    def heartbeat(self, sequence: int, load: float = 0.0) -> None:
        beat = agent_pb2.Heartbeat(sequence=sequence, load_per_core=load)
        self.send(agent_pb2.SessionRequest(heartbeat=beat))

    async def get(self, kind: str) -> Any:
        response = await self._responses.get()
        assert response.WhichOneof("response") == kind
        return getattr(response, kind)

    async def failure(self) -> PrismError:
        with pytest.raises(PrismError) as caught:
            await self.task
        return caught.value


async def joined(control: Control, *has: str) -> Agent:
    agent = Agent(control, register(0, "i1", *has))
    welcome = await agent.get("welcome")
    assert (welcome.term, welcome.cluster_id) == (3, "cl-1")
    assert list(welcome.control_addresses) == ["a:1", "b:2"]
    assert welcome.lease.ToMilliseconds() > welcome.heartbeat_interval.ToMilliseconds() > 0
    return agent
