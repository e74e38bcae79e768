"""Runs many seeds on all cores: `python -m tests.sim.run --seeds 300`."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import astuple, dataclass, fields, replace
from random import Random

from tests.sim.cluster import Cluster
from tests.sim.formation import Formation
from tests.sim.options import Options
from tests.sim.plane.plane import Plane

#: Every so many seeds the whole control plane runs as well, which takes longer.
PLANE_EVERY = 8


@dataclass(frozen=True)
class Result:
    """What came of one seed."""

    seed: int
    failure: str = ""
    details: str = ""
    elections: int = 0
    acknowledged: int = 0
    reads: int = 0
    crashes: int = 0
    changes: int = 0
    transfers: int = 0
    histories: int = 0
    plane_answers: int = 0
    plane_losses: int = 0


def run_plane(seed: int) -> Result:
    """Run a seed of the whole control plane; a failure of any kind is a result."""
    plane = Plane(seed)
    failure = details = ""
    try:
        plane.run()
    except Exception as error:  # noqa: BLE001 - whatever it is, the seed has found it
        failure, details = f"plane: {type(error).__name__}: {error}", traceback.format_exc()
    return Result(
        seed=seed,
        failure=failure,
        details=details,
        plane_answers=plane.clients.answers,
        plane_losses=plane.losses,
    )


def run_seed(seed: int, options: Options | None = None) -> Result:
    """Run one seed; a failure of any kind is a result, not an exception."""
    cluster = Cluster(seed, options=options)
    failure = details = ""
    try:
        if options is None:
            Formation(seed).run()
        cluster.run()
    except Exception as error:  # noqa: BLE001 - whatever it is, the seed has found it
        failure, details = f"{type(error).__name__}: {error}", traceback.format_exc()
    plane = run_plane(seed) if options is None and seed % PLANE_EVERY == 0 else Result(seed)
    return Result(
        seed=seed,
        failure=failure or plane.failure,
        details=details or plane.details,
        plane_answers=plane.plane_answers,
        plane_losses=plane.plane_losses,
        elections=cluster.invariants.elections,
        acknowledged=len(cluster.invariants.acknowledged),
        reads=cluster.reads_served,
        crashes=cluster.crashes,
        changes=cluster.clients.changes,
        transfers=cluster.transfers_done,
        histories=cluster.clients.histories_checked,
    )


def replay_command(seed: int, only_plane: bool = False) -> str:
    """Return what shows the same run again, step by step."""
    return f"python -m tests.sim.run --seed {seed} --trace{' --plane' if only_plane else ''}"


def _run_many(first: int, count: int, processes: int, only_plane: bool) -> int:
    run = run_plane if only_plane else run_seed
    began = time.monotonic()
    failed = 0
    totals = [0] * len(fields(Result)[3:])
    with multiprocessing.Pool(processes) as pool:
        seeds = range(first, first + count)
        for done, result in enumerate(pool.imap_unordered(run, seeds, chunksize=4), 1):
            counts = astuple(result)[3:]
            totals = [total + more for total, more in zip(totals, counts, strict=True)]
            if result.failure:
                failed += 1
                print(f"seed {result.seed} FAILED: {result.failure}")
                print(f"  replay: {replay_command(result.seed, only_plane)}", flush=True)
            if done % 50 == 0 or done == count:
                per_minute = done / (time.monotonic() - began) * 60
                print(
                    f"{done}/{count} seeds, {failed} failed, {per_minute:.0f} a minute", flush=True
                )
    names = [field.name for field in fields(Result)[3:]]
    print(", ".join(f"{name} {total}" for name, total in zip(names, totals, strict=True)))
    return 1 if failed else 0


def shrink(seed: int) -> list[int]:
    """Return the numbers of the faults without which the seed still fails; the rest is needed.

    Larger groups of faults are tried first, then smaller ones, down to each alone.
    """
    options = Options.draw(Random(f"options {seed}"))
    cluster = Cluster(seed)
    with suppress(Exception):
        cluster.run()
    left_out: frozenset[int] = frozenset()
    size = max(1, cluster.faults.count // 2)
    while True:
        for first in range(1, cluster.faults.count + 1, size):
            tried = left_out | set(range(first, first + size))
            shrunk = replace(options, faults_left_out=frozenset(tried))
            if tried != left_out and run_seed(seed, shrunk).failure:
                left_out = frozenset(tried)
        if size == 1:
            return sorted(left_out)
        size //= 2


def _run_one_plane(seed: int, with_trace: bool) -> int:
    if not with_trace:
        result = run_plane(seed)
        print(result.details or result)
        return 1 if result.failure else 0
    try:
        Plane(seed, trace=print).run()
    except Exception as error:  # noqa: BLE001 - whatever it is, the seed has found it
        print(f"FAILED {type(error).__name__}: {error}", flush=True)
        return 1
    return 0


def _run_one(seed: int, with_trace: bool, left_out: list[int]) -> int:
    drawn = Options.draw(Random(f"options {seed}"))
    options = replace(drawn, faults_left_out=frozenset(left_out)) if left_out else None
    if with_trace:
        try:
            if options is None:
                Formation(seed).run()
            Cluster(seed, trace=print, options=options).run()
            if options is None and seed % PLANE_EVERY == 0:
                Plane(seed, trace=print).run()
        except Exception as error:  # noqa: BLE001 - whatever it is, the seed has found it
            print(f"FAILED {type(error).__name__}: {error}", flush=True)
            traceback.print_exc()
            return 1
        return 0
    result = run_seed(seed, options)
    print(result.details or result)
    return 1 if result.failure else 0


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 if every seed has passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.run", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds to run")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="run this seed alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: print every event")
    parser.add_argument("--plane", action="store_true", help="run the whole control plane alone")
    parser.add_argument("--shrink", action="store_true", help="with --seed: find needless faults")
    parser.add_argument("--leave-out", default="", help="with --seed: numbers of faults, by commas")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if options.plane and (options.shrink or options.leave_out):
        parser.error("--shrink and --leave-out know no faults of --plane: leave one of them out")
    if options.plane and options.seed is not None:
        return _run_one_plane(options.seed, options.trace)
    if options.seed is not None:
        if options.shrink:
            needless = ",".join(map(str, shrink(options.seed)))
            print(f"{replay_command(options.seed)} --leave-out={needless}")
            return 0
        left_out = [int(number) for number in options.leave_out.split(",") if number]
        return _run_one(options.seed, options.trace, left_out)
    return _run_many(options.first_seed, options.seeds, options.processes, options.plane)


if __name__ == "__main__":
    sys.exit(main())
