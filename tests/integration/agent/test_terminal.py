"""Execs with a terminal, in a real sandbox."""

import asyncio
import os

import grpc
import grpc.aio
import psutil
import pytest
from prism.sandbox.v1 import sandbox_pb2

from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess
from tests.integration.agent.test_life import until
from tests.integration.agent.test_restart import kill_and_restart

SIZE = sandbox_pb2.WindowSize(rows=31, columns=97)


async def test_it_is_a_terminal_of_the_size_asked_for(agent: AgentProcess, sandbox: str) -> None:
    script = "tty; stty size; test -t 0 -a -t 1 -a -t 2 && echo all; echo err >&2; echo $TERM"
    result = await agent.run(sandbox, ["sh", "-c", script], terminal=SIZE)
    assert result.stdout == b"/dev/pts/0\r\n31 97\r\nall\r\nerr\r\nxterm-256color\r\n"
    assert (result.stderr, result.code) == (b"", 0)


async def test_input_is_echoed_and_ctrl_c_interrupts(agent: AgentProcess, sandbox: str) -> None:
    wait = "while :; do sleep 0.05; done"
    script = f"trap 'echo caught; exit 3' INT; echo up; read line; echo got $line; {wait}"
    call = agent.open(sandbox, ["sh", "-c", script], terminal=SIZE, stdin=True)
    await call.until(b"up\r\n")
    await call.send(stdin=b"hello\n")
    await call.until(b"got hello\r\n")
    await call.send(stdin=b"\x03")
    result = await call.result()
    assert result.stdout == b"up\r\nhello\r\ngot hello\r\n^Ccaught\r\n"
    assert result.code == 3


async def test_resize_is_told_to_the_program(agent: AgentProcess, sandbox: str) -> None:
    program = (
        "import os, signal\n"
        "signal.signal(signal.SIGWINCH, lambda *_: None)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])\n"
        "print('up', flush=True); signal.sigwait([signal.SIGWINCH]); print(os.get_terminal_size())"
    )
    call = agent.open(sandbox, ["python3", "-c", program], terminal=SIZE, stdin=True)
    await call.until(b"up\r\n")
    await call.send(resize=sandbox_pb2.WindowSize(rows=50, columns=132))
    assert b"columns=132, lines=50" in (await call.result()).stdout


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"terminal": SIZE}, grpc.StatusCode.INVALID_ARGUMENT),
        ({}, grpc.StatusCode.FAILED_PRECONDITION),
    ],
)
async def test_a_resize_that_cannot_be_is_refused(
    agent: AgentProcess, sandbox: str, fields: dict[str, object], code: grpc.StatusCode
) -> None:
    call = agent.open(sandbox, ["sh", "-c", "echo up; sleep 1000"], **fields)
    await call.until(b"up")
    rows = 0 if fields else 5
    await call.send(resize=sandbox_pb2.WindowSize(rows=rows, columns=5))
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call.result()
    assert failure.value.code() is code


async def test_all_output_comes_before_the_end(agent: AgentProcess, sandbox: str) -> None:
    for _ in range(20):
        result = await agent.run(sandbox, ["seq", "1", "3000"], terminal=SIZE)
        assert result.stdout == b"".join(b"%d\r\n" % i for i in range(1, 3001))
        assert result.exit == sandbox_pb2.ExecExit(exit_code=0)


async def test_end_of_input_ends_a_reader(agent: AgentProcess, sandbox: str) -> None:
    result = await agent.run(sandbox, ["cat"], terminal=SIZE, stdin=b"line\n")
    assert result.stdout.endswith(b"line\r\nline\r\n")
    assert result.code == 0


async def test_job_control_works(agent: AgentProcess, sandbox: str) -> None:
    call = agent.open(sandbox, ["bash", "--norc", "-i"], terminal=SIZE, stdin=True)
    # The quotes tell what it prints from the echo of what is typed.
    await call.send(stdin=b"sh -c 'echo r\"\"un; exec sleep 1000'\n")
    await call.until(b"run\r\n")
    await call.send(stdin=b"\x1a")
    await call.until(b"Stopped")
    await call.send(stdin=b"kill %1; exit 4\n")
    await call.send(stdin=b"exit 4\n")
    result = await call.result()
    assert b"cannot set terminal process group" not in result.stdout
    assert result.code == 4


async def test_what_is_left_behind_is_hung_up(agent: AgentProcess, sandbox: str) -> None:
    left = "(trap 'echo hup > hup' HUP; echo up > up; while :; do sleep 0.05; done) &"
    script = f"{left} while [ ! -e up ]; do sleep 0.01; done"
    result = await agent.run(sandbox, ["bash", "-c", script], terminal=SIZE)
    assert result.code == 0
    found = b""
    async with asyncio.timeout(10):
        while found != b"hup\n":
            found = (await agent.run(sandbox, ["cat", "hup"])).stdout


async def test_a_program_that_closes_its_terminal_runs_on(
    agent: AgentProcess, sandbox: str
) -> None:
    script = "exec </dev/null >/dev/null 2>&1; sleep 0.3; echo alive >/dev/tty; exit 6"
    result = await agent.run(sandbox, ["sh", "-c", script], terminal=SIZE)
    assert (result.stdout, result.code) == (b"alive\r\n", 6)


async def test_unknown_program_is_said(agent: AgentProcess, sandbox: str) -> None:
    result = await agent.run(sandbox, ["no-such-program"], terminal=SIZE)
    assert result.exit == sandbox_pb2.ExecExit(exit_code=127, reason="NOT_FOUND")
    assert b"no-such-program" in result.stdout


async def test_it_survives_kill_of_the_agent(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    script = (
        "echo up; stty size; read a; echo got $a; "
        "until [ \"$(stty size)\" = '7 8' ]; do sleep 0.01; done; stty size; exit 9"
    )
    call = agent.open(sandbox, ["sh", "-c", script], terminal=SIZE, stdin=True)
    so_far = await call.until(b"31 97\r\n")
    await kill_and_restart(agent, gateway)
    attached = agent.attach(sandbox, so_far.exec_id)
    await attached.send_attach(stdin=b"")
    request = sandbox_pb2.AttachExecRequest(resize=sandbox_pb2.WindowSize(rows=7, columns=8))
    await attached._call.write(request)
    await attached.send_attach(stdin=b"hello\n")
    result = await attached.result()
    assert result.stdout == b"up\r\n31 97\r\nhello\r\ngot hello\r\n7 8\r\n"
    assert result.code == 9


async def test_ended_terminals_leave_nothing(agent: AgentProcess, sandbox: str) -> None:
    process = psutil.Process(agent.pid)
    await agent.run(sandbox, ["cat"], terminal=SIZE, stdin=b"x\n")
    before = process.num_fds()
    for _ in range(30):
        await agent.run(sandbox, ["cat"], terminal=SIZE, stdin=b"x\n")
    await until(lambda: process.num_fds() <= before)
    assert (await agent.run(sandbox, ["ls", "/dev/pts"])).stdout == b"ptmx\n"
    supervisor = max(agent.supervised(sandbox))
    used_s = sum(psutil.Process(supervisor).cpu_times()[:2])
    await asyncio.sleep(0.5)
    assert sum(psutil.Process(supervisor).cpu_times()[:2]) - used_s < 0.1
    if os.geteuid() == 0:
        assert len(os.listdir(f"/proc/{supervisor}/fd")) < 12
