"""A lost node: how soon it is SUSPECT and LOST, and its sandboxes run elsewhere, never twice.

    sudo .venv/bin/python bench/node_loss.py --rounds=5

Three control nodes and two real agents, each agent in a network namespace of its own below one that
this program makes for itself, so that nothing of it is left on the machine, whatever happens. Needs
root and bubblewrap.

`agent-restarted`: SIGKILL of the agent, which is started again at once, as a service manager would:
its sandboxes must run on. `agent-killed`: nobody starts it again. `node-cut`: its link goes down,
the agent lives. Every sandbox is to be placed again (on_node_loss RESCHEDULE). A double run is a
sandbox whose supervisor is seen on both nodes at one moment; it is looked for ten times a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from prism.node.v1 import node_pb2
from prism.sandbox.v1 import sandbox_pb2 as pb

from bench.part import Results, leave_on_signals, parser, run_rounds
from prism_agent.runtime import host
from prism_cli.bench.figures import Bar, Outcome, Round
from tests.integration import harness

NETWORK = "10.214.0"
CONTROL = f"{NETWORK}.1"
AGENTS = 2
SANDBOXES = 6
#: The lease of 15 s, a tenth of it for clocks, and the leader's margin of 2 s.
TTL_S = 18.5
LOOK_S = 0.1
LOSS_TIMEOUT_S = 40.0
READY_TIMEOUT_S = 60.0
INSIDE = "--inside"


def run(*argv: str) -> None:
    """Run a program of the system, and require that it succeeds."""
    subprocess.run(argv, check=True, capture_output=True, text=True)


class Agent:
    """A prism-agent in its own network namespace, which a process of ours holds open."""

    def __init__(self, number: int, directory: Path, control: str) -> None:
        self.name = f"node{number}"
        self.data = directory / self.name
        self._log = directory / f"{self.name}.log"
        self._control = control
        self._address = f"{NETWORK}.{10 + number}"
        self._link = f"agent{number}"
        self._holder = subprocess.Popen(
            ("unshare", "--net", "sleep", "infinity"), stdin=subprocess.DEVNULL
        )
        self._process: subprocess.Popen[bytes] | None = None

    def connect(self) -> None:
        """Join its namespace to the bridge."""
        ours = os.readlink("/proc/self/ns/net")
        harness.wait_for(
            "a network namespace",
            lambda: os.readlink(f"/proc/{self._holder.pid}/ns/net") != ours,
        )
        run(
            "ip", "link", "add", self._link, "type", "veth", "peer", "eth0",
            "netns", str(self._holder.pid),
        )  # fmt: skip
        run("ip", "link", "set", self._link, "master", "bridge", "up")
        for arguments in (
            ("address", "add", f"{self._address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            run(*self._enter, "ip", *arguments)

    @property
    def _enter(self) -> tuple[str, ...]:
        return ("nsenter", f"--net=/proc/{self._holder.pid}/ns/net")

    @property
    def node_id(self) -> str:
        """The id that its data directory keeps."""
        return str(json.loads((self.data / "node").read_text())["node_id"])

    def supervisors(self) -> set[tuple[int, str]]:
        """Return the pids and tags of its sandboxes' supervisors."""
        return set(host.supervised(f"{self.node_id}/"))

    def start(self) -> None:
        """Start it, or start it again."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                (*self._enter, sys.executable, "-c",
                 "from prism_agent.main import main; main()",
                 f"--name={self.name}", f"--data-dir={self.data}", "--insecure",
                 f"--listen={self._address}:7117", "--metrics=127.0.0.1:0",
                 "--runtime=bubblewrap", "--on-exit=delete", f"--control={self._control}"),
                env=harness.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def set_link(self, state: str) -> None:
        """Cut its link, or mend it: up or down."""
        run("ip", "link", "set", self._link, state)

    def close(self) -> None:
        """End it and all that it runs."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
        subprocess.run(
            (sys.executable, "-c", "from prism_agent.main import main; main()",
             f"--data-dir={self.data}", "--purge"),
            env=harness.environment(), stdin=subprocess.DEVNULL, capture_output=True, check=False,
        )  # fmt: skip
        self._holder.kill()
        self._holder.wait()


class Site:
    """The cluster: control nodes on the bridge, and agents behind their links."""

    def __init__(self, cluster: harness.Cluster, agents: list[Agent]) -> None:
        self.cluster = cluster
        self.agents = agents

    def node(self, agent: Agent) -> node_pb2.Node:
        """Return what the leader thinks of an agent's node."""
        return self.cluster.leader().nodes.GetNode(
            node_pb2.GetNodeRequest(node=agent.name), timeout=harness.WAIT_S
        )

    def wait_ready(self) -> None:
        """Wait until both nodes are READY."""

        def ready() -> bool:
            page = self.cluster.leader().nodes.ListNodes(
                node_pb2.ListNodesRequest(), timeout=harness.WAIT_S
            )
            states = [node.state for node in page.nodes]
            return states.count(node_pb2.NODE_STATE_READY) == len(self.agents)

        harness.wait_for("READY nodes", ready, READY_TIMEOUT_S)

    def create(self) -> list[pb.Sandbox]:
        """Create sandboxes that are to be placed again."""
        spec = pb.SandboxSpec(
            runtime="bubblewrap",
            on_node_loss=pb.ON_NODE_LOSS_RESCHEDULE,
            limits=pb.Limits(cpu_millicores=50, memory_bytes=32 << 20, disk_bytes=8 << 20),
        )
        return [
            self.cluster.leader().sandboxes.CreateSandbox(
                pb.CreateSandboxRequest(
                    request_id=str(uuid.uuid4()), spec=spec, wait_until=pb.WAIT_UNTIL_READY
                ),
                timeout=READY_TIMEOUT_S,
            )
            for _ in range(SANDBOXES)
        ]

    def remove(self, made: list[pb.Sandbox]) -> None:
        """Remove what a round has made."""
        requests = [
            pb.DeleteSandboxRequest(sandbox=each.id, force=True, wait=True) for each in made
        ]
        self.cluster.leader().sandboxes.BatchDeleteSandboxes(
            pb.BatchDeleteSandboxesRequest(requests=requests), timeout=READY_TIMEOUT_S
        )

    def running_on(self, agent: Agent) -> set[str]:
        """Return the sandboxes of which a process is seen on a node."""
        prefix = f"{agent.node_id}/"
        return {tag.removeprefix(prefix) for _, tag in host.supervised(prefix)}


def lose(site: Site, hurt: Callable[[Agent], None], mend: Callable[[Agent], None]) -> Round:
    """Hurt the node that runs most, and look until its sandboxes run on the other one."""
    made = site.create()
    site.agents.sort(key=lambda agent: len(site.running_on(agent)))
    other, victim = site.agents
    moved = site.running_on(victim)
    began = time.perf_counter()
    hurt(victim)
    try:
        seen, doubles = _watch(site, victim, other, moved, began)
    finally:
        mend(victim)
        site.wait_ready()
    lived_on = site.running_on(victim) & site.running_on(other)
    site.remove(made)
    return Round(
        {
            "sandboxes": float(len(moved)),
            "suspect_s": seen["suspect"],
            "lost_s": seen["lost"],
            "again_ready_s": seen["again"],
            "double_runs": float(len(doubles)),
            "double_runs_after_mending": float(len(lived_on)),
        }
    )


def restart(site: Site) -> Round:
    """Kill the agent that runs most, start it again, and see whether its sandboxes ran on."""
    made = site.create()
    site.agents.sort(key=lambda agent: len(site.running_on(agent)))
    victim = site.agents[-1]
    before, incarnation = victim.supervisors(), site.node(victim).incarnation
    began = time.perf_counter()
    victim.kill()
    victim.start()

    def back() -> bool:
        node = site.node(victim)
        return node.incarnation != incarnation and node.state == node_pb2.NODE_STATE_READY

    harness.wait_for("the agent that was started again", back, LOSS_TIMEOUT_S)
    back_s = time.perf_counter() - began
    kept = before & victim.supervisors()
    site.remove(made)
    return Round(
        {
            "sandboxes": float(len({tag for _, tag in before})),
            "back_s": back_s,
            "lost": float(len({tag for _, tag in before} - {tag for _, tag in kept})),
        }
    )


def _watch(
    site: Site, victim: Agent, other: Agent, moved: set[str], began: float
) -> tuple[dict[str, float], set[str]]:
    """Return when each step was seen, in seconds since the beginning, and what ran twice."""
    seen: dict[str, float] = {}
    doubles: set[str] = set()
    while "again" not in seen:
        state, elsewhere = site.node(victim).state, site.running_on(other)
        doubles |= site.running_on(victim) & elsewhere
        now = time.perf_counter() - began
        if state != node_pb2.NODE_STATE_READY:
            seen.setdefault("suspect", now)
        if state == node_pb2.NODE_STATE_LOST:
            seen.setdefault("lost", now)
        if "lost" in seen and moved <= _ready(site):
            seen["again"] = now
        if now > LOSS_TIMEOUT_S:
            raise AssertionError(f"not within {LOSS_TIMEOUT_S:g} s: placed again; seen: {seen}")
        time.sleep(LOOK_S)
    doubles |= site.running_on(victim) & site.running_on(other)
    return seen, doubles


def _ready(site: Site) -> set[str]:
    return {
        sandbox.id
        for sandbox in site.cluster.leader().list_all()
        if sandbox.state == pb.SANDBOX_STATE_READY and sandbox.generation > 1
    }


@contextlib.contextmanager
def running() -> Iterator[Site]:
    """Build the network, the cluster and the agents for the block."""
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "bridge", "type", "bridge")
    run("ip", "address", "add", f"{CONTROL}/24", "dev", "bridge")
    run("ip", "link", "set", "bridge", "up")
    with (
        tempfile.TemporaryDirectory() as name,
        harness.cluster(Path(name), 3, "--insecure", start=False) as cluster,
        contextlib.ExitStack() as stack,
    ):
        for node in cluster.nodes:
            node.api = node.api.replace("127.0.0.1", CONTROL)
        cluster.start()
        control = ",".join(node.api for node in cluster.nodes)
        agents = []
        for number in range(1, AGENTS + 1):
            agent = Agent(number, Path(name), control)
            stack.callback(agent.close)
            agent.connect()
            agent.start()
            agents.append(agent)
        site = Site(cluster, agents)
        site.wait_ready()
        yield site


def outcomes() -> tuple[Outcome, Outcome, Outcome]:
    """Return the three, with what is promised of each."""
    bars = (
        Bar("suspect_s", "at most", 5), Bar("lost_s", "at most", TTL_S + 1),
        Bar("double_runs", "at most", 0), Bar("double_runs_after_mending", "at most", 0),
    )  # fmt: skip
    return (
        Outcome(
            "agent-restarted",
            "SIGKILL of an agent that is started again at once",
            (Bar("lost", "at most", 0),),
        ),
        Outcome("agent-killed", "SIGKILL of an agent that nobody starts again", bars),
        Outcome("node-cut", "a node's link goes down, its agent lives", bars),
    )


def why_not() -> str:
    """Return why this cannot run here; empty: it can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    missing = [name for name in ("bwrap", "ip", "nsenter", "unshare") if shutil.which(name) is None]
    return f"needs {', '.join(missing)}" if missing else ""


def main() -> int:
    """Measure and print."""
    flags = parser(__doc__ or "")
    flags.add_argument(INSIDE, action="store_true", help="this namespace is ours already")
    arguments = flags.parse_args()
    reason = why_not()
    if not reason and not arguments.inside:
        os.execvp("unshare", ("unshare", "--net", sys.executable, *sys.argv, INSIDE))
    leave_on_signals()
    restarted, killed, cut = outcomes()
    restarted.skipped = killed.skipped = cut.skipped = reason
    results = Results(arguments, (restarted, killed, cut))
    if reason:
        return results.finish()
    with running() as site:
        return run_rounds(
            results, 1 if arguments.quick else arguments.rounds,
            [(restarted, lambda: restart(site)),
             (killed, lambda: lose(site, Agent.kill, Agent.start)),
             (cut, lambda: lose(site, lambda agent: agent.set_link("down"),
                                lambda agent: agent.set_link("up")))],
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
