"""Kill an agent and its sandboxes' supervisors at random; at the end nothing may be left.

`make kills KILLS=1000 SEED=7 RUNTIME=both`, or with `PYTHONPATH=.:proto`
`python -m tests.integration.agent.random_kills --sandboxes 500`.
"""

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import grpc
import grpc.aio
from prism.agent.v1 import agent_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent import cgroups
from prism_agent.network import devices, tools
from prism_agent.runtime import host
from prism_common.limits import MIB
from tests.integration.agent.conftest import why_no_gvisor, why_no_sandboxes
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess

READY = agent_pb2.OBSERVED_STATE_READY
PAUSED = agent_pb2.OBSERVED_STATE_PAUSED
STOPPED = agent_pb2.OBSERVED_STATE_STOPPED
FAILED = agent_pb2.OBSERVED_STATE_FAILED
DELETED = agent_pb2.OBSERVED_STATE_DELETED
#: Sandboxes that live at once.
LIVES = 6
#: Any state is reached, and any exec answered, in this time, whatever is killed meanwhile.
STEP_S = 120.0
#: Longest time between two kills.
PAUSE_S = 0.15
#: So many kills may follow each other with nothing reached in between: what takes longer to start
#: than kills are apart, on a busy machine, would otherwise never be.
KILLS_IN_VAIN_MAX = 3
#: Kills between two lines of progress.
PROGRESS_KILLS = 10
BUBBLEWRAP, GVISOR = "bubblewrap", "gvisor"
#: What sandboxes are of, at random.
RUNTIMES = {BUBBLEWRAP: (BUBBLEWRAP,), GVISOR: (GVISOR,), "both": (BUBBLEWRAP, GVISOR)}
#: An agent is killed again while it starts: how often, and at most how long after its start.
EARLY_SHARE = 0.25
EARLY_S = 0.8
#: Of all kills, those of the agent; the others are of supervisors.
AGENT_SHARE = 0.5
CALLS_MAX = 32
#: Why a call may fail: the agent or the sandbox was killed.
KILLED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)
#: What gRPC's client says of a request that it was just writing when the connection broke.
BROKEN_WRITE = "Internal error from Core"


@dataclass
class Figures:
    """What was done."""

    seed: int = 0
    agent_kills: int = 0
    supervisor_kills: int = 0
    sandboxes: int = 0
    failed: int = 0
    execs: int = 0
    execs_lost: int = 0
    duration_s: float = 0.0
    #: What was left of sandboxes, by kind.
    left: dict[str, list[str]] = field(default_factory=dict)

    @property
    def kills(self) -> int:
        return self.agent_kills + self.supervisor_kills

    def __str__(self) -> str:
        counts = [f"{len(found)} {kind}" for kind, found in self.left.items()]
        left = ", ".join(counts) or "not looked for"
        return (
            f"seed {self.seed}: {self.kills} kills ({self.agent_kills} of the agent, "
            f"{self.supervisor_kills} of supervisors) in {self.duration_s:.1f} s; "
            f"{self.sandboxes} sandboxes, {self.failed} of them failed; {self.execs} execs ran "
            f"once, {self.execs_lost} were lost with their sandbox; left: {left}"
        )

    def progress(self, kills: int) -> str:
        """Return how far it is."""
        return (
            f"{self.kills} of {kills} kills, {self.duration_s / max(1, self.kills):.2f} s each; "
            f"{self.sandboxes} sandboxes, {self.failed} of them failed; {self.execs} execs"
        )


def left_of(agent: AgentProcess) -> dict[str, list[str]]:
    """Return every trace of any sandbox of an agent, by kind."""
    node_id = agent.node_id
    groups = [
        f"{directory}/{name}"
        for directory, names, _ in os.walk("/sys/fs/cgroup")
        if directory.endswith(f"/prism/{node_id}")
        for name in names
    ]
    inside = {line for group in groups for line in _lines_of(Path(group, "cgroup.procs"))}
    networks = [] if os.geteuid() != 0 or tools.missing() else devices.owned(node_id)
    return {
        "processes": sorted(inside | {str(pid) for pid, _ in host.supervised(f"{node_id}/")}),
        "mounts": [str(path) for path in host.mounts_below(agent.data_dir)],
        "cgroups": groups,
        "directories": [str(path) for path in (agent.data_dir / "sandboxes").iterdir()],
        "network devices": [name for name, _ in networks],
    }


def _lines_of(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        # It is gone by now.
        return []


async def until_nothing_is_left(agent: AgentProcess, timeout_s: float) -> dict[str, list[str]]:
    """Wait until no trace is left, and return those that are left in the end."""
    end_s = time.monotonic() + timeout_s
    while any((found := left_of(agent)).values()) and time.monotonic() < end_s:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    return found


@contextlib.asynccontextmanager
async def bounded(what: str) -> AsyncIterator[None]:
    """Fail with what did not come where the time of a step has passed."""
    try:
        async with asyncio.timeout(STEP_S) as bound:
            yield
    except TimeoutError:
        if not bound.expired():
            raise
        raise AssertionError(f"{what} in {STEP_S} s") from None


class RandomKills:
    """One agent that is killed, and a few sandboxes that come and go.

    Args:
        agent: Is killed; not started yet.
        gateway: Its leader.
        kills: How often to kill, agent and supervisors together.
        seed: Of what is killed when.
        runtimes: What sandboxes are of.
        tell: Called with the figures after some kills.
    """

    def __init__(
        self,
        agent: AgentProcess,
        gateway: Gateway,
        kills: int,
        seed: int,
        runtimes: tuple[str, ...],
        tell: Callable[[Figures], None],
    ) -> None:
        self._agent = agent
        self._gateway = gateway
        self._kills = kills
        self._runtimes = runtimes
        self._tell = tell
        self._random = random.Random(seed)
        self.figures = Figures(seed)
        self._began_s = 0.0
        #: The agent serves.
        self._up = asyncio.Event()
        #: Something was reached since the last kill.
        self._reached = asyncio.Event()
        self._done = False
        groups, _ = cgroups.find_on_this_machine("test-kills")
        #: Without cgroups nothing can be paused.
        self._pauses = groups is not None
        if groups is not None:
            groups.close()

    async def run(self) -> Figures:
        """Kill, then delete everything and look for what is left."""
        self._began_s = time.monotonic()
        await self._agent.start()
        self._up.set()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._kill())
            for _ in range(LIVES):
                group.create_task(self._lead_lives())
        self.figures.left = await until_nothing_is_left(self._agent, STEP_S)
        self.figures.duration_s = time.monotonic() - self._began_s
        return self.figures

    # ── kills ──

    async def _kill(self) -> None:
        next_told, in_vain = PROGRESS_KILLS, 0
        while self.figures.kills < self._kills:
            if self.figures.kills >= next_told:
                next_told += PROGRESS_KILLS
                self.figures.duration_s = time.monotonic() - self._began_s
                self._tell(self.figures)
            await asyncio.sleep(self._random.uniform(0, PAUSE_S))
            if not self._agent.alive:
                raise AssertionError(f"the agent ended by itself; see {self._agent.log}")
            if in_vain == KILLS_IN_VAIN_MAX:
                async with bounded("nothing was reached"):
                    await self._reached.wait()
            in_vain = 0 if self._reached.is_set() else in_vain + 1
            self._reached.clear()
            if self._random.random() < AGENT_SHARE:
                await self._kill_agent()
            else:
                self._kill_supervisor()
        self._done = True

    async def _kill_agent(self) -> None:
        self._up.clear()
        async with bounded("the agent was not killed and started"):
            await self._kill_and_start()
        self._up.set()

    async def _kill_and_start(self) -> None:
        await self._agent.kill()
        self.figures.agent_kills += 1
        await self._agent.spawn()
        while self._random.random() < EARLY_SHARE:
            await asyncio.sleep(self._random.uniform(0, EARLY_S))
            if not self._agent.alive:
                raise AssertionError(f"the agent ended by itself; see {self._agent.log}")
            await self._agent.kill()
            self.figures.agent_kills += 1
            await self._agent.spawn()
        await self._agent.serving()

    def _kill_supervisor(self) -> None:
        """Kill one process of those that a sandbox lives by, of whatever it is just doing."""
        found = [pid for pid, _ in host.supervised(f"{self._agent.node_id}/")]
        if GVISOR in self._runtimes:
            # Of these the supervisor is no process of the host: its kernel is.
            for path in (self._agent.data_dir / "sandboxes").glob("*/runsc/pid"):
                found += [int(text) for text in _lines_of(path) if self._is_kernel(int(text))]
        if not found:
            return
        try:
            os.kill(self._random.choice(found), 9)
        except ProcessLookupError:
            return
        self.figures.supervisor_kills += 1

    @staticmethod
    def _is_kernel(pid: int) -> bool:
        """Return whether a pid that was written down is still one of runsc's."""
        return any("runsc" in line for line in _lines_of(Path(f"/proc/{pid}/cmdline")))

    # ── lives ──

    async def _lead_lives(self) -> None:
        while not self._done:
            self.figures.sandboxes += 1
            sandbox = f"sb-{self.figures.sandboxes}"
            limits = sandbox_pb2.Limits(memory_bytes=64 * MIB)
            runtime = self._random.choice(self._runtimes)
            self._gateway.assign(
                sandbox, spec=sandbox_pb2.SandboxSpec(limits=limits, runtime=runtime)
            )
            failed = not await self._live(sandbox)
            self.figures.failed += failed
            self._gateway.want(sandbox, agent_pb2.DESIRED_STATE_DELETED, grace_s=0)
            await self._reach(sandbox, DELETED)
            del self._gateway.assignments[sandbox]

    async def _live(self, sandbox: str) -> bool:
        """Lead a sandbox through a part of a life; False: it was killed meanwhile."""
        if self._random.random() < 0.1:
            # It is deleted while it starts.
            await asyncio.sleep(self._random.uniform(0, 0.05))
            return True
        if not await self._reach(sandbox, READY):
            return False
        for step in range(self._random.randint(1, 4)):
            if not await self._exec(sandbox, f"rq-{step}"):
                return False
            choice = self._random.random()
            if choice < 0.3 and self._pauses:
                if not await self._become(sandbox, agent_pb2.DESIRED_STATE_PAUSED, PAUSED):
                    return False
                if not await self._become(sandbox, agent_pb2.DESIRED_STATE_RUNNING, READY):
                    return False
            elif choice < 0.6:
                if not await self._become(sandbox, agent_pb2.DESIRED_STATE_STOPPED, STOPPED):
                    return False
                start_count = self._gateway.assignments[sandbox].start_count + 1
                running = agent_pb2.DESIRED_STATE_RUNNING
                if not await self._become(sandbox, running, READY, start_count=start_count):
                    return False
        return True

    async def _become(self, sandbox: str, desired: int, state: int, **fields: int) -> bool:
        grace_s = self._random.choice((0.0, 0.1))
        self._gateway.want(sandbox, desired, grace_s=grace_s, **fields)
        return await self._reach(sandbox, state)

    async def _reach(self, sandbox: str, state: int) -> bool:
        """Wait for a state; False: the sandbox has failed instead."""
        start_count = self._gateway.assignments[sandbox].start_count
        ends = (state,) if state == DELETED else (state, FAILED)

        def reached() -> bool:
            report = self._gateway.reports.get(sandbox)
            return (
                report is not None
                and report.state in ends
                and (state == DELETED or report.start_count >= start_count)
            )

        try:
            await self._gateway.wait(reached, STEP_S)
        except TimeoutError:
            name = agent_pb2.ObservedState.Name(agent_pb2.ObservedState.ValueType(state))
            report = self._gateway.reports.get(sandbox)
            raise AssertionError(f"{sandbox} is not {name} after {STEP_S} s: {report}") from None
        self._reached.set()
        return self._gateway.reports[sandbox].state == state

    async def _exec(self, sandbox: str, request_id: str) -> bool:
        """Run something exactly once, through any death; False: its sandbox has failed."""
        script = f"(sleep 1000 &); echo x >> {request_id}; wc -l < {request_id}"
        end_s = time.monotonic() + STEP_S
        while True:
            await self._up.wait()
            try:
                async with bounded(f"the exec {request_id} of {sandbox} did not end"):
                    result = await self._agent.run(
                        sandbox, ["sh", "-c", script], request_id=request_id
                    )
            except grpc.aio.AioRpcError as error:
                killed = error.code() in KILLED or error.details() == BROKEN_WRITE
                if not killed or time.monotonic() > end_s:
                    raise
                if self._gateway.reports[sandbox].state == FAILED:
                    self.figures.execs_lost += 1
                    return False
                await asyncio.sleep(0.02)
                continue
            if result.code == 137 and await self._reach(sandbox, FAILED):
                # Killed with its sandbox: the kernel said so in time.
                self.figures.execs_lost += 1
                return False
            if (result.stdout, result.code) != (b"1\n", 0):
                raise AssertionError(f"{sandbox} {request_id}: {result}")
            self.figures.execs += 1
            self._reached.set()
            return True


async def many(agent: AgentProcess, gateway: Gateway, count: int) -> str:
    """Have many sandboxes at once, and then none."""
    await agent.start()
    await gateway.wait_registrations(1)
    names = [f"sb-{number}" for number in range(count)]
    limits = sandbox_pb2.Limits(memory_bytes=32 * MIB)

    async def all_are(state: int) -> float:
        began_s = time.monotonic()
        reports = gateway.reports
        await gateway.wait(
            lambda: sum(each.state == state for each in reports.values()) == count, count + STEP_S
        )
        return time.monotonic() - began_s

    for name in names:
        gateway.assign(name, spec=sandbox_pb2.SandboxSpec(limits=limits))
    ready_s = await all_are(READY)
    ran_s = await run_in_each(agent, names)
    began_s = time.monotonic()
    await agent.kill()
    await agent.start()
    await gateway.wait_registrations(2)
    adopted_s = time.monotonic() - began_s
    adopted = sum(each.state == READY for each in gateway.registrations[-1].sandboxes)
    if adopted != count:
        raise AssertionError(f"{adopted} of {count} sandboxes were adopted")
    again_s = await run_in_each(agent, names)
    for name in names:
        gateway.want(name, agent_pb2.DESIRED_STATE_DELETED, grace_s=0)
    deleted_s = await all_are(DELETED)
    left = await until_nothing_is_left(agent, STEP_S)
    if any(left.values()):
        raise AssertionError(f"left: {left}")
    return (
        f"{count} sandboxes: all READY in {ready_s:.1f} s, an exec in each in {ran_s:.1f} s; "
        f"agent killed, all adopted in {adopted_s:.1f} s, an exec in each in {again_s:.1f} s; "
        f"all deleted in {deleted_s:.1f} s; left: 0"
    )


async def run_in_each(agent: AgentProcess, names: list[str]) -> float:
    """Run something in each sandbox; return the time that it took."""
    began_s = time.monotonic()
    room = asyncio.Semaphore(CALLS_MAX)

    async def run(name: str) -> None:
        async with room:
            result = await agent.run(name, ["echo", name])
        if result.stdout != f"{name}\n".encode():
            raise AssertionError(f"{name}: {result}")

    async with asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(run(name))
    return time.monotonic() - began_s


async def run_kills(
    directory: Path,
    kills: int,
    seed: int,
    runtime: str = BUBBLEWRAP,
    tell: Callable[[Figures], None] = lambda _: None,
) -> Figures:
    """Kill at random, with a control plane and an agent of its own.

    Raises:
        AssertionError: A promise was broken.
    """
    gateway = Gateway()
    await gateway.start()
    runtimes = RUNTIMES[runtime]
    # A runtime that is not used need not be tried at each start.
    flags = [f"--runtime={runtimes[0]}"] if len(runtimes) == 1 else []
    agent = AgentProcess(directory / "data", gateway.address, *flags)
    try:
        figures = await RandomKills(agent, gateway, kills, seed, runtimes, tell).run()
        if any(figures.left.values()):
            raise AssertionError(f"{figures}: {figures.left}")
        if await agent.end() != 0 or "Traceback" in agent.log.read_text():
            raise AssertionError(f"the agent met an error; see {agent.log}")
    finally:
        await agent.clear()
        await gateway.stop()
    return figures


async def run_many(directory: Path, count: int) -> str:
    """Have many sandboxes at once, with a control plane and an agent of its own."""
    gateway = Gateway()
    await gateway.start()
    agent = AgentProcess(directory / "data", gateway.address)
    try:
        return await many(agent, gateway, count)
    finally:
        await agent.clear()
        await gateway.stop()


def main() -> int:
    """Run; keep the agent's log where something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="kill so often")
    parser.add_argument("--seed", type=int, default=1, help="of what is killed when")
    parser.add_argument(
        "--runtime", choices=list(RUNTIMES), default=BUBBLEWRAP, help="what sandboxes are of"
    )
    parser.add_argument(
        "--sandboxes", type=int, default=0, help="instead: have so many at once, then none"
    )
    options = parser.parse_args()
    problem = why_no_sandboxes()
    if not problem and GVISOR in RUNTIMES[options.runtime]:
        problem = why_no_gvisor()
    if problem:
        print(problem, file=sys.stderr)
        return 1

    def leave(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    def tell(figures: Figures) -> None:
        print(figures.progress(options.kills), file=sys.stderr, flush=True)

    # Unwinds, so that nothing is left of an unfinished run either.
    signal.signal(signal.SIGTERM, leave)
    directory = Path(tempfile.mkdtemp(prefix="prism-kills-"))
    if options.sandboxes:
        print(asyncio.run(run_many(directory, options.sandboxes)))
    else:
        print(asyncio.run(run_kills(directory, options.kills, options.seed, options.runtime, tell)))
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
