"""The control plane's workloads of `prismctl bench`, on a cluster whose leader is killed.

    .venv/bin/python bench/control_plane.py --rounds=5 burst-1k open-500

Three control nodes and 20 simulated agents, each a process of its own; this one is the load. After
every load the leader is killed with SIGKILL, and what was acknowledged must be in the next one's
list, once. Each round has a cluster of its own, and so has what measures memory: control nodes
remember request ids for a day, and those of other loads would be measured with it.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import partial

from bench.local import LocalTarget, running
from bench.part import Results, leave_on_signals, parser
from prism_cli.bench import load
from prism_cli.bench.figures import Outcome
from prism_cli.bench.runner import run_round
from prism_cli.bench.workloads import CONTROL, Size, Workload
from tests.integration import harness

AGENTS = 20
#: Workloads that measure memory.
MEMORY = {"state-100k"}
TIMEOUT_S = 120.0
#: What --quick leaves of a workload: sandboxes, and seconds of an open loop.
QUICK = Size(seconds=3.0, count=1000)


async def measure(
    cluster: harness.Cluster, chosen: list[Workload], label: str, size: Size, results: Results
) -> None:
    """Run one round of all."""
    async with LocalTarget(cluster, TIMEOUT_S) as target:
        try:
            named = {outcome.name: outcome for outcome in results.outcomes}
            outcomes = [named[each.name] for each in chosen]
            keep = partial(results.keep, results.outcomes)
            await run_round(target, chosen, outcomes, label, size, keep)
        finally:
            await target.remove_run()


def main() -> int:
    """Measure and print."""
    flags = parser(__doc__ or "")
    flags.add_argument("--seconds", type=float, default=60.0, help="length of an open loop")
    flags.add_argument("--processes", type=int, default=1, help="that unary creates come from")
    flags.add_argument("--agents", type=int, default=AGENTS, help="simulated ones")
    flags.add_argument("workloads", nargs="*", help="as `prismctl bench list` names them")
    arguments = flags.parse_args()
    known = {workload.name: workload for workload in CONTROL}
    for name in arguments.workloads:
        if name not in known:
            flags.error(f"{name!r} is none of {', '.join(known)}")
    chosen = [known[name] for name in arguments.workloads or known]
    leave_on_signals()
    size = QUICK if arguments.quick else Size(arguments.seconds)
    size = dataclasses.replace(size, processes=arguments.processes)
    outcomes = [Outcome(each.name, each.summary, each.bars) for each in chosen]
    results = Results(arguments, outcomes)
    for number in range(arguments.rounds):
        label = f"round {number + 1} of {arguments.rounds}"
        for apart in (False, True):
            part = [each for each in chosen if (each.name in MEMORY) is apart]
            if part:
                with running(arguments.agents) as (cluster, _):
                    load.run(measure(cluster, part, label, size, results))
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
