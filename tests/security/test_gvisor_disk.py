"""What a gVisor kernel that was taken over can write on the host: memory of its sandbox, no disk.

Programs here have the rights of the sandbox's kernel and of its file server on the host, as whoever
has broken out of the code that they run would have.
"""

import asyncio
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from prism.agent.v1 import agent_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent.runtime import host
from prism_common.limits import MIB
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess
from tests.integration.agent.test_life import until
from tests.integration.agent.test_restart import kill_and_restart
from tests.integration.agent.test_runtimes import cgroup_pids

_MEMORY: Final = 64 * MIB
#: Writes a file in each directory that takes one, until no more goes in, and says how much did.
_FILL: Final = """
import os
left = ["/"]
while left:
    directory = left.pop()
    try:
        if directory.count("/") < 3:
            found = list(os.scandir(directory))
            left += [each.path for each in found if each.is_dir(follow_symlinks=False)]
        descriptor = os.open(directory + "/fill", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        continue
    written, error = 0, 0
    while written < 1 << 30:
        try:
            written += os.write(descriptor, bytes(1 << 20))
        except OSError as refused:
            error = refused.errno
            break
    for number in range(100_000):
        try:
            os.close(os.open(f"{directory}/{number}", os.O_WRONLY | os.O_CREAT))
        except OSError as refused:
            break
    print(directory, written, error, number, flush=True)
"""


@pytest.fixture
def agent(gvisor_agent: AgentProcess) -> AgentProcess:
    return gvisor_agent


@pytest.fixture
async def sandbox(agent: AgentProcess, gateway: Gateway) -> str:
    """A small one that runs something whose output is kept."""
    await gateway.wait_registrations(1)
    limits = sandbox_pb2.Limits(memory_bytes=_MEMORY)
    gateway.assign("sb-1", spec=sandbox_pb2.SandboxSpec(limits=limits))
    await gateway.wait_for("sb-1", agent_pb2.OBSERVED_STATE_READY)
    call = agent.open("sb-1", ["sh", "-c", "echo up; exec sleep 1000"])
    await call.until(b"up\n")
    return "sb-1"


def _processes(agent: AgentProcess, sandbox: str) -> tuple[int, int, int]:
    """Return the pids of a sandbox's kernel and file server, and their user."""
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in cgroup_pids(agent, sandbox)}
    (kernel,) = [pid for pid, name in names.items() if b"runsc-sandbox" in name]
    (files,) = [pid for pid, name in names.items() if b"runsc-gofer" in name]
    return kernel, files, os.stat(f"/proc/{kernel}").st_uid


def _writable(pid: int) -> Iterator[Path]:
    """Yield the descriptors of a process that write to a file, or can make one."""
    for entry in os.listdir(f"/proc/{pid}/fd"):
        path = Path(f"/proc/{pid}/fd/{entry}")
        flags = Path(f"/proc/{pid}/fdinfo/{entry}").read_text().split("flags:")[1].split()[0]
        if stat.S_ISREG(path.stat().st_mode) and int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
            yield path


def _write(path: Path, size: int) -> None:
    """Write to a file from its beginning on."""
    with path.open("r+b", buffering=0) as file:
        while size > 0:
            size -= file.write(bytes(MIB))


def _on_disk(directory: Path) -> int:
    """Return what a directory takes of the file system that it is on."""
    said = subprocess.run(["du", "-xsk", str(directory)], capture_output=True, check=True)
    return int(said.stdout.split()[0]) * 1024


def _size_of(directory: Path) -> int:
    """Return the size of the file system that a directory is on."""
    found = os.statvfs(directory)
    return found.f_blocks * found.f_frsize


async def test_no_descriptor_of_its_kernel_writes_to_the_disk(
    agent: AgentProcess, sandbox: str
) -> None:
    kernel, files, _ = _processes(agent, sandbox)
    disk = agent.data_dir.stat().st_dev
    found = [path for pid in (kernel, files) for path in _writable(pid)]
    names = {path.readlink().name.partition(" ")[0] for path in found}
    assert any(name.endswith(".ring") for name in names), names
    assert "start.log" in names
    assert [path.readlink() for path in found if path.stat().st_dev == disk] == []


async def test_who_has_its_file_servers_rights_fills_bounded_memory_and_no_disk(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    _, files, uid = _processes(agent, sandbox)
    before = _on_disk(agent.data_dir)
    inside = [f"--mount=/proc/{files}/ns/mnt", f"--root=/proc/{files}/root"]
    user = [f"--setuid={uid}", f"--setgid={uid}"]
    argv = ["nsenter", *inside, *user, "--", "/usr/bin/python3", "-c", _FILL]
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True)
    filled = {words[0]: [int(each) for each in words[1:]]
              for words in map(str.split, done.stdout.splitlines())}  # fmt: skip
    # Where agent and supervisor meet. Files of the sandbox are its user's, who is another.
    assert "/.prism" in filled, done
    for directory, (written, error, number) in filled.items():
        assert (error, os.strerror(error)) == (28, "No space left on device"), directory
        assert written <= _MEMORY // 2, directory
        assert number < 20_000, directory
    # Nor does a file that is open have more room.
    kernel, _, _ = _processes(agent, sandbox)
    ring = next(path for path in _writable(kernel) if ".ring" in path.readlink().name)
    with pytest.raises(OSError, match="No space left"):
        _write(ring, 1024 * MIB)
    assert _on_disk(agent.data_dir) - before < MIB
    # The agent is well, says what is wrong, and can remove it all.
    gateway.assign("sb-other")
    await gateway.wait_for("sb-other", agent_pb2.OBSERVED_STATE_READY)
    assert (await agent.run("sb-other", ["echo", "on"])).stdout == b"on\n"
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_DELETED, grace_s=0)
    await gateway.wait_for(sandbox, agent_pb2.OBSERVED_STATE_DELETED)
    assert not any(sandbox in str(path) for path in host.mounts_below(agent.data_dir))
    assert not (agent.data_dir / "sandboxes" / sandbox / "execs").exists()


async def test_output_is_kept_within_that_room_and_holds_nothing_up(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    argv = ["sh", "-c", "head -c 3000000 /dev/zero; echo end"]
    # More than all there is, one after the other, and by some at once.
    for _ in range(8):
        assert len((await agent.run(sandbox, argv)).stdout) == 3_000_004
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        runs = [group.create_task(agent.run(sandbox, argv)) for _ in range(6)]
    assert [len(run.result().stdout) for run in runs] == [3_000_004] * 6
    memory = agent.data_dir / "sandboxes" / sandbox / "execs" / "memory"
    assert _size_of(memory) == _MEMORY // 4
    # It follows the limit of memory.
    limits = sandbox_pb2.Limits(memory_bytes=2 * _MEMORY)
    gateway.assign(sandbox, spec=sandbox_pb2.SandboxSpec(limits=limits))
    await until(lambda: _size_of(memory) == _MEMORY // 2)
    # An agent that was killed finds it again, and a stop keeps it.
    await kill_and_restart(agent, gateway)
    assert len((await agent.run(sandbox, argv)).stdout) == 3_000_004
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_STOPPED, grace_s=0)
    await gateway.wait_for(sandbox, agent_pb2.OBSERVED_STATE_STOPPED)
    assert any(each.suffix == ".ring" for each in memory.iterdir())
