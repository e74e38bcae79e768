"""Commits a second beside a three-node etcd: same machine, same client shape, in turns.

    .venv/bin/python bench/etcd.py --rounds=5 --seconds=3

Needs Debian's etcd-server. One client process speaks grpc.aio to the leader of each, with 1, 32
and 256 writers of one item a call, and with 8 writers of 100 items a call: a put, or a
CreateSandbox of about the same size that waits for its commit. Each round takes both in turn, so
that the ratio holds when the machine's speed drifts. What was created is deleted in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_tools import protoc
from prism.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc

from bench.part import Results, leave_on_signals, parser, run_rounds, version_of
from prism_cli.bench.figures import Bar, Outcome, Round, percentile
from prism_cli.errors import CliError
from prism_common.channels import open_channel
from tests.integration import harness

#: One item a call, and a batch.
SHAPES = ((1, 1), (32, 1), (256, 1), (8, 100))
VALUE_BYTES = 200
TIMEOUT_S = 30.0
SPEC = sandbox_pb2.SandboxSpec(labels={"filler": "x" * 60})

#: Writes so many items in one call; raises unless all of them are committed.
Write = Callable[[int], Awaitable[None]]


def load_stubs(directory: Path) -> tuple[Any, Any]:
    """Generate etcd's stubs, and return them."""
    here = Path(__file__).parent
    arguments = ["", f"-I{here}", f"--python_out={directory}", f"--grpc_python_out={directory}"]
    if protoc.main([*arguments, "etcd.proto"]):
        raise SystemExit("etcd.proto cannot be compiled")
    sys.path.insert(0, str(directory))
    return importlib.import_module("etcd_pb2"), importlib.import_module("etcd_pb2_grpc")


@contextlib.contextmanager
def etcd_cluster(directory: Path) -> Iterator[list[str]]:
    """Run three etcd; yield their client addresses."""
    if shutil.which("etcd") is None:
        raise SystemExit("etcd is not installed: apt-get install etcd-server")
    ports = [(harness.free_port(), harness.free_port()) for _ in range(3)]
    members = ",".join(f"e{i}=http://127.0.0.1:{peer}" for i, (_, peer) in enumerate(ports))
    processes = []
    try:
        for number, (client, peer) in enumerate(ports):
            mine, others = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
            processes.append(
                subprocess.Popen(
                    [
                        "etcd", f"--name=e{number}", f"--data-dir={directory / f'e{number}'}",
                        f"--listen-client-urls={mine}", f"--advertise-client-urls={mine}",
                        f"--listen-peer-urls={others}", f"--initial-advertise-peer-urls={others}",
                        f"--initial-cluster={members}", "--initial-cluster-state=new",
                        "--log-level=error",
                    ],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )  # fmt: skip
        yield [f"127.0.0.1:{client}" for client, _ in ports]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


async def etcd_leader(addresses: list[str], pb: Any, stubs: Any) -> str:
    """Return the address of etcd's leader."""
    ends = time.monotonic() + TIMEOUT_S
    while time.monotonic() < ends:
        for address in addresses:
            async with grpc.aio.insecure_channel(address) as channel:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    status = await stubs.MaintenanceStub(channel).Status(
                        pb.StatusRequest(), timeout=1.0
                    )
                    if status.leader and status.leader == status.header.member_id:
                        return address
        await asyncio.sleep(0.1)
    raise SystemExit("etcd has no leader")


def etcd_writer(stub: Any, pb: Any) -> Write:
    """Return what puts new keys."""
    value = b"x" * VALUE_BYTES

    async def write(items: int) -> None:
        puts = [pb.PutRequest(key=uuid.uuid4().bytes, value=value) for _ in range(items)]
        if items == 1:
            await stub.Put(puts[0], timeout=TIMEOUT_S)
        else:
            ops = [pb.RequestOp(request_put=put) for put in puts]
            await stub.Txn(pb.TxnRequest(success=ops), timeout=TIMEOUT_S)

    return write


def prism_writer(stub: sandbox_pb2_grpc.SandboxServiceAsyncStub, made: list[str]) -> Write:
    """Return what creates sandboxes, and notes them."""

    def one() -> sandbox_pb2.CreateSandboxRequest:
        return sandbox_pb2.CreateSandboxRequest(request_id=str(uuid.uuid4()), spec=SPEC)

    async def write(items: int) -> None:
        if items == 1:
            made.append((await stub.CreateSandbox(one(), timeout=TIMEOUT_S)).id)
            return
        batch = sandbox_pb2.BatchCreateSandboxesRequest(requests=[one() for _ in range(items)])
        answer = await stub.BatchCreateSandboxes(batch, timeout=TIMEOUT_S)
        failed = [result.message for result in answer.results if result.code]
        if failed:
            raise CliError(f"a create failed: {failed[0]}")
        made.extend(result.sandbox.id for result in answer.results)

    return write


async def run_for(write: Write, writers: int, items: int, seconds: float) -> dict[str, float]:
    """Write for some seconds; return items a second and the latency of calls."""
    latencies: list[float] = []
    started, cpu = time.monotonic(), time.process_time()

    async def writer() -> None:
        while time.monotonic() - started < seconds:
            begun = time.perf_counter()
            await write(items)
            latencies.append(time.perf_counter() - begun)

    await asyncio.gather(*(writer() for _ in range(writers)))
    took_s = time.monotonic() - started
    latencies.sort()
    return {
        "commits_per_s": len(latencies) * items / took_s,
        "p50_ms": statistics.median(latencies) * 1e3,
        "p99_ms": percentile(latencies, 0.99) * 1e3,
        "client_cpu": (time.process_time() - cpu) / took_s,
    }


async def remove(stub: sandbox_pb2_grpc.SandboxServiceAsyncStub, made: list[str]) -> None:
    """Delete all that was created."""
    while made:
        part, made[:] = made[:1000], made[1000:]
        requests = [sandbox_pb2.DeleteSandboxRequest(sandbox=id_, force=True) for id_ in part]
        await stub.BatchDeleteSandboxes(
            sandbox_pb2.BatchDeleteSandboxesRequest(requests=requests), timeout=TIMEOUT_S
        )


async def compare(
    etcd: str, prism: str, pb: Any, stubs: Any, shape: tuple[int, int], seconds: float
) -> Round:
    """Load both in turn with one shape."""
    writers, items = shape
    made: list[str] = []
    async with grpc.aio.insecure_channel(etcd) as other, open_channel(prism) as channel:
        stub = sandbox_pb2_grpc.SandboxServiceStub(channel)
        puts, creates = etcd_writer(stubs.KVStub(other), pb), prism_writer(stub, made)
        theirs = await run_for(puts, writers, items, seconds)
        try:
            ours = await run_for(creates, writers, items, seconds)
        finally:
            await remove(stub, made)
    return Round(
        {
            "ratio": ours["commits_per_s"] / theirs["commits_per_s"],
            **{
                f"{name}_{figure}": measured[figure]
                for name, measured in (("prism", ours), ("etcd", theirs))
                for figure in ("commits_per_s", "p50_ms", "p99_ms")
            },
        },
        client_cpu=max(ours["client_cpu"], theirs["client_cpu"]),
    )


def outcome_of(shape: tuple[int, int]) -> Outcome:
    """Return what one shape is called, and its bar."""
    writers, items = shape
    what = f"{writers} writers" if writers > 1 else "1 writer"
    return Outcome(
        f"etcd-{writers}x{items}",
        f"commits beside a three-node etcd: {what}, {items} a call",
        (Bar("ratio", "at least", 0.45 if items == 1 else 0.7),),
    )


def main() -> int:
    """Measure and print."""
    flags = parser(__doc__ or "")
    flags.add_argument("--seconds", type=float, default=3.0, help="of each load")
    arguments = flags.parse_args()
    leave_on_signals()
    outcomes = [outcome_of(shape) for shape in SHAPES]
    installed = shutil.which("etcd") is not None
    others = (version_of("etcd", "--version"),) if installed else ()
    results = Results(arguments, outcomes, *others)
    if not installed:
        for outcome in outcomes:
            outcome.skipped = "etcd is not installed; as root: apt-get install etcd-server"
        results.keep(outcomes)
        return results.finish()
    seconds = 1.0 if arguments.quick else arguments.seconds
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        pb, stubs = load_stubs(directory)
        with etcd_cluster(directory) as addresses, harness.cluster(directory, 3) as cluster:
            leader = asyncio.run(etcd_leader(addresses, pb, stubs))

            def work(shape: tuple[int, int]) -> Round:
                api = cluster.leader().api
                return asyncio.run(compare(leader, api, pb, stubs, shape, seconds))

            return run_rounds(
                results, arguments.rounds,
                [(outcome, functools.partial(work, shape))
                 for outcome, shape in zip(outcomes, SHAPES, strict=True)],
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
