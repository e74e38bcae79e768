"""Execs in a real sandbox, through the agent's own API."""

import asyncio

import grpc
import grpc.aio
import pytest
from prism.sandbox.v1 import sandbox_pb2

from prism_common.status import from_rpc_error
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess


async def test_python_prints_42(agent: AgentProcess, sandbox: str) -> None:
    result = await agent.python(sandbox, "print(6*7)")
    assert (result.stdout, result.stderr, result.code) == (b"42\n", b"", 0)


async def test_exit_status_is_the_programs_own(agent: AgentProcess, sandbox: str) -> None:
    result = await agent.run(sandbox, ["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (result.stdout, result.stderr, result.code) == (b"out\n", b"err\n", 7)


async def test_argv_is_not_given_to_a_shell(agent: AgentProcess, sandbox: str) -> None:
    result = await agent.run(sandbox, ["echo", "$HOME", "a b", "*", ";", "ünï"])
    assert result.stdout == "$HOME a b * ; ünï\n".encode()


async def test_environment_and_directory(agent: AgentProcess, sandbox: str) -> None:
    result = await agent.run(
        sandbox, ["sh", "-c", "echo $A-$B; pwd; hostname"], env={"A": "1", "B": "x y"}, cwd="/tmp"
    )
    assert result.stdout == b"1-x y\n/tmp\nsb-1\n"


async def test_default_directory_is_a_writable_workspace(agent: AgentProcess, sandbox: str) -> None:
    result = await agent.run(sandbox, ["sh", "-c", "pwd; echo x > f; cat f; id -u"])
    assert result.stdout == b"/workspace\nx\n1000\n"


async def test_stdin_is_echoed_and_ends(agent: AgentProcess, sandbox: str) -> None:
    data = bytes(range(256)) * 1000
    result = await agent.run(sandbox, ["cat"], stdin=data)
    assert (result.stdout, result.code) == (data, 0)


async def test_without_stdin_it_is_empty(agent: AgentProcess, sandbox: str) -> None:
    assert (await agent.run(sandbox, ["cat"])).stdout == b""


async def test_unknown_program_is_127_not_found(agent: AgentProcess, sandbox: str) -> None:
    result = await agent.run(sandbox, ["no-such-program"])
    assert result.exit == sandbox_pb2.ExecExit(exit_code=127, reason="NOT_FOUND")
    assert b"no-such-program" in result.stderr


async def test_file_that_is_no_program_is_126(agent: AgentProcess, sandbox: str) -> None:
    for path in ("/etc/passwd", "/workspace"):
        result = await agent.run(sandbox, [path])
        assert result.exit == sandbox_pb2.ExecExit(exit_code=126, reason="NOT_EXECUTABLE")


async def test_timeout_kills_the_whole_session(agent: AgentProcess, sandbox: str) -> None:
    result = await agent.run(
        sandbox, ["sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000"], timeout_s=0.3
    )
    assert result.exit == sandbox_pb2.ExecExit(exit_code=137, signal=9, reason="TIMEOUT")
    # Its end is told when its leader is dead; the others die at the same time.
    look = "while cat /proc/[0-9]*/comm | grep -q sleep; do :; done"
    assert (await agent.run(sandbox, ["sh", "-c", look], timeout_s=20)).code == 0


async def test_signal_reaches_the_session_and_is_reported(
    agent: AgentProcess, sandbox: str
) -> None:
    call = agent.open(sandbox, ["sh", "-c", "echo up; sleep 1000; echo not"])
    await call.until(b"up\n")
    await call.send(signal=15)
    result = await call.result()
    assert result.exit == sandbox_pb2.ExecExit(exit_code=143, signal=15)
    assert result.stdout == b"up\n"


async def test_signal_call_interrupts(agent: AgentProcess, sandbox: str) -> None:
    program = (
        "import os,signal,time\n"
        # Not print: the signal may come while the other one is still being flushed.
        "def h(*a): os.write(1, b'got\\n'); os._exit(5)\n"
        "signal.signal(signal.SIGUSR1, h); print('up', flush=True); time.sleep(1000)"
    )
    call = agent.open(sandbox, ["python3", "-c", program])
    so_far = await call.until(b"up\n")
    await agent.stub.SignalExec(
        sandbox_pb2.SignalExecRequest(sandbox=sandbox, exec_id=so_far.exec_id, signal=10)
    )
    result = await call.result()
    assert (result.stdout, result.code) == (b"up\ngot\n", 5)


async def test_exit_is_sent_while_a_background_child_holds_the_pipe(
    agent: AgentProcess, sandbox: str
) -> None:
    async with asyncio.timeout(5):
        result = await agent.run(sandbox, ["sh", "-c", "sleep 1000 & echo done; exit 3"])
    assert (result.stdout, result.code) == (b"done\n", 3)


async def test_large_output_is_complete_and_numbered(agent: AgentProcess, sandbox: str) -> None:
    size = 40_000_000
    result = await agent.run(sandbox, ["sh", "-c", f"head -c {size} /dev/zero; echo e >&2"])
    assert (len(result.stdout), result.stderr, result.code) == (size, b"e\n", 0)
    assert result.sequences == sorted(result.sequences)
    assert result.sequences[-1] == size + 2


async def test_client_that_does_not_read_slows_the_process(
    agent: AgentProcess, sandbox: str
) -> None:
    program = (
        "import sys\n"
        "n = 0\n"
        "while n < 100 << 20:\n"
        "  sys.stdout.buffer.write(b'x' * 65536); n += 65536\n"
        "  open('/workspace/n', 'w').write(str(n))\n"
    )
    call = agent.open(sandbox, ["python3", "-c", program])
    so_far = await call.until(b"x")
    previous = -1
    async with asyncio.timeout(20):
        while True:
            written = int((await agent.run(sandbox, ["cat", "/workspace/n"])).stdout or b"0")
            if written == previous and written > 1 << 20:
                break
            previous = written
            await agent.run(sandbox, ["sleep", "0.3"])
    assert written < 60 << 20
    assert so_far.exit is None
    result = await call.result()
    assert (len(result.stdout), result.code) == (100 << 20, 0)


async def test_same_request_id_runs_once_and_attaches(agent: AgentProcess, sandbox: str) -> None:
    argv = ["sh", "-c", "echo x >> /workspace/runs; echo hello"]
    first = await agent.run(sandbox, argv, request_id="r1")
    second = await agent.run(sandbox, argv, request_id="r1")
    assert first.exec_id == second.exec_id
    assert second.stdout == b"hello\n"
    assert (await agent.run(sandbox, ["cat", "/workspace/runs"])).stdout == b"x\n"
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await agent.run(sandbox, ["true"], request_id="r1")
    assert from_rpc_error(failure.value).code == "REQUEST_ID_REUSED"


async def test_detached_exec_goes_on_and_is_listed(agent: AgentProcess, sandbox: str) -> None:
    started = await agent.run(
        sandbox,
        ["sh", "-c", "echo first; read x < /workspace/f; exit 4"],
        detach=True,
        cwd="/workspace",
    )
    assert started.exit is None
    attached = agent.attach(sandbox, started.exec_id)
    info = await agent.stub.GetExec(
        sandbox_pb2.GetExecRequest(sandbox=sandbox, exec_id=started.exec_id)
    )
    assert info.argv[0] == "sh"
    result = await attached.result()
    assert result.stdout == b"first\n"
    listed = await agent.stub.ListExecs(sandbox_pb2.ListExecsRequest(sandbox=sandbox))
    assert [each.exec_id for each in listed.execs] == [started.exec_id]
    assert not listed.execs[0].running
    assert listed.execs[0].exit.exit_code == result.code
    assert listed.execs[0].sequence > 0


async def test_attach_replays_after_a_sequence_number(agent: AgentProcess, sandbox: str) -> None:
    call = agent.open(sandbox, ["sh", "-c", "echo 12345; cat"], stdin=True)
    so_far = await call.until(b"12345\n")
    call.cancel()
    attached = agent.attach(sandbox, so_far.exec_id, after_sequence=3)
    await attached.until(b"45\n")
    await attached.send_attach(stdin=b"more")
    await attached.send_attach(stdin_eof=True)
    result = await attached.result()
    assert (result.stdout, result.code) == (b"45\nmore", 0)


async def test_two_clients_see_the_same(agent: AgentProcess, sandbox: str) -> None:
    call = agent.open(sandbox, ["sh", "-c", "echo up; read x; seq 1 20000"], stdin=True)
    so_far = await call.until(b"up\n")
    other = agent.attach(sandbox, so_far.exec_id)
    await other.until(b"up\n")
    await call.send(stdin=b"go\n")
    first, second = await asyncio.gather(call.result(), other.result())
    assert first.stdout == second.stdout
    assert first.code == second.code == 0


async def test_logs_hold_what_execs_wrote(agent: AgentProcess, sandbox: str) -> None:
    await agent.run(sandbox, ["echo", "one"])
    await agent.run(sandbox, ["sh", "-c", "echo two >&2"])
    request = sandbox_pb2.StreamLogsRequest(sandbox=sandbox)
    pieces = [piece async for piece in agent.stub.StreamLogs(request)]
    assert [(piece.stream, piece.data) for piece in pieces] == [(1, b"one\n"), (2, b"two\n")]
    follow = agent.stub.StreamLogs(sandbox_pb2.StreamLogsRequest(sandbox=sandbox, follow=True))
    seen = [(await follow.read()).data, (await follow.read()).data]
    await agent.run(sandbox, ["echo", "three"])
    seen.append((await follow.read()).data)
    assert seen == [b"one\n", b"two\n", b"three\n"]
    follow.cancel()


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"argv": []}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"argv": ["a\0b"]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"argv": ["true"], "cwd": "relative"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"argv": ["true"], "env": {"A=B": "x"}}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"argv": ["x" * 200_000]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"argv": ["true"], "user": "root"}, grpc.StatusCode.UNIMPLEMENTED),
        (
            {"argv": ["true"], "terminal": sandbox_pb2.WindowSize(rows=0, columns=80)},
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ],
)
async def test_what_cannot_be_run_is_refused(
    agent: AgentProcess, sandbox: str, fields: dict[str, object], code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await agent.run(sandbox, **fields)  # type: ignore[arg-type]
    assert failure.value.code() == code


async def test_unknown_sandbox_is_not_found(agent: AgentProcess, gateway: Gateway) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await agent.run("sb-none", ["true"])
    assert failure.value.code() == grpc.StatusCode.NOT_FOUND
