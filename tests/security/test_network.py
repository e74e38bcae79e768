"""Hostile programs in a sandbox that has a network: they reach no more than they may."""

import asyncio
import os
import socket
import time

import psutil
import pytest
from prism.agent.v1 import agent_pb2
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_agent.network.namespace import open_socket
from tests.integration.agent import world as behind
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.ports import ECHO, listen
from tests.integration.agent.world import (
    HOST,
    METADATA,
    NAMED,
    PRIVATE,
    PUBLIC,
    UDP,
    World,
    WorldAgent,
    egress,
    make,
    rule,
    run,
)
from tests.security.test_bubblewrap import _TRY

#: The fixtures of this module.
world, agent = behind.world, behind.agent

_UDP = "u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.settimeout(1)"
ATTACKS = {
    "take_the_resolvers_port": "socket.socket().bind(('127.0.0.53', 53))",
    "take_another_port_53": "socket.socket().bind(('127.0.0.1', 53))",
    "raw": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "packet": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x300)",
    "netfilter": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)",
    "add_address": "s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); "
    "s.send(struct.pack('=IHHIIBBBBIHH4s', 32, 20, 0x605, 1, 0, 2, 24, 0, 0, "
    "socket.if_nametoindex('eth0'), 8, 2, bytes([192, 0, 2, 9]))); "
    "checked(struct.unpack_from('=i', s.recv(999), 16)[0])",
    "own_namespace": "checked(libc.unshare(0x40000000))",
    "change_address": "fcntl.ioctl(socket.socket(), 0x8916, struct.pack("
    "'16sHH4s8x', b'eth0', 2, 0, bytes([192, 0, 2, 9])))",
    "change_route": "fcntl.ioctl(socket.socket(), 0x890b, bytes(120))",
    "device_down": "fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sH14x', b'eth0', 0))",
    "mark": "socket.socket().setsockopt(socket.SOL_SOCKET, 36, 1)",
    "transparent": "socket.socket().setsockopt(0, 19, 1)",
    "sysctl_forward": "open('/proc/sys/net/ipv4/ip_forward', 'w').write('1')",
    "sysctl_ipv6": "open('/proc/sys/net/ipv6/conf/eth0/disable_ipv6', 'w').write('0')",
    "sysctl_ports": "open('/proc/sys/net/ipv4/ip_unprivileged_port_start', 'w').write('0')",
    "free_bind": f"{_UDP}; u.setsockopt(0, 15, 1); u.bind(('{PUBLIC}', 0)); "
    f"u.sendto(b'x', ('{NAMED}', 80)); u.recv(9)",
    "source_route": f"{_UDP}; u.setsockopt(0, 4, bytes([131, 7, 4]) + "
    f"socket.inet_aton('{PRIVATE}') + b'\\0'); u.sendto(b'x', ('{NAMED}', 80)); u.recv(9)",
    "metadata": f"socket.create_connection(('{METADATA}', 80), 2)",
    "gateway": "socket.create_connection(('169.254.1.1', 80), 2)",
    "ipv6": "socket.create_connection(('2001:db8::1', 80), 2)",
    "link_local_ipv6": "s = socket.socket(socket.AF_INET6); s.settimeout(2); "
    "s.connect(('fe80::1', 80, 0, socket.if_nametoindex('eth0')))",
    "mapped": f"socket.create_connection(('::ffff:{PRIVATE}', 80), 2)",
    "broadcast": f"{_UDP}; u.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1); "
    "u.sendto(b'x', ('255.255.255.255', 80)); u.recv(9)",
    "multicast": f"{_UDP}; u.sendto(b'x', ('224.0.0.251', 5353)); u.recv(9)",
    "another_server": f"{_UDP}; u.sendto(b'x', ('{PUBLIC}', 53)); u.recv(9)",
}
#: Asks the resolver what `ask` makes of a name, a type and a way, and says what it answers.
_ASK = """
import socket, struct, sys
def question(labels, kind):
    name = b"".join(bytes([len(each)]) + each for each in labels) + b"\\0"
    return struct.pack(">6H", 7, 0x100, 1, 0, 0, 0) + name + struct.pack(">2H", kind, 1)
def by_udp(data, wait_s=3):
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.settimeout(wait_s)
    one.sendto(data, ("127.0.0.53", 53))
    return one.recv(4096)
def by_tcp(data):
    with socket.create_connection(("127.0.0.53", 53), 3) as one:
        one.sendall(struct.pack(">H", len(data)) + data)
        size = struct.unpack(">H", one.recv(2))[0]
        return one.recv(size)
def said(answer):
    flags, _, answers = struct.unpack(">3H", answer[2:8])
    return flags & 15, answers
"""


async def test_attacks_get_nowhere(gateway: Gateway, agent: WorldAgent, world: World) -> None:
    names = [pb.EgressName(name="good.example.org")]
    sandbox = await make(gateway, "sb-1", egress(rule(NAMED, 80, protocol=UDP), names=names))
    denied = "denied = lambda e: isinstance(e, (OSError, AssertionError))\n"
    program = _TRY.partition("try:")[0] + denied
    for name, body in ATTACKS.items():
        program += (
            f"try:\n    {body}\nexcept Exception as e:\n    if not denied(e): print({name!r}, e)\n"
            f"else:\n    print({name!r})\n"
        )
    result = await agent.python(sandbox, program)
    assert (result.code, result.stdout) == (0, b""), result.stderr
    # What is allowed still works, and loopback has IPv6.
    body = (
        f"{_UDP}; u.sendto(b'x', ('{NAMED}', 80)); u.recv(9); "
        "socket.create_server(('::1', 8080), family=socket.AF_INET6)"
    )
    assert (await agent.python(sandbox, _TRY.format(body=body))).stdout == b"GOT IT\n"
    # The host's sockets and devices are not seen.
    result = await agent.run(
        sandbox, ["cat", "/proc/net/tcp", "/proc/net/unix", "/proc/net/dev", "/proc/net/route"]
    )
    text = result.stdout.decode()
    assert "uplink" not in text
    assert "@" not in text
    assert text.count("eth0") >= 2
    own = {os.readlink(f"/proc/{pid}/ns/net") for pid in agent.supervised(sandbox)}
    assert len(own) == 1
    assert own != {os.readlink(f"/proc/{agent.pid}/ns/net")}


async def test_questions_carry_nothing_out_and_garbage_harms_nobody(
    gateway: Gateway, agent: WorldAgent, world: World
) -> None:
    names = [pb.EgressName(name="good.example.org"), pb.EgressName(name="*.example.net")]
    sandbox = await make(gateway, "sb-1", egress(names=names))
    program = _ASK + (
        "good = [b'good', b'example', b'org']\n"
        "print(said(by_udp(question(good, 1))), said(by_tcp(question(good, 1))))\n"
        "for kind in (16, 28, 65, 12, 255): print(said(by_udp(question(good, kind))), end=' ')\n"
        "print()\n"
        "for labels in ([b'secret'] + good, [b'evil.example', b'net'], "
        "[b'x\\0', b'example', b'net'], [b'net'], []):\n"
        "    print(said(by_udp(question(labels, 1))), end=' ')\n"
        "print()\n"
        "import os, random\n"
        "random.seed(7)\n"
        "whole = question(good, 1)\n"
        "for _ in range(60):\n"
        "    data = bytearray(whole + os.urandom(random.randrange(40)))\n"
        "    for _ in range(random.randrange(6)):\n"
        "        data[random.randrange(len(data))] ^= 1 << random.randrange(8)\n"
        "    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "    one.sendto(bytes(data[:random.randrange(len(data) + 1)]), ('127.0.0.53', 53))\n"
        "held = []\n"
        "for _ in range(40):\n"
        "    held.append(socket.create_connection(('127.0.0.53', 53), 3))\n"
        "    held[-1].sendall(b'\\xff')\n"
        "print(said(by_udp(question(good, 1), 10)))\n"
    )
    result = await agent.python(sandbox, program)
    assert result.stdout.decode().splitlines() == [
        "(0, 1) (0, 1)",
        "(0, 0) (0, 0) (0, 0) (0, 0) (0, 0) ",
        "(5, 0) (5, 0) (5, 0) (5, 0) (5, 0) ",
        "(0, 1)",
    ], result.stderr.decode()
    # The second question was remembered, and none of the others was passed on.
    assert world.questions()[0] == "good.example.org."
    assert set(world.questions()) == {"good.example.org."}


async def test_floods_of_questions_and_connections_are_bounded(
    gateway: Gateway, agent: WorldAgent, world: World
) -> None:
    names = [pb.EgressName(name="*")]
    sandbox = await make(gateway, "sb-1", egress(names=names))
    program = _ASK + (
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "for i in range(20000):\n"
        "    one.sendto(question([b'x%d' % i, b'example', b'org'], 1), ('127.0.0.53', 53))\n"
        "print('sent')\n"
    )
    process = psutil.Process(agent.pid)
    before = process.memory_info().rss
    began_s = time.monotonic()
    assert (await agent.python(sandbox, program)).stdout == b"sent\n"
    other = await make(gateway, "sb-2", egress(names=names))
    answer = await agent.python(
        other, _ASK + "print(said(by_udp(question([b'good', b'example', b'org'], 1), 10)))"
    )
    assert answer.stdout == b"(0, 1)\n"
    assert len(world.questions()) < 150 + 10 * (time.monotonic() - began_s)
    assert process.memory_info().rss - before < 64 * 1024 * 1024
    # So are connections, of which the machine has a table.
    sandbox = await make(gateway, "sb-3", egress(rule(NAMED, protocol=UDP)))
    program = (
        "import socket\n"
        "for port in range(20000, 24000):\n"
        "    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); one.bind(('', port))\n"
        f"    one.sendto(b'x', ('{NAMED}', 9))\n"
        "    one.close()\n"
    )
    result = await agent.python(sandbox, program)
    assert result.code == 0, result.stderr
    inside = f"--net=/run/netns/{world.host}"
    count = run("nsenter", inside, "cat", "/proc/sys/net/netfilter/nf_conntrack_count")
    assert 2000 < int(count) < 2300


async def test_a_flood_for_the_resolver_costs_the_agent_little(
    gateway: Gateway, agent: WorldAgent, world: World
) -> None:
    sandbox = await make(gateway, "sb-1", egress(names=[pb.EgressName(name="*")]))
    program = (
        "import socket, time\n"
        "ends, sent = time.monotonic() + 2, 0\n"
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "while time.monotonic() < ends or sent < 50000:\n"
        "    one.sendto(b'x', ('127.0.0.53', 53)); sent += 1\n"
    )
    process = psutil.Process(agent.pid)
    before, began_s = process.cpu_times(), time.monotonic()
    result = await agent.python(sandbox, program)
    after = process.cpu_times()
    assert result.code == 0, result.stderr
    # It lives meanwhile; at some 15 us each they would take it almost a second besides.
    lived = 0.05 * (time.monotonic() - began_s)
    assert after.user + after.system - before.user - before.system < 0.4 + lived


async def test_an_address_comes_without_the_connections_of_who_had_it_before(
    gateway: Gateway, agent: WorldAgent, world: World
) -> None:
    program = (
        f"{_UDP.replace('; ', chr(10))}\nu.bind(('', 5555))\n"
        f"u.sendto(b'x', ('{PUBLIC}', 80))\nprint(u.recv(9))\n"
        f"u.sendto(b'x', ('{PUBLIC}', 80))\nprint(u.recv(9))\n"
    )
    program = f"import socket\n{program}"
    first = await make(gateway, "sb-1", egress(rule(PUBLIC, 80, protocol=UDP)))
    assert (await agent.python(first, program)).code == 0
    address = (await agent.run(first, ["hostname", "-I"])).stdout
    gateway.want(first, agent_pb2.DESIRED_STATE_DELETED, grace_s=0)
    await gateway.wait_for(first, agent_pb2.OBSERVED_STATE_DELETED)
    # A new process of the agent gives addresses from the same one on.
    await agent.kill()
    await agent.start()
    await gateway.wait_registrations(2)
    names = [pb.EgressName(name="bad.example.org")]
    second = await make(gateway, "sb-2", egress(names=names))
    assert (await agent.run(second, ["hostname", "-I"])).stdout == address
    result = await agent.python(second, program)
    assert (result.code, result.stdout) == (1, b""), result


async def test_other_users_of_the_host_reach_no_port_of_a_sandbox(
    gateway: Gateway, agent: WorldAgent, world: World
) -> None:
    # Its answers to the host would be let through.
    sandbox = await make(gateway, "sb-1", egress(rule(HOST), rule(NAMED)))
    server = await listen(agent, sandbox, ECHO, 8000, "0.0.0.0")
    address = (await agent.run(sandbox, ["hostname", "-I"])).stdout.decode().strip()
    connection = await open_socket(world.host_namespace, socket.AF_INET)
    with connection:
        connection.settimeout(3)
        with pytest.raises(OSError, match=r"unreachable|No route|timed out|refused"):
            await asyncio.to_thread(connection.connect, (address, 8000))
    server.cancel()
