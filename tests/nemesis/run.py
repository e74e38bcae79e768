"""Hurts a real cluster for a while, and checks that nobody was told a lie.

    python -m tests.nemesis.run --members 3 --seconds 60 --seed 1

Needs root, iproute2, nftables and a C compiler; works in namespaces of its own, and leaves nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.nemesis.clients import ABSENT, Client, History
from tests.nemesis.faults import FAULTS, Fault
from tests.nemesis.hosts import Hosts
from tests.sim.linearizability import is_linearizable

CLIENTS: Final = 8
#: Names last for a few operations each, so that every history is short enough to check.
NAMES_A_ROUND: Final = 24
FAULT_S: Final = (2.0, 4.0)
CALM_S: Final = 1.0
#: After the last fault is undone, one leader within this time.
HEALED_MAX_S: Final = 5.0
_INSIDE: Final = "PRISM_NEMESIS_INSIDE"


async def hurt(
    hosts: Hosts, seconds: float, chance: random.Random
) -> tuple[History, list[float], list[str]]:
    """Let clients work while faults come and go.

    Returns:
        What they were told, the healing times, and the faults that had no effect.
    """
    history = History()
    healings: list[float] = []
    blunt: list[str] = []
    deck: list[Fault] = []
    ends = time.monotonic() + seconds
    apis = [host.api for host in hosts.all]
    number = 0
    while time.monotonic() < ends:
        number += 1
        stop = asyncio.Event()
        names = [f"r{number:04}-{i:04}" for i in range(NAMES_A_ROUND)]
        clients = [Client(apis, history, chance.randrange(2**32)) for _ in range(CLIENTS)]
        async with asyncio.TaskGroup() as tasks:
            for client in clients:
                tasks.create_task(client.run(names, stop))
            await asyncio.sleep(CALM_S)
            if not deck:
                # Each once, before any comes again.
                deck = chance.sample(FAULTS, len(FAULTS))
            struck = await asyncio.to_thread(deck.pop(), hosts, chance)
            length_s = max(chance.uniform(*FAULT_S), struck.length_min_s)
            before = len(history.successes)
            await asyncio.sleep(length_s)
            during = len(history.successes) - before
            if not await asyncio.to_thread(struck.has_bitten):
                blunt.append(struck.said)
            await asyncio.to_thread(hosts.heal)
            healed_s = await asyncio.to_thread(hosts.wait_healthy, 30.0)
            healings.append(healed_s)
            stop.set()
        print(
            f"{struck.said} for {length_s:.1f} s: {during} answers; healed in {healed_s:.1f} s",
            flush=True,
        )
    return history, healings, blunt


def check(history: History) -> int:
    """Print what was found; return the number of names whose history is not linearizable."""
    bad = 0
    for name, operations in history.operations.items():
        if not is_linearizable(operations, ABSENT, steps_max=2_000_000):
            bad += 1
            print(
                f"NOT LINEARIZABLE: {name}", *sorted(operations, key=lambda o: o.begin), sep="\n  "
            )
    total = sum(map(len, history.operations.values()))
    print(
        f"{total} operations on {len(history.operations)} names, {bad} names not linearizable; "
        f"longest gap {history.longest_gap_s():.1f} s; retries {dict(history.retries)}"
    )
    return bad


def main() -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, choices=(3, 5), default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("nemesis: needs root, for network namespaces", file=sys.stderr)
        return 2
    if _INSIDE not in os.environ:
        os.environ[_INSIDE] = "1"
        argv = (
            "unshare",
            "--net",
            "--mount",
            sys.executable,
            "-m",
            "tests.nemesis.run",
            *sys.argv[1:],
        )
        os.execvp(argv[0], argv)
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="prism-nemesis-") as scratch:
        with Hosts(arguments.members, Path(scratch)) as hosts:
            history, healings, blunt = asyncio.run(hurt(hosts, arguments.seconds, chance))
        bad = check(history)
        logs = [path for path in Path(scratch).glob("*.log") if "Traceback" in path.read_text()]
        for path in logs:
            print(f"a traceback in {path.name}:\n{path.read_text()[-3000:]}")
    slow = [healed for healed in healings if healed > HEALED_MAX_S]
    print(
        f"{len(healings)} faults; one leader after healing within {max(healings):.1f} s, "
        f"median {statistics.median(healings):.1f} s"
    )
    for said in blunt:
        print(f"this had no effect: {said}")
    return 1 if bad or slow or logs or blunt else 0


if __name__ == "__main__":
    sys.exit(main())
