"""What every service needs of the node that it runs on."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from prism.sandbox.v1 import sandbox_pb2

from prism_common.channels import ChannelPool
from prism_common.errors import NotFoundError, PrismError
from prism_common.signal import KeyedSignal, Signal
from prism_control.api.forward import Forwarder
from prism_control.state.commands import Command
from prism_control.state.machine import Machine
from prism_control.state.model import SandboxRow
from prism_control.state.results import Result


@dataclass(frozen=True, slots=True)
class ApiContext:
    """The node, as its services see it.

    Attributes:
        machine: The replicated state; read it without an await in between.
        changed: Notified after each change of the state.
        sandbox_changed: Notified, by id, after each change of a sandbox.
        submit: Proposes a command and returns its result; on the leader.
        submit_all: Proposes a group, and returns each one's result or failure; on the leader.
        read_barrier: Returns once `machine` holds all that was acknowledged before.
        forwarder: Serves writes here or on the leader.
        agents: Channels to the agents' node APIs.
        last_seen_ms: When a node was last heard, if this member leads; else 0.
    """

    machine: Callable[[], Machine]
    changed: Signal
    sandbox_changed: KeyedSignal
    submit: Callable[[Command, int], Awaitable[Result]]
    submit_all: Callable[[Sequence[tuple[Command, int]]], Awaitable[list[Result | PrismError]]]
    read_barrier: Callable[[], Awaitable[None]]
    forwarder: Forwarder
    agents: ChannelPool
    last_seen_ms: Callable[[str], int]

    async def fresh(self, consistency: sandbox_pb2.Consistency.ValueType) -> Machine:
        """Return the state, as fresh as asked."""
        if consistency != sandbox_pb2.CONSISTENCY_STALE:
            await self.read_barrier()
        return self.machine()


def exact_sandbox(machine: Machine, reference: str) -> SandboxRow:
    """Return a sandbox by id or exact name; what changes or enters one takes no prefix.

    Raises:
        NotFoundError: There is none.
    """
    row = machine.sandbox(reference)
    if row is None:
        raise NotFoundError(f"sandbox: there is no sandbox {reference!r}", field="sandbox")
    return row
