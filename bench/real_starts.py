"""What starting real sandboxes takes: alone, many at once, and beside bwrap itself.

    .venv/bin/python bench/real_starts.py                         # 50 one by one, 200 at once
    .venv/bin/python bench/real_starts.py --one-by-one=200 --warm-pool=4 --at-once=0
    .venv/bin/python bench/real_starts.py --at-once=500 --bare

A real prism-agent with a data directory of its own; this process plays the leader, so that the
figures are the agent's alone. "create" is the time from the assignment being sent to the first
exec's exit status. Processor time is user and system time of the agent and of all that it has
started, from a cpuacct cgroup where there is one (cgroup v1; needs root): a busy machine changes it
little, unlike wall time. What the kernel does later by itself (namespaces, cgroups) is not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from prism.agent.v1 import agent_pb2

from prism_agent.runtime import host
from prism_cli.bench.figures import percentile
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess

_CPUACCT = Path("/sys/fs/cgroup/cpuacct")
_TIMEOUT_S = 600.0
_READY = agent_pb2.OBSERVED_STATE_READY
_DELETED = agent_pb2.OBSERVED_STATE_DELETED


class Meter:
    """Processor time of a process and of all that it starts."""

    def __init__(self, pid: int, node_id: str) -> None:
        self._process = psutil.Process(pid)
        #: Where the agent puts its sandboxes.
        self._sandboxes = _CPUACCT / "prism" / node_id
        self._group: Path | None = None
        with contextlib.suppress(OSError):
            if (_CPUACCT / "cpuacct.usage_user").exists():
                self._group = _CPUACCT / f"prism-bench-{os.getpid()}"
                self._group.mkdir()
                (self._group / "cgroup.procs").write_text(str(pid))

    def read_s(self) -> tuple[float, float]:
        """Return the seconds of all, and of the process alone."""
        times = self._process.cpu_times()
        alone_s = float(times.user + times.system)
        if self._group is None:
            return alone_s, alone_s
        all_ns = 0
        for group in (self._group, self._sandboxes):
            with contextlib.suppress(FileNotFoundError):
                all_ns += int((group / "cpuacct.usage").read_text())
        return all_ns / 1e9, alone_s

    def close(self) -> None:
        """Remove the group; what is left in it goes to the parent."""
        if self._group is None:
            return
        for pid in (self._group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (_CPUACCT / "cgroup.procs").write_text(pid)
        with contextlib.suppress(OSError):
            self._group.rmdir()


@contextlib.contextmanager
def measured(what: str, meter: Meter, count: int) -> Iterator[None]:
    """Print what was taken for each of `count`."""
    all_s, alone_s = meter.read_s()
    began_s = time.perf_counter()
    yield
    wall_s = time.perf_counter() - began_s
    all_s, alone_s = (
        now - then for now, then in zip(meter.read_s(), (all_s, alone_s), strict=True)
    )
    print(
        f"  {what}: {count} in {wall_s:.2f} s, {count / wall_s:.1f} a second; processor "
        f"{all_s / count * 1e3:.1f} ms each, of it the agent {alone_s / count * 1e3:.1f} ms"
    )


def show(what: str, seconds: list[float]) -> None:
    """Print percentiles."""
    ordered = sorted(seconds)
    values = [f"p{rank} {percentile(ordered, rank / 100) * 1e3:.1f}" for rank in (50, 90, 99)]
    print(f"  {what}: {', '.join(values)} ms")


class Load:
    """One agent, and what is asked of it."""

    def __init__(self, gateway: Gateway, agent: AgentProcess, meter: Meter) -> None:
        self._gateway, self._agent, self._meter = gateway, agent, meter

    async def one_by_one(self, count: int, pause_s: float) -> None:
        """Create, run, delete; one sandbox at a time."""
        ready: list[float] = []
        created: list[float] = []
        again: list[float] = []
        with measured("one by one", self._meter, count):
            for number in range(count):
                name = f"single-{number}"
                began_s = time.perf_counter()
                self._gateway.assign(name)
                await self._gateway.wait_for(name, _READY)
                ready.append(time.perf_counter() - began_s)
                if (await self._agent.run(name, ["true"])).code != 0:
                    raise SystemExit(f"{name}: true failed")
                created.append(time.perf_counter() - began_s)
                began_s = time.perf_counter()
                await self._agent.run(name, ["true"])
                again.append(time.perf_counter() - began_s)
                self._gateway.want(name, agent_pb2.DESIRED_STATE_DELETED, grace_s=0)
                await self._gateway.wait_for(name, _DELETED)
                # Time for a pool to be filled again; else its figure would be of a cold start.
                await asyncio.sleep(pause_s)
        show("until READY", ready)
        show("create", created)
        show("exec true again", again)

    async def at_once(self, count: int) -> None:
        """Create all at once, then delete all at once."""
        names = [f"burst-{number}" for number in range(count)]
        gateway = self._gateway

        def all_are(state: int) -> Callable[[], bool]:
            return lambda: all(
                name in gateway.reports and gateway.reports[name].state == state for name in names
            )

        with measured("start at once", self._meter, count):
            for name in names:
                gateway.assign(name)
            await gateway.wait(all_are(_READY), _TIMEOUT_S)
        with measured("delete at once", self._meter, count):
            for name in names:
                gateway.want(name, agent_pb2.DESIRED_STATE_DELETED, grace_s=0)
            await gateway.wait(all_are(_DELETED), _TIMEOUT_S)


def bare(count: int) -> None:
    """Run bwrap's own start and end, for comparison."""
    argv = [
        "bwrap", "--unshare-user", "--unshare-all", "--disable-userns", "--cap-drop", "ALL",
        "--new-session", "--clearenv", "--as-pid-1", "--ro-bind", "/usr", "/usr", "--symlink",
        "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev",
        "--tmpfs", "/tmp", "--tmpfs", "/workspace", "/usr/bin/true",
    ]  # fmt: skip
    before = psutil.Process().cpu_times()
    seconds = []
    for _ in range(count):
        began_s = time.perf_counter()
        subprocess.run(argv, check=True)
        seconds.append(time.perf_counter() - began_s)
    after = psutil.Process().cpu_times()
    own = after.user + after.system - before.user - before.system
    children = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    show(f"bare bwrap, one by one; processor {(own + children) / count * 1e3:.1f} ms each", seconds)


async def measure(options: argparse.Namespace, directory: Path) -> int:
    """Start an agent and measure; return how much was left over."""
    if options.bare:
        bare(100)
    gateway = Gateway()
    gateway.heartbeat_s = 10.0
    await gateway.start()
    flags = ["--on-exit=delete", *options.flag]
    if options.warm_pool:
        flags.append(f"--warm-pool={options.warm_pool}")
    if options.max_starts:
        flags.append(f"--max-starts={options.max_starts}")
    agent = AgentProcess(directory / "data", gateway.address, *flags)
    await agent.start()
    meter = Meter(agent.pid, agent.node_id)
    try:
        await gateway.wait_registrations(1)
        await asyncio.sleep(options.settle)
        load = Load(gateway, agent, meter)
        if options.one_by_one:
            await load.one_by_one(options.one_by_one, options.pause)
        if options.at_once:
            await load.at_once(options.at_once)
    finally:
        node_id = agent.node_id
        await agent.end()
        meter.close()
        await gateway.stop()
        if options.log:
            print(agent.log.read_text()[-4000:])
    left = len(host.supervised(f"{node_id}/")) + len(host.mounts_below(agent.data_dir))
    print(f"  left over: {left} processes and mounts")
    return left


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one-by-one", type=int, default=50, help="sandboxes; 0: none")
    parser.add_argument("--at-once", type=int, default=200, help="sandboxes; 0: none")
    parser.add_argument("--warm-pool", type=int, default=0, help="the agent's --warm-pool")
    parser.add_argument("--max-starts", type=int, default=0, help="the agent's; 0: its default")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two, one by one")
    parser.add_argument("--settle", type=float, default=0.5, help="seconds before the first")
    parser.add_argument("--flag", action="append", default=[], help="another flag of the agent")
    parser.add_argument("--bare", action="store_true", help="bwrap alone as well")
    parser.add_argument("--log", action="store_true", help="print the end of the agent's log")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prism-bench-") as name:
        left = asyncio.run(measure(options, Path(name)))
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
