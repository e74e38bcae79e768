"""What execs, their output and warm starts cost: processor time of each process on their way.

    .venv/bin/python bench/real_cost.py                         # all three
    .venv/bin/python bench/real_cost.py exec --count=2000 --in-flight=16
    .venv/bin/python bench/real_cost.py output --count=1024 --runtime=gvisor

Three control nodes and one prism-agent of their own. User and system time, not wall time: a busy
machine changes it less. Of `exec` and `start` the figures are for one, of `output` for one MiB. The
sandboxes' time is that of their cgroups, with their supervisors (cgroup v1; needs root).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Coroutine
from pathlib import Path

import psutil
from prism.sandbox.v1 import sandbox_pb2

from bench.part import leave_on_signals
from bench.real import Agent, WarmTarget, running
from prism_cli.bench.real import execute
from prism_cli.bench.target import Target, each_of
from tests.integration import harness

POOL = 32
WARM_UP = 20
COUNTS = {"exec": 1000, "output": 256, "start": POOL}
TIMEOUT_S = 60.0


class Meter:
    """Processor time of every process that takes part."""

    def __init__(self, cluster: harness.Cluster, agent: Agent) -> None:
        leader = cluster.leader()
        pids = {node.name: node.process.pid for node in cluster.nodes if node.process is not None}
        self._groups = {
            "client": [os.getpid()],
            "leader": [pids[leader.name]],
            "followers": [pid for name, pid in pids.items() if name != leader.name],
            "agent": [agent.pid],
        }
        node_id = json.loads((agent.data / "node").read_text())["node_id"]
        self._sandboxes = Path("/sys/fs/cgroup/cpuacct/prism", node_id, "cpuacct.usage")

    def read_s(self) -> dict[str, float]:
        """Return the seconds of each."""
        found: dict[str, float] = {}
        for name, pids in self._groups.items():
            times = [psutil.Process(pid).cpu_times() for pid in pids]
            found[name] = sum(each.user + each.system for each in times)
        if self._sandboxes.exists():
            found["sandboxes"] = int(self._sandboxes.read_text()) / 1e9
        return found


async def measured(what: str, meter: Meter, count: int, work: Coroutine[None, None, None]) -> None:
    """Do it, and print what was taken for each of `count`."""
    before, began_s = meter.read_s(), time.perf_counter()
    await work
    wall_s = time.perf_counter() - began_s
    costs = {name: now_s - before[name] for name, now_s in meter.read_s().items()}
    parts = ", ".join(f"{name} {taken_s / count * 1e3:.2f}" for name, taken_s in costs.items())
    print(
        f"{what}: {count} in {wall_s:.2f} s, {count / wall_s:.0f} a second; processor "
        f"{sum(costs.values()) / count * 1e3:.2f} ms each: {parts}"
    )


async def ready(target: Target, runtime: str) -> str:
    """Return a new sandbox that something has run in."""
    # The server's own limits: a small share of a core would throttle what is measured.
    request = target.request(runtime, ready=True, limits=sandbox_pb2.Limits())
    sandbox = await target.leader.CreateSandbox(request, timeout=TIMEOUT_S)
    await execute(target, sandbox.id)
    return sandbox.id


async def run_execs(target: Target, sandbox: str, count: int, in_flight: int) -> None:
    """Run /bin/true so often."""

    async def one(_: int) -> None:
        await execute(target, sandbox)

    await each_of(range(count), in_flight, one)


async def take_output(target: Target, sandbox: str, mebibytes: int) -> None:
    """Have one exec write so much."""
    await execute(target, sandbox, "head", "-c", str(mebibytes << 20), "/dev/zero")


async def start_all(target: Target, runtime: str, count: int) -> None:
    """Create so many, one after the other, and run something in each."""
    for _ in range(count):
        await ready(target, runtime)


async def measure(options: argparse.Namespace) -> None:
    """Start what is needed, and measure."""
    warm = options.runtime == "bubblewrap" and "start" in options.works
    flags = [f"--runtime={options.runtime}", *([f"--warm-pool={POOL}"] if warm else [])]
    with running(*flags) as (cluster, agent):
        async with WarmTarget(cluster, agent, POOL if warm else 0) as target:
            await target.find()
            meter = Meter(cluster, agent)
            counts = {what: options.count or COUNTS[what] for what in COUNTS}
            starts = min(counts["start"], POOL)
            try:
                if "start" in options.works:
                    work = start_all(target, options.runtime, starts)
                    await measured("start to the first exec's end", meter, starts, work)
                    # They take all that the node has; and to fill the pool again is none of below.
                    await target.remove_run()
                    await target.find()
                sandbox = await ready(target, options.runtime)
                await run_execs(target, sandbox, WARM_UP, options.in_flight)
                if "exec" in options.works:
                    work = run_execs(target, sandbox, counts["exec"], options.in_flight)
                    await measured("exec", meter, counts["exec"], work)
                if "output" in options.works:
                    work = take_output(target, sandbox, counts["output"])
                    await measured("MiB of output", meter, counts["output"], work)
            finally:
                await target.remove_run()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "works", nargs="*", metavar="WORK", help=f"of {', '.join(COUNTS)}; all unless given"
    )
    parser.add_argument("--count", type=int, default=0, help="of each; MiB of output")
    parser.add_argument("--in-flight", type=int, default=8, help="execs at a time")
    parser.add_argument("--runtime", default="bubblewrap", choices=["bubblewrap", "gvisor"])
    options = parser.parse_args()
    for name in options.works:
        if name not in COUNTS:
            parser.error(f"{name!r} is none of {', '.join(COUNTS)}")
    options.works = options.works or list(COUNTS)
    leave_on_signals()
    asyncio.run(measure(options))


if __name__ == "__main__":
    main()
