"""A real agent and a sandbox to attack from inside: the tests' own user's, and a plain user's."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.integration.agent.conftest import gateway, gvisor_agent, needs_sandboxes, sandbox
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.plain import home, plain_agent, processes, why_no_plain_user
from tests.integration.agent.process import AgentProcess

__all__ = ["agent", "gateway", "gvisor_agent", "needs_sandboxes", "sandbox"]


@asynccontextmanager
async def _running(process: AgentProcess) -> AsyncIterator[AgentProcess]:
    await process.start()
    yield process
    await process.end()
    assert "Traceback" not in process.log.read_text()


#: Tests to be run with an agent of each kind of user, and those of what only a plain one has.
both_users = pytest.mark.parametrize("agent", ["own_user", "plain_user"], indirect=True)
plain_user = pytest.mark.parametrize("agent", ["plain_user"], indirect=True)


@pytest.fixture(params=["own_user"])
async def agent(
    request: pytest.FixtureRequest, needs_sandboxes: None, gateway: Gateway, tmp_path: Path
) -> AsyncIterator[AgentProcess]:
    """A real agent with the bubblewrap runtime; at the end it removes its sandboxes."""
    if request.param == "own_user" or os.geteuid() != 0:
        own = AgentProcess(tmp_path / "data", gateway.address, "--on-exit=delete")
        async with _running(own) as made:
            yield made
        return
    if reason := await asyncio.to_thread(why_no_plain_user):
        pytest.skip(reason)
    with home() as directory:
        async with _running(plain_agent(directory, gateway.address, "--on-exit=delete")) as made:
            yield made
    async with asyncio.timeout(60):
        while processes():  # noqa: ASYNC110 - what ends tells nobody
            await asyncio.sleep(0.02)
