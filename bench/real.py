"""The workloads of `prismctl bench` that run code, on a cluster with one real agent.

    .venv/bin/python bench/real.py --rounds=5 first-exec real-burst

Three control nodes and one prism-agent with every runtime that works here. What removed sandboxes
leave on this machine is looked for too: processes, cgroups and mounts. `first-exec-warm` has an
agent of its own, with prepared sandboxes for all of its starts (`--warm-pool` for fewer), and says
how many of them came from the pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from prism.node.v1 import node_pb2

from bench.local import LocalTarget
from bench.part import Results, leave_on_signals, parser
from prism_agent.runtime import host
from prism_cli.bench.figures import Bar, Outcome, Round
from prism_cli.bench.real import REAL, first_exec
from prism_cli.bench.runner import Keep, run_workloads
from prism_cli.bench.target import Target
from prism_cli.bench.workloads import Size, Workload
from prism_cli.errors import CliError
from prism_common.errors import PrismError
from tests.integration import harness

TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
QUICK = Size(count=20)
#: More than a round starts, since a pool is filled only while nothing starts.
POOL = 32
POOL_MAX = 1000
MAIN = "from prism_agent.main import main; main()"


class Agent:
    """A prism-agent on this machine."""

    def __init__(self, directory: Path, cluster: harness.Cluster, *flags: str) -> None:
        self._metrics = f"127.0.0.1:{harness.free_port()}"
        self.data = directory / "agent"
        self._log = directory / "agent.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                (sys.executable, "-c", MAIN, "--name=real", f"--data-dir={self.data}",
                 "--listen=127.0.0.1:0", f"--metrics={self._metrics}", "--on-exit=delete",
                 f"--control={','.join(node.api for node in cluster.nodes)}", *flags),
                env=harness.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def check(self) -> bool:
        """Say why if it has ended."""
        if self._process.poll() is not None:
            raise AssertionError(f"the agent ended: {self._log.read_text()[-500:]}")
        return True

    def prepared(self) -> int:
        """Return how many sandboxes wait in its warm pool."""
        return self._counts(r'prism_agent_warm{state="(ready)"}').get("ready", 0)

    def starts(self) -> dict[str, int]:
        """Return how many starts found a prepared sandbox, or why they did not."""
        return self._counts(r'prism_agent_warm_starts_total{result="(\w+)"}')

    def _counts(self, pattern: str) -> dict[str, int]:
        """Return a metric's values by the label that the pattern takes out."""
        with urllib.request.urlopen(f"http://{self._metrics}/metrics", timeout=5) as answer:
            found = re.findall(rf"^{pattern} (\S+)$", answer.read().decode(), re.M)
        return {label: int(float(value)) for label, value in found}

    def left(self) -> int:
        """Return how many processes, cgroups and mounts its sandboxes have on this machine."""
        node_id = json.loads((self.data / "node").read_text())["node_id"]
        cgroups = sum(
            child.is_dir()
            for root in Path("/sys/fs/cgroup").glob(f"**/prism/{node_id}")
            for child in root.iterdir()
        )
        mounts = sum(
            f" {self.data}/" in line
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
        )
        return len(host.supervised(f"{node_id}/")) + cgroups + mounts

    def close(self) -> None:
        """End it, and remove what it could not."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        subprocess.run(
            (sys.executable, "-c", MAIN, f"--data-dir={self.data}", "--purge"),
            env=harness.environment(), stdin=subprocess.DEVNULL, capture_output=True, check=False,
        )  # fmt: skip


class RealTarget(LocalTarget):
    """A cluster of ours whose one agent runs on this machine."""

    def __init__(self, cluster: harness.Cluster, agent: Agent) -> None:
        super().__init__(cluster, TIMEOUT_S)
        self._agent = agent

    def left_on_nodes(self) -> int:
        """Look at the machine."""
        return self._agent.left()


@contextlib.contextmanager
def running(*flags: str) -> Iterator[tuple[harness.Cluster, Agent]]:
    """Run control nodes and an agent for the block."""
    with (
        tempfile.TemporaryDirectory() as directory,
        harness.cluster(Path(directory), 3) as cluster,
    ):
        agent = Agent(Path(directory), cluster, *flags)

        def ready() -> bool:
            page = cluster.leader().nodes.ListNodes(
                node_pb2.ListNodesRequest(), timeout=harness.WAIT_S
            )
            return agent.check() and any(
                node.state == node_pb2.NODE_STATE_READY for node in page.nodes
            )

        try:
            harness.wait_for("a real agent", ready, TIMEOUT_S)
            yield cluster, agent
        finally:
            agent.close()


class WarmTarget(RealTarget):
    """The same with a warm pool, which is full when a round begins."""

    def __init__(self, cluster: harness.Cluster, agent: Agent, pool: int) -> None:
        super().__init__(cluster, agent)
        self._pool = pool

    async def find(self) -> None:
        """Find the leader, and wait until all are prepared that there should be."""
        await super().find()
        agent = self._agent
        try:
            await asyncio.to_thread(
                harness.wait_for, f"{self._pool} prepared sandboxes",
                lambda: agent.check() and agent.prepared() >= self._pool, TIMEOUT_S,
            )  # fmt: skip
        except AssertionError as error:
            raise CliError(str(error)) from None

    async def first_exec(self, _: Target, size: Size) -> Round:
        """Create and run one after the other, and count what came from the pool."""
        before = await asyncio.to_thread(self._agent.starts)
        found = await first_exec(self, size)
        after = await asyncio.to_thread(self._agent.starts)
        for result in ("prepared", "none_ready", "unfit"):
            found.figures[f"starts_{result}"] = after.get(result, 0) - before.get(result, 0)
        return found


WARM = "first-exec-warm"
WARM_SUMMARY = "create to the first exec's result, from the warm pool"
WARM_BARS = (
    Bar("bubblewrap_first_exec_p50_ms", "at most", 10), Bar("starts_none_ready", "at most", 0),
    Bar("starts_unfit", "at most", 0),
)  # fmt: skip


async def measure_warm(pool: int, rounds: int, size: Size, keep: Keep) -> None:
    """Run the rounds of `first-exec-warm` on an agent with a pool."""
    with running(f"--warm-pool={pool}", "--runtime=bubblewrap") as (cluster, agent):
        async with WarmTarget(cluster, agent, pool) as target:
            workload = Workload(WARM, WARM_SUMMARY, target.first_exec, WARM_BARS)
            try:
                await run_workloads(target, [workload], rounds, size, keep)
            finally:
                await target.remove_run()


async def measure(chosen: Sequence[Workload], rounds: int, size: Size, keep: Keep) -> None:
    """Run the rounds of all on an agent without a pool."""
    with running() as (cluster, agent):
        async with RealTarget(cluster, agent) as target:
            try:
                await run_workloads(target, chosen, rounds, size, keep)
            finally:
                await target.remove_run()


def main() -> int:
    """Measure and print."""
    flags = parser(__doc__ or "")
    flags.add_argument(
        "--warm-pool", type=int, default=POOL, metavar="N", help="prepared for first-exec-warm"
    )
    flags.add_argument("workloads", nargs="*", help="as `prismctl bench list` names them")
    arguments = flags.parse_args()
    known = {workload.name: workload for workload in REAL}
    for name in arguments.workloads:
        if name not in (*known, WARM):
            flags.error(f"{name!r} is none of {', '.join((*known, WARM))}")
    if not 1 <= arguments.warm_pool <= POOL_MAX:
        flags.error(f"--warm-pool: {arguments.warm_pool} is not 1 to {POOL_MAX}")
    chosen = arguments.workloads or [*known, WARM]
    leave_on_signals()
    done = [Outcome(WARM, WARM_SUMMARY, WARM_BARS)] if WARM in chosen else []
    cold = [known[name] for name in chosen if name != WARM]
    results = Results(arguments, done)
    size = QUICK if arguments.quick else Size()
    if done and os.geteuid() != 0:
        done[0].skipped = "needs root, as the warm pool does"
    elif done:
        try:
            asyncio.run(measure_warm(arguments.warm_pool, arguments.rounds, size, results.keep))
        except (AssertionError, PrismError) as error:
            # Without a pool the rest can still be measured.
            results.outcomes[0].error = str(error)
        done = list(results.outcomes)
    if cold:
        asyncio.run(
            measure(cold, arguments.rounds, size, lambda found: results.keep([*done, *found]))
        )
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
