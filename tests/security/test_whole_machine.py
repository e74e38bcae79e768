"""What one number of the whole machine bounds, and what the agent finds by looking at processes."""

import asyncio
import os
from pathlib import Path

import grpc
import pytest
from prism.agent.v1 import agent_pb2

from prism_agent.runtime import host
from tests.integration.agent.files import names, read, remove, write
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess
from tests.security.conftest import both_users

_CALL = """
import ctypes, errno, fcntl, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*a):
    ctypes.set_errno(0)
    r = libc.syscall(*[ctypes.c_long(x) if isinstance(x, int) else x for x in a])
    return r, errno.errorcode.get(ctypes.get_errno(), '')
"""
_X86_64 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls")


@_X86_64
async def test_what_belongs_to_the_whole_machine_is_not_taken(
    agent: AgentProcess, sandbox: str
) -> None:
    """Not fs.aio-max-nr, the flushing of all disks, nor line disciplines of the kernel."""
    program = _CALL + (
        "print(call(206, 1, ctypes.byref(ctypes.c_ulong())))\n"
        # Done truly, syncfs would refuse a descriptor that is none.
        "print(call(162), call(306, 999))\n"
        "m, s = os.openpty()\n"
        "print(call(16, s, 1 << 32 | 0x5423, ctypes.byref(ctypes.c_int(0))))"
    )
    lines = (await agent.python(sandbox, program)).stdout.splitlines()
    assert lines == [b"(-1, 'ENOSYS')", b"(0, '') (0, '')", b"(-1, 'EPERM')"]


@both_users
async def test_signals_to_the_supervisor_do_not_queue_up(agent: AgentProcess, sandbox: str) -> None:
    """What is queued counts against the user, who may be the agent's where it is not root."""
    program = (
        "import os, signal\n"
        "for _ in range(50):\n"
        "  for number in range(1, 65):\n"
        "    if number not in (32, 33): os.kill(1, number)\n"
        "print('sent')"
    )
    assert (await agent.python(sandbox, program)).stdout == b"sent\n"
    status = (await agent.run(sandbox, ["cat", "/proc/1/status"])).stdout.decode()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    pending = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
    child = 1 << 16
    assert pending & ~child == 0
    assert (await agent.run(sandbox, ["echo", "lives"])).stdout == b"lives\n"


@both_users
async def test_a_process_that_calls_itself_a_supervisor_is_none(
    agent: AgentProcess, sandbox: str
) -> None:
    """Else code in one sandbox could keep another from being killed, or an agent from starting."""
    tag = f"{agent.node_id}/sb-ghost"
    program = "import time; print('up', flush=True); time.sleep(60)"
    call = agent.open(sandbox, ["python3", "-c", program, "supervise", "3", "256", "0", tag])
    await call.until(b"up\n")
    pretenders = [
        entry.name
        for entry in os.scandir("/proc")
        if entry.name.isdigit() and tag.encode() in _command_line(Path(entry.path))
    ]
    assert len(pretenders) == 1
    assert host.supervised(tag) == []
    assert len(agent.supervised(sandbox)) >= 1
    call.cancel()


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


_CHURN = """
import os, threading
os.makedirs('/workspace/churn', exist_ok=True)
print('up', flush=True)
i = 0
while True:
    os.close(os.open(f'/workspace/churn/{i}', os.O_CREAT)); os.unlink(f'/workspace/churn/{i}')
    i += 1
"""


async def test_names_that_come_and_go_keep_no_call(agent: AgentProcess, sandbox: str) -> None:
    call = agent.open(sandbox, ["python3", "-c", _CHURN])
    await call.until(b"up\n")
    for _ in range(5):
        await asyncio.wait_for(names(agent, sandbox, "/workspace/churn"), 20)
    call.cancel()


_LEASE = """
import fcntl, os, signal, time
signal.signal(signal.SIGIO, signal.SIG_IGN)
fd = os.open('/workspace/leased', os.O_CREAT | os.O_RDWR)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print('up', flush=True); time.sleep(60)
"""


async def test_a_lease_holds_no_call_up(agent: AgentProcess, sandbox: str) -> None:
    """The kernel lets whoever opens a leased file wait for 45 s, unless it asks not to."""
    call = agent.open(sandbox, ["python3", "-c", _LEASE])
    await call.until(b"up\n")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await asyncio.wait_for(read(agent, sandbox, "/workspace/leased"), 15)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    await asyncio.wait_for(write(agent, sandbox, "/workspace/leased", b"new"), 15)
    assert await read(agent, sandbox, "/workspace/leased") == b"new"
    await remove(agent, sandbox, "/workspace/leased")
    call.cancel()


@both_users
async def test_a_sandbox_sees_nothing_of_another(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    gateway.assign("sb-other")
    await gateway.wait_for("sb-other", agent_pb2.OBSERVED_STATE_READY)
    await write(agent, "sb-other", "/workspace/secret", b"s")
    await agent.python("sb-other", "open('/tmp/secret', 'w'); open('/dev/shm/secret', 'w')")
    listing = (
        "import os; print([os.listdir(d) for d in ('/workspace', '/tmp', '/dev/shm', '/run')])"
    )
    assert (await agent.python(sandbox, listing)).stdout == b"[[], [], [], []]\n"
    seen = (await agent.run(sandbox, ["cat", "/proc/sysvipc/shm", "/proc/net/unix"])).stdout
    assert len(seen.splitlines()) == 2
