"""The node's own API (7117): execs and logs of its sandboxes, its resources and its health."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc.aio
from google.protobuf import empty_pb2
from prism.node.v1 import node_pb2, node_pb2_grpc
from prism.sandbox.v1 import sandbox_pb2

from prism_agent import exec_streams
from prism_agent.exec_record import Exec
from prism_agent.execs import Execs
from prism_agent.health import Health
from prism_agent.network.service import PortService
from prism_agent.resources import Resources
from prism_common import limits
from prism_common.errors import InvalidArgumentError, NotServedError, PrismError
from prism_common.names import shorten, validate_env, validate_request_id

_Context = grpc.aio.ServicerContext[Any, Any]
#: What the kernel can say of a terminal.
_CELLS_MAX: Final = 65_535
_Client = sandbox_pb2.ExecRequest | sandbox_pb2.AttachExecRequest


def validate_start(start: sandbox_pb2.ExecStart) -> None:
    """Refuse what cannot be run.

    Raises:
        InvalidArgumentError: A field is out of its range.
        NotServedError: This version does not serve it.
    """
    if start.HasField("terminal"):
        _validate_size(start.terminal, "start.terminal")
    if start.user:
        raise NotServedError("start.user: a user other than the sandbox's own")
    if start.request_id:
        validate_request_id(start.request_id, "start.request_id")
    _validate_argv(list(start.argv))
    validate_env(dict(start.env), "start.env")
    if start.cwd and (not start.cwd.startswith("/") or "\0" in start.cwd):
        raise InvalidArgumentError(
            f"start.cwd: {shorten(start.cwd)} is not an absolute path", field="start.cwd"
        )
    if len(start.cwd.encode()) > limits.PATH_LENGTH_MAX:
        raise InvalidArgumentError("start.cwd: the path is too long", field="start.cwd")
    if start.timeout.ToNanoseconds() < 0 or start.timeout.seconds > limits.TTL_S_MAX:
        raise InvalidArgumentError(
            f"start.timeout: 0 (none) to {limits.TTL_S_MAX} s", field="start.timeout"
        )
    if start.detach and start.stdin:
        raise InvalidArgumentError(
            "start.stdin: a detached exec has no client to give it input; attach to one that is "
            "not detached",
            field="start.stdin",
        )


def _validate_argv(argv: list[str]) -> None:
    size = sum(len(each.encode()) + 1 for each in argv)
    if not argv or not argv[0]:
        raise InvalidArgumentError("start.argv: empty; name a program", field="start.argv")
    if len(argv) > limits.ARGV_ENTRIES_MAX or size > limits.ARGV_BYTES_MAX:
        raise InvalidArgumentError(
            f"start.argv: {len(argv)} strings of {size} bytes; at most {limits.ARGV_ENTRIES_MAX} "
            f"of {limits.ARGV_BYTES_MAX} together",
            field="start.argv",
        )
    if any("\0" in each for each in argv):
        raise InvalidArgumentError("start.argv: holds a NUL character", field="start.argv")


def _validate_signal(number: int) -> int:
    if not 1 <= number <= 64:
        raise InvalidArgumentError(f"signal: {number}; 1 to 64", field="signal")
    return number


def _validate_size(size: sandbox_pb2.WindowSize, field: str) -> sandbox_pb2.WindowSize:
    if not (1 <= size.rows <= _CELLS_MAX and 1 <= size.columns <= _CELLS_MAX):
        raise InvalidArgumentError(
            f"{field}: {size.rows} rows of {size.columns} columns; 1 to {_CELLS_MAX} each",
            field=field,
        )
    return size


class AgentService(PortService):
    """The data path into the node's sandboxes, which are named by their ids here."""

    async def Exec(
        self, request_iterator: AsyncIterator[sandbox_pb2.ExecRequest], context: _Context
    ) -> AsyncIterator[sandbox_pb2.ExecResponse]:
        """Run a command, and follow it until it ends or the client goes."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("request") != "start":
            raise InvalidArgumentError("the first request must be start", field="start")
        start = first.start
        validate_start(start)
        execs = self._sandboxes.execs(start.sandbox)
        each = await execs.start(start)
        yield _started(each)
        if start.detach:
            return
        async for response in _converse(execs, each, 0, request_iterator):
            yield response

    async def AttachExec(
        self, request_iterator: AsyncIterator[sandbox_pb2.AttachExecRequest], context: _Context
    ) -> AsyncIterator[sandbox_pb2.ExecResponse]:
        """Follow an exec from any point on."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("request") != "start":
            raise InvalidArgumentError("the first request must be start", field="start")
        start = first.start
        if start.after_sequence < 0:
            raise InvalidArgumentError(
                "start.after_sequence: 0 or more", field="start.after_sequence"
            )
        execs = self._sandboxes.execs(start.sandbox, running=False)
        each = execs.get(start.exec_id)
        yield _started(each)
        async for response in _converse(execs, each, start.after_sequence, request_iterator):
            yield response

    async def ListExecs(
        self, request: sandbox_pb2.ListExecsRequest, context: _Context
    ) -> sandbox_pb2.ListExecsResponse:
        """Return the execs of a sandbox."""
        execs = self._sandboxes.execs(request.sandbox, running=False)
        return sandbox_pb2.ListExecsResponse(execs=[each.info() for each in execs.all()])

    async def GetExec(
        self, request: sandbox_pb2.GetExecRequest, context: _Context
    ) -> sandbox_pb2.ExecInfo:
        """Return one exec."""
        return self._sandboxes.execs(request.sandbox, running=False).get(request.exec_id).info()

    async def SignalExec(
        self, request: sandbox_pb2.SignalExecRequest, context: _Context
    ) -> empty_pb2.Empty:
        """Signal all processes of an exec."""
        execs = self._sandboxes.execs(request.sandbox)
        execs.signal(execs.get(request.exec_id), _validate_signal(request.signal))
        return empty_pb2.Empty()

    async def MeasureSandboxes(
        self, request: sandbox_pb2.MeasureSandboxesRequest, context: _Context
    ) -> sandbox_pb2.MeasureSandboxesResponse:
        """Measure what sandboxes use now; those that have no processes here are left out."""
        if len(request.sandbox_ids) > limits.PAGE_SIZE_MAX:
            raise InvalidArgumentError(
                f"sandbox_ids: {len(request.sandbox_ids)}; at most {limits.PAGE_SIZE_MAX}",
                field="sandbox_ids",
            )
        usages = await asyncio.to_thread(self._sandboxes.measure, list(request.sandbox_ids))
        return sandbox_pb2.MeasureSandboxesResponse(usages=usages)

    async def StreamLogs(
        self, request: sandbox_pb2.StreamLogsRequest, context: _Context
    ) -> AsyncIterator[sandbox_pb2.StreamLogsResponse]:
        """Stream what the execs have written."""
        execs = self._sandboxes.execs(request.sandbox, running=False)
        since_s = request.since.ToNanoseconds() / 1e9
        async for response in exec_streams.logs(execs, since_s, request.follow):
            yield response


def _started(each: Exec) -> sandbox_pb2.ExecResponse:
    return sandbox_pb2.ExecResponse(started=sandbox_pb2.ExecStarted(exec_id=each.record.exec_id))


async def _converse(
    execs: Execs, each: Exec, after_sequence: int, requests: AsyncIterator[_Client]
) -> AsyncIterator[Any]:
    """Yield output, encoded, and the end while what the client says is passed on.

    What is wrong with a request is raised between two pieces of output, never by cancelling: the
    task may just then be waiting in gRPC and not here.
    """
    listener = _Listener(execs, each, requests)
    async with listener:
        check = listener.raise_failure
        async for response in exec_streams.follow(execs, each, after_sequence, check):
            yield response


class _Listener:
    """Passes a client's requests on to an exec until the exec's stream ends."""

    def __init__(self, execs: Execs, each: Exec, requests: AsyncIterator[_Client]) -> None:
        self._execs = execs
        self._each = each
        self._requests = requests
        self._failure: Exception | None = None
        self._group = asyncio.TaskGroup()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "_Listener":
        await self._group.__aenter__()
        self._task = self._group.create_task(self._listen())
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        if self._task is not None:
            self._task.cancel()
        await self._group.__aexit__(None, None, None)

    def raise_failure(self) -> None:
        """Raise what was wrong with a request."""
        if self._failure is not None:
            raise self._failure

    async def _listen(self) -> None:
        try:
            async for request in self._requests:
                await self._pass_on(request)
        except (PrismError, TimeoutError) as error:
            self._failure = error
            self._each.notify()

    async def _pass_on(self, request: _Client) -> None:
        match request.WhichOneof("request"):
            case "stdin":
                await self._execs.write_stdin(self._each, request.stdin)
            case "stdin_eof":
                await self._execs.close_stdin(self._each)
            case "signal":
                number = _validate_signal(request.signal)
                if self._each.running:
                    self._execs.signal(self._each, number)
            case "resize":
                size = _validate_size(request.resize, "resize")
                self._execs.resize(self._each, size.rows, size.columns)
            case "start":
                raise InvalidArgumentError("start comes first, and only once", field="start")
            case _:
                # A newer client may say more than we know.
                pass


class NodeService(node_pb2_grpc.NodeServiceServicer):
    """Of this node only."""

    def __init__(self, resources: Resources, health: Health) -> None:
        self._resources = resources
        self._health = health

    async def GetResources(
        self, request: node_pb2.GetResourcesRequest, context: _Context
    ) -> node_pb2.GetResourcesResponse:
        """Measure now."""
        return self._resources.measure()

    async def GetHealth(
        self, request: node_pb2.GetHealthRequest, context: _Context
    ) -> node_pb2.GetHealthResponse:
        """Check now."""
        return self._health.measure()

    async def ListNodes(
        self, request: node_pb2.ListNodesRequest, context: _Context
    ) -> node_pb2.ListNodesResponse:
        """Ask the control plane."""
        raise _ask_control_plane()

    async def GetNode(self, request: node_pb2.GetNodeRequest, context: _Context) -> node_pb2.Node:
        """Ask the control plane."""
        raise _ask_control_plane()

    async def WatchNodes(
        self, request: node_pb2.WatchNodesRequest, context: _Context
    ) -> AsyncIterator[node_pb2.WatchNodesResponse]:
        """Ask the control plane."""
        raise _ask_control_plane()
        yield

    async def CordonNode(
        self, request: node_pb2.CordonNodeRequest, context: _Context
    ) -> node_pb2.Node:
        """Ask the control plane."""
        raise _ask_control_plane()

    async def UncordonNode(
        self, request: node_pb2.UncordonNodeRequest, context: _Context
    ) -> node_pb2.Node:
        """Ask the control plane."""
        raise _ask_control_plane()

    async def DrainNode(
        self, request: node_pb2.DrainNodeRequest, context: _Context
    ) -> node_pb2.Node:
        """Ask the control plane."""
        raise _ask_control_plane()


def _ask_control_plane() -> NotServedError:
    return NotServedError("this call on an agent's port (a control node answers it, on 8008)")
