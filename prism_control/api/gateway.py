"""AgentGateway: agents' sessions. The leader's dispatcher serves them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, Protocol, TypeAlias

import grpc.aio
from prism.agent.v1 import agent_pb2, agent_pb2_grpc

from prism_common import limits
from prism_common.errors import InvalidArgumentError, NotLeaderError
from prism_common.names import shorten, validate_labels, validate_name
from prism_control.api.forward import LeaderView

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_ID_LENGTH_MAX: Final = 64
_ADDRESS_LENGTH_MAX: Final = 260
#: Of a registration with its parts: 100,000 sandboxes and more. It becomes one entry of the log,
#: which must fit into one message of Raft's.
_REGISTER_BYTES_MAX: Final = 16 * limits.MIB
#: An agent registers at once; a stream that says nothing is not kept.
_REGISTER_TIMEOUT_S: Final = 10.0


class SessionServer(Protocol):
    """What serves sessions while this member leads."""

    async def serve(
        self,
        register: agent_pb2.Register,
        requests: AsyncIterator[agent_pb2.SessionRequest],
        write: Callable[[agent_pb2.SessionResponse | bytes], Awaitable[None]],
    ) -> None:
        """Serve one agent until its session ends."""


class GatewayServicer(agent_pb2_grpc.AgentGatewayServicer):
    """Serves AgentGateway on one control node."""

    def __init__(self, view: LeaderView, sessions: SessionServer) -> None:
        self._view = view
        self._sessions = sessions

    async def Session(  # type: ignore[override]  # it writes by itself
        self, request_iterator: AsyncIterator[agent_pb2.SessionRequest], context: Context
    ) -> None:
        """Serve one agent, while this member leads."""
        async with asyncio.timeout(_REGISTER_TIMEOUT_S):
            register = await _read_register(request_iterator, self._check_leads)
        _validate(register)
        self._check_leads()
        await self._sessions.serve(register, request_iterator, context.write)

    def _check_leads(self) -> None:
        if not self._view.leads:
            address = self._view.leader_api_address
            raise NotLeaderError(
                "this member does not lead",
                retry_after_s=0.5,
                metadata={"leader": address} if address else {},
            )


async def _read_register(
    requests: AsyncIterator[agent_pb2.SessionRequest], check_leads: Callable[[], None]
) -> agent_pb2.Register:
    """Return a registration with the sandboxes of all its parts.

    Raises:
        InvalidArgumentError: It is none, or has too many sandboxes.
    """
    parts: list[agent_pb2.RegisterPart] = []
    size = 0
    async for request in requests:
        kind = request.WhichOneof("request")
        size += request.ByteSize()
        if size > _REGISTER_BYTES_MAX:
            raise InvalidArgumentError(
                f"register.sandboxes: more than {_REGISTER_BYTES_MAX} bytes: this agent has more "
                "sandboxes than one node may have",
                field="register.sandboxes",
            )
        if kind == "register_part":
            check_leads()  # before the rest is sent in vain
            parts.append(request.register_part)
        elif kind == "register":
            for part in parts:
                request.register.sandboxes.extend(part.sandboxes)
            return request.register
        else:
            break
    raise InvalidArgumentError("register: the first message of a session registers")


def _validate(register: agent_pb2.Register) -> None:
    validate_name(register.name, "register.name")
    validate_labels(dict(register.labels), "register.labels")
    for field, value, most in (
        ("node_id", register.node_id, _ID_LENGTH_MAX),
        ("incarnation", register.incarnation, _ID_LENGTH_MAX),
        ("address", register.address, _ADDRESS_LENGTH_MAX),
    ):
        if not value or len(value) > most:
            raise InvalidArgumentError(
                f"register.{field}: {shorten(value)} is not 1 to {most} characters",
                field=f"register.{field}",
            )
