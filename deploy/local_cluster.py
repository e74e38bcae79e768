"""A cluster on this machine: three control nodes and two agents. `up`, `down`, `status`.

Standard library only. What it starts is recorded in .run/ with pid and start time, so that `down`
ends those processes and no others.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Processes, logs and data; PRISM_RUN_DIR moves it, for a second cluster beside the first.
RUN = Path(os.environ.get("PRISM_RUN_DIR") or ROOT / ".run").absolute()
BIN = ROOT / ".venv" / "bin"
CONTROL_NODES = 3
AGENTS_MAX = 16
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
DEMO = "import platform\nprint('Hello from a Prism sandbox, Python', platform.python_version())"


class ClusterError(Exception):
    """Said in one line."""


@dataclass(frozen=True)
class Daemon:
    """One process of the cluster, and its ports."""

    name: str
    argv: tuple[str, ...]
    ports: tuple[tuple[str, int], ...]
    metrics: int


@dataclass(frozen=True)
class Ports:
    """As docs/architecture.md says; PRISM_PORT_BASE moves them all."""

    base: int | None

    def raft(self, number: int) -> int:
        return (4200 if self.base is None else self.base) + number

    def api(self, number: int) -> int:
        return (8008 if self.base is None else self.base + 10) + number

    def node(self, number: int) -> int:
        return (7117 if self.base is None else self.base + 20) + number

    def control_metrics(self, number: int) -> int:
        return 9420 + 2 * number if self.base is None else self.base + 30 + number

    def agent_metrics(self, number: int) -> int:
        return 9421 + 2 * number if self.base is None else self.base + 40 + number


def number_from(variable: str, default: int | None, least: int, most: int) -> int | None:
    """Return an environment variable's whole number."""
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise ClusterError(f"{variable}: {text!r} is not {least} to {most}")
    return int(text)


def daemons(ports: Ports, agents: int) -> list[Daemon]:
    """Return what the cluster consists of."""
    join = ",".join(f"127.0.0.1:{ports.raft(i)}" for i in range(CONTROL_NODES))
    apis = ",".join(f"127.0.0.1:{ports.api(i)}" for i in range(CONTROL_NODES))
    found = []
    for i in range(CONTROL_NODES):
        name = f"control{i + 1}"
        argv = (
            str(BIN / "prismd"),
            f"--name={name}",
            f"--data-dir={RUN / name}",
            f"--raft=127.0.0.1:{ports.raft(i)}",
            f"--api=127.0.0.1:{ports.api(i)}",
            f"--metrics=127.0.0.1:{ports.control_metrics(i)}",
            f"--bootstrap-expect={CONTROL_NODES}",
            f"--join={join}",
        )
        taken = (
            ("Raft", ports.raft(i)),
            ("API", ports.api(i)),
            ("metrics", ports.control_metrics(i)),
        )
        found.append(Daemon(name, argv, taken, ports.control_metrics(i)))
    for j in range(agents):
        name = f"agent{j + 1}"
        argv = (
            str(BIN / "prism-agent"),
            f"--name={name}",
            f"--data-dir={RUN / name}",
            f"--listen=127.0.0.1:{ports.node(j)}",
            f"--metrics=127.0.0.1:{ports.agent_metrics(j)}",
            f"--control={apis}",
        )
        taken = (("node API", ports.node(j)), ("metrics", ports.agent_metrics(j)))
        found.append(Daemon(name, argv, taken, ports.agent_metrics(j)))
    return found


# ── Processes ────────────────────────────────────────────────────────────────────────────────────


def start_time(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; None: it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def recorded(name: str) -> int | None:
    """Return the pid of a daemon that we started and that still runs."""
    try:
        record = json.loads((RUN / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None
    return record["pid"] if start_time(record["pid"]) == record["start_time"] else None


def names_recorded() -> list[str]:
    """Return the daemons of which there is a record, agents first."""
    return sorted(path.stem for path in RUN.glob("*.json"))


def check_ports(wanted: list[Daemon]) -> None:
    """Raise ClusterError if one of the ports is taken."""
    for daemon in wanted:
        for what, port in daemon.ports:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError as error:
                    raise ClusterError(
                        f"port {port} ({what} of {daemon.name}): {error.strerror}; free it, or "
                        "move all ports: PRISM_PORT_BASE=15000 make up"
                    ) from None


def start(daemon: Daemon) -> None:
    """Start a daemon in a session of its own, and record it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PRISM_")}
    with (RUN / f"{daemon.name}.log").open("ab") as log:
        process = subprocess.Popen(
            daemon.argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=RUN,
            env=environment,
            start_new_session=True,
        )
    record = {"pid": process.pid, "start_time": start_time(process.pid)}
    partial = RUN / f"{daemon.name}.partial"
    partial.write_text(json.dumps(record))
    partial.rename(RUN / f"{daemon.name}.json")


def wait_until(what: str, ready: Callable[[], bool], timeout_s: float) -> None:
    """Wait for a condition."""
    ends = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > ends:
            raise ClusterError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(0.05)


def is_ready(daemon: Daemon) -> bool:
    """Whether a daemon says that it serves. Raises ClusterError if it has ended."""
    if recorded(daemon.name) is None:
        log = (RUN / f"{daemon.name}.log").read_text(errors="replace").strip().splitlines()
        raise ClusterError(f"{daemon.name} ended: {log[-1] if log else 'it said nothing'}")
    try:
        url = f"http://127.0.0.1:{daemon.metrics}/readyz"
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def stop(name: str) -> None:
    """End a daemon with SIGTERM, and after a while with SIGKILL."""
    pid = recorded(name)
    if pid is None:
        return
    started = start_time(pid)
    os.kill(pid, signal.SIGTERM)
    ends = time.monotonic() + STOP_TIMEOUT_S
    while start_time(pid) == started:
        if time.monotonic() > ends:
            print(f"  {name} does not stop; killing it", file=sys.stderr)
            os.kill(pid, signal.SIGKILL)
            ends = float("inf")
        time.sleep(0.02)


# ── Commands ─────────────────────────────────────────────────────────────────────────────────────


def prismctl(api: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run prismctl against one control node."""
    return subprocess.run(
        (str(BIN / "prismctl"), f"--api={api}", *arguments),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def up() -> None:
    """Start what does not run yet; show that it works."""
    agents = number_from("PRISM_AGENTS", 2, 1, AGENTS_MAX) or 2
    base = number_from("PRISM_PORT_BASE", None, 1024, 65535 - 100)
    ports = Ports(base)
    all_daemons = daemons(ports, agents)
    RUN.mkdir(mode=0o700, exist_ok=True)
    settings = {"base": base}
    settings_file = RUN / "settings"
    running = {name for name in names_recorded() if recorded(name) is not None}
    if running and settings_file.exists() and json.loads(settings_file.read_text()) != settings:
        raise ClusterError("the cluster runs on other ports; `make down` first")
    missing = [daemon for daemon in all_daemons if daemon.name not in running]
    check_ports(missing)
    settings_file.write_text(json.dumps(settings))
    if not missing:
        print(f"The cluster runs already: {CONTROL_NODES} control nodes, {agents} agents.")
    for daemon in missing:
        print(f"  starting {daemon.name:<9} " + ", ".join(f"{w} {p}" for w, p in daemon.ports))
        start(daemon)
    for daemon in all_daemons:
        wait_until(daemon.name, lambda daemon=daemon: is_ready(daemon), START_TIMEOUT_S)
    demo(ports)


def demo(ports: Ports) -> None:
    """Create a sandbox through one node, run code in it through another, remove it by a third."""
    apis = [f"127.0.0.1:{ports.api(i)}" for i in range(CONTROL_NODES)]
    name = f"demo-{os.getpid()}"
    steps = (
        (apis[0], ("sandbox", "create", "--name", name, "--wait")),
        (apis[1], ("sandbox", "exec", name, "--", "python3", "-c", DEMO)),
        (apis[2], ("sandbox", "rm", "-f", name)),
    )
    print("\nOne sandbox, through each of the three nodes:")
    for api, arguments in steps:
        shown = " ".join("…" if argument == DEMO else argument for argument in arguments)
        print(f"  $ prismctl --api={api} {shown}")
        done = prismctl(api, *arguments)
        if done.returncode != 0:
            raise ClusterError(f"the demo failed: {done.stderr.strip() or done.stdout.strip()}")
        if "exec" in arguments:
            print(f"    {done.stdout.strip()}")
    api = "" if ports.base is None else f" --api={apis[0]}"
    ctl = f"{BIN.relative_to(ROOT)}/prismctl{api}"
    print(
        "\nThe cluster is up. Try:\n"
        f"  {ctl} info\n"
        f"  {ctl} node ls\n"
        f"  {ctl} sandbox run -- python3 -c 'print(6*7)'\n"
        f"  {ctl} sandbox create --name mine --wait\n"
        f"  {ctl} sandbox exec mine -- sh -c 'uname -a; id'\n"
        f"  {ctl} sandbox ls\n"
        f"  curl http://127.0.0.1:{ports.control_metrics(0)}/metrics\n"
        "Stop it, and leave nothing behind: make down"
    )


def down() -> None:
    """Stop all that `up` started, and remove what it wrote."""
    if not RUN.exists():
        print("Nothing runs.")
        return
    names = names_recorded()
    agents = [name for name in names if name.startswith("agent")]
    others = [name for name in names if name not in agents]
    left: list[str] = []
    for name in agents:
        print(f"  stopping {name} and its sandboxes")
        stop(name)
        if problem := purge(name):
            left.append(problem)
    for name in others:
        print(f"  stopping {name}")
        stop(name)
    if left:  # their journals are kept: the next `down` tries again
        raise ClusterError("; ".join(left))
    shutil.rmtree(RUN)
    print("The cluster is down; nothing of it is left.")


def purge(name: str) -> str:
    """Remove the sandboxes that a stopped agent has left running, as it is meant to.

    Returns:
        What went wrong; empty if nothing did.
    """
    done = subprocess.run(
        (str(BIN / "prism-agent"), f"--data-dir={RUN / name}", "--purge"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return f"{name}: sandboxes are left: {done.stderr.strip()}" if done.returncode else ""


def status() -> None:
    """Show what runs."""
    names = names_recorded()
    if not names:
        print("Nothing runs. Start it with: make up")
    for name in names:
        pid = recorded(name)
        print(f"  {name:<9} " + (f"runs, pid {pid}" if pid else f"has ended; see {RUN}/{name}.log"))


def main() -> int:
    """Run one command; return the exit status."""
    commands = {"up": up, "down": down, "status": status}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=commands)
    try:
        commands[parser.parse_args().command]()
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
