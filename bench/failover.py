"""Kills the leader again and again under load: how long nobody is served, and what is lost.

    .venv/bin/python bench/failover.py --kills=20 --members=3

Clients create through the followers, one after the other in each of their threads. The gap is the
time from the kill to the next success that was asked for after it. In the end every acknowledged
sandbox must be in the list, once.
"""

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
import uuid
from collections import Counter
from pathlib import Path

import grpc
from prism.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc

from tests.integration import harness

CLIENTS = 8
CALL_TIMEOUT_S = 10.0
CALM_S = 1.0
GAP_MAX_S = 30.0


class Load:
    """Threads that create, and what they were told."""

    def __init__(self, cluster: harness.Cluster) -> None:
        self._cluster = cluster
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]
        #: Acknowledged ids by request.
        self.acknowledged: dict[str, str] = {}
        #: When each success was asked for and when it came.
        self.successes: list[tuple[float, float]] = []
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let the calls under way end."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def next_success(self, after: float) -> float:
        """Return when the first success came that was asked for after a time."""
        ends = time.monotonic() + GAP_MAX_S
        while time.monotonic() < ends:
            with self._lock:
                came = [done for asked, done in self.successes if asked >= after]
            if came:
                return min(came)
            time.sleep(0.002)
        raise SystemExit(f"nobody was served for {GAP_MAX_S:g} s")

    def _run(self) -> None:
        while not self._stop.is_set():
            request = str(uuid.uuid4())
            while not self._create(request) and not self._stop.is_set():
                time.sleep(0.005)

    def _create(self, request: str) -> bool:
        node = random.choice(self._cluster.running)
        asked = time.monotonic()
        try:
            with grpc.insecure_channel(node.api) as channel:
                made = sandbox_pb2_grpc.SandboxServiceStub(channel).CreateSandbox(
                    sandbox_pb2.CreateSandboxRequest(request_id=request), timeout=CALL_TIMEOUT_S
                )
        except grpc.RpcError:
            return False
        with self._lock:
            self.acknowledged[request] = made.id
            self.successes.append((asked, time.monotonic()))
        return True


def measure(cluster: harness.Cluster, kills: int) -> dict[str, object]:
    """Kill the leader `kills` times; return the figures."""
    load = Load(cluster)
    gaps: list[float] = []
    try:
        for number in range(kills):
            time.sleep(CALM_S)
            leader = cluster.leader()
            killed = time.monotonic()
            leader.kill()
            gaps.append(load.next_success(killed) - killed)
            print(f"kill {number + 1}: {gaps[-1]:.3f} s", flush=True)
            leader.start()
            cluster.wait_ready()
    finally:
        load.stop()
    listed = Counter(sandbox.id for sandbox in cluster.leader().list_all())
    told = set(load.acknowledged.values())
    return {
        "kills": kills,
        "gap_median_s": round(statistics.median(gaps), 3),
        "gap_max_s": round(max(gaps), 3),
        "acknowledged": len(load.acknowledged),
        "lost": len(told - set(listed)),
        "duplicated": len(load.acknowledged) - len(told) + sum(n > 1 for n in listed.values()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as directory,
        harness.cluster(Path(directory), arguments.members) as cluster,
    ):
        cluster.wait_ready()
        figures = measure(cluster, arguments.kills)
    print(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if figures["lost"] or figures["duplicated"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
