"""Create to first exec result, beside bubblewrap's own start, in one run.

    .venv/bin/python bench/first_exec.py --api=127.0.0.1:8008 --runs=50

Each round starts a bare bwrap and a sandbox in turn, so that the ratio holds when the machine's
speed drifts. Every sandbox is removed again.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import time
import uuid

from prism.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc

from prism_common.channels import open_channel

TIMEOUT_S = 30
BWRAP = ("bwrap", "--unshare-all", "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin",
         "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", "--proc", "/proc",
         "--dev", "/dev", "--tmpfs", "/tmp", "--", "/bin/true")  # fmt: skip


def bare() -> float:
    """Return the seconds that bwrap takes to run /bin/true."""
    started = time.perf_counter()
    subprocess.run(BWRAP, check=True)
    return time.perf_counter() - started


async def execute(stub: sandbox_pb2_grpc.SandboxServiceStub, sandbox: str) -> None:
    """Run /bin/true, and require that it exits with 0."""
    start = sandbox_pb2.ExecStart(sandbox=sandbox, request_id=str(uuid.uuid4()), argv=["/bin/true"])
    call = stub.Exec(timeout=TIMEOUT_S)
    await call.write(sandbox_pb2.ExecRequest(start=start))
    await call.done_writing()
    async for response in call:
        if response.WhichOneof("response") == "exit":
            if response.exit.exit_code != 0:
                raise SystemExit(f"/bin/true exited with {response.exit.exit_code}")
            return
    raise SystemExit("the exec ended without an exit status")


async def one(stub: sandbox_pb2_grpc.SandboxServiceStub) -> tuple[float, float, float]:
    """Return the seconds to READY, to the first exec's result, and of a second exec."""
    request = sandbox_pb2.CreateSandboxRequest(
        request_id=str(uuid.uuid4()), wait_until=sandbox_pb2.WAIT_UNTIL_READY
    )
    started = time.perf_counter()
    sandbox = await stub.CreateSandbox(request, timeout=TIMEOUT_S)
    ready = time.perf_counter()
    try:
        await execute(stub, sandbox.id)
        first = time.perf_counter()
        await execute(stub, sandbox.id)
        second = time.perf_counter()
    finally:
        await stub.DeleteSandbox(
            sandbox_pb2.DeleteSandboxRequest(sandbox=sandbox.id, force=True, wait=True),
            timeout=TIMEOUT_S,
        )
    return ready - started, first - started, second - first


def row(name: str, seconds: list[float]) -> float:
    """Print p50, p99 and the extremes; return the median."""
    ordered = sorted(seconds)
    median = statistics.median(ordered)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    print(f"{name:<34} p50 {median * 1e3:7.1f} ms   p99 {p99 * 1e3:7.1f} ms   "
          f"[{ordered[0] * 1e3:.1f}-{ordered[-1] * 1e3:.1f}]")  # fmt: skip
    return median


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--api", default="127.0.0.1:8008")
    parser.add_argument("--runs", type=int, default=50)
    arguments = parser.parse_args()
    async with open_channel(arguments.api) as channel:
        stub = sandbox_pb2_grpc.SandboxServiceStub(channel)
        await one(stub)
        bwraps, figures = [], []
        for _ in range(arguments.runs):
            bwraps.append(bare())
            figures.append(await one(stub))
    print(f"{arguments.runs} runs, load average {os.getloadavg()[0]:.2f}, {os.cpu_count()} cores")
    base = row("bare bwrap /bin/true", bwraps)
    row("create to READY", [figure[0] for figure in figures])
    first = row("create to first exec's result", [figure[1] for figure in figures])
    row("a further exec of true", [figure[2] for figure in figures])
    print(f"create to first exec is {first / base:.1f} x bare bwrap")


if __name__ == "__main__":
    asyncio.run(main())
