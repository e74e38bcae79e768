"""What sandboxes of gVisor take: alone, many at once, idle, and beside `runsc run` itself.

    .venv/bin/python bench/gvisor_starts.py                        # 50 one by one, 100 at once
    .venv/bin/python bench/gvisor_starts.py --one-by-one=10 --at-once=0

A real prism-agent with --runtime=gvisor; this process plays the leader (see real_starts.py, whose
figures are of the same kind). "bare" is `runsc run` of /bin/true with the host's root, no network
and the same platform: create, run and remove in one command. Exits with 1 if anything is left over.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from prism.agent.v1 import agent_pb2

from bench.real_starts import Load, Meter, measured, show
from prism_agent.runtime import gvisor, gvisor_release, host
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess

_READY = agent_pb2.OBSERVED_STATE_READY
_DELETED = agent_pb2.OBSERVED_STATE_DELETED
_TIMEOUT_S = 600.0
_CGROUPS = Path("/sys/fs/cgroup")


def bare(count: int, directory: Path) -> None:
    """Run /bin/true under runsc, and nothing of Prism."""
    bundle = directory / "bundle"
    bundle.mkdir()
    config: dict[str, Any] = {
        "ociVersion": "1.0.0",
        "root": {"path": "/", "readonly": True},
        "process": {"args": ["/bin/true"], "cwd": "/", "user": {"uid": 1000, "gid": 1000}},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": each} for each in ("pid", "mount", "ipc", "network")]},
    }
    (bundle / "config.json").write_text(json.dumps(config))
    argv = [
        gvisor_release.find_runsc().path, f"--root={directory}/state", "--network=none",
        f"--platform={gvisor.PLATFORM}", "--ignore-cgroups", "--overlay2=none", "run",
        f"--bundle={bundle}",
    ]  # fmt: skip
    seconds = []
    for number in range(count):
        began_s = time.perf_counter()
        subprocess.run([*argv, f"bare-{number}"], check=True)
        seconds.append(time.perf_counter() - began_s)
    show("bare runsc run /bin/true", seconds)


def memory_bytes(node_id: str) -> list[int]:
    """Return what each sandbox of a node is charged now."""
    found = []
    for pattern in ("memory/prism/{}/*/memory.usage_in_bytes", "prism/{}/*/memory.current"):
        found += [int(each.read_text()) for each in _CGROUPS.glob(pattern.format(node_id))]
    return found


def leftovers(agent: AgentProcess) -> list[str]:
    """Return what the machine still has of an agent's sandboxes."""
    found = [f"mount {each}" for each in host.mounts_below(agent.data_dir / "sandboxes")]
    found += [str(each) for each in _CGROUPS.glob(f"*/prism/{agent.node_id}/*/")]
    found += [str(each) for each in (agent.data_dir / "sandboxes").iterdir()]
    return found


async def at_once(gateway: Gateway, agent: AgentProcess, meter: Meter, count: int) -> None:
    """Start many, look at what they take while they idle, and delete them."""
    names = [f"burst-{number}" for number in range(count)]

    def all_are(state: int) -> bool:
        return all(name in gateway.reports and gateway.reports[name].state == state
                   for name in names)  # fmt: skip

    with measured("start at once", meter, count):
        for name in names:
            gateway.assign(name)
        await gateway.wait(lambda: all_are(_READY), _TIMEOUT_S)
    before_s = meter.read_s()[0]
    await asyncio.sleep(5.0)
    busy_s = meter.read_s()[0] - before_s
    print(
        f"  idle: {median(memory_bytes(agent.node_id)) / 2**20:.1f} MiB each (median), "
        f"{busy_s / 5.0 / count * 100:.3f} % of a core each"
    )
    with measured("delete at once", meter, count):
        for name in names:
            gateway.want(name, agent_pb2.DESIRED_STATE_DELETED, grace_s=0)
        await gateway.wait(lambda: all_are(_DELETED), _TIMEOUT_S)


async def measure(options: argparse.Namespace, directory: Path) -> list[str]:
    """Start an agent and measure; return what was left over."""
    bare(options.bare, directory)
    gateway = Gateway()
    gateway.heartbeat_s = 10.0
    await gateway.start()
    agent = AgentProcess(
        directory / "data", gateway.address, "--runtime=gvisor", "--on-exit=delete"
    )
    await agent.start()
    meter: Meter | None = None
    try:
        meter = Meter(agent.pid, agent.node_id)
        await gateway.wait_registrations(1)
        if options.one_by_one:
            await Load(gateway, agent, meter).one_by_one(options.one_by_one, 0.0)
        if options.at_once:
            await at_once(gateway, agent, meter, options.at_once)
    finally:
        await agent.end()
        if meter is not None:
            meter.close()
        await gateway.stop()
    return leftovers(agent)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bare", type=int, default=20, help="runs of runsc alone")
    parser.add_argument("--one-by-one", type=int, default=50, help="sandboxes; 0: none")
    parser.add_argument("--at-once", type=int, default=100, help="sandboxes; 0: none")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prism-bench-") as name:
        left = asyncio.run(measure(options, Path(name)))
    print(f"  left over: {len(left)}", *left, sep="\n    ")
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
