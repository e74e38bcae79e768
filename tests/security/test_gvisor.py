"""Hostile programs inside a sandbox of the gvisor runtime, and what its kernel is on the host.

The attacks are those on bubblewrap. All that holds there holds here, most of it for another reason:
the kernel that is attacked is the sandbox's own.
"""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import grpc
import grpc.aio
import psutil
import pytest
from prism.agent.v1 import agent_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_common.limits import MIB
from tests.integration.agent.files import write
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess
from tests.integration.agent.test_runtimes import cgroup_pids
from tests.security.test_bubblewrap import _TRY, ATTACKS

#: Allowed, since they change nothing but the sandbox's own kernel: a user namespace there gives
#: rights over that namespace, keys and the log are that kernel's. It shows the numbers of PID 1's
#: descriptors to all; that nobody opens those that matter is tested below.
OWN_KERNEL: Final = {
    "unshare_user", "clone_user", "clone3_user", "keyctl", "syslog", "list_supervisor_descriptors",
}  # fmt: skip
#: Tries each attack in a process of its own, and names those that got something.
_RUN: Final = """
import json, os, signal
bodies = json.load(open('/workspace/attacks'))
for name, body in bodies.items():
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.dup2(writing, 1); os.dup2(writing, 2); signal.alarm(10)
        try: exec(body, {})
        except BaseException as error: print('RAISED', repr(error))
        os.sys.stdout.flush(); os._exit(0)
    os.close(writing)
    output = b''
    while piece := os.read(reading, 4096): output += piece
    os.close(reading); os.wait()
    if not output.startswith(b'DENIED'): print(name, output[:300], flush=True)
print('tried', len(bodies))
"""
#: What a user namespace gives: rights that must not reach PID 1 nor what is the agent's.
_AS_NAMESPACE_ROOT: Final = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
uid, gid = os.getuid(), os.getgid()
assert libc.unshare(0x10000000 | 0x00020000) == 0
open('/proc/self/uid_map', 'w').write(f'0 {uid} 1')
open('/proc/self/gid_map', 'w').write(f'0 {gid} 1')
assert os.getuid() == 0
def attempt(name, work):
    try: print('GOT', name, work())
    except OSError as error: pass
attempt('shared', lambda: os.listdir('/.prism'))
attempt('signal', lambda: os.kill(1, 9))
attempt('memory', lambda: open('/proc/1/mem', 'rb'))
attempt('root', lambda: os.listdir('/proc/1/root'))
attempt('supervisor', lambda: open('/.prism-supervisor', 'r+b'))
attempt('etc', lambda: open('/etc/passwd', 'w'))
attempt('shadow', lambda: os.stat('/etc/shadow'))
for fd in os.listdir('/proc/1/fd'):
    name = os.readlink('/proc/1/fd/' + fd)
    if 'ring' in name or name.startswith('socket'):
        attempt(name, lambda: os.open('/proc/1/fd/' + fd, os.O_RDONLY))
        attempt(name, lambda: os.open('/proc/1/fd/' + fd, os.O_RDWR))
print('tried')
"""


@pytest.fixture
def agent(gvisor_agent: AgentProcess) -> AgentProcess:
    return gvisor_agent


@pytest.fixture
def listeners() -> Iterator[dict[str, str]]:
    """What of the host an attack tries to reach."""
    name = f"prism-test-gvisor-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket() as port:
        abstract.bind(f"\0{name}")
        abstract.listen(1)
        port.bind(("127.0.0.1", 0))
        port.listen(1)
        yield {"abstract": name, "port": str(port.getsockname()[1])}


async def test_every_attack_is_denied_or_meets_its_own_kernel(
    agent: AgentProcess, sandbox: str, listeners: dict[str, str]
) -> None:
    directory = agent.data_dir / "sandboxes" / sandbox
    facts = listeners | {
        "control": str(directory / "shared" / "control"),
        "journal": str(agent.data_dir / "journal"),
        "data": str(agent.data_dir),
    }
    bodies = {}
    for name, attack in ATTACKS.items():
        body = attack
        for key, value in facts.items():
            body = body.replace(f"{{{key}!r}}", repr(value)).replace(f"{{{key}}}", value)
        bodies[name] = _TRY.replace("{body}", body)
    bodies["own_socket"] = _TRY.replace(
        "{body}", "socket.socket(socket.AF_UNIX, 5).connect('/.prism/control')"
    )
    await write(agent, sandbox, "/workspace/attacks", json.dumps(bodies).encode())
    result = await agent.python(sandbox, _RUN)
    lines = result.stdout.decode().splitlines()
    assert lines.pop() == f"tried {len(bodies)}", result.stderr
    assert {line.split()[0] for line in lines} <= OWN_KERNEL, lines


async def test_rights_in_a_user_namespace_reach_nothing_outside_it(
    agent: AgentProcess, sandbox: str
) -> None:
    result = await agent.python(sandbox, _AS_NAMESPACE_ROOT)
    assert (result.stdout, result.stderr) == (b"tried\n", b"")


async def test_execs_have_no_rights_and_few_descriptors(agent: AgentProcess, sandbox: str) -> None:
    program = (
        "import os\n"
        "for line in open('/proc/self/status'):\n"
        "    if line.startswith('Cap'): print(line.split()[1])\n"
        "print(os.getresuid(), os.getresgid(), os.getgroups(), sorted(os.environ))\n"
        "print(sorted(os.listdir('/proc/self/fd')))\n"
    )
    result = await agent.python(sandbox, program)
    *capabilities, users, descriptors = result.stdout.decode().splitlines()
    assert {int(each, 16) for each in capabilities} == {0}
    ids = (1000,) * 3
    assert users == f"{ids} {ids} [] ['HOME', 'LANG', 'PATH']"
    assert descriptors == "['0', '1', '2', '3']"


async def test_its_kernel_is_nobody_on_the_host(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    gateway.assign("sb-other")
    await gateway.wait_for("sb-other", agent_pb2.OBSERVED_STATE_READY)
    owners: dict[str, set[int]] = {}
    own = os.readlink("/proc/self/ns/net")
    for name in (sandbox, "sb-other"):
        processes = [psutil.Process(pid) for pid in cgroup_pids(agent, name)]
        owners[name] = {uid for each in processes for uid in each.uids()}
        assert len(processes) >= 2
        for process in processes:
            assert _status(process.pid)["NoNewPrivs"] == "1"
            # Rights are over a user namespace that knows these two users, and no other.
            assert os.readlink(f"/proc/{process.pid}/ns/user") != os.readlink("/proc/self/ns/user")
            assert os.readlink(f"/proc/{process.pid}/ns/net") != own
        (kernel,) = [each for each in processes if "runsc-sandbox" in "".join(each.cmdline())]
        assert _status(kernel.pid)["Seccomp"] == "2"
        assert set(os.listdir(f"/proc/{kernel.pid}/root")) <= {"etc", "proc"}
    # One each: what runs code that nobody read is its kernel, whoever it believes to be.
    assert [len(each) for each in owners.values()] == [1, 1]
    assert not set.intersection(*owners.values())
    assert 0 not in set.union(*owners.values())


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


async def test_memory_bomb_ends_its_own_sandbox_alone(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    limits = sandbox_pb2.Limits(memory_bytes=96 * MIB)
    gateway.assign("sb-bomb", spec=sandbox_pb2.SandboxSpec(limits=limits))
    await gateway.wait_for("sb-bomb", agent_pb2.OBSERVED_STATE_READY)
    await agent.python("sb-bomb", "x = bytearray(500 << 20)", detach=True)
    report = await gateway.wait_for("sb-bomb", agent_pb2.OBSERVED_STATE_FAILED)
    assert report.reason == "OUT_OF_MEMORY"
    assert (await agent.run(sandbox, ["echo", "on"])).stdout == b"on\n"


async def test_fork_bomb_meets_a_bound_and_ends_with_its_sandbox(
    agent: AgentProcess, gateway: Gateway
) -> None:
    await gateway.wait_registrations(1)
    limits = sandbox_pb2.Limits(processes_max=24)
    gateway.assign("sb-fork", spec=sandbox_pb2.SandboxSpec(limits=limits))
    await gateway.wait_for("sb-fork", agent_pb2.OBSERVED_STATE_READY)
    argv = ["bash", "-c", ":(){ :|:& };: ; sleep 0.5"]
    try:
        bomb = await agent.run("sb-fork", argv, timeout_s=2)
    except grpc.aio.AioRpcError:
        # Its processes are its kernel's memory: it may have used that up before their number.
        report = await gateway.wait_for("sb-fork", agent_pb2.OBSERVED_STATE_FAILED)
        assert report.reason in ("OUT_OF_MEMORY", "SUPERVISOR_DIED")
        return
    assert b"Resource temporarily unavailable" in bomb.stderr
    gateway.want("sb-fork", agent_pb2.DESIRED_STATE_STOPPED, grace_s=0)
    await gateway.wait_for("sb-fork", agent_pb2.OBSERVED_STATE_STOPPED)
