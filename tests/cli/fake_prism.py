"""A control plane in this process: real gRPC, real semantics, scripted failures. No mock."""

import contextlib
import signal
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2
from prism.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from prism.node.v1 import node_pb2, node_pb2_grpc
from prism.sandbox.v1 import sandbox_pb2 as pb
from prism.sandbox.v1 import sandbox_pb2_grpc

from prism_common import errors
from prism_common.status import DETAILS_KEY, code_named, to_status
from tests.cli.fake_files import FakeFiles

WAIT_S = 20.0


def abort(
    context: "grpc.ServicerContext | _ItemContext", failure: errors.PrismError | status_pb2.Status
) -> NoReturn:
    if isinstance(context, _ItemContext):
        assert isinstance(failure, errors.PrismError)
        raise failure
    status = to_status(failure) if isinstance(failure, errors.PrismError) else failure
    context.set_trailing_metadata(((DETAILS_KEY, status.SerializeToString()),))
    context.abort(code_named(status.code), status.message)
    raise AssertionError("abort returns never")


class _ItemContext:
    """Stands for the call of one item of a batch: a failure is the item's own."""


class FakeExec:
    """One exec: a Python function that stands for the program."""

    def __init__(self, exec_id: str, start: pb.ExecStart, program: Callable[["FakeExec"], int]):
        self.exec_id = exec_id
        self.start = start
        self.pieces: list[pb.ExecOutput] = []
        self.exit: pb.ExecExit | None = None
        self.stdin: deque[bytes | None] = deque()
        self.signals: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.changed = threading.Condition()
        self.sequence = 0
        self._program = program
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        result = self._program(self)
        with self.changed:
            if isinstance(result, pb.ExecExit):
                self.exit = result
            else:
                number = result - 128 if result > 128 else 0
                self.exit = pb.ExecExit(exit_code=result, signal=number)
            self.changed.notify_all()

    def write(self, data: bytes, stream: int = pb.OUTPUT_STREAM_STDOUT) -> None:
        with self.changed:
            self.sequence += len(data)
            self.pieces.append(
                pb.ExecOutput(sequence=self.sequence, stream=stream, data=data)  # type: ignore[arg-type]
            )
            self.changed.notify_all()

    def read(self) -> bytes | None:
        """Return a chunk of standard input; None at its end."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.stdin, WAIT_S)
            return self.stdin.popleft()

    def wait_signal(self) -> int:
        with self.changed:
            assert self.changed.wait_for(lambda: self.signals, WAIT_S)
            return self.signals.pop(0)

    def take(self, request: Any) -> None:
        with self.changed:
            kind = request.WhichOneof("request")
            if kind == "stdin":
                self.stdin.append(request.stdin)
            elif kind == "stdin_eof":
                self.stdin.append(None)
            elif kind == "signal":
                self.signals.append(request.signal)
            elif kind == "resize":
                self.sizes.append((request.resize.rows, request.resize.columns))
            self.changed.notify_all()

    def info(self) -> pb.ExecInfo:
        return pb.ExecInfo(
            exec_id=self.exec_id,
            argv=self.start.argv,
            running=self.exit is None,
            exit=self.exit,
            sequence=self.sequence,
        )


def exit_with(execution: FakeExec) -> int:
    return int(execution.start.argv[1])


def echo(execution: FakeExec) -> int:
    execution.write(" ".join(execution.start.argv[1:]).encode() + b"\n")
    return 0


def shell(execution: FakeExec) -> int:
    """Say what is typed, byte by byte, until `q`."""
    execution.write(b"ready\r\n")
    while (data := execution.read()) is not None:
        execution.write(f"<{data.hex()}>".encode())
        if b"q" in data:
            return 5
    return 0


def both(execution: FakeExec) -> int:
    execution.write(b"out \xff\x00\n")
    execution.write(b"err\n", pb.OUTPUT_STREAM_STDERR)
    return 0


def cat(execution: FakeExec) -> int:
    while (data := execution.read()) is not None:
        execution.write(data)
    return 0


def wait_signal(execution: FakeExec) -> int:
    execution.write(b"waiting\n")
    return 128 + execution.wait_signal()


def count(execution: FakeExec) -> int:
    for number in range(1, 6):
        execution.write(b"%d\n" % number)
    return 7


def flood(execution: FakeExec) -> int:
    while not execution.signals and execution.sequence < 64 * 2**20:
        execution.write(b"y\n" * 4096)
    return 128 + execution.wait_signal()


def out_of_memory(execution: FakeExec) -> pb.ExecExit:
    return pb.ExecExit(exit_code=137, signal=9, reason="OUT_OF_MEMORY")


PROGRAMS: dict[str, Callable[[FakeExec], Any]] = {
    "exit": exit_with, "echo": echo, "both": both, "shell": shell, "cat": cat, "wait": wait_signal,
    "count": count, "flood": flood, "oom": out_of_memory,
}  # fmt: skip


class FakePrism(
    FakeFiles,
    node_pb2_grpc.NodeServiceServicer,
    cluster_pb2_grpc.ClusterServiceServicer,
):
    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition()
        #: What a node's first, second … measurement says, by sandbox id; the last one stays.
        self.usages: list[dict[str, pb.SandboxUsage]] = []
        self.sandboxes: dict[str, pb.Sandbox] = {}
        self.by_request: dict[str, pb.Sandbox] = {}
        self.log: list[pb.Sandbox] = []
        self.revision = 0
        self.compacted = 0
        self.calls: list[tuple[str, Any]] = []
        self.failures: dict[str, deque[Any]] = defaultdict(deque)
        self.states_after_create = [pb.SANDBOX_STATE_READY]
        #: Why a sandbox that is created waits.
        self.placement: list[pb.PlacementRefusal] = []
        self.execs: dict[str, FakeExec] = {}
        self.exec_by_request: dict[str, str] = {}
        #: For each exec stream to come: how many pieces it carries before it breaks, and how.
        self.breaks: deque[tuple[int, errors.PrismError | None]] = deque()
        #: For each watch to come: how many changes it carries before it breaks.
        self.watch_breaks: deque[int] = deque()
        self.logs: list[pb.StreamLogsResponse] = []
        self.log_breaks: deque[int] = deque()
        self.nodes: list[node_pb2.Node] = []
        self.cluster = cluster_pb2.Cluster()
        self._server = grpc.server(ThreadPoolExecutor(32))
        sandbox_pb2_grpc.add_SandboxServiceServicer_to_server(self, self._server)
        node_pb2_grpc.add_NodeServiceServicer_to_server(self, self._server)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        for execution in self.execs.values():  # what a test left running ends with it
            execution.take(pb.ExecRequest(signal=signal.SIGKILL))
            execution.take(pb.ExecRequest(stdin_eof=Empty()))
        self._server.stop(None).wait()
        self.close_files()

    def _abort(self, context: Any, failure: errors.PrismError | status_pb2.Status) -> None:
        abort(context, failure)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with self.changed:
            yield
            self.changed.notify_all()

    # ── Scripting ────────────────────────────────────────────────────────────────────────────

    def fail(self, method: str, *failures: errors.PrismError | status_pb2.Status) -> None:
        self.failures[method].extend(failures)

    def requests(self, method: str) -> list[Any]:
        with self.changed:
            return [request for name, request in self.calls if name == method]

    def wait_for_call(self, method: str, times: int = 1) -> None:
        def called() -> bool:
            return sum(name == method for name, _ in self.calls) >= times

        with self.changed:
            assert self.changed.wait_for(called, WAIT_S), f"{method} was not called"

    def put(self, name: str, state: int, **fields: Any) -> pb.Sandbox:
        """Create a sandbox, or change it: watchers see it."""
        with self.changed:
            self.revision += 1
            identity = f"sb-{name}"
            sandbox = self.sandboxes.get(identity) or pb.Sandbox(id=identity, name=name)
            sandbox = pb.Sandbox.FromString(sandbox.SerializeToString())
            sandbox.MergeFrom(pb.Sandbox(state=state, revision=self.revision, **fields))  # type: ignore[arg-type]
            if not sandbox.HasField("create_time"):
                sandbox.create_time.CopyFrom(Timestamp(seconds=1_700_000_000 + self.revision))
            self.sandboxes[identity] = sandbox
            if state == pb.SANDBOX_STATE_DELETED:
                del self.sandboxes[identity]
            self.log.append(sandbox)
            self.changed.notify_all()
            return sandbox

    def _begin(self, method: str, request: Any, context: Any) -> None:
        with self.changed:
            self.calls.append((method, request))
            failure = self.failures[method].popleft() if self.failures[method] else None
            self.changed.notify_all()
        if failure is not None:
            abort(context, failure)

    def _find(self, text: str, context: Any) -> pb.Sandbox:
        for sandbox in list(self.sandboxes.values()):
            if text in (sandbox.id, sandbox.name):
                return sandbox
        abort(context, errors.NotFoundError(f"no sandbox is named {text!r}"))

    # ── SandboxService ───────────────────────────────────────────────────────────────────────

    def CreateSandbox(self, request: Any, context: Any) -> pb.Sandbox:
        self._begin("CreateSandbox", request, context)
        if request.request_id in self.by_request:
            return self.by_request[request.request_id]
        name = request.name or "cosmic-dragon-3f2a"
        if f"sb-{name}" in self.sandboxes:
            abort(context, errors.AlreadyExistsError(f"a sandbox is named {name!r} already"))
        first = self.put(
            name, pb.SANDBOX_STATE_PENDING, spec=request.spec, placement=self.placement
        )
        self.by_request[request.request_id] = first
        for state in self.states_after_create:
            self.put(name, state, node_id="nd-1", node_name="agent-1", runtime="fake")
        return first

    def GetSandbox(self, request: Any, context: Any) -> pb.Sandbox:
        self._begin("GetSandbox", request, context)
        return self._find(request.sandbox, context)

    def ListSandboxes(self, request: Any, context: Any) -> pb.ListSandboxesResponse:
        self._begin("ListSandboxes", request, context)
        with self.changed:
            found = [
                one
                for one in self.sandboxes.values()
                if (not request.states or one.state in request.states)
                and all(one.spec.labels[k] == v for k, v in request.label_selector.items())
            ]
            first = int(request.page_token or 0)
            size = min(request.page_size, 2)  # small, so that tests page
            more = first + size < len(found)
            return pb.ListSandboxesResponse(
                sandboxes=found[first : first + size],
                next_page_token=str(first + size) if more else "",
                revision=self.revision,
            )

    def WatchSandboxes(self, request: Any, context: Any) -> Iterator[pb.WatchSandboxesResponse]:
        self._begin("WatchSandboxes", request, context)
        if request.revision < self.compacted:
            abort(context, errors.CompactedError("that revision is compacted"))
        left = self.watch_breaks.popleft() if self.watch_breaks else -1
        position = 0
        while context.is_active():
            with self.changed:
                self.changed.wait_for(lambda at=position: len(self.log) > at, 0.2)
                news, position = self.log[position:], len(self.log)
            for sandbox in news:
                if sandbox.revision <= request.revision:
                    continue
                if request.sandbox not in ("", sandbox.id, sandbox.name):
                    continue
                if left == 0:
                    abort(context, status_pb2.Status(code=14, message="Socket closed"))
                left -= 1
                yield pb.WatchSandboxesResponse(sandbox=sandbox, revision=sandbox.revision)

    def UpdateSandbox(self, request: Any, context: Any) -> pb.Sandbox:
        self._begin("UpdateSandbox", request, context)
        sandbox = self._find(request.sandbox, context)
        return self.put(sandbox.name, sandbox.state, spec=pb.SandboxSpec(limits=request.limits))

    def MeasureSandboxes(self, request: Any, context: Any) -> pb.MeasureSandboxesResponse:
        self._begin("MeasureSandboxes", request, context)
        before = sum(one.node == request.node for one in self.requests("MeasureSandboxes")) - 1
        usages = self.usages[min(before, len(self.usages) - 1)]
        found = [usages[key] for key in request.sandbox_ids if key in usages]
        return pb.MeasureSandboxesResponse(usages=found)

    def StopSandbox(self, request: Any, context: Any) -> pb.Sandbox:
        self._begin("StopSandbox", request, context)
        sandbox = self._find(request.sandbox, context)
        first = self.put(sandbox.name, pb.SANDBOX_STATE_STOPPING)
        self.put(sandbox.name, pb.SANDBOX_STATE_STOPPED)
        return first

    def PauseSandbox(self, request: Any, context: Any) -> pb.Sandbox:
        self._begin("PauseSandbox", request, context)
        first = self._find(request.sandbox, context)
        self.put(first.name, pb.SANDBOX_STATE_PAUSED)
        return first

    def ResumeSandbox(self, request: Any, context: Any) -> pb.Sandbox:
        self._begin("ResumeSandbox", request, context)
        first = self._find(request.sandbox, context)
        self.put(first.name, pb.SANDBOX_STATE_READY)
        return first

    def StartSandbox(self, request: Any, context: Any) -> pb.Sandbox:
        self._begin("StartSandbox", request, context)
        sandbox = self._find(request.sandbox, context)
        self.put(sandbox.name, pb.SANDBOX_STATE_STARTING)
        self.put(sandbox.name, pb.SANDBOX_STATE_READY)
        return sandbox  # as it was: STOPPED

    def DeleteSandbox(self, request: Any, context: Any) -> pb.Sandbox:
        self._begin("DeleteSandbox", request, context)
        sandbox = self._find(request.sandbox, context)
        return self.put(sandbox.name, pb.SANDBOX_STATE_DELETED)

    def BatchCreateSandboxes(self, request: Any, context: Any) -> pb.BatchCreateSandboxesResponse:
        self._begin("BatchCreateSandboxes", request, context)
        results = [self._item(self.CreateSandbox, one) for one in request.requests]
        return pb.BatchCreateSandboxesResponse(results=results)

    def BatchDeleteSandboxes(self, request: Any, context: Any) -> pb.BatchDeleteSandboxesResponse:
        self._begin("BatchDeleteSandboxes", request, context)
        results = [self._item(self.DeleteSandbox, one) for one in request.requests]
        return pb.BatchDeleteSandboxesResponse(results=results)

    @staticmethod
    def _item(call: Callable[[Any, Any], pb.Sandbox], request: Any) -> pb.ItemResult:
        try:
            return pb.ItemResult(sandbox=call(request, _ItemContext()))
        except errors.PrismError as error:
            code = to_status(error).code
            return pb.ItemResult(code=code, reason=error.code, message=error.message)

    # ── Execs ────────────────────────────────────────────────────────────────────────────────

    def Exec(self, requests: Any, context: Any) -> Iterator[pb.ExecResponse]:
        start = next(requests).start
        self._begin("Exec", start, context)
        self._find(start.sandbox, context)
        exec_id = self.exec_by_request.get(start.request_id, "")
        if not exec_id:
            exec_id = f"ex-{len(self.execs) + 1}"
            self.exec_by_request[start.request_id] = exec_id
            program = PROGRAMS.get(start.argv[0], lambda _: pb.ExecExit(
                exit_code=127, reason="NOT_FOUND"))  # fmt: skip
            self.execs[exec_id] = FakeExec(exec_id, start, program)
        yield pb.ExecResponse(started=pb.ExecStarted(exec_id=exec_id))
        if not start.detach:
            yield from self._follow(self.execs[exec_id], 0, requests, context)

    def AttachExec(self, requests: Any, context: Any) -> Iterator[pb.ExecResponse]:
        start = next(requests).start
        self._begin("AttachExec", start, context)
        if start.exec_id not in self.execs:
            abort(context, errors.NotFoundError(f"no exec {start.exec_id!r}"))
        yield from self._follow(self.execs[start.exec_id], start.after_sequence, requests, context)

    def _follow(
        self, execution: FakeExec, after: int, requests: Any, context: Any
    ) -> Iterator[pb.ExecResponse]:
        def receive() -> None:
            try:
                for request in requests:
                    execution.take(request)
            except Exception:  # noqa: BLE001  (the stream ended; grpc has no class for it here)
                return

        threading.Thread(target=receive, daemon=True).start()
        left, how = self.breaks.popleft() if self.breaks else (-1, None)
        sent = 0
        while context.is_active():
            with execution.changed:
                execution.changed.wait_for(
                    lambda at=sent: len(execution.pieces) > at or execution.exit is not None, 0.2
                )
                news, ended = execution.pieces[sent:], execution.exit
            for piece in news:
                sent += 1
                if piece.sequence <= after:
                    continue
                if left == 0:
                    abort(context, how or status_pb2.Status(code=14, message="Socket closed"))
                left -= 1
                yield pb.ExecResponse(output=piece)
            if left == 0:
                abort(context, how or status_pb2.Status(code=14, message="Socket closed"))
            if ended is not None and sent == len(execution.pieces):
                yield pb.ExecResponse(exit=ended)
                return

    def ListExecs(self, request: Any, context: Any) -> pb.ListExecsResponse:
        self._begin("ListExecs", request, context)
        return pb.ListExecsResponse(execs=[one.info() for one in self.execs.values()])

    def SignalExec(self, request: Any, context: Any) -> Empty:
        self._begin("SignalExec", request, context)
        self.execs[request.exec_id].take(pb.ExecRequest(signal=signal.Signals(request.signal)))
        return Empty()

    def StreamLogs(self, request: Any, context: Any) -> Iterator[pb.StreamLogsResponse]:
        self._begin("StreamLogs", request, context)
        left = self.log_breaks.popleft() if self.log_breaks else -1
        for piece in self.logs:
            if request.HasField("since") and (
                piece.time.ToNanoseconds() < request.since.ToNanoseconds()
            ):
                continue
            if left == 0:
                abort(context, status_pb2.Status(code=14, message="Socket closed"))
            left -= 1
            yield piece

    # ── NodeService and ClusterService ───────────────────────────────────────────────────────

    def ListNodes(self, request: Any, context: Any) -> node_pb2.ListNodesResponse:
        self._begin("ListNodes", request, context)
        return node_pb2.ListNodesResponse(nodes=self.nodes)

    def GetNode(self, request: Any, context: Any) -> node_pb2.Node:
        self._begin("GetNode", request, context)
        for node in self.nodes:
            if request.node in (node.id, node.name):
                return node
        abort(context, errors.NotFoundError(f"no node is named {request.node!r}"))

    def CordonNode(self, request: Any, context: Any) -> node_pb2.Node:
        return self.GetNode(request, context)

    def UncordonNode(self, request: Any, context: Any) -> node_pb2.Node:
        return self.GetNode(request, context)

    def DrainNode(self, request: Any, context: Any) -> node_pb2.Node:
        self._begin("DrainNode", request, context)
        return self.GetNode(request, context)

    def GetHealth(self, request: Any, context: Any) -> node_pb2.GetHealthResponse:
        self._begin("GetHealth", request, context)
        check = node_pb2.HealthCheck(
            name="disk", status=node_pb2.HEALTH_STATUS_WARNING, message="91 % full: remove files"
        )
        return node_pb2.GetHealthResponse(
            node_id=request.node, status=node_pb2.HEALTH_STATUS_WARNING, checks=[check]
        )

    def GetResources(self, request: Any, context: Any) -> node_pb2.GetResourcesResponse:
        self._begin("GetResources", request, context)
        amounts = node_pb2.ResourceAmounts
        return node_pb2.GetResourcesResponse(
            node_id=request.node,
            node_name="agent-1",
            total=amounts(cpu_millicores=4000, memory_bytes=8 * 2**30, disk_bytes=2**40),
            used=amounts(cpu_millicores=1000, memory_bytes=2 * 2**30, disk_bytes=2**39, slots=3),
            load_average=[0.5, 0.25, 0.125],
            score=71.5,
        )

    def GetCluster(self, request: Any, context: Any) -> cluster_pb2.Cluster:
        self._begin("GetCluster", request, context)
        return self.cluster

    def ListPeers(self, request: Any, context: Any) -> cluster_pb2.ListPeersResponse:
        self._begin("ListPeers", request, context)
        return cluster_pb2.ListPeersResponse(peers=self.cluster.peers)
