"""Hostile files: whatever a sandbox puts in its paths, the agent never leaves its root."""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from prism.sandbox.v1 import sandbox_pb2

from tests.integration.agent.files import (
    describe,
    make_directory,
    move,
    names,
    read,
    remove,
    write,
)
from tests.integration.agent.process import AgentProcess
from tests.integration.agent.test_life import until
from tests.security.conftest import both_users

#: What a sandbox lays out, and then has the agent read.
LINKS = {
    "absolute": "/etc/shadow",
    "relative": "../../../../../../etc/shadow",
    "proc_self_root": "/proc/self/root/etc/shadow",
    "proc_1_root": "/proc/1/root/etc/shadow",
    "proc_thread_self": "/proc/thread-self/root/etc/shadow",
    "proc_fd": "/proc/self/fd/0",
    "proc_cwd": "/proc/self/cwd/x",
    "memory": "/proc/1/mem",
    "environment": "/proc/1/environ",
    "core_pattern": "/proc/sys/kernel/core_pattern",
    "sysrq": "/proc/sysrq-trigger",
    "null": "/dev/null",
    "zero": "/dev/zero",
    "terminal": "/dev/ptmx",
    "fifo": "/workspace/fifo",
}


def threads_of(pid: int) -> list[dict[str, str]]:
    texts = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            texts.append((task / "status").read_text())
    return [dict(line.split(":", 1) for line in text.splitlines() if ":" in line) for text in texts]


def host_files() -> tuple[bytes, int, list[str]]:
    shadow = Path("/etc/shadow")
    return shadow.read_bytes(), shadow.stat().st_mtime_ns, sorted(os.listdir("/etc"))


async def code_of(call: Coroutine[Any, Any, Any]) -> grpc.StatusCode:
    try:
        await asyncio.wait_for(call, 10)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@both_users
async def test_no_link_and_no_special_file_is_read_or_written_through(
    agent: AgentProcess, sandbox: str
) -> None:
    await agent.run(sandbox, ["mkfifo", "/workspace/fifo"])
    got = {}
    for name, target in LINKS.items():
        await agent.run(sandbox, ["ln", "-s", target, f"/workspace/{name}"])
        for path in (f"/workspace/{name}", target):
            code = await code_of(read(agent, sandbox, path))
            if code not in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND):
                got[f"read {path}"] = code
        if not target.startswith("/workspace"):
            code = await code_of(write(agent, sandbox, target, b"x"))
            if code not in (
                grpc.StatusCode.FAILED_PRECONDITION,
                grpc.StatusCode.NOT_FOUND,
            ) and not target.startswith(".."):
                got[f"write {target}"] = code
    got.pop("read ../../../../../../etc/shadow", None)
    assert not got


@both_users
async def test_dots_end_at_the_sandboxs_root(agent: AgentProcess, sandbox: str) -> None:
    inside = await agent.run(sandbox, ["cat", "/etc/hostname"])
    up = "/.." * 40
    assert await read(agent, sandbox, f"{up}/etc/hostname") == inside.stdout == b"sb-1\n"
    assert await read(agent, sandbox, f"/workspace{up}/etc/hostname") == b"sb-1\n"
    assert await code_of(read(agent, sandbox, f"{up}/etc/shadow")) is grpc.StatusCode.NOT_FOUND
    listed = await names(agent, sandbox, f"/workspace{up}")
    assert f"/workspace{up}/.prism-supervisor" in listed


@both_users
async def test_the_kernels_files_are_not_files_of_the_sandbox(
    agent: AgentProcess, sandbox: str
) -> None:
    for call in (
        names(agent, sandbox, "/proc"),
        names(agent, sandbox, "/proc/1/fd"),
        describe(agent, sandbox, "/proc/1/mem"),
        write(agent, sandbox, "/proc/sys/kernel/core_pattern", b"|/x"),
        make_directory(agent, sandbox, "/proc/x"),
        remove(agent, sandbox, "/proc/1", recursive=True),
        names(agent, sandbox, "/dev/pts"),
    ):
        assert await code_of(call) is grpc.StatusCode.FAILED_PRECONDITION


@both_users
async def test_the_agent_acts_with_the_sandboxs_rights(agent: AgentProcess, sandbox: str) -> None:
    """Root would be let through: a directory without permissions, and what is another's."""
    await agent.run(sandbox, ["sh", "-c", "echo x > f; chmod 0 f; mkdir d; touch d/f; chmod 0 d"])
    denied = grpc.StatusCode.FAILED_PRECONDITION
    assert await code_of(read(agent, sandbox, "/workspace/f")) is denied
    assert await code_of(names(agent, sandbox, "/workspace/d")) is denied
    assert await code_of(describe(agent, sandbox, "/workspace/d/f")) is denied
    for call in (
        write(agent, sandbox, "/etc/x", b""),
        write(agent, sandbox, "/.prism-supervisor", b""),
        remove(agent, sandbox, "/.prism-supervisor"),
        move(agent, sandbox, "/usr/bin", "/usr/nib"),
        make_directory(agent, sandbox, "/dev/d"),
        remove(agent, sandbox, "/dev/null"),
    ):
        assert await code_of(call) is denied


async def test_threads_of_calls_have_no_capabilities(agent: AgentProcess, sandbox: str) -> None:
    if os.geteuid() != 0:
        return
    await write(agent, sandbox, "/workspace/f", (bytes(1 << 20) for _ in range(30)))
    request = sandbox_pb2.ReadFileRequest(sandbox=sandbox, path="/workspace/f")
    call = agent.stub.ReadFile(request)
    await call.read()
    found: list[dict[str, str]] = []

    def only_the_readers() -> bool:
        found[:] = [each for each in threads_of(agent.pid) if each["Uid"].split()[0] != "0"]
        return len(found) == 1

    await until(only_the_readers)  # the writer's ends
    call.cancel()
    for name in ("CapPrm", "CapEff", "CapInh", "CapAmb"):
        assert int(found[0][name], 16) == 0
    assert set(found[0]["Uid"].split()) == set(found[0]["Gid"].split())
    assert len(set(found[0]["Uid"].split())) == 1
    assert not found[0]["Groups"].split()


_RACE = """
import ctypes, os, threading
libc = ctypes.CDLL(None)
os.makedirs('d/etc', exist_ok=True)
open('d/etc/shadow', 'w').write('mine'); open('f', 'w').write('mine')
os.symlink('/proc/self/root', 'root'); os.symlink('/../../../..', 'up')
os.symlink('/etc/shadow', 'l')
def swap(a, b):
    while True: libc.renameat2(-100, a, -100, b, 2)
for a, b in ((b'd', b'root'), (b'f', b'l'), (b'd/etc', b'up')):
    threading.Thread(target=swap, args=(a, b), daemon=True).start()
print('up', flush=True); import time; time.sleep(60)
"""


async def test_races_with_links_never_read_or_change_the_host(
    agent: AgentProcess, sandbox: str
) -> None:
    before = host_files()
    call = agent.open(sandbox, ["python3", "-c", _RACE])
    await call.until(b"up\n")
    read_what: set[bytes] = set()
    codes: set[grpc.StatusCode] = set()
    makes: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        lambda: write(agent, sandbox, "/workspace/d/etc/prism-race", b"x"),
        lambda: write(agent, sandbox, "/workspace/f", b"mine"),
        lambda: make_directory(agent, sandbox, "/workspace/d/etc/prism-dir", parents=True),
        lambda: move(agent, sandbox, "/workspace/d/etc/prism-race", "/workspace/d/etc/prism-2"),
        lambda: remove(agent, sandbox, "/workspace/d/etc/prism-dir", recursive=True),
        lambda: names(agent, sandbox, "/workspace/d/etc"),
    ]

    async def attempt(path: str) -> None:
        try:
            read_what.add(await read(agent, sandbox, path))
        except grpc.aio.AioRpcError as error:
            codes.add(error.code())

    until_s = time.monotonic() + 4
    while time.monotonic() < until_s:
        for path in ("/workspace/d/etc/shadow", "/workspace/f", "/workspace/up/etc/shadow"):
            await attempt(path)
        for make in makes:
            codes.add(await code_of(make()))
    call.cancel()
    assert grpc.StatusCode.UNKNOWN not in codes
    assert read_what <= {b"mine", b""}
    assert b"mine" in read_what
    assert host_files() == before


async def test_deep_and_wide_trees_end_in_an_answer(agent: AgentProcess, sandbox: str) -> None:
    program = (
        "import os\n"
        "for i in range(400): os.mkdir('d'); os.chdir('d')\n"
        "os.chdir('/workspace'); os.mkdir('w')\n"
        "for i in range(20000): open(f'w/{i}', 'w').close()"
    )
    await agent.python(sandbox, program)
    deep = await code_of(remove(agent, sandbox, "/workspace/d", recursive=True))
    assert deep is grpc.StatusCode.FAILED_PRECONDITION
    await remove(agent, sandbox, "/workspace/w", recursive=True)
    assert await names(agent, sandbox, "/workspace") == ["/workspace/d"]


async def test_names_that_are_no_text_are_listed(agent: AgentProcess, sandbox: str) -> None:
    await agent.python(
        sandbox, "open(b'/workspace/\\xff\\n', 'w'); open('/workspace/' + 'n' * 255, 'w')"
    )
    assert await names(agent, sandbox, "/workspace") == [
        "/workspace/" + "n" * 255,
        "/workspace/\N{REPLACEMENT CHARACTER}\n",
    ]


async def test_files_of_any_time_are_listed(agent: AgentProcess, sandbox: str) -> None:
    await agent.python(
        sandbox,
        "import os\nfor name, when in (('late', 10**12), ('early', -10**12)):\n"
        "    open(name, 'w').close(); os.utime(name, (when, when))",
    )
    assert await names(agent, sandbox, "/workspace") == ["/workspace/early", "/workspace/late"]
    late = await describe(agent, sandbox, "/workspace/late")
    assert late.modify_time.ToDatetime().year == 9999


async def test_writers_of_a_fifo_are_not_woken(agent: AgentProcess, sandbox: str) -> None:
    await agent.run(sandbox, ["mkfifo", "/workspace/p"])
    call = agent.open(sandbox, ["sh", "-c", "echo up; echo x > p; echo woken"])
    so_far = await call.until(b"up\n")
    assert (
        await code_of(read(agent, sandbox, "/workspace/p")) is grpc.StatusCode.FAILED_PRECONDITION
    )
    await asyncio.sleep(0.2)
    assert so_far.stdout == b"up\n"
    call.cancel()
