"""A supervisor as PID 1 of a namespace, with a test as its agent; built as usual or sanitised."""

import asyncio
import os
import shutil
import socket
import subprocess
from pathlib import Path

from prism_agent.runtime import host
from prism_agent.runtime.bubblewrap import SUPERVISOR
from prism_agent.supervisor import protocol
from prism_agent.supervisor.client import SupervisorClient
from prism_agent.supervisor.protocol import Event, Message, Request, RingHeader, State
from prism_agent.supervisor.ring import Ring

RING_BYTES = 256 * 1024
#: The leak check would ptrace, which the supervisor forbids; descriptors are counted instead.
_SANITISERS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
_FLAGS = ("-std=gnu11", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def build_sanitised(directory: Path) -> Path | None:
    """Compile it with the sanitisers; None: this machine's compiler has none."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    target = directory / "prism-supervisor"
    sources = sorted(str(path) for path in SUPERVISOR.parent.glob("*.c"))
    probe = directory / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    # Instrumented code makes gcc warn of what is right.
    command = [compiler, "-w", *_FLAGS, "-o", str(target)]
    if subprocess.run([*command, str(probe)], capture_output=True, check=False).returncode != 0:
        return None
    subprocess.run([*command, *sources], check=True)
    return target


class Supervised:
    """One supervisor, and the execs that a test starts in it.

    Args:
        directory: Holds the socket, rings and the log.
        program: The supervisor.
        listen_in: The directory that it shares with the agent, where it is passed no descriptors.
    """

    def __init__(
        self, directory: Path, program: Path = SUPERVISOR, listen_in: Path | None = None
    ) -> None:
        self.directory = directory
        self.tag = f"test-{os.getpid()}/{directory.name}"
        self.socket_path = directory / "control"
        self.events: list[Message] = []
        self.changed = asyncio.Event()
        self.rings: dict[int, Ring] = {}
        self.client = SupervisorClient(self._on_event, lambda: None)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(self.socket_path))
        listener.listen(4)
        argv = ["bwrap", "--unshare-pid", "--unshare-net", "--as-pid-1", "--dev-bind", "/", "/",
                "--proc", "/proc", "--", str(program), "supervise",
                str(listen_in or listener.fileno()), "256", "0", self.tag]  # fmt: skip
        self.log_path = directory / "supervisor.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                argv, pass_fds=[listener.fileno()], stderr=log, env={**os.environ, **_SANITISERS}
            )
        listener.close()

    def _on_event(self, message: Message) -> None:
        self.events.append(message)
        self.changed.set()

    def start(self, number: int, argv: list[str], flags: int = 0, timeout_ns: int = 0) -> Ring:
        ring = Ring.create(self.directory / f"{number}.ring", RING_BYTES)
        self.rings[number] = ring
        spec = os.memfd_create("spec")
        os.write(spec, protocol.encode_spec("/", argv, {"PATH": "/usr/bin:/bin"}))
        message = Message(Request.EXEC, number, timeout_ns, flags)
        self.client.send(message, [spec, ring.fileno()])
        os.close(spec)
        return ring

    async def wait(self, number: int, state: State) -> RingHeader:
        async with asyncio.timeout(20):
            while (header := self.rings[number].header()).state < state:
                self.changed.clear()
                await self.changed.wait()
        return header

    async def run(self, number: int, argv: list[str]) -> tuple[RingHeader, bytes]:
        ring = self.start(number, argv)
        header = await self.wait(number, State.DRAINED)
        return header, output_of(ring)

    async def error(self) -> Message:
        async with asyncio.timeout(20):
            while not any(each.kind == Event.ERROR for each in self.events):
                self.changed.clear()
                await self.changed.wait()
        return next(each for each in self.events if each.kind == Event.ERROR)

    def pid(self) -> int:
        """Return PID 1 as the host sees it; not the bwrap around it."""
        pids = [pid for pid, its in host.supervised(self.tag) if its == self.tag]
        return next(pid for pid in pids if pid != self.process.pid)

    def end(self) -> str:
        """Kill it, and return what it said: sanitisers speak on its standard error."""
        self.client.close()
        for ring in self.rings.values():
            ring.close()
        host.kill_supervised(self.tag, exact=True)
        self.process.wait()
        return self.log_path.read_text(errors="replace")


def output_of(ring: Ring, offset: int = 0) -> bytes:
    data = b""
    while True:
        outputs, offset = ring.read(offset)
        if not outputs:
            return data
        data += b"".join(each.data for each in outputs)
