"""Clients that create through any node all the time, and what they were told."""

from __future__ import annotations

import itertools
import random
import threading
import time
import uuid
from collections import Counter
from typing import Final

import grpc
from prism.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc

from tests.integration.harness import Cluster, ControlNode

_CALL_TIMEOUT_S: Final = 10.0
_PAUSE_S: Final = 0.005


class Load:
    """Threads that create; each sends a request again, with its id, until it is acknowledged.

    Args:
        cluster: Whose running nodes are called, as they come and go.
        clients: How many threads.
        pause_s: Between a client's requests.
    """

    def __init__(self, cluster: Cluster, clients: int = 4, pause_s: float = 0.0) -> None:
        self._cluster = cluster
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._lock = threading.Lock()
        #: Acknowledged ids by request.
        self.acknowledged: dict[str, str] = {}
        #: When each success was asked for and when it came.
        self.successes: list[tuple[float, float]] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let the calls under way end."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def next_success(self, after: float, timeout_s: float) -> float:
        """Return when the first success came that was asked for after a time.

        Raises:
            AssertionError: There was none within the timeout.
        """
        ends = time.monotonic() + timeout_s
        while time.monotonic() < ends:
            with self._lock:
                came = [done for asked, done in self.successes if asked >= after]
            if came:
                return min(came)
            time.sleep(0.002)
        raise AssertionError(f"nobody was served for {timeout_s:g} s")

    def longest_gap_s(self) -> float:
        """Return the longest time without a success."""
        times = sorted(done for _, done in self.successes)
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)

    def lost_and_duplicated(self, node: ControlNode) -> tuple[int, int]:
        """Compare what was acknowledged with what a node lists, once stopped."""
        listed = Counter(sandbox.id for sandbox in node.list_all())
        told = set(self.acknowledged.values())
        twice = sum(count > 1 for count in listed.values())
        return len(told - set(listed)), len(self.acknowledged) - len(told) + twice

    def _run(self) -> None:
        while not self._stop.is_set():
            request = str(uuid.uuid4())
            while not self._create(request) and not self._stop.is_set():
                time.sleep(_PAUSE_S)
            self._stop.wait(self._pause_s)

    def _create(self, request: str) -> bool:
        node = random.choice(self._cluster.running)
        asked = time.monotonic()
        try:
            with grpc.insecure_channel(node.api) as channel:
                made = sandbox_pb2_grpc.SandboxServiceStub(channel).CreateSandbox(
                    sandbox_pb2.CreateSandboxRequest(request_id=request), timeout=_CALL_TIMEOUT_S
                )
        except grpc.RpcError:
            return False
        with self._lock:
            self.acknowledged[request] = made.id
            self.successes.append((asked, time.monotonic()))
        return True
