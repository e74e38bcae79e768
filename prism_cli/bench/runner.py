"""Runs workloads round by round, so that what one of them breaks costs only its own figures."""

import os
import sys
import time
from collections.abc import Callable, Sequence

import grpc.aio

from prism_cli.bench.figures import Outcome, SkippedError
from prism_cli.bench.target import Target
from prism_cli.bench.workloads import Size, Workload
from prism_common.errors import PrismError
from prism_common.status import from_rpc_error

#: Told after every round of a workload, with all outcomes so far.
Keep = Callable[[Sequence[Outcome]], None]


async def run_workloads(
    target: Target, chosen: Sequence[Workload], rounds: int, size: Size, keep: Keep
) -> list[Outcome]:
    """Run every round of all workloads, each round through the whole list.

    Rounds of one workload are so minutes apart: a machine that is busy for a while spoils one of
    them, and not all.
    """
    outcomes = [Outcome(each.name, each.summary, each.bars) for each in chosen]
    for number in range(rounds):
        label = f"round {number + 1} of {rounds}"
        await run_round(target, chosen, outcomes, label, size, lambda: keep(outcomes))
    return outcomes


async def run_round(
    target: Target,
    chosen: Sequence[Workload],
    outcomes: Sequence[Outcome],
    label: str,
    size: Size,
    keep: Callable[[], None],
) -> None:
    """Run one round of all, and add what is found to their outcomes."""
    for workload, outcome in zip(chosen, outcomes, strict=True):
        if outcome.skipped:
            continue
        sys.stderr.write(f"{label}: {workload.name} … ")
        sys.stderr.flush()
        started = time.monotonic()
        await _run_one(target, workload, size, outcome)
        sys.stderr.write(f"{time.monotonic() - started:.1f} s{_trouble(outcome)}\n")
        keep()


async def _run_one(target: Target, workload: Workload, size: Size, outcome: Outcome) -> None:
    load = os.getloadavg()[0]
    try:
        await target.find()
        found = await workload.run(target, size)
    except SkippedError as skipped:
        outcome.skipped = str(skipped)
        return
    # The next workload may work: what this one has measured so far must not be lost.
    except (PrismError, grpc.aio.AioRpcError, TimeoutError, ExceptionGroup) as error:
        outcome.error = why(error)
        return
    found.load_average = load
    outcome.rounds.append(found)


def _trouble(outcome: Outcome) -> str:
    if outcome.skipped:
        return f", skipped: {outcome.skipped}"
    return f", failed: {outcome.error}" if outcome.error else ""


def why(error: Exception) -> str:
    """Return a failure in one line; of several that came together, the first.

    Raises:
        Exception: It is none that a workload may end with.
    """
    first: BaseException = error
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    if isinstance(first, grpc.aio.AioRpcError):
        first = from_rpc_error(first)
    if isinstance(first, PrismError):
        return f"{first.code}: {first}"
    if isinstance(first, TimeoutError):
        return "it took too long"
    raise error
