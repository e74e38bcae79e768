"""Hostile programs inside a sandbox of the bubblewrap runtime: every one of them must fail."""

import os
import socket
from collections.abc import Iterator

import psutil
import pytest
from prism.agent.v1 import agent_pb2

from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess
from tests.integration.agent.test_life import until
from tests.security.conftest import both_users

#: Prints DENIED with the error, or what an attack got.
_TRY = """
import ctypes, errno, fcntl, os, signal, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def syscall(*a):
    r = libc.syscall(*[ctypes.c_long(x) if isinstance(x, int) else x for x in a])
    if r < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return r
def checked(r):
    if r < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return r
try:
    {body}
except (OSError, AssertionError) as e:
    print('DENIED', e)
else:
    print('GOT IT')
"""

ATTACKS = {
    "read_shadow": "print(open('/etc/shadow').read())",
    "read_root": "print(os.listdir('/root'))",
    "read_home": "print(os.listdir('/home'))",
    "read_host_var": "assert os.listdir('/var') != ['tmp'], 'only our own'",
    "list_host_processes": "assert len([p for p in os.listdir('/proc') if p.isdigit()]) > 8, 'few'",
    "signal_supervisor": "os.kill(1, 9); os.kill(1, 15); raise OSError('it lives')",
    "read_supervisor_memory": "open('/proc/1/mem', 'rb')",
    "list_supervisor_descriptors": "print(os.listdir('/proc/1/fd'))",
    "supervisor_root": "print(os.listdir('/proc/1/root/'))",
    "supervisor_executable": "open('/proc/1/exe', 'rb')",
    "ptrace_supervisor": "checked(libc.ptrace(16, 1, 0, 0))",
    "pidfd_getfd": "p = os.pidfd_open(1); syscall(438, p, 3, 0)",
    "limit_supervisor": "import resource; resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))",
    "overwrite_supervisor": "open('/.prism-supervisor', 'r+b')",
    "mount": "checked(libc.mount(b'x', b'/tmp', b'tmpfs', 0, None))",
    "bind_mount": "checked(libc.mount(b'/', b'/tmp', None, 4096, None))",
    "umount": "checked(libc.umount2(b'/proc', 2))",
    "remount_writable": "checked(libc.mount(None, b'/usr', None, 32 | 4096, None))",
    "pivot_root": "syscall(155, b'/tmp', b'/tmp')",
    "chroot": "os.chroot('/tmp')",
    "unshare_user": "checked(libc.unshare(0x10000000))",
    "unshare_mount": "checked(libc.unshare(0x00020000))",
    "clone_user": "syscall(56, 0x10000000 | 17, 0, 0, 0, 0)",
    "clone3_user": "syscall(435, struct.pack('=8Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0), 64)",
    "setns": "fd = os.open('/proc/1/ns/user', os.O_RDONLY); syscall(308, fd, 0)",
    "setuid_0": "os.setuid(0)",
    "write_usr": "open('/usr/x', 'w')",
    "write_etc": "open('/etc/x', 'w')",
    "write_slash": "open('/x', 'w')",
    "write_dev": "open('/dev/x', 'w')",
    "sysrq": "open('/proc/sysrq-trigger', 'w').write('h')",
    "core_pattern": "open('/proc/sys/kernel/core_pattern', 'w').write('|/x')",
    "hostname": "socket.sethostname('x')",
    "cgroup_release_agent": "open('/sys/fs/cgroup/release_agent', 'w')",
    "device_node": "os.mknod('/workspace/d', 0o60600, os.makedev(254, 0))",
    "character_node": "os.mknod('/workspace/d', 0o20600, os.makedev(1, 1))",
    "disk_device": "open('/dev/vda', 'rb')",
    "kernel_memory": "open('/dev/mem', 'rb')",
    "kernel_log": "open('/dev/kmsg', 'rb')",
    "syslog": "checked(libc.klogctl(3, ctypes.create_string_buffer(100), 100))",
    "module": "syscall(313, 0, b'', 0)",
    "bpf": "syscall(321, 0, 0, 0)",
    "perf": "syscall(298, ctypes.create_string_buffer(128), 0, -1, -1, 0)",
    "userfaultfd": "syscall(323, 0)",
    "io_uring": "syscall(425, 8, ctypes.create_string_buffer(128))",
    "keyctl": "syscall(250, 0, -3, 0)",
    "add_key": "syscall(248, b'user', b'x', b'y', 1, -3)",
    "open_by_handle": "syscall(304, -100, ctypes.create_string_buffer(128), 0)",
    "kexec": "syscall(246, 0, 0, 0, 0)",
    "reboot": "syscall(169, 0xfee1dead, 672274793, 0x89abcdef, 0)",
    "swapon": "syscall(167, b'/x', 0)",
    "settimeofday": "import time; time.clock_settime(time.CLOCK_REALTIME, 0)",
    "personality": "checked(libc.personality(0x0400000))",
    "vsock": "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "packet_socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "raw_socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "netfilter_netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)",
    "audit_netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9)",
    "alg_socket": "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
    "network": "socket.create_connection(('1.1.1.1', 53), timeout=2)",
    "host_loopback": "socket.create_connection(('127.0.0.1', {port}), timeout=2)",
    "host_abstract_socket": "socket.socket(socket.AF_UNIX).connect('\\0{abstract}')",
    "host_pathname_socket": "socket.socket(socket.AF_UNIX, 5).connect({control!r})",
    "tiocsti": "m, s = os.openpty(); fcntl.ioctl(s, 0x5412, b'x')",
    "tiocsti_upper_bits": "checked(libc.ioctl(0, ctypes.c_ulong(1 << 32 | 0x5412), b'x'))",
    "journal": "open({journal!r})",
    "host_data_directory": "print(os.listdir({data!r}))",
}


@pytest.fixture
def abstract() -> Iterator[str]:
    name = f"prism-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen(1)
        yield name


@both_users
async def test_every_attack_is_denied(agent: AgentProcess, sandbox: str, abstract: str) -> None:
    directory = agent.data_dir / "sandboxes" / sandbox
    facts = {
        "port": agent.address.rpartition(":")[2],
        "abstract": abstract,
        "control": str(directory / "control"),
        "journal": str(agent.data_dir / "journal"),
        "data": str(agent.data_dir),
    }
    succeeded = {}
    for name, attack in ATTACKS.items():
        body = attack
        for key, value in facts.items():
            body = body.replace(f"{{{key}!r}}", repr(value)).replace(f"{{{key}}}", str(value))
        result = await agent.python(sandbox, _TRY.replace("{body}", body))
        # Killed by the filter (SIGSYS) is denied too.
        if not result.stdout.startswith(b"DENIED") and result.exit and result.exit.signal != 31:
            succeeded[name] = (result.stdout, result.stderr[-500:])
    assert not succeeded


@both_users
async def test_no_capabilities_and_no_new_privileges(agent: AgentProcess, sandbox: str) -> None:
    status = (await agent.run(sandbox, ["cat", "/proc/self/status"])).stdout.decode()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(fields[name], 16) == 0, name
    assert fields["NoNewPrivs"].strip() == "1"
    assert fields["Seccomp"].strip() == "2"
    assert fields["Uid"].split() == ["1000"] * 4


@both_users
async def test_only_standard_descriptors_are_inherited(agent: AgentProcess, sandbox: str) -> None:
    result = await agent.python(sandbox, "import os; print(sorted(os.listdir('/proc/self/fd')))")
    # The fourth is the listing's own.
    assert result.stdout == b"['0', '1', '2', '3']\n"


async def test_environment_of_the_agent_is_not_seen(agent: AgentProcess, sandbox: str) -> None:
    result = await agent.python(sandbox, "import os; print(sorted(os.environ))")
    assert result.stdout == b"['HOME', 'LANG', 'PATH']\n"


async def test_mkfifo_and_ordinary_files_work(agent: AgentProcess, sandbox: str) -> None:
    script = "mkfifo f && touch g && ln -s g h && ln g i && chmod 700 g && rm f g h i && echo ok"
    assert (await agent.run(sandbox, ["sh", "-c", script])).stdout == b"ok\n"


async def test_processes_run_as_a_user_of_their_own_on_the_host(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: otherwise all sandboxes have the agent's user")
    gateway.assign("sb-other")
    await gateway.wait_for("sb-other", agent_pb2.OBSERVED_STATE_READY)
    uids = {
        name: {uid for pid in agent.supervised(name) for uid in psutil.Process(pid).uids()}
        for name in (sandbox, "sb-other")
    }
    assert len(uids) == 2
    owners = [owner for each in uids.values() for owner in each]
    assert len(owners) == len(set(owners)) == 2
    assert 0 not in owners


@both_users
async def test_double_forked_daemon_dies_with_its_sandbox(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    marker = f"1234567.{os.getpid()}"
    await agent.run(sandbox, ["sh", "-c", f"(setsid sh -c 'sleep {marker} &') ; exit 0"])

    def survivors() -> int:
        count = 0
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    with open(f"/proc/{entry.name}/cmdline", "rb") as file:
                        count += file.read() == f"sleep\0{marker}\0".encode()
                except OSError:
                    continue
        return count

    # The shell ends before its child's child has become sleep.
    await until(lambda: survivors() == 1)
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_STOPPED, grace_s=0)
    await gateway.wait_for(sandbox, agent_pb2.OBSERVED_STATE_STOPPED)
    assert survivors() == 0


async def test_output_flood_without_a_reader_is_bounded(agent: AgentProcess, sandbox: str) -> None:
    started = await agent.run(sandbox, ["head", "-c", "200000000", "/dev/zero"], detach=True)
    result = await agent.attach(sandbox, started.exec_id).result()
    assert result.code == 0
    assert result.sequences[-1] == 200_000_000
    used = sum(
        path.stat().st_blocks * 512
        for path in (agent.data_dir / "sandboxes" / sandbox / "execs").iterdir()
    )
    assert used < 18 << 20


async def test_inode_filler_is_bounded(agent: AgentProcess, sandbox: str) -> None:
    program = (
        "import os\n"
        "try:\n"
        "  for i in range(10_000_000): os.close(os.open(f'/workspace/{i}', os.O_CREAT))\n"
        "except OSError as e: print(e.strerror, i < 1_000_000)"
    )
    result = await agent.python(sandbox, program)
    assert result.exit is not None
    stopped = result.stdout == b"No space left on device True\n"
    assert stopped or result.exit.reason == "OUT_OF_MEMORY"
