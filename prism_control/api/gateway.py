"""AgentGateway: agents' sessions. The leader's dispatcher serves them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, Protocol, TypeAlias

import grpc.aio
from prism.agent.v1 import agent_pb2, agent_pb2_grpc

from prism_common.errors import InvalidArgumentError, NotLeaderError
from prism_common.names import shorten, validate_labels, validate_name
from prism_control.api.forward import LeaderView

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_ID_LENGTH_MAX: Final = 64
_ADDRESS_LENGTH_MAX: Final = 260
#: An agent registers at once; a stream that says nothing is not kept.
_REGISTER_TIMEOUT_S: Final = 10.0


class SessionServer(Protocol):
    """What serves sessions while this member leads."""

    async def serve(
        self,
        register: agent_pb2.Register,
        requests: AsyncIterator[agent_pb2.SessionRequest],
        write: Callable[[agent_pb2.SessionResponse], Awaitable[None]],
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
            first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("request") != "register":
            raise InvalidArgumentError("register: the first message of a session registers")
        _validate(first.register)
        if not self._view.leads:
            address = self._view.leader_api_address
            raise NotLeaderError(
                "this member does not lead",
                retry_after_s=0.5,
                metadata={"leader": address} if address else {},
            )
        await self._sessions.serve(first.register, request_iterator, context.write)


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
