"""The disk of the agent's data directory is full: what runs goes on, and a start is refused."""

import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from prism.agent.v1 import agent_pb2

from prism_agent.runtime import host
from prism_common.limits import MIB
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess
from tests.integration.agent.test_life import DELETED, FAILED, READY, STOPPED


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    host.mount_tmpfs(disk, 16 * MIB, 0)
    yield disk
    host.unmount(disk)


def fill(file: Path) -> None:
    """Write until nothing more goes in."""
    with file.open("wb", buffering=0) as whole:
        try:
            while whole.write(bytes(4096)):
                pass
        except OSError:
            return


async def fail_to_start(gateway: Gateway) -> list[str]:
    """Start sandboxes until one fails, and return all: the journal's last page has some room."""
    names: list[str] = []

    def settled() -> bool:
        report = gateway.reports.get(names[-1])
        return report is not None and report.state in (READY, FAILED)

    for number in range(20):
        names.append(f"sb-late-{number}")
        gateway.assign(names[-1])
        await gateway.wait(settled)
        report = gateway.reports[names[-1]]
        if report.state == FAILED:
            assert (report.reason, "No space left" in report.message) == ("START_FAILED", True)
            return names
    raise AssertionError("the disk is not full")


async def test_a_full_disk_refuses_starts_and_ends_nothing(
    needs_sandboxes: None, gateway: Gateway, small_disk: Path
) -> None:
    agent = AgentProcess(small_disk / "data", gateway.address)
    # Its log is not on the disk that is full.
    agent.log = small_disk.with_suffix(".log")
    try:
        await agent.start()
        await gateway.wait_registrations(1)
        for name in ("sb-run", "sb-stop"):
            gateway.assign(name)
            await gateway.wait_for(name, READY)
        call = agent.open("sb-run", ["sh", "-c", "echo up; read x; exit 7"], stdin=True)
        await call.until(b"up\n")
        fill(small_disk / "ballast")
        await call.send(stdin=b"go\n")
        assert (await call.result()).code == 7
        late = await fail_to_start(gateway)
        with pytest.raises(grpc.aio.AioRpcError):
            await agent.run("sb-run", ["true"])
        gateway.want("sb-stop", agent_pb2.DESIRED_STATE_STOPPED, grace_s=0)
        await gateway.wait_for("sb-stop", STOPPED)
        assert gateway.reports["sb-run"].state == READY
        (small_disk / "ballast").unlink()
        assert (await agent.run("sb-run", ["echo", "on"])).stdout == b"on\n"
        for name in ("sb-run", "sb-stop", *late):
            gateway.want(name, agent_pb2.DESIRED_STATE_DELETED, grace_s=0)
            await gateway.wait_for(name, DELETED)
        assert await agent.end() == 0
    finally:
        await agent.clear()
    assert len(gateway.registrations) == 1
