"""Fixtures: a control plane, an agent process, a READY sandbox."""

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prism.agent.v1 import agent_pb2

from prism_agent import cgroups
from prism_agent.runtime import gvisor_release
from prism_agent.runtime.bubblewrap import SUPERVISOR
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess


def why_no_sandboxes() -> str:
    """Return why sandboxes cannot be run here; empty: they can."""
    if shutil.which("bwrap") is None:
        return "bwrap is not installed"
    if not os.access(SUPERVISOR, os.X_OK):
        return "the supervisor is not built: pip install -e ."
    return ""


def why_no_gvisor() -> str:
    """Return why sandboxes of gVisor cannot be run here; empty: they can."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.access(SUPERVISOR, os.X_OK):
        return "the supervisor is not built: pip install -e ."
    groups, problem = cgroups.find_on_this_machine("test-gvisor")
    if groups is None:
        return problem
    groups.close()
    try:
        gvisor_release.find_runsc()
    except gvisor_release.NoRunscError as error:
        return str(error)
    return ""


@pytest.fixture
def needs_sandboxes() -> None:
    if reason := why_no_sandboxes():
        pytest.skip(reason)


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    gateway = Gateway()
    await gateway.start()
    yield gateway
    await gateway.stop()


@pytest.fixture
async def agent(
    needs_sandboxes: None, gateway: Gateway, tmp_path: Path
) -> AsyncIterator[AgentProcess]:
    """A real agent with the bubblewrap runtime; at the end it removes its sandboxes."""
    process = AgentProcess(
        tmp_path / "data", gateway.address, "--runtime=bubblewrap", "--on-exit=delete"
    )
    await process.start()
    yield process
    await process.end()
    assert "Traceback" not in process.log.read_text()


@pytest.fixture
async def gvisor_agent(gateway: Gateway, tmp_path: Path) -> AsyncIterator[AgentProcess]:
    """The same with the gvisor runtime; the test is skipped where there is none."""
    if reason := why_no_gvisor():
        pytest.skip(f"gvisor: {reason}")
    process = AgentProcess(
        tmp_path / "data", gateway.address, "--runtime=gvisor", "--on-exit=delete"
    )
    await process.start()
    yield process
    await process.end()
    assert "Traceback" not in process.log.read_text()


@pytest.fixture
async def fake_agent(gateway: Gateway, tmp_path: Path) -> AsyncIterator[AgentProcess]:
    process = AgentProcess(tmp_path / "data", gateway.address, "--runtime=fake")
    await process.start()
    yield process
    await process.end()
    assert "Traceback" not in process.log.read_text()


@pytest.fixture
async def sandbox(gateway: Gateway, agent: AgentProcess) -> str:
    """A READY sandbox with the default limits."""
    await gateway.wait_registrations(1)
    gateway.assign("sb-1")
    await gateway.wait_for("sb-1", agent_pb2.OBSERVED_STATE_READY)
    return "sb-1"
