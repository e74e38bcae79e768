"""One hundred thousand sandboxes in the state: memory, restart, and the pause of a snapshot.

    .venv/bin/python bench/state_size.py --sandboxes=100000

One control node without agents, so that all of them wait. The pause is what a client sees: it reads
one row, stale, again and again, while the node takes snapshots; the longest answer less the median
is how long the loop was held up at worst.
"""

import argparse
import json
import os
import re
import statistics
import tempfile
import threading
import time
import uuid
from pathlib import Path

import grpc
from prism.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc

from tests.integration.harness import ControlNode

BATCH = 1000
CALL_TIMEOUT_S = 60.0
SNAPSHOT_ENTRIES = 500
SNAPSHOTS = 5
SETTLE_S = 3.0


def fill(node: ControlNode, count: int) -> None:
    """Create so many sandboxes, by batches."""
    for _ in range(count // BATCH):
        requests = [
            sandbox_pb2.CreateSandboxRequest(request_id=str(uuid.uuid4())) for _ in range(BATCH)
        ]
        answer = node.sandboxes.BatchCreateSandboxes(
            sandbox_pb2.BatchCreateSandboxesRequest(requests=requests), timeout=CALL_TIMEOUT_S
        )
        if any(result.code for result in answer.results):
            raise SystemExit("a create failed")


def memory_mib(node: ControlNode) -> float:
    """Return the process's resident memory."""
    assert node.process is not None
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


class Reader:
    """A client that reads one row again and again, and times it."""

    def __init__(self, node: ControlNode) -> None:
        self._api = node.api
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        #: When each call began and how long it took, in seconds.
        self.calls: list[tuple[float, float]] = []
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        request = sandbox_pb2.ListSandboxesRequest(
            page_size=1, consistency=sandbox_pb2.CONSISTENCY_STALE
        )
        with grpc.insecure_channel(self._api) as channel:
            stub = sandbox_pb2_grpc.SandboxServiceStub(channel)
            while not self._stop.is_set():
                begun = time.perf_counter()
                stub.ListSandboxes(request, timeout=CALL_TIMEOUT_S)
                self.calls.append((begun, time.perf_counter() - begun))


def snapshot_pauses(node: ControlNode) -> dict[str, object]:
    """Have it take snapshots; return what a reader saw meanwhile."""
    reader = Reader(node)
    try:
        time.sleep(SETTLE_S)
        quiet = len(reader.calls)
        for _ in range(SNAPSHOTS):
            before = newest(node)
            while newest(node) == before:
                node.create()
    finally:
        reader.stop()
    calm = [took for _, took in reader.calls[:quiet]]
    busy = sorted(took for _, took in reader.calls[quiet:])
    median = statistics.median(calm)
    return {
        "snapshots": SNAPSHOTS,
        "calm_p50_ms": round(median * 1e3, 2),
        "calm_max_ms": round(max(calm) * 1e3, 2),
        "pause_p99_ms": round((busy[int(len(busy) * 0.99)] - median) * 1e3, 2),
        "pause_max_ms": round((busy[-1] - median) * 1e3, 2),
    }


def newest(node: ControlNode) -> str:
    """Return the name of the newest snapshot on disk."""
    names = sorted(path.name for path in (node.data / "snapshots").glob("*.snapshot"))
    return names[-1] if names else ""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sandboxes", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures: dict[str, object] = {"sandboxes": arguments.sandboxes}
    with tempfile.TemporaryDirectory() as directory:
        node = ControlNode(
            Path(directory), "n1", ["--bootstrap", f"--snapshot-entries={SNAPSHOT_ENTRIES}"]
        )
        try:
            node.start().wait_ready()
            figures["empty_mib"] = round(memory_mib(node))
            started = time.monotonic()
            fill(node, arguments.sandboxes)
            figures["created_s"] = round(arguments.sandboxes / (time.monotonic() - started))
            time.sleep(SETTLE_S)
            figures["memory_mib"] = round(memory_mib(node))
            figures |= snapshot_pauses(node)
            figures["memory_after_snapshots_mib"] = round(memory_mib(node))
            figures["snapshot_mib"] = round(node.metric("prism_raft_snapshot_bytes") / 2**20, 1)
            for how in ("stopped", "killed"):
                if how == "stopped":
                    node.stop()
                else:
                    node.kill()
                started = time.monotonic()
                node.start().wait_ready(60.0)
                figures[f"restart_{how}_s"] = round(time.monotonic() - started, 2)
            figures["memory_restarted_mib"] = round(memory_mib(node))
        finally:
            node.close()
    print(f"load average {os.getloadavg()[0]:.2f}, {os.cpu_count()} cores")
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
