"""A host with an agent, and the world behind it: two network namespaces that the test makes.

`host` is where the agent runs: 192.0.2.1 leads to the world. `world` has the addresses 203.0.113.5
(documentation; so it must be named), 9.9.9.9 (public), 10.9.0.1 (private) and 169.254.169.254
(metadata), and listens on each. What is in the namespaces is reached from here by sockets that are
made there.
"""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prism.agent.v1 import agent_pb2
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_agent.network.namespace import open_socket
from prism_common.channels import open_channel
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess

TCP, UDP = pb.TRANSPORT_PROTOCOL_TCP, pb.TRANSPORT_PROTOCOL_UDP
PUBLIC, OTHER, NAMED = "9.9.9.9", "8.8.4.4", "203.0.113.5"
PRIVATE, METADATA, HOST = "10.9.0.1", "169.254.169.254", "192.0.2.1"
_WORLD_ADDRESSES = (PUBLIC, OTHER, NAMED, PRIVATE, METADATA)
#: Answers connections on 80 and 443 and datagrams on 80 with who asks, and questions for names.
_SERVER = """
import selectors, socket, sys
import dns.message, dns.rrset, dns.flags
names = {"good.example.org.": ["9.9.9.9"], "bad.example.org.": ["9.9.9.9"],
    "rebind.example.org.": ["10.9.0.1"], "metadata.example.org.": ["169.254.169.254"],
    "mixed.example.org.": ["10.9.0.1", "9.9.9.9"], "other.example.net.": ["8.8.4.4"],
    "host.example.org.": ["192.0.2.1"], "db.internal.": ["10.9.0.1"]}
selector = selectors.DefaultSelector()
for port in (80, 443):
    selector.register(socket.create_server(("0.0.0.0", port), backlog=64), 1, "tcp")
for address in sys.argv[1:]:
    for port, kind in ((80, "udp"), (53, "dns")):
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.bind((address, port))
        selector.register(one, 1, kind)
print("up", flush=True)
while True:
    for key, _ in selector.select():
        if key.data == "tcp":
            connection, peer = key.fileobj.accept()
            with connection:
                connection.settimeout(5)
                try:
                    connection.sendall(peer[0].encode())
                except OSError:
                    pass
            continue
        data, peer = key.fileobj.recvfrom(4096)
        if key.data == "udp":
            key.fileobj.sendto(peer[0].encode(), peer)
            continue
        question = dns.message.from_wire(data)
        answer = dns.message.make_response(question)
        name = question.question[0].name
        print("asked", name, flush=True)
        if name.to_text() in names:
            found = names[name.to_text()]
            answer.answer.append(dns.rrset.from_text_list(name, 30, "IN", "A", found))
        else:
            answer.set_rcode(3)
        key.fileobj.sendto(answer.to_wire(), peer)
"""


def why_no_networks() -> str:
    """Return why networks cannot be made here; empty: they can."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [each for each in ("ip", "nft", "nsenter") if shutil.which(each) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    name = f"prism-test-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode != 0:
        return f"no network namespaces: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


def run(*arguments: str, text: str | None = None) -> str:
    done = subprocess.run(arguments, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stderr}"
    return done.stdout


class World:
    """Both namespaces, and what runs in them."""

    def __init__(self) -> None:
        self.host = f"prism-test-{os.getpid()}-host"
        self.world = f"prism-test-{os.getpid()}-world"
        self._server: subprocess.Popen[str] | None = None
        self._stack = contextlib.AsyncExitStack()
        self.host_namespace = -1
        self.asked = Path()

    async def start(self, directory: Path) -> None:
        for name in (self.host, self.world):
            run("ip", "netns", "add", name)
        run("ip", "-netns", self.host, "-batch", "-", text=(
            "link set lo up\n"
            f"link add name uplink type veth peer name downlink netns {self.world}\n"
            f"addr add {HOST}/24 dev uplink\nlink set dev uplink up\n"
            "route add default via 192.0.2.2\n"
        ))  # fmt: skip
        run("ip", "-netns", self.world, "-batch", "-", text=(
            "link set lo up\naddr add 192.0.2.2/24 dev downlink\nlink set dev downlink up\n"
            + "".join(f"addr add {address}/32 dev lo\n" for address in _WORLD_ADDRESSES)
        ))  # fmt: skip
        run("ip", "netns", "exec", self.host, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.asked = directory / "world.log"
        self._spawn(self.world, self.asked, *_WORLD_ADDRESSES)
        # The host listens too, on all its addresses: nothing of it may be reached.
        self._spawn(self.host, directory / "host.log", HOST)
        self.host_namespace = os.open(f"/run/netns/{self.host}", os.O_RDONLY | os.O_CLOEXEC)

    def _spawn(self, namespace: str, log: Path, *addresses: str) -> None:
        with log.open("w") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, sys.executable, "-c", _SERVER, *addresses],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        while "up" not in log.read_text():
            assert process.poll() is None, log.read_text()

    def questions(self) -> list[str]:
        return [line.split()[1] for line in self.asked.read_text().splitlines() if " " in line]

    async def bridge(self, into: bool, address: str) -> str:
        """Carry connections between here and the host's namespace; return where they are taken.

        Args:
            into: From here to an address there; else from there to an address here.
            address: Of a listener on loopback.
        """
        here, there = (
            socket.socket(socket.AF_INET, socket.SOCK_STREAM),
            await open_socket(self.host_namespace, socket.AF_INET),
        )
        listener = here if into else there
        (there if into else here).close()
        listener.setblocking(False)
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        port = int(address.rpartition(":")[2])
        group = await self._stack.enter_async_context(asyncio.TaskGroup())

        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if into:
                connection = await open_socket(self.host_namespace, socket.AF_INET)
            else:
                connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
                connection.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
            except OSError:
                connection.close()
                writer.transport.abort()
                return
            far_reader, far_writer = await asyncio.open_connection(sock=connection)
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(_copy(reader, far_writer))
                    both.create_task(_copy(far_reader, writer))
            finally:
                writer.transport.abort()
                far_writer.transport.abort()

        tasks: set[asyncio.Task[None]] = set()

        def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = group.create_task(carry(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(take, sock=listener)

        def stop() -> None:
            server.close()
            for task in tasks:
                task.cancel()

        self._stack.callback(stop)
        return f"127.0.0.1:{listener.getsockname()[1]}"

    async def stop(self) -> None:
        await self._stack.aclose()
        if self.host_namespace >= 0:
            os.close(self.host_namespace)
        for name in (self.host, self.world):
            if os.path.exists(f"/run/netns/{name}"):  # noqa: ASYNC240  # of the kernel's
                run("ip", "netns", "delete", name)

    # ── what is left on the host ──

    def devices(self) -> list[str]:
        lines = run("ip", "-netns", self.host, "-oneline", "link", "show").splitlines()
        names = [line.split(": ")[1].partition("@")[0] for line in lines]
        return [name for name in names if name not in ("lo", "uplink")]

    def rules(self) -> str:
        return run("ip", "netns", "exec", self.host, "nft", "list", "ruleset")


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()


class WorldAgent(AgentProcess):
    """An agent on the world's host."""

    def __init__(self, world: World, data_dir: Path, control: str, *flags: str) -> None:
        prefix = ("nsenter", f"--net=/run/netns/{world.host}", "--")
        super().__init__(data_dir, control, *flags, prefix=prefix)
        self._world = world

    async def serving(self) -> None:
        address = await self._read_address(self._log_offset)
        self.address = await self._world.bridge(True, address)
        if self._channel is not None:
            await self._channel.close()
        self._channel = open_channel(self.address)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    if reason := why_no_networks():
        pytest.skip(reason)
    made = World()
    try:
        await made.start(tmp_path)
        yield made
    finally:
        await made.stop()


@pytest.fixture
async def agent(
    needs_sandboxes: None, world: World, gateway: Gateway, tmp_path: Path
) -> AsyncIterator[WorldAgent]:
    """An agent on the world's host, which asks the world for names."""
    control = await world.bridge(False, gateway.address)
    process = WorldAgent(
        world, tmp_path / "data", control, "--on-exit=delete", f"--dns-servers={PUBLIC}"
    )
    await process.start()
    yield process
    await process.end()
    assert "Traceback" not in process.log.read_text()


# ── what sandboxes ask for ───────────────────────────────────────────────────────────────────


def egress(*rules: pb.EgressRule, names: list[pb.EgressName] | None = None) -> pb.SandboxSpec:
    network = pb.Network(mode=pb.NETWORK_MODE_EGRESS, rules=rules, names=names or [])
    return pb.SandboxSpec(network=network)


def rule(cidr: str, *ports: int, protocol: "pb.TransportProtocol.ValueType" = TCP) -> pb.EgressRule:
    return pb.EgressRule(
        cidr=cidr, ports=[pb.PortRange(first=port) for port in ports], protocol=protocol
    )


async def make(gateway: Gateway, name: str, spec: pb.SandboxSpec) -> str:
    await gateway.wait_registrations(1)
    gateway.assign(name, spec=spec)
    await gateway.wait_for(name, agent_pb2.OBSERVED_STATE_READY)
    return name
