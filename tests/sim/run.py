"""Runs many seeds on all cores: `python -m tests.sim.run --seeds 300`."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import dataclass

from tests.sim.cluster import Cluster
from tests.sim.options import Options


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


def run_seed(seed: int, options: Options | None = None) -> Result:
    """Run one seed; a failure of any kind is a result, not an exception."""
    cluster = Cluster(seed, options=options)
    failure = details = ""
    try:
        cluster.run()
    except Exception as error:  # noqa: BLE001 - whatever it is, the seed has found it
        failure, details = f"{type(error).__name__}: {error}", traceback.format_exc()
    return Result(
        seed=seed,
        failure=failure,
        details=details,
        elections=cluster.invariants.elections,
        acknowledged=len(cluster.invariants.acknowledged),
        reads=cluster.reads_served,
        crashes=cluster.crashes,
    )


def replay_command(seed: int) -> str:
    """Return what shows the same run again, step by step."""
    return f"python -m tests.sim.run --seed {seed} --trace"


def _run_many(first: int, count: int, processes: int) -> int:
    began = time.monotonic()
    failed = 0
    totals = [0, 0, 0, 0]
    with multiprocessing.Pool(processes) as pool:
        seeds = range(first, first + count)
        for done, result in enumerate(pool.imap_unordered(run_seed, seeds, chunksize=4), 1):
            counts = (result.elections, result.acknowledged, result.reads, result.crashes)
            totals = [total + more for total, more in zip(totals, counts, strict=True)]
            if result.failure:
                failed += 1
                print(f"seed {result.seed} FAILED: {result.failure}")
                print(f"  replay: {replay_command(result.seed)}", flush=True)
            if done % 50 == 0 or done == count:
                per_minute = done / (time.monotonic() - began) * 60
                print(
                    f"{done}/{count} seeds, {failed} failed, {per_minute:.0f} a minute", flush=True
                )
    print("elections {}, writes acknowledged {}, reads {}, crashes {}".format(*totals))
    return 1 if failed else 0


def _run_one(seed: int, with_trace: bool) -> int:
    if with_trace:
        try:
            Cluster(seed, trace=print).run()
        except Exception as error:  # noqa: BLE001 - whatever it is, the seed has found it
            print(f"FAILED {type(error).__name__}: {error}", flush=True)
            traceback.print_exc()
            return 1
        return 0
    result = run_seed(seed)
    print(result.details or result)
    return 1 if result.failure else 0


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 if every seed has passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.run", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds to run")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="run this seed alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: print every event")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return _run_one(options.seed, options.trace)
    return _run_many(options.first_seed, options.seeds, options.processes)


if __name__ == "__main__":
    sys.exit(main())
