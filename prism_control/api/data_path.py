"""The data path: from any node straight to the sandbox's agent. Raft is not asked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Final, TypeAlias, TypeVar

import grpc.aio
from google.protobuf import empty_pb2
from google.protobuf.message import Message
from prism.agent.v1 import agent_pb2_grpc
from prism.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc

from prism_common.errors import (
    InvalidArgumentError,
    NodeUnreachableError,
    NoLeaderError,
    SandboxGoneError,
    WrongStateError,
)
from prism_common.names import shorten
from prism_common.status import RemoteError, failure_of, from_rpc_error
from prism_common.streams import whole
from prism_control.api import validation
from prism_control.api.context import ApiContext, exact_sandbox
from prism_control.api.forward import time_left_s
from prism_control.state.machine import Machine
from prism_control.state.model import NodeRow, SandboxRow, SandboxState

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
First = TypeVar(
    "First",
    sandbox_pb2.ExecRequest,
    sandbox_pb2.AttachExecRequest,
    sandbox_pb2.ForwardPortRequest,
    sandbox_pb2.WriteFileRequest,
)
Response = TypeVar("Response", bound=Message)

#: A read waits so long for a quorum; an election is over by then.
_BARRIER_TIMEOUT_S: Final = 6.0
#: An answer about a sandbox waits so long for its node to say what it uses.
_USAGE_S: Final = 2.0
#: What an agent says ahead of a failure has come by then.
_TOLD_S: Final = 0.5
#: What an agent still keeps something of, such as logs.
_ON_A_NODE: Final = frozenset(
    {
        SandboxState.READY,
        SandboxState.PAUSED,
        SandboxState.STOPPING,
        SandboxState.STOPPED,
        SandboxState.FAILED,
    }
)
_RUNS: Final = frozenset({SandboxState.READY})
#: Its files can be reached.
_HAS_PROCESSES: Final = frozenset({SandboxState.READY, SandboxState.PAUSED})


class DataPath(sandbox_pb2_grpc.SandboxServiceServicer):
    """Execs, logs and files."""

    def __init__(self, api: ApiContext) -> None:
        self._api = api

    async def Exec(
        self, request_iterator: AsyncIterator[sandbox_pb2.ExecRequest], context: Context
    ) -> AsyncIterator[sandbox_pb2.ExecResponse]:
        """Run a command."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("request") != "start":
            raise InvalidArgumentError("start: the first request of an exec is its start")
        row = await self._locate(first.start.sandbox, _RUNS, context)
        first.start.sandbox = row.id
        first.start.request_id = validation.request_id(first.start.request_id)
        call = self._exec_stream(row, "Exec")(
            _chain(first, request_iterator), timeout=_deadline(context)
        )
        async for response in _relay(call, row):
            yield response

    async def AttachExec(
        self, request_iterator: AsyncIterator[sandbox_pb2.AttachExecRequest], context: Context
    ) -> AsyncIterator[sandbox_pb2.ExecResponse]:
        """Attach to an exec."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("request") != "start":
            raise InvalidArgumentError("start: the first request of an attach is its start")
        row = await self._locate(first.start.sandbox, _ON_A_NODE, context)
        first.start.sandbox = row.id
        call = self._exec_stream(row, "AttachExec")(
            _chain(first, request_iterator), timeout=_deadline(context)
        )
        async for response in _relay(call, row):
            yield response

    async def StreamLogs(
        self, request: sandbox_pb2.StreamLogsRequest, context: Context
    ) -> AsyncIterator[sandbox_pb2.StreamLogsResponse]:
        """Stream what execs have written."""
        row = await self._locate(request.sandbox, _ON_A_NODE, context)
        request.sandbox = row.id
        call = self._agent(row).StreamLogs(request, timeout=_deadline(context))
        async for response in _relay(call, row):
            yield response

    async def ForwardPort(
        self, request_iterator: AsyncIterator[sandbox_pb2.ForwardPortRequest], context: Context
    ) -> AsyncIterator[sandbox_pb2.ForwardPortResponse]:
        """Connect to a port inside."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("request") != "start":
            raise InvalidArgumentError("start: the first request of a port is its start")
        row = await self._locate(first.start.sandbox, _RUNS, context)
        first.start.sandbox = row.id
        call = self._agent(row).ForwardPort(
            _chain(first, request_iterator), timeout=_deadline(context)
        )
        async for response in _relay(call, row):
            yield response

    async def ListExecs(
        self, request: sandbox_pb2.ListExecsRequest, context: Context
    ) -> sandbox_pb2.ListExecsResponse:
        """List a sandbox's execs."""
        row = await self._locate(request.sandbox, _ON_A_NODE, context)
        request.sandbox = row.id
        return await _ask(self._agent(row).ListExecs(request, timeout=time_left_s(context)), row)

    async def GetExec(
        self, request: sandbox_pb2.GetExecRequest, context: Context
    ) -> sandbox_pb2.ExecInfo:
        """Return one exec."""
        row = await self._locate(request.sandbox, _ON_A_NODE, context)
        request.sandbox = row.id
        return await _ask(self._agent(row).GetExec(request, timeout=time_left_s(context)), row)

    async def SignalExec(
        self, request: sandbox_pb2.SignalExecRequest, context: Context
    ) -> empty_pb2.Empty:
        """Signal an exec."""
        row = await self._locate(request.sandbox, _RUNS, context)
        request.sandbox = row.id
        return await _ask(self._agent(row).SignalExec(request, timeout=time_left_s(context)), row)

    async def MeasureSandboxes(
        self, request: sandbox_pb2.MeasureSandboxesRequest, context: Context
    ) -> sandbox_pb2.MeasureSandboxesResponse:
        """Ask a node what its sandboxes use."""
        node = self._api.machine().find_node(validation.reference(request.node, "node"))
        call = self._stub(node).MeasureSandboxes(request, timeout=time_left_s(context))
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise _from_agent(error, node.name) from None

    async def _with_usage(self, row: SandboxRow, proto: sandbox_pb2.Sandbox) -> sandbox_pb2.Sandbox:
        """Add what a sandbox uses, if its node says so in time."""
        node = self._api.machine().node(row.node_id)
        if node is not None and row.state in _HAS_PROCESSES:
            request = sandbox_pb2.MeasureSandboxesRequest(sandbox_ids=[row.id])
            with contextlib.suppress(grpc.aio.AioRpcError):
                response = await self._stub(node).MeasureSandboxes(request, timeout=_USAGE_S)
                for usage in response.usages:
                    proto.usage.CopyFrom(usage)
        return proto

    # ── Files ────────────────────────────────────────────────────────────────────────────────

    async def ReadFile(
        self, request: sandbox_pb2.ReadFileRequest, context: Context
    ) -> AsyncIterator[sandbox_pb2.ReadFileResponse]:
        """Stream a file's contents."""
        row = await self._locate(request.sandbox, _HAS_PROCESSES, context)
        request.sandbox = row.id
        call = self._agent(row).ReadFile(request, timeout=_deadline(context))
        async for response in _relay(call, row):
            yield response

    async def WriteFile(
        self, request_iterator: AsyncIterator[sandbox_pb2.WriteFileRequest], context: Context
    ) -> sandbox_pb2.FileInfo:
        """Pass a file on. The agent is told that it is complete only if the client said so."""
        first = await anext(request_iterator, None)
        if first is None:
            raise InvalidArgumentError("path: the first message has sandbox and path", field="path")
        row = await self._locate(first.sandbox, _HAS_PROCESSES, context)
        first.sandbox = row.id
        call = self._agent(row).WriteFile(timeout=_deadline(context))
        try:
            return await _pass_file(call, _chain(first, whole(request_iterator, context)), row)
        finally:
            call.cancel()

    async def ListFiles(
        self, request: sandbox_pb2.ListFilesRequest, context: Context
    ) -> sandbox_pb2.ListFilesResponse:
        """List a directory."""
        row = await self._locate(request.sandbox, _HAS_PROCESSES, context)
        request.sandbox = row.id
        return await _ask(self._agent(row).ListFiles(request, timeout=time_left_s(context)), row)

    async def StatFile(
        self, request: sandbox_pb2.StatFileRequest, context: Context
    ) -> sandbox_pb2.FileInfo:
        """Describe a path."""
        row = await self._locate(request.sandbox, _HAS_PROCESSES, context)
        request.sandbox = row.id
        return await _ask(self._agent(row).StatFile(request, timeout=time_left_s(context)), row)

    async def MakeDirectory(
        self, request: sandbox_pb2.MakeDirectoryRequest, context: Context
    ) -> sandbox_pb2.FileInfo:
        """Make a directory."""
        row = await self._locate(request.sandbox, _HAS_PROCESSES, context)
        request.sandbox = row.id
        call = self._agent(row).MakeDirectory(request, timeout=time_left_s(context))
        return await _ask(call, row)

    async def MakeLink(
        self, request: sandbox_pb2.MakeLinkRequest, context: Context
    ) -> sandbox_pb2.FileInfo:
        """Make a symbolic link."""
        row = await self._locate(request.sandbox, _HAS_PROCESSES, context)
        request.sandbox = row.id
        return await _ask(self._agent(row).MakeLink(request, timeout=time_left_s(context)), row)

    async def MoveFile(
        self, request: sandbox_pb2.MoveFileRequest, context: Context
    ) -> sandbox_pb2.FileInfo:
        """Rename a path."""
        row = await self._locate(request.sandbox, _HAS_PROCESSES, context)
        request.sandbox = row.id
        return await _ask(self._agent(row).MoveFile(request, timeout=time_left_s(context)), row)

    async def RemoveFile(
        self, request: sandbox_pb2.RemoveFileRequest, context: Context
    ) -> empty_pb2.Empty:
        """Remove a path."""
        row = await self._locate(request.sandbox, _HAS_PROCESSES, context)
        request.sandbox = row.id
        return await _ask(self._agent(row).RemoveFile(request, timeout=time_left_s(context)), row)

    # ── Where it runs ────────────────────────────────────────────────────────────────────────

    async def _fresh(
        self, consistency: sandbox_pb2.Consistency.ValueType, context: Context
    ) -> Machine:
        timeout_s = min(time_left_s(context), _BARRIER_TIMEOUT_S)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._api.fresh(consistency)
        except TimeoutError:
            raise NoLeaderError(
                "no leader has confirmed the read: reads need a majority of the control nodes; "
                "ask with consistency STALE for this member's own copy",
                retry_after_s=1.0,
            ) from None

    async def _locate(
        self, reference: str, states: frozenset[SandboxState], context: Context
    ) -> SandboxRow:
        """Return a sandbox that is in one of the states, by id or exact name.

        The local copy answers where it can: a sandbox never moves under the same generation, and
        its agent knows the truth. Only a copy that says no is asked again behind a read barrier.
        """
        validation.reference(reference, "sandbox")
        row = self._api.machine().sandbox(reference)
        if row is None or row.state not in states:
            machine = await self._fresh(sandbox_pb2.CONSISTENCY_LINEARIZABLE, context)
            row = exact_sandbox(machine, reference)
        if row.state is SandboxState.LOST:
            raise SandboxGoneError(
                f"sandbox {row.name} is LOST: {row.message or 'its node is gone'}",
                reason="SANDBOX_LOST",
            )
        if row.state not in states:
            wanted = " or ".join(sorted(state.name for state in states))
            raise WrongStateError(
                f"sandbox {shorten(row.name)} is {row.state.name}; this needs {wanted}",
                metadata={"sandbox": row.id, "state": row.state.name},
            )
        return row

    def _agent(self, row: SandboxRow) -> agent_pb2_grpc.AgentServiceAsyncStub:
        return self._stub(self._node(row))

    def _exec_stream(self, row: SandboxRow, method: str) -> Any:
        """Return a call of an agent whose answers stay bytes: output is passed on as it came."""
        return self._api.agents.get(self._node(row).address).stream_stream(
            f"/prism.agent.v1.AgentService/{method}",
            request_serializer=_encode,
        )

    def _node(self, row: SandboxRow) -> NodeRow:
        node = self._api.machine().node(row.node_id)
        if node is None:
            raise NodeUnreachableError(f"node {row.node_name} of sandbox {row.name} is gone")
        return node

    def _stub(self, node: NodeRow) -> agent_pb2_grpc.AgentServiceAsyncStub:
        return agent_pb2_grpc.AgentServiceStub(self._api.agents.get(node.address))


def _encode(request: Message) -> bytes:
    return request.SerializeToString()


async def _chain(first: First, rest: AsyncIterator[First]) -> AsyncIterator[First]:
    yield first
    async for request in rest:
        yield request


_Write: TypeAlias = "grpc.aio.StreamUnaryCall[sandbox_pb2.WriteFileRequest, sandbox_pb2.FileInfo]"


async def _pass_file(
    call: _Write, requests: AsyncIterator[sandbox_pb2.WriteFileRequest], row: SandboxRow
) -> sandbox_pb2.FileInfo:
    """Pass a file on to its agent; once the agent has said that it fails, send no more of it."""
    async with asyncio.TaskGroup() as tasks:
        told = tasks.create_task(_told(call))
        try:
            await _write_all(call, requests, told)
            return await call
        except grpc.aio.AioRpcError as error:
            await asyncio.wait({told}, timeout=_TOLD_S)
            raise (told.done() and told.result()) or _from_agent(error, row.node_name) from None
        finally:
            told.cancel()


async def _told(call: _Write) -> RemoteError | None:
    """Return what an agent says ahead of a failure."""
    try:
        return failure_of(await call.initial_metadata())
    except grpc.aio.AioRpcError:
        return None


async def _write_all(
    call: _Write,
    requests: AsyncIterator[sandbox_pb2.WriteFileRequest],
    told: asyncio.Task[RemoteError | None],
) -> None:
    """Write all to an agent, as fast as it takes them."""
    async for request in requests:
        if told.done() and (failure := told.result()) is not None:
            raise failure
        try:
            await call.write(request)
        except asyncio.InvalidStateError:
            # It has ended the call; its status says why.
            return
    if not call.done():
        await call.done_writing()


async def _relay(call: Any, row: SandboxRow) -> AsyncIterator[Any]:
    """Pass an agent's stream on; whatever ends it, the agent's call ends too."""
    try:
        async for response in call:
            yield response
    except grpc.aio.AioRpcError as error:
        raise _from_agent(error, row.node_name) from None
    finally:
        call.cancel()


async def _ask(call: Awaitable[Response], row: SandboxRow) -> Response:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise _from_agent(error, row.node_name) from None


def _from_agent(error: grpc.aio.AioRpcError, node_name: str) -> RemoteError | NodeUnreachableError:
    remote = from_rpc_error(error)
    # No ErrorInfo: it is not the agent that speaks, but the connection that failed.
    if remote.code == "UNAVAILABLE":
        return NodeUnreachableError(
            f"node {node_name} does not answer: {remote.message}", retry_after_s=1.0
        )
    return remote


def _deadline(context: Context) -> float | None:
    """Return the call's own deadline; a stream without one may last."""
    remaining: float | None = context.time_remaining()
    return remaining
