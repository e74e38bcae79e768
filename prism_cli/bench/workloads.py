"""The workloads on the control plane, and the list of all."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_cli.bench.figures import Bar, Round, SkippedError, latencies_ms, percentile
from prism_cli.bench.load import Load, offer
from prism_cli.bench.target import (
    BATCH_CALLS,
    BATCH_ITEMS,
    LABEL,
    Tally,
    Target,
    chunks,
    commit_figures,
    create,
    create_batch,
    each_of,
    lost_and_duplicated,
)
from prism_cli.errors import CliError

_SEQUENTIAL: Final = 200
_BURST_CALLS: Final = 256
_WATCHERS: Final = 100
_WATCHED: Final = 50
_WATCH_PAUSE_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class Size:
    """What the user may shorten."""

    #: How long an open loop offers load.
    seconds: float = 60.0
    #: Sandboxes of a workload instead of its own number; None: its own.
    count: int | None = None
    #: Processes that bursts and open loops of unary creates are offered by.
    processes: int = 1

    def of(self, usual: int) -> int:
        """Return how many sandboxes a workload makes."""
        return usual if self.count is None else self.count

    def at_most(self, usual: int) -> int:
        """Return how often something slow is repeated: --count only shortens it."""
        return min(usual, self.of(usual))


Run = Callable[[Target, Size], Awaitable[Round]]


@dataclass(frozen=True, slots=True)
class Workload:
    """One workload: its name, what it does, and the bars on two cores."""

    name: str
    summary: str
    run: Run
    bars: tuple[Bar, ...] = ()


def control_runtime(target: Target) -> str:
    """Return the runtime for load on the control plane.

    Raises:
        SkippedError: Only real sandboxes could be started, and nobody asked for those.
    """
    if target.runtimes["fake"]:
        return "fake"
    if target.real and target.runtimes:
        return ""
    raise SkippedError(
        "no node with simulated agents (prism-agent --runtime=fake); --real starts real sandboxes"
    )


async def settle(target: Target, tally: Tally) -> Round:
    """Return what a load of creates gave, once it is compared with the list, and remove it."""
    cpu = tally.client_cpu()
    lost, duplicated = await lost_and_duplicated(target, tally)
    await target.remove_run()
    took_s = tally.took_s
    figures = {
        "sandboxes": float(len(tally.ids)),
        "per_s": len(tally.ids) / took_s if took_s else 0.0,
        "took_s": took_s,
        **latencies_ms(tally.latencies_s),
        "failures": float(sum(n for code, n in tally.refused.items() if code != "QUEUE_FULL")),
        "refusals": float(tally.refused["QUEUE_FULL"]),
        "lost": float(lost),
        "duplicated": float(duplicated),
    }
    return Round(figures, dict(tally.refused), tally.timeline, cpu)


def _ready_figures(result: Round, tally: Tally) -> Round:
    rate = result.figures.pop("per_s")
    result.figures = {
        "ready_per_s": rate,
        **commit_figures(tally.create_times_s),
        **result.figures,
    }
    return result


def burst(usual: int, in_flight: int | None, *, follower: bool = False) -> Run:
    """Return unary creates until READY; None: all in flight at once."""

    async def run(target: Target, size: Size) -> Round:
        runtime, count = control_runtime(target), size.of(usual)
        if follower and not target.follower_address:
            raise SkippedError("this cluster has no follower")
        load = Load(
            target.follower_address if follower else target.leader_address, target.run_id,
            runtime, ready=True, timeout_s=target.timeout_s, count=count,
            in_flight=in_flight or count,
        )  # fmt: skip
        tally = await offer(load, size.processes)
        return _ready_figures(await settle(target, tally), tally)

    return run


async def batch(target: Target, size: Size) -> Round:
    """Create by BatchCreateSandboxes until READY, and delete by BatchDeleteSandboxes."""
    runtime, count = control_runtime(target), size.of(10_000)
    parts = chunks((target.request(runtime, ready=True) for _ in range(count)), BATCH_ITEMS)
    tally = Tally()

    async def one(part: list[pb.CreateSandboxRequest]) -> None:
        await create_batch(target, tally, part)

    await each_of(parts, BATCH_CALLS, one)
    cpu = tally.client_cpu()
    lost, duplicated = await lost_and_duplicated(target, tally)
    started = time.perf_counter()
    refused = await target.delete(tally.ids)
    deleting_s = time.perf_counter() - started
    await target.remove_run()
    failed = sum(tally.refused.values()) + sum(refused.values())
    return Round(
        {
            "ready_per_s": len(tally.ids) / tally.took_s if tally.took_s else 0.0,
            **commit_figures(tally.create_times_s),
            "deletes_per_s": (len(tally.ids) - sum(refused.values())) / deleting_s,
            "sandboxes": float(len(tally.ids)),
            "failures": float(failed),
            "lost": float(lost),
            "duplicated": float(duplicated),
        },
        dict(tally.refused + refused),
        tally.timeline,
        cpu,
    )


def open_loop(rate: int) -> Run:
    """Return creates at a steady rate, each timed from when it was due."""

    async def run(target: Target, size: Size) -> Round:
        load = Load(
            target.leader_address, target.run_id, control_runtime(target), ready=False,
            timeout_s=target.timeout_s, count=max(1, int(rate * size.seconds)), rate_per_s=rate,
        )  # fmt: skip
        result = await settle(target, await offer(load, size.processes))
        result.figures.pop("took_s")
        achieved = result.figures.pop("per_s")
        figures = {"offered_per_s": float(rate), "achieved_per_s": achieved}
        result.figures = {**figures, **result.figures}
        return result

    return run


async def sequential(target: Target, size: Size) -> Round:
    """Create one after the other, each until committed."""
    runtime, count = control_runtime(target), size.at_most(_SEQUENTIAL)
    tally = Tally()
    for _ in range(count):
        request = target.request(runtime, ready=False)
        await create(target.leader, target.timeout_s, tally, request)
    return await settle(target, tally)


async def state(target: Target, size: Size) -> Round:
    """Fill the state; list all of it, and watch it with many watchers."""
    runtime, count = control_runtime(target), size.of(100_000)
    # Until READY: a list of what is still being started would measure the starts.
    parts = chunks((target.request(runtime, ready=True) for _ in range(count)), BATCH_ITEMS)
    tally = Tally()

    async def one(part: list[pb.CreateSandboxRequest]) -> None:
        await create_batch(target, tally, part)

    await each_of(parts, BATCH_CALLS, one)
    started = time.perf_counter()
    listed = await target.list_run()
    list_ms = (time.perf_counter() - started) * 1e3
    lags = await _watch_lags(target, runtime)
    memory_bytes = target.leader_memory_bytes()
    figures = {
        "ready_per_s": len(tally.ids) / tally.took_s if tally.took_s else 0.0,
        "list_ms": list_ms,
        "listed": float(len(listed)),
        "watch_lag_p50_ms": percentile(lags, 0.5) * 1e3,
        "watch_lag_p99_ms": percentile(lags, 0.99) * 1e3,
        "failures": float(sum(tally.refused.values())),
    }
    if memory_bytes is not None:
        figures["leader_rss_mb"] = memory_bytes / 1e6
    cpu = tally.client_cpu()
    await target.remove_run()
    return Round(figures, dict(tally.refused), tally.timeline, cpu)


async def _watch_lags(target: Target, runtime: str) -> list[float]:
    """Return the sorted seconds from a create's answer to its event, for each watcher and create.

    An event that comes before the answer counts as 0.
    """
    answered: dict[str, float] = {}
    seen: list[dict[str, float]] = [{} for _ in range(_WATCHERS)]
    page = await target.leader.ListSandboxes(
        pb.ListSandboxesRequest(page_size=1), timeout=target.timeout_s
    )
    request = pb.WatchSandboxesRequest(
        revision=page.revision, label_selector={LABEL: target.run_id, "watched": "true"}
    )

    async def watch(events: dict[str, float]) -> None:
        call = target.leader.WatchSandboxes(request)
        try:
            while len(events) < _WATCHED:
                response = await call.read()
                if not isinstance(response, pb.WatchSandboxesResponse):
                    raise CliError("a watch ended by itself")
                if response.HasField("sandbox"):
                    events.setdefault(response.sandbox.id, time.perf_counter())
        finally:
            call.cancel()

    async with asyncio.timeout(target.timeout_s), asyncio.TaskGroup() as group:
        for events in seen:
            group.create_task(watch(events))
        for _ in range(_WATCHED):
            one = target.request(runtime, ready=False)
            one.spec.labels["watched"] = "true"
            made = await target.leader.CreateSandbox(one, timeout=target.timeout_s)
            answered[made.id] = time.perf_counter()
            await asyncio.sleep(_WATCH_PAUSE_S)
    return sorted(
        max(0.0, at - answered[sandbox]) for events in seen for sandbox, at in events.items()
    )


_EXACT: Final = (Bar("failures", "at most", 0), Bar("lost", "at most", 0),
                 Bar("duplicated", "at most", 0))  # fmt: skip
CONTROL: Final[Sequence[Workload]] = (
    Workload(
        "sequential", "200 creates, one after the other, until committed", sequential,
        (Bar("p50_ms", "at most", 4), Bar("p99_ms", "at most", 15), *_EXACT),
    ),
    Workload(
        "burst-1k", "1,000 unary creates until READY, 256 in flight",
        burst(1000, _BURST_CALLS), (Bar("ready_per_s", "at least", 1800), *_EXACT),
    ),
    Workload(
        "burst-10k", "10,000 unary creates until READY, 256 in flight",
        burst(10_000, _BURST_CALLS),
        (Bar("ready_per_s", "at least", 1800), Bar("took_s", "at most", 6), *_EXACT),
    ),
    Workload(
        "burst-all", "10,000 unary creates until READY, all in flight at once",
        burst(10_000, None), _EXACT,
    ),
    Workload(
        "burst-follower", "10,000 unary creates until READY, 256 in flight, through a follower",
        burst(10_000, _BURST_CALLS, follower=True), _EXACT,
    ),
    Workload(
        "batch-10k", "10,000 by BatchCreateSandboxes until READY, then BatchDeleteSandboxes",
        batch,
        (Bar("ready_per_s", "at least", 12_000), Bar("deletes_per_s", "at least", 15_000),
         *_EXACT),
    ),
    Workload("open-200", "200 creates a second, timed from when each was due", open_loop(200),
             _EXACT),
    Workload("open-500", "500 creates a second, timed from when each was due", open_loop(500),
             (Bar("p99_ms", "at most", 40), *_EXACT)),
    Workload("open-1000", "1,000 creates a second, timed from when each was due",
             open_loop(1000), (Bar("p99_ms", "at most", 80), *_EXACT)),
    Workload(
        "state-100k", "100,000 sandboxes: list all, and 100 watchers", state,
        (Bar("list_ms", "at most", 300), Bar("watch_lag_p99_ms", "at most", 100),
         Bar("leader_rss_mb", "at most", 250),
         Bar("failures", "at most", 0)),
    ),
)  # fmt: skip
