"""A gvisor sandbox with a network, asked for by name on a node that has bubblewrap too."""

import pytest
from prism.agent.v1 import agent_pb2

from tests.integration.agent import world as behind
from tests.integration.agent.conftest import why_no_gvisor
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.ports import ECHO, PortCall, listen
from tests.integration.agent.test_life import DELETED, until
from tests.integration.agent.test_network import probe
from tests.integration.agent.world import (
    HOST,
    METADATA,
    NAMED,
    OTHER,
    PUBLIC,
    UDP,
    World,
    WorldAgent,
    egress,
    make,
    rule,
)

#: The fixtures of this module.
world, agent = behind.world, behind.agent


async def test_it_reaches_what_is_named_and_is_reached_by_its_ports(
    gateway: Gateway, agent: WorldAgent, world: World
) -> None:
    if reason := why_no_gvisor():
        pytest.skip(f"gvisor: {reason}")
    spec = egress(rule(NAMED, 80), rule(PUBLIC, 80, protocol=UDP))
    spec.runtime = "gvisor"
    sandbox = await make(gateway, "sb-1", spec)
    assert gateway.reports[sandbox].runtime == "gvisor"
    targets = {
        f"tcp/{NAMED}/80": HOST,
        f"udp/{PUBLIC}/80": HOST,
        f"tcp/{NAMED}/443": "refused",
        f"tcp/{OTHER}/80": "refused",
        f"tcp/{METADATA}/80": "refused",
        f"tcp/{HOST}/80": "refused",
        "tcp/good.example.org/80": "name",
    }
    assert await probe(agent, sandbox, *targets) == targets
    for kind in ("AF_INET, SOCK_RAW, 1", "AF_PACKET, SOCK_RAW, 0"):
        raw = await agent.python(sandbox, f"from socket import *; socket({kind})")
        assert b"PermissionError" in raw.stderr, raw

    await listen(agent, sandbox, ECHO, 8080)
    call = await PortCall(agent.stub, sandbox, 8080).connect()
    await call.send(b"hello")
    await call.send_eof()
    assert await call.receive() == b"hello|5"

    gateway.want(sandbox, agent_pb2.DESIRED_STATE_DELETED, grace_s=0)
    await gateway.wait_for(sandbox, DELETED)
    await until(lambda: not world.devices())
