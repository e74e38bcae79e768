"""exec, attach, execs and run: streams, statuses, signals, broken connections."""

import json
import signal
import subprocess

import pytest
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_common import errors
from tests.cli.conftest import Run, Spawn
from tests.cli.fake_prism import FakePrism


@pytest.fixture(autouse=True)
def _web(fake: FakePrism) -> None:
    fake.put("web", pb.SANDBOX_STATE_READY)


@pytest.mark.parametrize("status", [0, 1, 3, 255])
def test_exit_status_of_the_command_is_ours(cli: Run, status: int) -> None:
    result = cli("sandbox", "exec", "web", "--", "exit", str(status))
    assert (result.returncode, result.stdout, result.stderr) == (status, b"", b"")


def test_output_is_raw_and_goes_to_its_own_stream(cli: Run) -> None:
    result = cli("sandbox", "exec", "web", "--", "both")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"out \xff\x00\n", b"err\n")


def test_options_after_the_dashes_belong_to_the_command(cli: Run, fake: FakePrism) -> None:
    result = cli("sandbox", "exec", "web", "--", "echo", "-i", "--", "--help")
    assert result.stdout == b"-i -- --help\n"
    assert not fake.requests("Exec")[0].stdin


def test_stdin_is_sent_whole_with_i_and_not_without(cli: Run) -> None:
    data = bytes(range(256)) * 4096  # 1 MiB: many chunks
    assert cli("sandbox", "exec", "-i", "web", "--", "cat", stdin=data).stdout == data
    assert cli("sandbox", "exec", "web", "--", "exit", "0", stdin=data).stdout == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_go_to_the_command(spawn: Spawn, fake: FakePrism, number: int) -> None:
    process = spawn("sandbox", "exec", "web", "--", "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == b"waiting\n"
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert fake.execs["ex-1"].exit == pb.ExecExit(exit_code=128 + number, signal=number)


def test_sigquit_leaves_the_command_running(spawn: Spawn, fake: FakePrism) -> None:
    process = spawn("sandbox", "exec", "web", "--", "wait")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"waiting\n"
    process.send_signal(signal.SIGQUIT)
    assert process.wait(20) == 128 + signal.SIGQUIT
    assert b"prismctl sandbox attach web ex-1" in process.stderr.read()
    assert fake.execs["ex-1"].exit is None


def test_a_broken_stream_is_attached_again_without_loss_or_repetition(
    cli: Run, fake: FakePrism
) -> None:
    fake.breaks.extend([(2, None), (0, None), (1, None)])
    result = cli("sandbox", "exec", "web", "--", "count")
    assert (result.returncode, result.stdout) == (7, b"1\n2\n3\n4\n5\n")
    assert [one.after_sequence for one in fake.requests("AttachExec")] == [4, 4, 6]
    assert len(fake.execs) == 1


def test_a_stream_that_ends_without_a_status_is_attached_again(cli: Run, fake: FakePrism) -> None:
    fake.fail("Exec", errors.NoLeaderError("no leader", retry_after_s=0.01))
    result = cli("sandbox", "exec", "web", "--", "exit", "4")
    assert result.returncode == 4
    first, second = fake.requests("Exec")
    assert first.request_id == second.request_id


def test_a_connection_that_stays_broken_gives_no_status(cli: Run, fake: FakePrism) -> None:
    fake.breaks.extend([(1, None)] + [(0, None)] * 50)
    result = cli("--timeout", "4s", "sandbox", "exec", "web", "--", "count")
    assert (result.returncode, result.stdout) == (1, b"1\n")
    assert b"how it ended is not known" in result.stderr
    assert b"prismctl sandbox attach web ex-1" in result.stderr


@pytest.mark.parametrize("reason", ["SANDBOX_GONE", "NODE_LOST"])
def test_a_sandbox_that_is_gone_is_said_and_not_retried(
    cli: Run, fake: FakePrism, reason: str
) -> None:
    fake.breaks.append((1, errors.SandboxGoneError("node agent-1 is lost", reason=reason)))
    result = cli("sandbox", "exec", "web", "--", "count")
    assert (result.returncode, result.stdout) == (1, b"1\n")
    assert b"sandbox web is gone" in result.stderr
    assert b"node agent-1 is lost" in result.stderr
    assert not fake.requests("AttachExec")


def test_piped_input_that_may_be_cut_is_not_taken_for_whole(spawn: Spawn, fake: FakePrism) -> None:
    fake.breaks.append((1, None))
    process = spawn("sandbox", "exec", "-i", "web", "--", "cat")
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(b"some\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"some\n"
    assert process.wait(20) == 1
    assert b"a part may be missing" in process.stderr.read()


def test_input_that_was_not_sent_yet_survives_a_broken_stream(
    spawn: Spawn, fake: FakePrism
) -> None:
    fake.breaks.append((0, None))
    process = spawn("sandbox", "exec", "-i", "web", "--", "cat")
    fake.wait_for_call("AttachExec")
    out, _ = process.communicate(b"later\n", 20)
    assert (process.returncode, out) == (0, b"later\n")


def test_a_reader_that_leaves_ends_the_command(spawn: Spawn, fake: FakePrism) -> None:
    process = spawn("sandbox", "exec", "web", "--", "flood")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    assert process.wait(20) == 141
    assert process.stderr.read() == b""
    assert fake.requests("SignalExec")[0].signal == signal.SIGPIPE


def test_detach_prints_the_id_and_leaves(cli: Run, fake: FakePrism) -> None:
    assert cli("sandbox", "exec", "-d", "web", "--", "echo", "x").stdout == b"ex-1\n"
    result = cli("-o", "json", "sandbox", "exec", "--detach", "web", "--", "exit", "5")
    assert json.loads(result.stdout) == {"exec_id": "ex-2"}
    assert cli("sandbox", "attach", "web", "ex-2").returncode == 5
    assert cli("sandbox", "attach", "web", "ex-1").stdout == b"x\n"
    assert cli("sandbox", "attach", "web", "ex-1", "--after", "1").stdout == b"\n"


def test_ctrl_c_leaves_an_attached_exec_running(spawn: Spawn, cli: Run, fake: FakePrism) -> None:
    cli("sandbox", "exec", "-d", "web", "--", "wait")
    process = spawn("sandbox", "attach", "web", "ex-1")
    assert process.stdout is not None
    assert process.stdout.readline() == b"waiting\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert fake.execs["ex-1"].exit is None


def test_flags_reach_the_server(cli: Run, fake: FakePrism) -> None:
    cli(
        "sandbox", "exec", "web", "--env", "A=1", "-e", "B=x=y", "--cwd", "/tmp", "--user", "me",
        "--exec-timeout", "1m30s", "--", "exit", "0",
    )  # fmt: skip
    (start,) = fake.requests("Exec")
    assert dict(start.env) == {"A": "1", "B": "x=y"}
    assert (start.cwd, start.user, start.timeout.ToTimedelta().total_seconds()) == (
        "/tmp",
        "me",
        90,
    )


@pytest.mark.parametrize(
    ("program", "status", "words"),
    [("oom", 137, b"out of the sandbox's memory"), ("nosuch", 127, b"no such program")],
)
def test_a_reason_is_said_beside_the_status(
    cli: Run, program: str, status: int, words: bytes
) -> None:
    result = cli("sandbox", "exec", "web", "--", program)
    assert result.returncode == status
    assert words in result.stderr


@pytest.mark.parametrize("args", [["web"], ["web", "ls", "-l"], ["web", "--"]])
def test_a_command_without_dashes_is_a_usage_error(cli: Run, args: list[str]) -> None:
    result = cli("sandbox", "exec", *args)
    assert result.returncode == 2
    assert b"write it after --" in result.stderr


def test_execs_lists_what_ran(cli: Run) -> None:
    cli("sandbox", "exec", "web", "--", "exit", "3")
    cli("sandbox", "exec", "web", "--", "oom")
    out = cli("sandbox", "execs", "web").stdout.decode()
    assert "exited 3" in out
    assert "SIGKILL (OUT_OF_MEMORY)" in out
    assert cli("-o", "name", "sandbox", "execs", "web").stdout == b"ex-1\nex-2\n"


# ── run ──────────────────────────────────────────────────────────────────────────────────────


def test_run_creates_executes_and_removes(cli: Run, fake: FakePrism) -> None:
    result = cli("sandbox", "run", "-i", "--cpu", "2", "--", "cat", stdin=b"hello")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"hello", b"")
    assert fake.requests("CreateSandbox")[0].spec.limits.cpu_millicores == 2000
    assert set(fake.sandboxes) == {"sb-web"}


def test_run_removes_after_a_failed_command(cli: Run, fake: FakePrism) -> None:
    assert cli("sandbox", "run", "--", "exit", "9").returncode == 9
    assert set(fake.sandboxes) == {"sb-web"}


def test_run_removes_after_a_sandbox_that_never_gets_ready(cli: Run, fake: FakePrism) -> None:
    fake.states_after_create = [pb.SANDBOX_STATE_FAILED]
    result = cli("sandbox", "run", "--", "exit", "0")
    assert result.returncode == 1
    assert b"is FAILED" in result.stderr
    assert set(fake.sandboxes) == {"sb-web"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_removes_when_interrupted_while_it_waits(
    spawn: Spawn, fake: FakePrism, number: int
) -> None:
    fake.states_after_create = []
    process = spawn("sandbox", "run", "--", "exit", "0")
    fake.wait_for_call("WatchSandboxes")
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert set(fake.sandboxes) == {"sb-web"}


def test_run_removes_when_its_command_is_interrupted(spawn: Spawn, fake: FakePrism) -> None:
    process = spawn("sandbox", "run", "--", "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == b"waiting\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert set(fake.sandboxes) == {"sb-web"}


def test_run_does_not_remove_a_sandbox_that_was_there(cli: Run, fake: FakePrism) -> None:
    result = cli("sandbox", "run", "--name", "web", "--", "exit", "0")
    assert result.returncode == 1
    assert b"already" in result.stderr
    assert set(fake.sandboxes) == {"sb-web"}


def test_no_stdin_at_all_is_its_end(environment: dict[str, str], fake: FakePrism) -> None:
    import sys

    script = f"exec {sys.executable} -m prism_cli sandbox exec -i web -- cat <&-"
    result = subprocess.run(
        ["/bin/sh", "-c", script],
        env=environment | {"PRISM_API": fake.address},
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")
