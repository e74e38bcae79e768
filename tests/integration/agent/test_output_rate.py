"""Output that comes too fast is slowed, whoever reads it, and nothing of it is lost."""

import time

from prism.sandbox.v1 import sandbox_pb2

from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess
from tests.integration.agent.test_life import READY
from tests.integration.agent.test_restart import kill_and_restart

RATE = 512 * 1024
#: What may come at once.
BURST = 64 * 1024
SEQUENCE = b"".join(b"%d\n" % number for number in range(1, 60_001))


async def start(gateway: Gateway, sandbox_id: str) -> None:
    limits = sandbox_pb2.Limits(output_bytes_per_second=RATE)
    gateway.assign(sandbox_id, spec=sandbox_pb2.SandboxSpec(limits=limits))
    await gateway.wait_for(sandbox_id, READY)


async def test_output_comes_whole_and_no_faster_than_allowed(
    agent: AgentProcess, gateway: Gateway
) -> None:
    await gateway.wait_registrations(1)
    await start(gateway, "sb-1")
    began_s = time.monotonic()
    assert (await agent.run("sb-1", ["seq", "60000"])).stdout == SEQUENCE
    assert time.monotonic() - began_s > (len(SEQUENCE) - BURST) / RATE * 0.95


async def test_the_rate_holds_while_no_agent_runs_and_for_the_next_one(
    agent: AgentProcess, gateway: Gateway
) -> None:
    await gateway.wait_registrations(1)
    await start(gateway, "sb-1")
    began_s = time.monotonic()
    call = agent.open("sb-1", ["seq", "60000"])
    so_far = await call.until(b"10\n")
    await kill_and_restart(agent, gateway)
    assert (await agent.attach("sb-1", so_far.exec_id).result()).stdout == SEQUENCE
    took_s = time.monotonic() - began_s
    assert took_s > (len(SEQUENCE) - BURST) / RATE * 0.95
    began_s = time.monotonic()
    assert (await agent.run("sb-1", ["seq", "60000"])).stdout == SEQUENCE
    assert time.monotonic() - began_s > (len(SEQUENCE) - 2 * BURST) / RATE * 0.95
