"""Ports of a gvisor sandbox without a network: all that holds for those of bubblewrap holds here.

The way there is another: the supervisor inside carries the bytes (`network/relayed.py`).
"""

import asyncio
import os
import signal

import psutil
import pytest

from prism_common.status import from_rpc_error
from tests.integration.agent.ports import ECHO, PortCall, listen
from tests.integration.agent.process import AgentProcess
from tests.integration.agent.test_life import until
from tests.integration.agent.test_ports import (  # noqa: F401  (they run here with another agent)
    test_a_client_that_does_not_read_holds_the_sandbox_up_and_not_the_agent,
    test_a_client_that_goes_away_resets_and_one_that_ends_does_not,
    test_bytes_and_half_closes_pass_both_ways_on_many_connections,
    test_what_cannot_be_connected_to_is_said,
)
from tests.integration.agent.test_runtimes import cgroup_pids


@pytest.fixture
def agent(gvisor_agent: AgentProcess) -> AgentProcess:
    return gvisor_agent


async def test_what_was_broken_off_does_not_seem_whole_and_nothing_is_left(
    agent: AgentProcess, sandbox: str
) -> None:
    server = await listen(agent, sandbox, ECHO, 8000)
    shared = agent.data_dir / "sandboxes" / sandbox / "execs" / "memory" / "shared"
    descriptors = psutil.Process(agent.pid).num_fds()
    for _ in range(5):
        call = await PortCall(agent.stub, sandbox, 8000).connect()
        await call.send(b"whole")
        await call.send_eof()
        assert await call.receive_all() == b"whole|5"
        await call.finish()
    await until(lambda: psutil.Process(agent.pid).num_fds() <= descriptors)
    # The supervisor, the server, this shell with two children: no relay that ended.
    look = "until [ $(ls -d /proc/[0-9]* | wc -l) -le 5 ]; do sleep 0.05; done"
    assert (await agent.run(sandbox, ["sh", "-c", look], timeout_s=20)).code == 0
    assert [each.name for each in shared.iterdir()] == ["control"]
    call = await PortCall(agent.stub, sandbox, 8000).connect()
    await call.send(b"half")
    for pid in cgroup_pids(agent, sandbox):
        os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        failure = from_rpc_error(await call.failure())
    assert failure.code in ("SANDBOX_GONE", "CONNECTION_RESET")
    server.cancel()
