"""IPv6 of a sandbox that has a network: it has none, and who makes some reaches nothing by it.

Code in a sandbox cannot turn IPv6 on (`test_network.py`, "sysctl_ipv6"). Here the test does it for
the code, as root of the machine and inside the sandbox's namespace: what a broken kernel or a hole
in a runtime might allow at the worst. The rules of the host must refuse it all the same.
"""

import os
import socket
from pathlib import Path
from typing import Final

from prism.node.v1 import node_pb2

from prism_agent.network.namespace import open_socket
from tests.integration.agent import world as behind
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.world import NAMED, World, WorldAgent, egress, make, rule, run

#: The fixtures of this module.
world, agent = behind.world, behind.agent

_HOST, _SANDBOX, _GATEWAY = "2606:4700:10::1", "2606:4700:20::2", "2606:4700:20::1"
#: Of the world: public, unique local, metadata of a cloud, documentation, and those that hold an
#: address of IPv4: translated (64:ff9b::), 6to4 and Teredo.
_WORLD: Final = (
    "2606:4700:4700::1111",
    "fd00::5",
    "fd00:ec2::254",
    "2001:db8::5",
    "64:ff9b::a09:1",
    "2002:a09:1::1",
    "2001::5",
)
_CONNECT: Final = """
import concurrent.futures, socket, sys
def outcome(address):
    try:
        socket.create_connection((address, 80), 1).close()
    except OSError:
        return "refused"
    return "reached"
addresses = sys.argv[1:]
with concurrent.futures.ThreadPoolExecutor(len(addresses)) as pool:
    for address, said in zip(addresses, pool.map(outcome, addresses)):
        print(address, said)
"""


def _give_ipv6(world: World, namespace: Path, device: str) -> None:
    """Give IPv6 to host, world, and a sandbox's namespace, with all routes that it takes."""
    for each, devices in ((world.host, ("uplink", device)), (world.world, ("downlink",))):
        for name in ("all", *devices):
            path = f"net.ipv6.conf.{name}.disable_ipv6=0"
            run("ip", "netns", "exec", each, "sysctl", "-qw", path)
    run("ip", "netns", "exec", world.host, "sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
    run("ip", "-netns", world.host, "-batch", "-", text=(
        f"addr add {_HOST}/64 dev uplink nodad\naddr add {_GATEWAY}/64 dev {device} nodad\n"
        f"neigh replace {_SANDBOX} lladdr 02:00:00:00:00:02 dev {device} nud permanent\n"
        "route add default via 2606:4700:10::2\n"
    ))  # fmt: skip
    run("ip", "-netns", world.world, "-batch", "-", text=(
        "addr add 2606:4700:10::2/64 dev downlink nodad\n"
        f"route add {_SANDBOX}/128 via {_HOST}\n"
        + "".join(f"addr add {each}/128 dev lo nodad\n" for each in _WORLD)
    ))  # fmt: skip
    inside = f"--net={namespace}"
    for name in ("all", "eth0"):
        run("nsenter", inside, "sysctl", "-qw", f"net.ipv6.conf.{name}.disable_ipv6=0")
    run("nsenter", inside, "ip", "-batch", "-", text=(
        f"addr add {_SANDBOX}/64 dev eth0 nodad\n"
        f"neigh replace {_GATEWAY} lladdr 02:00:00:00:00:01 dev eth0 nud permanent\n"
        f"route add default via {_GATEWAY} dev eth0\n"
    ))  # fmt: skip


async def _listen(namespace: str) -> socket.socket:
    """Accept connections over IPv6, on every address of a namespace."""
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        listener = await open_socket(descriptor, socket.AF_INET6)
    finally:
        os.close(descriptor)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind(("::", 80))
    listener.listen(64)
    return listener


async def test_what_turns_ipv6_on_reaches_neither_the_world_nor_the_host(
    gateway: Gateway, agent: WorldAgent, world: World
) -> None:
    # All of IPv4 is open to it, and all of it is of no use for IPv6.
    sandbox = await make(gateway, "sb-1", egress(rule("0.0.0.0/0"), rule(NAMED)))
    namespace = agent.data_dir / "sandboxes" / sandbox / "network"
    (device,) = world.devices()
    inside = f"--net={namespace}"
    assert run("nsenter", inside, "ip", "-6", "-oneline", "addr", "show", "dev", "eth0") == ""
    health = await agent.node.GetHealth(node_pb2.GetHealthRequest())
    (said,) = [check.message for check in health.checks if check.name == "network"]
    assert said == "egress over IPv4; IPv6 is denied to all sandboxes"
    _give_ipv6(world, namespace, device)
    targets = (*_WORLD, _HOST, _GATEWAY)

    async def reached() -> set[str]:
        result = await agent.run(sandbox, ["python3", "-c", _CONNECT, *targets], timeout_s=60)
        lines = result.stdout.decode().splitlines()
        assert len(lines) == len(targets), result
        return {line.split()[0] for line in lines if line.endswith("reached")}

    with await _listen(world.world), await _listen(world.host):
        assert await reached() == set()
        # Of the two sets of rules either is enough.
        outer = run("ip", "netns", "exec", world.host, "nft", "list", "ruleset")
        inner = run("nsenter", inside, "nft", "list", "ruleset")
        run("nsenter", inside, "nft", "flush", "ruleset")
        assert await reached() == set()
        run("nsenter", inside, "nft", "-f", "-", text=inner)
        run("ip", "netns", "exec", world.host, "nft", "flush", "ruleset")
        assert await reached() == set()
        # And it is they that refuse: without both, every one of these is reached. The agent puts
        # its own back at some time, so both are gone for a moment only.
        for _ in range(5):
            run("nsenter", inside, "nft", "flush", "ruleset")
            run("ip", "netns", "exec", world.host, "nft", "flush", "ruleset")
            if await reached() == set(targets):
                break
        else:
            raise AssertionError("nothing was reached without rules: the test tries nothing")
        run("ip", "netns", "exec", world.host, "nft", "-f", "-", text=f"flush ruleset\n{outer}")
        assert await reached() == set()
