"""What every runtime that isolates must do, whatever it is made of: one suite for all of them.

`_why_not` says which can be tried on this machine. What a runtime does in a way of its own is
tested elsewhere; what runs nothing has `test_fake.py`.
"""

import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import grpc
import grpc.aio
import pytest
from prism.agent.v1 import agent_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent import cgroups
from prism_agent.runtime import host
from tests.integration.agent import files
from tests.integration.agent.conftest import why_no_gvisor, why_no_sandboxes
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess
from tests.integration.agent.test_life import DELETED, READY, STOPPED, until_no_traces
from tests.integration.agent.test_restart import kill_and_restart

PAUSED: Final = agent_pb2.OBSERVED_STATE_PAUSED
RUN: Final = agent_pb2.DESIRED_STATE_RUNNING

#: Each with what tells why it cannot be tried here; empty: it can.
_why_not: Final = {"bubblewrap": why_no_sandboxes, "gvisor": why_no_gvisor}


def cgroup_pids(agent: AgentProcess, sandbox: str) -> list[int]:
    """Return the processes of a sandbox on the host."""
    for root in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup"):
        file = Path(root, "prism", agent.node_id, sandbox, "cgroup.procs")
        if file.exists():
            return [int(line) for line in file.read_text().split()]
    return []


@pytest.fixture(params=sorted(_why_not))
async def agent(
    request: pytest.FixtureRequest, gateway: Gateway, tmp_path: Path
) -> AsyncIterator[AgentProcess]:
    """A real agent with one runtime, asked for by name."""
    name: str = request.param
    if reason := _why_not[name]():
        pytest.skip(f"{name}: {reason}")
    process = AgentProcess(
        tmp_path / "data", gateway.address, f"--runtime={name}", "--on-exit=delete"
    )
    await process.start()
    yield process
    await process.end()
    assert "Traceback" not in process.log.read_text()


async def test_the_node_says_which_runtime_it_has(
    agent: AgentProcess, gateway: Gateway, sandbox: str, request: pytest.FixtureRequest
) -> None:
    runtime = gateway.registrations[0].runtimes[0]
    assert (runtime.ready, bool(runtime.version)) == (True, True)
    assert gateway.reports[sandbox].runtime == runtime.name
    assert f"[{runtime.name}]" in request.node.name


async def test_exec_has_its_own_status_output_and_input(agent: AgentProcess, sandbox: str) -> None:
    result = await agent.run(sandbox, ["sh", "-c", "cat; echo err >&2; exit 7"], stdin=b"in\n")
    assert (result.stdout, result.stderr, result.code) == (b"in\n", b"err\n", 7)
    missing = await agent.run(sandbox, ["no-such-program"])
    assert missing.exit == sandbox_pb2.ExecExit(exit_code=127, reason="NOT_FOUND")


async def test_death_by_a_signal_is_told_as_such(agent: AgentProcess, sandbox: str) -> None:
    call = agent.open(sandbox, ["sh", "-c", "echo up; sleep 1000"])
    await call.until(b"up\n")
    await call.send(signal=15)
    assert (await call.result()).exit == sandbox_pb2.ExecExit(exit_code=143, signal=15)


async def test_timeout_ends_what_ignores_sigterm(agent: AgentProcess, sandbox: str) -> None:
    result = await agent.run(sandbox, ["sh", "-c", "trap '' TERM; sleep 1000"], timeout_s=0.3)
    assert result.exit == sandbox_pb2.ExecExit(exit_code=137, signal=9, reason="TIMEOUT")


async def test_much_output_comes_whole_and_in_order(agent: AgentProcess, sandbox: str) -> None:
    result = await agent.run(sandbox, ["seq", "200000"])
    assert result.stdout == b"".join(b"%d\n" % i for i in range(1, 200_001))
    assert result.sequences == sorted(set(result.sequences))


async def test_terminal_is_one(agent: AgentProcess, sandbox: str) -> None:
    terminal = sandbox_pb2.WindowSize(rows=33, columns=77)
    result = await agent.run(sandbox, ["sh", "-c", "test -t 0 && stty size"], terminal=terminal)
    assert (result.stdout, result.code) == (b"33 77\r\n", 0)


async def test_terminal_takes_input_and_another_size(agent: AgentProcess, sandbox: str) -> None:
    program = (
        "import os, signal\n"
        "signal.signal(signal.SIGWINCH, lambda *_: None)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])\n"
        "print('got', input(), flush=True); signal.sigwait([signal.SIGWINCH])\n"
        "print(os.get_terminal_size(), flush=True); input()"
    )
    terminal = sandbox_pb2.WindowSize(rows=33, columns=77)
    call = agent.open(sandbox, ["python3", "-c", program], terminal=terminal, stdin=True)
    await call.send(stdin=b"hello\n")
    await call.until(b"got hello\r\n")
    await call.send(resize=sandbox_pb2.WindowSize(rows=50, columns=132))
    await call.until(b"columns=132, lines=50")
    await call.send(stdin_eof={})
    assert b"EOFError" in (await call.result()).stdout


async def test_files_are_the_same_from_outside_and_from_inside(
    agent: AgentProcess, sandbox: str
) -> None:
    content = bytes(range(256)) * 4096
    await files.write(agent, sandbox, "/workspace/in", content, mode=0o640)
    script = "stat -c '%a %U %s' in; cp in out; rm in; echo tmp > /tmp/t; ln -s /etc/passwd l"
    result = await agent.run(sandbox, ["sh", "-c", script])
    assert (result.stdout, result.stderr) == (b"640 sandbox 1048576\n", b"")
    assert await files.read(agent, sandbox, "/workspace/out") == content
    assert await files.read(agent, sandbox, "/tmp/t") == b"tmp\n"
    assert await files.names(agent, sandbox, "/workspace") == ["/workspace/l", "/workspace/out"]
    # The sandbox's, and not the host's.
    assert b"sandbox:x:1000" in await files.read(agent, sandbox, "/workspace/l")


async def test_input_that_nobody_reads_holds_nothing_up(agent: AgentProcess, sandbox: str) -> None:
    call = agent.open(sandbox, ["sh", "-c", "exec <&-; echo closed; sleep 1000"], stdin=True)
    await call.until(b"closed\n")
    for _ in range(4):
        await call.send(stdin=b"x" * 65536)
    await call.send(signal=9)
    assert (await call.result()).exit == sandbox_pb2.ExecExit(exit_code=137, signal=9)


async def test_workspace_is_bounded(agent: AgentProcess, gateway: Gateway) -> None:
    await gateway.wait_registrations(1)
    limits = sandbox_pb2.Limits(disk_bytes=16 * 2**20)
    gateway.assign("sb-full", spec=sandbox_pb2.SandboxSpec(limits=limits))
    await gateway.wait_for("sb-full", READY)
    result = await agent.run("sb-full", ["dd", "if=/dev/zero", "of=/workspace/f", "bs=1M"])
    assert result.code == 1
    assert b"No space left" in result.stderr


async def test_processes_are_bounded(agent: AgentProcess, gateway: Gateway) -> None:
    await gateway.wait_registrations(1)
    limits = sandbox_pb2.Limits(processes_max=16)
    gateway.assign("sb-few", spec=sandbox_pb2.SandboxSpec(limits=limits))
    await gateway.wait_for("sb-few", READY)
    program = (
        "import os, time\n"
        "made = 0\n"
        "try:\n"
        "    while made < 100:\n"
        "        if os.fork() == 0: time.sleep(1000)\n"
        "        made += 1\n"
        "except BlockingIOError: print('EAGAIN', made < 16, flush=True)\n"
    )
    call = agent.open("sb-few", ["python3", "-c", program])
    await call.until(b"EAGAIN True\n")
    call.cancel()


async def test_pause_stops_it_and_resume_lets_it_go_on(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    groups, _ = cgroups.find_on_this_machine("test-runtimes")
    if groups is None:
        pytest.skip("no cgroups here")
    groups.close()
    count = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done"
    call = agent.open(sandbox, ["sh", "-c", count])
    await call.until(b"5\n")
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_PAUSED)
    await gateway.wait_for(sandbox, PAUSED)
    gateway.want(sandbox, RUN)
    await gateway.wait_for(sandbox, READY)
    await call.until(b"\n60\n")
    call.cancel()


async def test_exec_and_its_output_outlive_a_kill_of_the_agent(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    call = agent.open(sandbox, ["sh", "-c", "echo before; read x; echo $x; exit 3"], stdin=True)
    so_far = await call.until(b"before\n")
    await kill_and_restart(agent, gateway)
    attached = agent.attach(sandbox, so_far.exec_id)
    await attached.send_attach(stdin=b"after\n")
    result = await attached.result()
    assert (result.stdout, result.code) == (b"before\nafter\n", 3)


async def test_death_of_all_its_processes_is_told(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    call = agent.open(sandbox, ["sh", "-c", "echo up; sleep 1000"])
    so_far = await call.until(b"up\n")
    pids = cgroup_pids(agent, sandbox)
    if not pids:
        pytest.skip("no cgroups here")
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    report = await gateway.wait_for(sandbox, agent_pb2.OBSERVED_STATE_FAILED)
    assert report.reason == "SUPERVISOR_DIED"
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call.result()
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    request = sandbox_pb2.GetExecRequest(sandbox=sandbox, exec_id=so_far.exec_id)
    info = await agent.stub.GetExec(request)
    assert (info.running, info.HasField("exit")) == (False, False)
    # What it has said can be read on, and takes no memory of the node, which counts none of it.
    logs = agent.stub.StreamLogs(sandbox_pb2.StreamLogsRequest(sandbox=sandbox))
    assert [each.data async for each in logs] == [b"up\n"]
    execs = agent.data_dir / "sandboxes" / sandbox / "execs"
    assert host.mounts_below(execs) == []
    # And it can be started again.
    gateway.want(sandbox, RUN, start_count=2)
    await gateway.wait_for(sandbox, READY)
    assert (await agent.run(sandbox, ["echo", "again"])).stdout == b"again\n"
    logs = agent.stub.StreamLogs(sandbox_pb2.StreamLogsRequest(sandbox=sandbox))
    assert [each.data async for each in logs] == [b"up\n", b"again\n"]


async def test_stop_ends_all_and_the_next_start_is_clean(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    await agent.run(sandbox, ["sh", "-c", "trap '' TERM; sleep 1000"], detach=True)
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_STOPPED, grace_s=0.2)
    await gateway.wait_for(sandbox, STOPPED)
    assert agent.supervised(sandbox) == cgroup_pids(agent, sandbox) == []
    gateway.want(sandbox, RUN, start_count=2)
    await gateway.wait_for(sandbox, READY)
    left = await agent.run(sandbox, ["sh", "-c", "cat /proc/[0-9]*/comm | grep -c sleep"])
    assert left.stdout == b"0\n"


@pytest.mark.parametrize("agent_dies_first", [False, True])
async def test_delete_leaves_nothing(
    agent: AgentProcess, gateway: Gateway, sandbox: str, agent_dies_first: bool
) -> None:
    await agent.run(sandbox, ["sh", "-c", "echo x > f; sleep 1000"], detach=True)
    if agent_dies_first:
        await agent.end(signal.SIGKILL)
        await agent.start()
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_DELETED, grace_s=0.0)
    await gateway.wait_for(sandbox, DELETED)
    await until_no_traces(agent, sandbox)
