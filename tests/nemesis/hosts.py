"""Control nodes, each with a network namespace and a disk of its own, joined by our bridge."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from tests.nemesis.meddle import Meddle, build

ROOT: Final = Path(__file__).parents[2]
NETWORK: Final = "10.213.0"
BRIDGE: Final = "prism0"
START_TIMEOUT_S: Final = 20.0
#: Of a node's own disk: what a run writes fits many times.
DISK_BYTES: Final = 256 * 2**20


def run(*argv: str, stdin: str | None = None) -> str:
    """Run a program to its end; return its output. Raises CalledProcessError."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=True)
    return done.stdout


def wait_until(what: str, ready: Callable[[], bool], timeout_s: float) -> float:
    """Wait for a condition; return the seconds that it took."""
    started = time.monotonic()
    while not ready():
        if time.monotonic() - started > timeout_s:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.02)
    return time.monotonic() - started


class Host:
    """One control node and its network namespace."""

    def __init__(self, number: int, directory: Path, library: Path) -> None:
        self.number = number
        self.name = f"n{number}"
        self.namespace = f"prism-{os.getpid()}-{number}"
        self.address = f"{NETWORK}.{10 + number}"
        self.api = f"{self.address}:8008"
        self._directory = directory
        self._disk = directory / self.name
        self._ballast = self._disk / "ballast"
        self.meddle = Meddle(library, directory / f"{self.name}.meddle")
        self._process: subprocess.Popen[bytes] | None = None

    def build(self) -> None:
        """Make the disk, the namespace and its link to the bridge."""
        self._disk.mkdir()
        size = f"size={DISK_BYTES},mode=700"
        run("mount", "-t", "tmpfs", "-o", size, "prism-nemesis", str(self._disk))
        outer = f"prism0v{self.number}"
        inside = ("ip", "-n", self.namespace)
        run("ip", "netns", "add", self.namespace)
        run("ip", "link", "add", outer, "type", "veth", "peer", "eth0", "netns", self.namespace)
        run("ip", "link", "set", outer, "master", BRIDGE, "up")
        run(*inside, "address", "add", f"{self.address}/24", "dev", "eth0")
        run(*inside, "link", "set", "eth0", "up")
        run(*inside, "link", "set", "lo", "up")

    def demolish(self) -> None:
        """End the node and remove its disk and the namespace."""
        self.kill()
        subprocess.run(("umount", str(self._disk)), check=False, capture_output=True)
        subprocess.run(("ip", "netns", "del", self.namespace), check=False, capture_output=True)

    # ── Process ──────────────────────────────────────────────────────────────────────────────

    def start(self, members: int) -> None:
        """Start the node."""
        join = ",".join(f"{NETWORK}.{10 + i}:4200" for i in range(members))
        argv = (
            "ip", "netns", "exec", self.namespace, sys.executable, "-m", "prism_control.main",
            f"--name={self.name}", f"--data-dir={self._disk / 'data'}",
            f"--raft={self.address}:4200", f"--api={self.api}", f"--metrics={self.address}:9420",
            f"--bootstrap-expect={members}", f"--join={join}", "--insecure",
        )  # fmt: skip
        with (self._directory / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                argv,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=os.environ
                | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'proto'}"}
                | self.meddle.environment,
            )

    def kill(self) -> None:
        """SIGKILL, and reap."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal. `ip netns exec` has become the node itself."""
        if self._process is not None:
            self._process.send_signal(number)

    @property
    def runs(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def is_stopped(self) -> bool:
        """Whether SIGSTOP holds the process."""
        if self._process is None:
            return False
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0] == "T"

    def ready_text(self) -> str:
        """Return what /readyz says; empty: it is not ready."""
        status, text = self.readyz()
        return text if status == 200 else ""

    def readyz(self) -> tuple[int, str]:
        """Return the status of /readyz, 0 if there is none, and what it says."""
        try:
            url = f"http://{self.address}:9420/readyz"
            with urllib.request.urlopen(url, timeout=1) as reply:
                return reply.status, str(reply.read().decode())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    # ── Disk ─────────────────────────────────────────────────────────────────────────────────

    def fill_disk(self, left_bytes: int) -> None:
        """Leave so much free on the disk."""
        block = bytes(64 * 1024)
        # The node writes too, so it may be full a little earlier.
        with self._ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while self.free_bytes > left_bytes:
                file.write(block)

    def free_disk(self) -> None:
        """Give the room back."""
        self._ballast.unlink(missing_ok=True)

    @property
    def free_bytes(self) -> int:
        """What is free on the disk."""
        state = os.statvfs(self._disk)
        return state.f_bavail * state.f_frsize

    # ── Network ──────────────────────────────────────────────────────────────────────────────

    def drop_from(self, others: Iterable[Host]) -> None:
        """Hear nothing of these hosts any more, and hear all others again."""
        sources = ", ".join(other.address for other in others)
        rules = "flush ruleset\n"
        if sources:
            rules += (
                "table ip prism {\n"
                "  chain input {\n"
                "    type filter hook input priority 0; policy accept;\n"
                f"    ip saddr {{ {sources} }} counter drop\n"
                "  }\n"
                "}\n"
            )
        run("ip", "netns", "exec", self.namespace, "nft", "-f", "-", stdin=rules)

    @property
    def dropped_packets(self) -> int:
        """Packets that were not heard since the last change of `drop_from`."""
        ruleset = run("ip", "netns", "exec", self.namespace, "nft", "list", "ruleset")
        return sum(int(count) for count in re.findall(r"counter packets (\d+)", ruleset))


class Hosts:
    """All of them. The caller's own network namespace must be new: it holds the bridge."""

    def __init__(self, count: int, directory: Path) -> None:
        library = build(directory)
        self.all = [Host(number, directory, library) for number in range(count)]

    def __enter__(self) -> Hosts:
        links = json.loads(run("ip", "-j", "link"))
        if any(link["ifname"] != "lo" for link in links):
            raise SystemExit("not in a network namespace of its own: use tests.nemesis.run")
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "address", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        for host in self.all:
            host.build()
            host.start(len(self.all))
        self.wait_healthy(START_TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.all:
            host.demolish()

    def wait_healthy(self, timeout_s: float) -> float:
        """Wait until all name the same leader; return the seconds that it took."""

        def healthy() -> bool:
            texts = {host.ready_text() for host in self.all}
            return len(texts) == 1 and "" not in texts

        return wait_until("one leader that all know", healthy, timeout_s)

    def heal(self) -> None:
        """Undo every fault."""
        for host in self.all:
            host.drop_from(())
            host.free_disk()
            host.meddle.slow_disk(0)
            host.meddle.shift_clock(0)
            host.signal(signal.SIGCONT)
            if not host.runs:
                host.kill()
                host.start(len(self.all))
