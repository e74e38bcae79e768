"""NodeService on a control node: what is replicated, and the agents' own answers passed on."""

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator
from typing import Any, Final, TypeAlias

import grpc.aio
from prism.node.v1 import node_pb2, node_pb2_grpc

from prism_common.errors import (
    InvalidArgumentError,
    NodeUnreachableError,
    NoLeaderError,
)
from prism_common.names import shorten
from prism_common.status import from_rpc_error
from prism_control.api import validation
from prism_control.api.context import ApiContext
from prism_control.api.forward import time_left_s
from prism_control.rows import node_proto
from prism_control.state import commands
from prism_control.state.commands import Command
from prism_control.state.events import NodeChanged, NodeRemoved
from prism_control.state.machine import Machine
from prism_control.state.model import NodeRow
from prism_control.state.results import NodeOk, Refused

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_SERVICE: Final = "/prism.node.v1.NodeService/"
_EVENTS_A_TURN: Final = 500
#: Longer than any work on a machine that is announced beforehand.
_DRAIN_S_MAX: Final = 7 * 24 * 3600.0
_BARRIER_TIMEOUT_S: Final = 6.0
#: An agent that measures itself answers in milliseconds.
_AGENT_TIMEOUT_S: Final = 5.0


class NodeServicer(node_pb2_grpc.NodeServiceServicer):
    """Serves NodeService on one control node."""

    def __init__(self, api: ApiContext) -> None:
        self._api = api

    async def ListNodes(
        self, request: node_pb2.ListNodesRequest, context: Context
    ) -> node_pb2.ListNodesResponse:
        """List nodes in order of name."""
        size = validation.page_size(request.page_size)
        after = _decode_token(request.page_token)
        machine = await self._fresh(context)
        rows = [row for row in machine.nodes() if row.name > after]
        return node_pb2.ListNodesResponse(
            nodes=[self._proto(machine, row) for row in rows[:size]],
            next_page_token=_encode_token(rows[size - 1].name) if len(rows) > size else "",
        )

    async def GetNode(self, request: node_pb2.GetNodeRequest, context: Context) -> node_pb2.Node:
        """Return one node."""
        machine = await self._fresh(context)
        return self._proto(machine, self._find(machine, request.node))

    async def GetResources(
        self, request: node_pb2.GetResourcesRequest, context: Context
    ) -> node_pb2.GetResourcesResponse:
        """Ask a node's agent what it has."""
        row = self._find(await self._fresh(context), request.node)
        stub = node_pb2_grpc.NodeServiceStub(self._api.agents.get(row.address))
        timeout_s = min(time_left_s(context), _AGENT_TIMEOUT_S)
        try:
            return await stub.GetResources(node_pb2.GetResourcesRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _unreachable(row, error) from None

    async def GetHealth(
        self, request: node_pb2.GetHealthRequest, context: Context
    ) -> node_pb2.GetHealthResponse:
        """Ask a node's agent how it is."""
        row = self._find(await self._fresh(context), request.node)
        stub = node_pb2_grpc.NodeServiceStub(self._api.agents.get(row.address))
        timeout_s = min(time_left_s(context), _AGENT_TIMEOUT_S)
        try:
            return await stub.GetHealth(node_pb2.GetHealthRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _unreachable(row, error) from None

    async def WatchNodes(
        self, request: node_pb2.WatchNodesRequest, context: Context
    ) -> AsyncIterator[node_pb2.WatchNodesResponse]:
        """Stream all nodes, and then every change."""
        machine = await self._fresh(context)
        revision = machine.revision
        for row in machine.nodes():
            yield node_pb2.WatchNodesResponse(node=self._proto(machine, row))
        while True:
            machine = self._api.machine()
            events = machine.changes_since(revision, _EVENTS_A_TURN)
            for event in events:
                revision = event.revision
                if isinstance(event, NodeChanged | NodeRemoved):
                    yield node_pb2.WatchNodesResponse(
                        node=self._proto(machine, event.row),
                        removed=isinstance(event, NodeRemoved),
                    )
            if not events:
                await self._api.changed.wait()

    async def CordonNode(
        self, request: node_pb2.CordonNodeRequest, context: Context
    ) -> node_pb2.Node:
        """Place nothing new on a node."""
        validation.reference(request.node, "node")

        async def cordon(request: node_pb2.CordonNodeRequest, left_s: float) -> node_pb2.Node:
            return await self._steer(commands.CordonNode(request.node, cordoned=True))

        return await self._api.forwarder.call(
            _SERVICE + "CordonNode", request, node_pb2.Node, context, cordon
        )

    async def UncordonNode(
        self, request: node_pb2.UncordonNodeRequest, context: Context
    ) -> node_pb2.Node:
        """Place new sandboxes on a node again, and end its drain."""
        validation.reference(request.node, "node")

        async def uncordon(request: node_pb2.UncordonNodeRequest, left_s: float) -> node_pb2.Node:
            return await self._steer(commands.CordonNode(request.node, cordoned=False))

        return await self._api.forwarder.call(
            _SERVICE + "UncordonNode", request, node_pb2.Node, context, uncordon
        )

    async def DrainNode(
        self, request: node_pb2.DrainNodeRequest, context: Context
    ) -> node_pb2.Node:
        """Cordon a node, and move or end what runs there."""
        validation.reference(request.node, "node")
        self._deadline_ms(request)

        async def drain(request: node_pb2.DrainNodeRequest, left_s: float) -> node_pb2.Node:
            return await self._steer(commands.DrainNode(request.node, self._deadline_ms(request)))

        return await self._api.forwarder.call(
            _SERVICE + "DrainNode", request, node_pb2.Node, context, drain
        )

    @staticmethod
    def _deadline_ms(request: node_pb2.DrainNodeRequest) -> int:
        return validation.duration_ms(
            request.deadline if request.HasField("deadline") else None,
            "deadline", 0, _DRAIN_S_MAX,
        )  # fmt: skip

    async def _steer(self, command: Command) -> node_pb2.Node:
        result = await self._api.submit(command, 256)
        if isinstance(result, Refused):
            raise result.error()
        if not isinstance(result, NodeOk):
            raise TypeError(f"{type(command).__name__} was answered by {type(result).__name__}")
        return self._proto(self._api.machine(), result.node)

    async def _fresh(self, context: Context) -> Machine:
        """Return the state as of now."""
        try:
            async with asyncio.timeout(min(time_left_s(context), _BARRIER_TIMEOUT_S)):
                await self._api.read_barrier()
        except TimeoutError:
            raise NoLeaderError(
                "no leader has confirmed the read: reads need a majority of the control nodes",
                retry_after_s=1.0,
            ) from None
        return self._api.machine()

    @staticmethod
    def _find(machine: Machine, reference: str) -> NodeRow:
        return machine.find_node(validation.reference(reference, "node"))

    def _proto(self, machine: Machine, row: NodeRow) -> node_pb2.Node:
        heard_ms = max(row.last_seen_ms, self._api.last_seen_ms(row.id))
        return node_proto(row, machine.allocated(row.id), heard_ms)


def _unreachable(row: NodeRow, error: grpc.aio.AioRpcError) -> NodeUnreachableError:
    return NodeUnreachableError(
        f"node {row.name} at {row.address} does not answer: {from_rpc_error(error).message}",
        retry_after_s=1.0,
    )


def _encode_token(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode().rstrip("=")


def _decode_token(token: str) -> str:
    try:
        padded = token + "=" * (-len(token) % 4)
        return base64.b64decode(padded, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidArgumentError(
            f"page_token: {shorten(token)} is not one that a list returned", field="page_token"
        ) from None
