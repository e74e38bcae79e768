"""Real `prismd` processes on free loopback ports: start, stop, kill, restart, and wait on them."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

import grpc
from prism.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from prism.node.v1 import node_pb2_grpc
from prism.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc

from prism_common.status import from_rpc_error

ROOT: Final = Path(__file__).parents[2]
#: An election or two on a busy machine; tests end as soon as what they wait for is there.
WAIT_S: Final = 60.0
STALE: Final = sandbox_pb2.CONSISTENCY_STALE
T = TypeVar("T")


#: Below the system's range for outgoing connections, which would take a port between two starts,
#: and each test process has its own: one that is to be used again is free meanwhile.
_WORKER: Final = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
_PORTS: Final = range(10_240 + _WORKER % 4, 15_000, 4)
_given: set[int] = set()


def free_port() -> int:
    """Return a port that nobody listens on, and that was not returned before."""
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


def wait_for(what: str, look: Callable[[], T | None], timeout_s: float = WAIT_S) -> T:
    """Return what `look` finds, once it finds something; fail after the timeout."""
    ends = time.monotonic() + timeout_s
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > ends:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.02)


def environment(code: Path = ROOT) -> dict[str, str]:
    """Return what a daemon of this code is started with: nothing of PRISM_… from outside."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PRISM_")}
    return {**kept, "PYTHONPATH": f"{code}{os.pathsep}{code / 'proto'}"}


def run_prismd(*flags: str, timeout_s: float = WAIT_S) -> subprocess.CompletedProcess[str]:
    """Run `prismd` that is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "prism_control.main", *flags],
        env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


class ControlNode:
    """One `prismd`: a directory, ports that stay the same over restarts, and a process or none."""

    def __init__(self, directory: Path, name: str, flags: Sequence[str] = ()) -> None:
        self.name = name
        self.flags = tuple(flags)
        self.directory = directory
        #: The checkout whose code it runs.
        self.code = ROOT
        self.data = directory / "data"
        self.log_file = directory / "log"
        self.raft, self.api, self.metrics = (f"127.0.0.1:{free_port()}" for _ in range(3))
        self.process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def address_flags(self) -> list[str]:
        """What the node is always started with."""
        return [
            f"--name={self.name}", f"--data-dir={self.data}",
            f"--raft={self.raft}", f"--api={self.api}", f"--metrics={self.metrics}",
        ]  # fmt: skip

    # ── Life ─────────────────────────────────────────────────────────────────────────────────

    def start(self, *flags: str) -> ControlNode:
        """Start it with its own flags and these; return at once."""
        assert self.process is None, f"{self.name} runs"
        self._close_channel()  # it may not have noticed yet that the last process has ended
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prism_control.main", *self.address_flags, *self.flags,
                 *flags],
                env=environment(self.code), cwd=self.code,
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        return self

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM; return the exit status."""
        self._close_channel()  # an idle connection would be given time to end
        self.signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = WAIT_S) -> int:
        """Return the exit status once it has ended."""
        assert self.process is not None
        status = self.process.wait(timeout_s)
        self.process = None
        return status

    def kill(self) -> None:
        """SIGKILL, and reap."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """Leave nothing behind."""
        self.kill()
        self._close_channel()

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    # ── What it says ─────────────────────────────────────────────────────────────────────────

    @property
    def log(self) -> str:
        """All that it has logged."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def get(self, path: str) -> tuple[int, str]:
        """GET of the metrics port: status and text; 0 and the reason if nobody answers."""
        try:
            with urllib.request.urlopen(f"http://{self.metrics}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def wait_ready(self, timeout_s: float = WAIT_S) -> str:
        """Return what /readyz says once it is ready."""
        return self.wait_readyz(200, "", timeout_s)

    def wait_readyz(self, status: int, pattern: str, timeout_s: float = WAIT_S) -> str:
        """Return what /readyz says once it has this status and its text this pattern."""

        def look() -> str | None:
            found, text = self.get("/readyz")
            return text if found == status and re.search(pattern, text) else None

        try:
            return wait_for(f"{self.name}: readyz {status} {pattern!r}", look, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; it says {self.get('/readyz')}") from None

    def metric(self, sample: str) -> float:
        """Return the value of a sample of /metrics, such as `prism_raft_term`."""
        _, text = self.get("/metrics")
        found = re.search(rf"^{re.escape(sample)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else float("nan")

    @property
    def leads(self) -> bool:
        """Whether it says that it leads."""
        return self.process is not None and self.metric("prism_raft_is_leader") == 1.0

    # ── Its API ──────────────────────────────────────────────────────────────────────────────

    @property
    def channel(self) -> grpc.Channel:
        """A channel to its API."""
        if self._channel is None:
            self._channel = grpc.insecure_channel(
                self.api,
                options=(
                    ("grpc.enable_http_proxy", 0),
                    ("grpc.initial_reconnect_backoff_ms", 50),
                    ("grpc.min_reconnect_backoff_ms", 50),
                    ("grpc.max_reconnect_backoff_ms", 200),
                ),
            )
        return self._channel

    @property
    def sandboxes(self) -> sandbox_pb2_grpc.SandboxServiceStub:
        """Its SandboxService."""
        return sandbox_pb2_grpc.SandboxServiceStub(self.channel)

    @property
    def nodes(self) -> node_pb2_grpc.NodeServiceStub:
        """Its NodeService."""
        return node_pb2_grpc.NodeServiceStub(self.channel)

    def cluster(self) -> cluster_pb2.Cluster:
        """GetCluster."""
        stub = cluster_pb2_grpc.ClusterServiceStub(self.channel)
        return stub.GetCluster(cluster_pb2.GetClusterRequest(), timeout=5)

    def create(
        self,
        name: str = "",
        request_id: str = "",
        timeout_s: float = WAIT_S,
        env: dict[str, str] | None = None,
    ) -> sandbox_pb2.Sandbox:
        """Create a sandbox."""
        request = sandbox_pb2.CreateSandboxRequest(
            request_id=request_id or str(uuid.uuid4()),
            name=name,
            spec=sandbox_pb2.SandboxSpec(env=env or {}),
        )
        return self.sandboxes.CreateSandbox(request, timeout=timeout_s)

    def list_all(
        self,
        consistency: sandbox_pb2.Consistency.ValueType = sandbox_pb2.CONSISTENCY_LINEARIZABLE,
    ) -> list[sandbox_pb2.Sandbox]:
        """List every sandbox, page by page."""
        found: list[sandbox_pb2.Sandbox] = []
        token = ""
        while True:
            page = self.sandboxes.ListSandboxes(
                sandbox_pb2.ListSandboxesRequest(
                    page_size=1000, page_token=token, consistency=consistency
                ),
                timeout=WAIT_S,
            )
            found += page.sandboxes
            token = page.next_page_token
            if not token:
                return found


class Cluster:
    """Control nodes that form one cluster."""

    def __init__(self, directory: Path, size: int, flags: Sequence[str] = ()) -> None:
        self.nodes = [ControlNode(directory / f"n{i}", f"n{i}", flags) for i in range(1, size + 1)]
        join = ",".join(node.raft for node in self.nodes)
        for node in self.nodes:
            formation = (
                ["--bootstrap"] if size == 1 else [f"--bootstrap-expect={size}", f"--join={join}"]
            )
            node.flags = (*node.flags, *formation)

    def start(self) -> Cluster:
        """Start all at once, and wait until all are ready."""
        for node in self.nodes:
            node.start()
        return self.wait_ready()

    def wait_ready(self) -> Cluster:
        """Wait until all that run are ready."""
        for node in self.running:
            node.wait_ready()
        return self

    @property
    def running(self) -> list[ControlNode]:
        """Nodes that have a process."""
        return [node for node in self.nodes if node.process is not None]

    def leader(self, timeout_s: float = WAIT_S) -> ControlNode:
        """Return the node that leads, once one does."""
        return wait_for(
            "a leader", lambda: next((n for n in self.running if n.leads), None), timeout_s
        )

    def followers(self) -> list[ControlNode]:
        """Return the others."""
        leader = self.leader()
        return [node for node in self.running if node is not leader]

    def close(self) -> None:
        """End everything."""
        for node in self.nodes:
            node.close()


@contextmanager
def logs_on_failure(*nodes: ControlNode) -> Iterator[None]:
    """End the nodes; if the block fails, show what they have logged."""
    try:
        yield
    except BaseException:
        for node in nodes:
            print(f"── log of {node.name} ──\n{node.log[-8000:]}", file=sys.stderr)
        raise
    finally:
        for node in nodes:
            node.close()


@contextmanager
def cluster(directory: Path, size: int, *flags: str, start: bool = True) -> Iterator[Cluster]:
    """Run a cluster for the block."""
    made = Cluster(directory, size, flags)
    with logs_on_failure(*made.nodes):
        try:
            yield made.start() if start else made
        finally:
            made.close()  # also what was added meanwhile


def reason_of(error: grpc.RpcError) -> tuple[str, float | None]:
    """Return the ErrorInfo's reason of a failed call, and the seconds of its RetryInfo."""
    remote = from_rpc_error(error)
    return remote.code, remote.retry_after_s
