"""A thousand simulated agents: what they cost while idle, and ten thousand creates on them.

    .venv/bin/python bench/many_agents.py --agents=1000 --rounds=5

Idle processor time is the leader's own, user and system, over some seconds in which nothing but
heartbeats happens. The agents share one process, which has more to do then than a real node has.
"""

from __future__ import annotations

import sys
import time

from bench.local import LocalTarget, SimulatedAgents, processor_s, running
from bench.part import Results, leave_on_signals, parser, run_rounds
from prism_cli.bench import load
from prism_cli.bench.figures import Bar, Outcome, Round
from prism_cli.bench.workloads import Size, batch
from tests.integration import harness

TIMEOUT_S = 120.0
#: A few heartbeats of each: a thousand agents are told to send one in ten seconds.
IDLE_S = 20.0


def idle(cluster: harness.Cluster, agents: SimulatedAgents, seconds: float) -> Round:
    """Let nothing happen for a while; return shares of a core."""
    leader = cluster.leader().process
    assert leader is not None
    watched = {"leader": leader.pid, "agents": agents.process.pid}
    started = time.monotonic()
    before = {name: processor_s(pid) for name, pid in watched.items()}
    time.sleep(seconds)
    took_s = time.monotonic() - started
    return Round(
        {
            "agents": float(agents.count),
            **{
                f"{name}_cpu_cores": (processor_s(pid) - before[name]) / took_s
                for name, pid in watched.items()
            },
        }
    )


async def burst(cluster: harness.Cluster, count: int) -> Round:
    """Create in batches until READY, and delete."""
    async with LocalTarget(cluster, TIMEOUT_S) as target:
        # A thousand agents come over to a new leader in the course of their heartbeats, and the
        # next round would measure that: here the leader stays.
        target.changes_leader = False
        try:
            return await batch(target, Size(count=count))
        finally:
            await target.remove_run()


def main() -> int:
    """Measure and print."""
    flags = parser(__doc__ or "")
    flags.add_argument("--agents", type=int, default=1000)
    flags.add_argument("--count", type=int, default=10_000)
    flags.add_argument("--seconds", type=float, default=IDLE_S, help="how long nothing happens")
    arguments = flags.parse_args()
    leave_on_signals()
    agents = 100 if arguments.quick else arguments.agents
    count = 1000 if arguments.quick else arguments.count
    seconds = 5.0 if arguments.quick else arguments.seconds
    quiet = Outcome(
        "idle-agents", f"{agents:,} simulated agents, and nothing to do",
        (Bar("leader_cpu_cores", "at most", 0.1),),
    )  # fmt: skip
    busy = Outcome(
        "batch-many-agents", f"{count:,} by BatchCreateSandboxes on {agents:,} simulated agents",
        (Bar("ready_per_s", "at least", 5000), Bar("failures", "at most", 0),
         Bar("lost", "at most", 0), Bar("duplicated", "at most", 0)),
    )  # fmt: skip
    results = Results(arguments, (quiet, busy))
    with running(agents) as (cluster, simulated):
        return run_rounds(
            results, arguments.rounds,
            [(quiet, lambda: idle(cluster, simulated, seconds)),
             (busy, lambda: load.run(burst(cluster, count)))],
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
