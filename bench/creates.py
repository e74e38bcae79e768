"""Creates a second with a bounded number in flight, and then their removal.

.venv/bin/python bench/creates.py --api=127.0.0.1:8008 --count=2000 --in-flight=64
"""

import argparse
import asyncio
import os
import statistics
import time
import uuid
from collections import Counter

import grpc.aio
from prism.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc

from prism_common.channels import open_channel
from prism_common.status import from_rpc_error

TIMEOUT_S = 60


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--api", default="127.0.0.1:8008")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--ready", action="store_true", help="wait until each is READY")
    arguments = parser.parse_args()
    wait = sandbox_pb2.WAIT_UNTIL_READY if arguments.ready else sandbox_pb2.WAIT_UNTIL_COMMITTED
    room = asyncio.Semaphore(arguments.in_flight)
    latencies: list[float] = []
    made: list[str] = []
    refused: Counter[str] = Counter()

    async def create(stub: sandbox_pb2_grpc.SandboxServiceStub) -> None:
        request = sandbox_pb2.CreateSandboxRequest(request_id=str(uuid.uuid4()), wait_until=wait)
        async with room:
            started = time.perf_counter()
            try:
                made.append((await stub.CreateSandbox(request, timeout=TIMEOUT_S)).id)
                latencies.append(time.perf_counter() - started)
            except grpc.aio.AioRpcError as error:
                refused[from_rpc_error(error).code] += 1

    async def delete(stub: sandbox_pb2_grpc.SandboxServiceStub, sandbox: str) -> None:
        async with room:
            await stub.DeleteSandbox(
                sandbox_pb2.DeleteSandboxRequest(sandbox=sandbox, force=True, wait=True),
                timeout=TIMEOUT_S,
            )

    async with open_channel(arguments.api) as channel:
        stub = sandbox_pb2_grpc.SandboxServiceStub(channel)
        started = time.perf_counter()
        await asyncio.gather(*(create(stub) for _ in range(arguments.count)))
        took_s = time.perf_counter() - started
        started = time.perf_counter()
        await asyncio.gather(*(delete(stub, sandbox) for sandbox in made))
        deleting_s = time.perf_counter() - started
    latencies.sort()
    what = "READY" if arguments.ready else "committed"
    print(f"load average {os.getloadavg()[0]:.2f}, {os.cpu_count()} cores")
    print(
        f"{len(made)} {what}, {arguments.in_flight} in flight: {len(made) / took_s:.0f}/s, "
        f"p50 {statistics.median(latencies) * 1e3:.1f} ms, "
        f"p99 {latencies[int(len(latencies) * 0.99)] * 1e3:.1f} ms, refused {dict(refused)}"
    )
    print(f"{len(made)} deleted: {len(made) / deleting_s:.0f}/s")


if __name__ == "__main__":
    asyncio.run(main())
