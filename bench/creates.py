"""Creates a second with a bounded number in flight, and then their removal.

.venv/bin/python bench/creates.py --api=127.0.0.1:8008 --count=2000 --in-flight=64
.venv/bin/python bench/creates.py --count=10000 --batch=1000 --in-flight=10 --ready
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
#: Small, so that a few simulated agents take ten thousand.
SPEC = sandbox_pb2.SandboxSpec(
    limits=sandbox_pb2.Limits(cpu_millicores=10, memory_bytes=16 << 20, disk_bytes=1 << 20)
)


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--api", default="127.0.0.1:8008")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--ready", action="store_true", help="wait until each is READY")
    parser.add_argument("--batch", type=int, default=0, help="items of one batch call; 0: unary")
    arguments = parser.parse_args()
    wait = sandbox_pb2.WAIT_UNTIL_READY if arguments.ready else sandbox_pb2.WAIT_UNTIL_COMMITTED
    room = asyncio.Semaphore(arguments.in_flight)
    latencies: list[float] = []
    made: list[str] = []
    refused: Counter[str] = Counter()

    def one() -> sandbox_pb2.CreateSandboxRequest:
        return sandbox_pb2.CreateSandboxRequest(
            request_id=str(uuid.uuid4()), wait_until=wait, spec=SPEC
        )

    async def create(stub: sandbox_pb2_grpc.SandboxServiceStub) -> None:
        request = one()
        async with room:
            started = time.perf_counter()
            try:
                made.append((await stub.CreateSandbox(request, timeout=TIMEOUT_S)).id)
                latencies.append(time.perf_counter() - started)
            except grpc.aio.AioRpcError as error:
                refused[from_rpc_error(error).code] += 1

    async def create_batch(stub: sandbox_pb2_grpc.SandboxServiceStub, size: int) -> None:
        batch = sandbox_pb2.BatchCreateSandboxesRequest(requests=[one() for _ in range(size)])
        async with room:
            started = time.perf_counter()
            answer = await stub.BatchCreateSandboxes(batch, timeout=TIMEOUT_S)
        for result in answer.results:
            if result.code:
                refused[result.reason] += 1
            else:
                made.append(result.sandbox.id)
                latencies.append(time.perf_counter() - started)

    async def delete_batch(stub: sandbox_pb2_grpc.SandboxServiceStub, ids: list[str]) -> None:
        requests = [
            sandbox_pb2.DeleteSandboxRequest(sandbox=key, force=True, wait=True) for key in ids
        ]
        async with room:
            answer = await stub.BatchDeleteSandboxes(
                sandbox_pb2.BatchDeleteSandboxesRequest(requests=requests), timeout=TIMEOUT_S
            )
        refused.update(result.reason for result in answer.results if result.code)

    async def delete(stub: sandbox_pb2_grpc.SandboxServiceStub, sandbox: str) -> None:
        async with room:
            await stub.DeleteSandbox(
                sandbox_pb2.DeleteSandboxRequest(sandbox=sandbox, force=True, wait=True),
                timeout=TIMEOUT_S,
            )

    async with open_channel(arguments.api) as channel:
        stub = sandbox_pb2_grpc.SandboxServiceStub(channel)
        started = time.perf_counter()
        if size := arguments.batch:
            rest = range(0, arguments.count, size)
            await asyncio.gather(
                *(create_batch(stub, min(size, arguments.count - begin)) for begin in rest)
            )
        else:
            await asyncio.gather(*(create(stub) for _ in range(arguments.count)))
        took_s = time.perf_counter() - started
        started = time.perf_counter()
        if size:
            parts = [made[begin : begin + size] for begin in range(0, len(made), size)]
            await asyncio.gather(*(delete_batch(stub, part) for part in parts))
        else:
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
