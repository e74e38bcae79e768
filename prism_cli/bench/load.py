"""Unary creates as load: by this process, or by several where one would be the bottleneck.

A process of its own is `python -m prism_cli.bench.load`: it reads its load as a line of JSON, says
`ready` once it is connected, reads when to begin, and writes what came of it as JSON. Times are of
the monotonic clock, which all processes of a machine share.
"""

import asyncio
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, TypeVar

import grpc.aio
import uvloop
from prism.sandbox.v1 import sandbox_pb2_grpc

from prism_cli.bench.target import Tally, create, create_request, each_of
from prism_cli.errors import CliError
from prism_common.channels import open_channel

T = TypeVar("T")

#: As prismd's. With Python's own, a look at all that a load has made takes up to 60 ms, in which it
#: sends nothing: it would be counted as the cluster's.
_GC_THRESHOLDS: Final = (10_000, 5, 1000)
#: Calls under way in an open loop. More wait for nothing but memory: such a cluster has stalled.
_OPEN_LOOP_MAX: Final = 20_000
_START_TIMEOUT_S: Final = 30.0
#: From telling all processes when to begin until then.
_LEAD_S: Final = 0.1
#: The last calls take at most their time-out, and their report a moment.
_REPORT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Load:
    """What to offer.

    Attributes:
        address: Whom to call.
        run_id: The run whose sandboxes these are.
        runtime: Of the sandboxes; empty: the node's own.
        ready: Whether each call waits for READY rather than for the commit.
        timeout_s: Of each call.
        count: Creates altogether.
        in_flight: Calls at once, where there is no rate.
        rate_per_s: Creates due each second; 0: the next as soon as one returns.
        first: Number of this process's first create.
        step: Processes that share the load: it has every step-th create.
    """

    address: str
    run_id: str
    runtime: str
    ready: bool
    timeout_s: float
    count: int
    in_flight: int = 0
    rate_per_s: float = 0.0
    first: int = 0
    step: int = 1

    @property
    def numbers(self) -> range:
        """The creates that are this process's."""
        return range(self.first, self.count, self.step)

    def shared(self, processes: int) -> "list[Load]":
        """Return the share of each process; none is empty."""
        processes = min(processes, self.count)
        share = -(-self.in_flight // processes)
        return [
            replace(self, first=number, step=processes, in_flight=share)
            for number in range(processes)
        ]


def run(measure: Coroutine[Any, Any, T]) -> T:
    """Run what offers load, so that it takes little of the machine itself."""
    gc.set_threshold(*_GC_THRESHOLDS)
    gc.freeze()
    return uvloop.run(measure)


async def offer(load: Load, processes: int = 1) -> Tally:
    """Offer a load; return what was acknowledged and refused.

    Raises:
        CliError: A process ended before it had reported.
    """
    if processes > 1 and load.count > 1:
        return await _offer_by_processes(load.shared(processes))
    async with open_channel(load.address) as channel:
        prepared = await _prepare(load, channel)
        return await prepared.run(Tally())


class _Prepared:
    """A load whose requests are built, so that building them is not timed."""

    def __init__(self, load: Load, channel: grpc.aio.Channel) -> None:
        self._load = load
        self._stub = sandbox_pb2_grpc.SandboxServiceStub(channel)
        self._requests = [] if load.rate_per_s else [self._request() for _ in load.numbers]

    def _request(self) -> Any:
        return create_request(self._load.run_id, self._load.runtime, ready=self._load.ready)

    async def run(self, tally: Tally) -> Tally:
        if self._load.rate_per_s:
            await self._open_loop(tally)
            return tally

        async def one(request: Any) -> None:
            await create(self._stub, self._load.timeout_s, tally, request)

        in_flight = max(1, min(self._load.in_flight, len(self._requests)))
        await each_of(self._requests, in_flight, one)
        return tally

    async def _open_loop(self, tally: Tally) -> None:
        """Each create is timed from when it was due, also where the load comes late itself."""
        room = asyncio.Semaphore(_OPEN_LOOP_MAX)

        async def one(due: float) -> None:
            try:
                await create(self._stub, self._load.timeout_s, tally, self._request(), due)
            finally:
                room.release()

        async with asyncio.TaskGroup() as group:
            for number in self._load.numbers:
                due = tally.started + number / self._load.rate_per_s
                await room.acquire()
                early_s = due - time.perf_counter()
                if early_s > 0:
                    await asyncio.sleep(early_s)
                group.create_task(one(due))


async def _prepare(load: Load, channel: grpc.aio.Channel) -> _Prepared:
    """Connect and build: neither is timed."""
    async with asyncio.timeout(_START_TIMEOUT_S):
        await channel.channel_ready()
    return _Prepared(load, channel)


# ── several processes ──


async def _offer_by_processes(loads: Sequence[Load]) -> Tally:
    children: list[asyncio.subprocess.Process] = []
    try:
        for load in loads:
            child = await _start()
            children.append(child)
            await _write(child, json.dumps(asdict(load)))
        async with asyncio.timeout(_START_TIMEOUT_S):
            for child in children:
                await _expect_ready(child)
        started = time.perf_counter() + _LEAD_S
        for child in children:
            await _write(child, repr(started))
        duration_s = loads[0].count / loads[0].rate_per_s if loads[0].rate_per_s else 0.0
        bound_s = duration_s + _REPORT_S + loads[0].timeout_s * _rounds(loads[0])
        async with asyncio.timeout(bound_s), asyncio.TaskGroup() as group:
            reading = [group.create_task(_read(child)) for child in children]
        tally = Tally(started)
        for task in reading:
            _add(tally, task.result())
        return tally
    finally:
        for child in children:
            if child.returncode is None:
                child.kill()
            await child.wait()


def _rounds(load: Load) -> int:
    """Return how often a call may wait for the one before it."""
    if load.rate_per_s:
        return 1
    return -(-len(load.numbers) // max(1, load.in_flight))


async def _start() -> asyncio.subprocess.Process:
    # In a session of its own: Ctrl-C ends it through us, once its calls have no reader.
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "prism_cli.bench.load", stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


async def _write(child: asyncio.subprocess.Process, line: str) -> None:
    assert child.stdin is not None  # noqa: S101 -- it was opened as a pipe
    try:
        child.stdin.write(f"{line}\n".encode())
        await child.stdin.drain()
    except OSError:
        raise CliError("a process of the load has ended") from None


async def _expect_ready(child: asyncio.subprocess.Process) -> None:
    assert child.stdout is not None  # noqa: S101 -- it was opened as a pipe
    if await child.stdout.readline() != b"ready\n":
        raise CliError("a process of the load did not begin")


async def _read(child: asyncio.subprocess.Process) -> dict[str, Any]:
    assert child.stdout is not None  # noqa: S101 -- it was opened as a pipe
    text = await child.stdout.read()
    if await child.wait() != 0:
        raise CliError(f"a process of the load ended with {child.returncode}")
    return dict(json.loads(text))


def _add(tally: Tally, report: dict[str, Any]) -> None:
    tally.ids += report["ids"]
    tally.create_times_s += report["create_times_s"]
    tally.refused += Counter(report["refused"])
    tally.timeline += [(at, latency) for at, latency in report["timeline"]]
    # The busiest of them is what may be the bottleneck.
    tally.others_cpu = max(tally.others_cpu, report["client_cpu"])


async def _serve() -> None:
    load = Load(**json.loads(await asyncio.to_thread(sys.stdin.readline)))
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(open_channel(load.address))
        prepared = await _prepare(load, channel)
        print("ready", flush=True)
        started = float(await asyncio.to_thread(sys.stdin.readline))
        await asyncio.sleep(max(0.0, started - time.perf_counter()))
        tally = await prepared.run(Tally(started))
    report = {
        "ids": tally.ids,
        "create_times_s": tally.create_times_s,
        "refused": dict(tally.refused),
        "timeline": tally.timeline,
        "client_cpu": tally.client_cpu(),
    }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    run(_serve())
