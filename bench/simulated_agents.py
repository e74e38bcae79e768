"""Many agents in one process: real sessions and journals, and a runtime that runs nothing.

    .venv/bin/python bench/simulated_agents.py --control=127.0.0.1:8008 --agents=20

Every listing says that their runtime is "fake". They measure the control plane, and no sandbox.
They serve no node API: an exec in one of their sandboxes fails. One process, so also one failure:
killing it loses all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import signal
import tempfile
from pathlib import Path

import uvloop
from prism.node.v1 import node_pb2
from prometheus_client import CollectorRegistry

from prism_agent.data_directory import DataDirectory
from prism_agent.journal import Journal
from prism_agent.main import GC_THRESHOLDS
from prism_agent.metrics import AgentMetrics
from prism_agent.reconcile import Reconciler
from prism_agent.reports import ReportQueue
from prism_agent.runtime.fake import MESSAGE, FakeRuntime
from prism_agent.sandboxes import Sandboxes
from prism_agent.session import NodeIdentity, Session
from prism_common import descriptors

AGENTS_MAX = 2000
#: A fake start takes no time, so it needs no bound that keeps others fast.
STARTS_MAX = 256
SLOTS = 20_000
#: Room for every slot with the benchmark's small sandboxes.
CAPACITY = node_pb2.ResourceAmounts(
    cpu_millicores=SLOTS * 100, memory_bytes=SLOTS * (64 << 20), disk_bytes=SLOTS * (8 << 20),
    slots=SLOTS,
)  # fmt: skip
#: Agents without a session at once: more in one process are all too slow to be welcomed in time.
JOINING_MAX = 100
JOINING_PAUSE_S = 0.02
#: Where nobody listens (the discard port): what dials it fails at once.
NOBODY = "127.0.0.1:9"


class SimulatedAgent:
    """One node: everything of an agent but its servers and its runtime."""

    def __init__(self, name: str, directory: Path, control: list[str]) -> None:
        self._data = DataDirectory(directory)
        fake = {FakeRuntime.name: FakeRuntime()}
        metrics, reports = AgentMetrics(CollectorRegistry()), ReportQueue()
        self._sandboxes = Sandboxes(
            Journal(self._data.sandboxes), fake, fake,
            Reconciler(STARTS_MAX, self._data.state.term), reports, metrics,
        )  # fmt: skip
        self.session = Session(control, self._data, self._sandboxes, reports, self._load, metrics)
        self._identity = NodeIdentity(
            name=name,
            address=NOBODY,
            capacity=CAPACITY,
            runtimes=[
                node_pb2.RuntimeStatus(name="fake", ready=True, message=MESSAGE, version="1")
            ],
            labels={"simulated": "true"},
        )

    async def run(self) -> None:
        """Keep the session until cancelled."""
        try:
            await self._sandboxes.adopt()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._sandboxes.run())
                await self.session.run(self._identity)
        finally:
            self._data.close()

    @staticmethod
    def _load() -> tuple[node_pb2.ResourceAmounts, float]:
        return node_pb2.ResourceAmounts(), 0.0


async def room_to_join(started: list[SimulatedAgent], stop: asyncio.Event) -> None:
    """Wait until few enough of those that run have no session, or all are to stop."""
    while sum(not agent.session.connected_to for agent in started) >= JOINING_MAX:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(JOINING_PAUSE_S):
                await stop.wait()
                return


async def run(count: int, control: list[str], directory: Path, prefix: str) -> None:
    """Run so many until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    agents = [
        SimulatedAgent(f"{prefix}-{index:04d}", directory / f"{index:04d}", control)
        for index in range(count)
    ]
    async with asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[None]] = []
        for agent in agents:
            await room_to_join(agents[: len(tasks)], stop)
            tasks.append(group.create_task(agent.run()))
        await stop.wait()
        for task in tasks:
            task.cancel()


def main() -> None:
    """Run them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--control", default="127.0.0.1:8008", help="HOST:PORT[,…] of control nodes"
    )
    parser.add_argument("--agents", type=int, default=20, help=f"1 to {AGENTS_MAX}")
    parser.add_argument("--prefix", default="simulated", help="names are PREFIX-0000 and so on")
    parser.add_argument("--data-dir", type=Path, help="default: a directory removed at the end")
    arguments = parser.parse_args()
    descriptors.allow_most()
    if not 1 <= arguments.agents <= AGENTS_MAX:
        parser.error(f"--agents: {arguments.agents} is not 1 to {AGENTS_MAX}")
    gc.set_threshold(*GC_THRESHOLDS)
    gc.freeze()
    control = [part.strip() for part in arguments.control.split(",") if part.strip()]
    if arguments.data_dir:
        uvloop.run(run(arguments.agents, control, arguments.data_dir, arguments.prefix))
        return
    # On tmpfs where there is one: a real node has a disk of its own, these would share one.
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        uvloop.run(run(arguments.agents, control, Path(name), arguments.prefix))


if __name__ == "__main__":
    main()
