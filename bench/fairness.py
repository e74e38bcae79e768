"""What a client waits for one create while another has ten thousand under way.

    .venv/bin/python bench/fairness.py
    .venv/bin/python bench/fairness.py --nodes=3 --through=follower --kinds=batches

One client asks for a burst of creates, in a process of its own, all at once on one connection.
Another asks for one after the other, on a connection of its own, and its waits are what is shown:
with nothing else, and from the burst's begin to its end. There are no agents: a create is answered
once it is committed.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
import grpc.aio
from prism.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.integration.harness import Cluster, ControlNode, environment

BATCH_ITEMS = 1000
CALL_S = 120.0


def create(number: int) -> sandbox_pb2.CreateSandboxRequest:
    """Return the create with this number."""
    return sandbox_pb2.CreateSandboxRequest(name=f"burst-{time.time_ns():x}-{number}")


async def burst(address: str, kind: str, count: int) -> None:
    """Ask for all at once; say how long it took and how many were refused."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = sandbox_pb2_grpc.SandboxServiceStub(channel)
        await asyncio.wait_for(channel.channel_ready(), 10)
        creates = [create(number) for number in range(count)]
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        began = time.perf_counter()
        if kind == "unary":
            answers = await asyncio.gather(
                *(stub.CreateSandbox(each, timeout=CALL_S) for each in creates),
                return_exceptions=True,
            )
            refused = sum(isinstance(answer, BaseException) for answer in answers)
        else:
            batches = await asyncio.gather(
                *(
                    stub.BatchCreateSandboxes(
                        sandbox_pb2.BatchCreateSandboxesRequest(
                            requests=creates[begin : begin + BATCH_ITEMS]
                        ),
                        timeout=CALL_S,
                    )
                    for begin in range(0, count, BATCH_ITEMS)
                )
            )
            refused = sum(bool(one.code) for batch in batches for one in batch.results)
        print(f"{time.perf_counter() - began:.3f} {refused}", flush=True)


def measure(node: ControlNode, kind: str, count: int) -> None:
    """Show what a lone client waits, alone and beside a burst."""
    alone = [wait_of_one(node) for _ in range(50)]
    process = subprocess.Popen(
        [sys.executable, __file__, "--burst", node.api, "--kinds", kind, "--count", str(count)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("no pipes")
    with process:
        process.stdout.readline()
        process.stdin.write("go\n")
        process.stdin.flush()
        beside = []
        while process.poll() is None:
            beside.append(wait_of_one(node))
        took_s, refused = process.stdout.read().split()
    print(
        f"{kind:8} {count} creates in {took_s} s ({refused} refused); one create waits "
        f"{1000 * statistics.median(alone):.1f} ms alone; beside them, of {len(beside)}: "
        f"{1000 * statistics.median(beside):.0f} ms in the median, "
        f"{1000 * max(beside):.0f} at most",
        flush=True,
    )


def wait_of_one(node: ControlNode) -> float:
    """Return how long one create takes, in seconds."""
    began = time.perf_counter()
    node.create(timeout_s=CALL_S)
    return time.perf_counter() - began


def main() -> None:
    """Measure, or be the burst."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--through", choices=("leader", "follower"), default="leader")
    parser.add_argument("--kinds", default="unary,batches")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--burst", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.burst:
        asyncio.run(burst(options.burst, options.kinds, options.count))
        return
    for kind in options.kinds.split(","):
        with tempfile.TemporaryDirectory(prefix="prism-fairness-") as directory:
            made = Cluster(Path(directory), options.nodes)
            try:
                made.start()
                follows = options.through == "follower" and options.nodes > 1
                measure(made.followers()[0] if follows else made.leader(), kind, options.count)
            finally:
                made.close()


if __name__ == "__main__":
    main()
