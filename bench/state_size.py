"""One hundred thousand sandboxes in the state: memory, restart, and the pause of a snapshot.

    .venv/bin/python bench/state_size.py --rounds=5 --sandboxes=100000

One control node without agents, so that all of them wait. The pause is what a client sees: it reads
one row, stale, again and again, while the node takes snapshots; the longest answer less the median
is how long the loop was held up at worst.
"""

import statistics
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import grpc
from prism.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc

from bench.local import resident_bytes
from bench.part import Results, leave_on_signals, parser, run_rounds
from prism_cli.bench.figures import Bar, Outcome, Round, percentile
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


def memory_mb(node: ControlNode) -> float:
    """Return the process's resident memory."""
    assert node.process is not None
    return resident_bytes(node.process.pid) / 1e6


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


def snapshot_pauses(node: ControlNode) -> dict[str, float]:
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
        "calm_p50_ms": median * 1e3,
        "calm_max_ms": max(calm) * 1e3,
        "pause_p99_ms": (percentile(busy, 0.99) - median) * 1e3,
        "pause_max_ms": (busy[-1] - median) * 1e3,
    }


def newest(node: ControlNode) -> str:
    """Return the name of the newest snapshot on disk."""
    names = sorted(path.name for path in (node.data / "snapshots").glob("*.snapshot"))
    return names[-1] if names else ""


def measure(count: int) -> Round:
    """Fill a control node, have it take snapshots, and start it again twice."""
    with tempfile.TemporaryDirectory() as directory:
        node = ControlNode(
            Path(directory), "n1", ["--bootstrap", f"--snapshot-entries={SNAPSHOT_ENTRIES}"]
        )
        try:
            node.start().wait_ready()
            figures = {"sandboxes": float(count), "empty_mb": memory_mb(node)}
            started = time.monotonic()
            fill(node, count)
            figures["created_per_s"] = count / (time.monotonic() - started)
            time.sleep(SETTLE_S)
            figures["memory_mb"] = memory_mb(node)
            figures |= snapshot_pauses(node)
            figures["memory_after_snapshots_mb"] = memory_mb(node)
            figures["snapshot_mb"] = node.metric("prism_raft_snapshot_bytes") / 1e6
            for how, end in (("stopped", node.stop), ("killed", node.kill)):
                end()
                started = time.monotonic()
                node.start().wait_ready(60.0)
                figures[f"restart_{how}_s"] = time.monotonic() - started
            figures["memory_restarted_mb"] = memory_mb(node)
            return Round(figures)
        finally:
            node.close()


def main() -> int:
    """Measure and print."""
    flags = parser(__doc__ or "")
    flags.add_argument("--sandboxes", type=int, default=100_000)
    arguments = flags.parse_args()
    leave_on_signals()
    count = 10_000 if arguments.quick else arguments.sandboxes
    outcome = Outcome(
        "state-size", f"{count:,} sandboxes on one control node: memory, restart, snapshots",
        (Bar("memory_mb", "at most", 250), Bar("pause_max_ms", "at most", 20),
         Bar("restart_stopped_s", "at most", 3), Bar("restart_killed_s", "at most", 3)),
    )  # fmt: skip
    results = Results(arguments, (outcome,))
    return run_rounds(results, arguments.rounds, [(outcome, lambda: measure(count))])


if __name__ == "__main__":
    sys.exit(main())
