"""A control plane and simulated agents for a measurement, on this machine's loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from prism.node.v1 import node_pb2

from prism_cli.bench.target import Target
from prism_cli.errors import CliError
from tests.integration import harness

READY_TIMEOUT_S = 60.0
#: Besides, for each simulated agent: they join one after the other.
JOIN_TIMEOUT_S = 0.1
STOP_TIMEOUT_S = 30.0


class SimulatedAgents:
    """The process of bench/simulated_agents.py."""

    def __init__(self, cluster: harness.Cluster, count: int, prefix: str = "simulated") -> None:
        self.count = count
        self.prefix = prefix
        self._cluster = cluster
        # Ours, so that it is removed also where they have to be killed. On tmpfs where there is
        # one: a real node has a disk of its own, these would share one.
        shared = Path("/dev/shm")
        self._directory = tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None)
        self.process = subprocess.Popen(
            [
                sys.executable, str(harness.ROOT / "bench" / "simulated_agents.py"),
                f"--control={','.join(node.api for node in cluster.nodes)}",
                f"--agents={count}", f"--prefix={prefix}", f"--data-dir={self._directory.name}",
            ],
            env=harness.environment(), stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until the leader counts all of them as READY."""

        def ready() -> bool:
            if self.process.poll() is not None:
                raise SystemExit(f"the simulated agents ended with {self.process.returncode}")
            return self.states().count(node_pb2.NODE_STATE_READY) == self.count

        harness.wait_for(f"{self.count} simulated agents", ready, timeout_s)

    def states(self) -> list[node_pb2.NodeState.ValueType]:
        """Return what the leader thinks of each."""
        request = node_pb2.ListNodesRequest(page_size=1000)
        found = []
        stub = self._cluster.leader().nodes
        while True:
            page = stub.ListNodes(request, timeout=harness.WAIT_S)
            found += [node.state for node in page.nodes if node.name.startswith(f"{self.prefix}-")]
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def kill(self) -> None:
        """SIGKILL: all are gone at once."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End them."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()
        self._directory.cleanup()


def resident_bytes(pid: int) -> int:
    """Return a process's resident memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def processor_s(pid: int) -> float:
    """Return the user and system time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class LocalTarget(Target):
    """A cluster whose leader may be killed, since it is ours."""

    def __init__(self, cluster: harness.Cluster, timeout_s: float) -> None:
        super().__init__([node.api for node in cluster.nodes], timeout_s, False, True)
        self._cluster = cluster

    async def depose(self) -> None:
        """Kill -9 the leader; another leads, and the killed member is back, when this returns."""
        try:
            await asyncio.to_thread(kill_leader, self._cluster)
        except AssertionError as error:
            raise CliError(f"after the leader was killed: {error}") from None

    def leader_memory_bytes(self) -> int | None:
        """Return the resident memory of the leader's process."""
        process = self._cluster.leader().process
        return resident_bytes(process.pid) if process is not None else None


def kill_leader(cluster: harness.Cluster) -> None:
    """Kill -9 the leader, wait for another, and start it again."""
    leader = cluster.leader()
    leader.kill()
    cluster.leader()
    leader.start()
    cluster.wait_ready()


@contextlib.contextmanager
def running(agents: int, members: int = 3) -> Iterator[tuple[harness.Cluster, SimulatedAgents]]:
    """Run control nodes, their data on disk, and simulated agents, for the block."""
    with (
        tempfile.TemporaryDirectory() as directory,
        harness.cluster(Path(directory), members) as cluster,
    ):
        simulated = SimulatedAgents(cluster, agents)
        try:
            simulated.wait_ready(READY_TIMEOUT_S + agents * JOIN_TIMEOUT_S)
            yield cluster, simulated
        finally:
            simulated.close()
