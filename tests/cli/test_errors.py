"""Each failure is one clear line, the right exit status, and never a traceback."""

import subprocess
from pathlib import Path

import pytest
from google.rpc import error_details_pb2, status_pb2
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_common import errors
from tests.cli.conftest import Run, Spawn
from tests.cli.fake_prism import FakePrism


def line_of(result: subprocess.CompletedProcess[bytes]) -> str:
    """Return the one line of a failure."""
    assert result.returncode == 1, result
    text = result.stderr.decode()
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    assert text.startswith("prismctl: ")
    return text.removeprefix("prismctl: ").rstrip("\n")


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (
            errors.InvalidArgumentError(
                "spec.limits.memory_bytes: 1 is below 16777216", field="spec.limits.memory_bytes"
            ),
            "--memory: 1 is below 16777216",
        ),
        (
            errors.InvalidArgumentError(
                "spec.labels[a b]: 'a b' is not a label key", field="spec.labels[a b]"
            ),
            "--label a b: 'a b' is not a label key",
        ),
        (errors.InvalidArgumentError("nothing fits"), "nothing fits"),
        (
            errors.RequestIdReusedError("it was used for something else"),
            "it was used for something else; give another --request-id, or none",
        ),
        (
            errors.AlreadyExistsError("a sandbox is named 'web'"),
            "a sandbox is named 'web'; choose another name, or remove it first: "
            "prismctl sandbox rm NAME",
        ),
        (
            errors.QueueFullError("12000 creates wait already", retry_after_s=1.5),
            "12000 creates wait already; try again in 1.5 s",
        ),
        (errors.WrongStateError("sandbox web is STOPPED"), "sandbox web is STOPPED"),
        (errors.NotServedError("gvisor"), "gvisor is not served by this version"),
        (errors.PrismError("it broke"), "it broke"),
        (
            status_pb2.Status(code=12, message="Method not found!"),
            "Method not found!; this server does not serve it (yet)",
        ),
        (errors.NoLeaderError("no leader"), "no leader; how the cluster is: prismctl info"),
        (errors.PrismError("two\nlines \x1b[31mred"), "two; lines \\x1b[31mred"),
    ],
)
def test_a_failure_is_one_line_that_says_what_to_do(
    inline: Run, fake: FakePrism, failure: errors.PrismError, expected: str
) -> None:
    fake.fail("CreateSandbox", failure)
    assert line_of(inline("sandbox", "create")) == expected


def test_not_found_says_how_to_look(inline: Run) -> None:
    line = line_of(inline("sandbox", "info", "web"))
    assert "'web'" in line
    assert "prismctl sandbox ls" in line


def test_verbose_shows_the_details(inline: Run, fake: FakePrism) -> None:
    fake.fail(
        "GetSandbox",
        errors.QueueFullError("full", retry_after_s=2, metadata={"queue": "create"}),
    )
    text = inline("-v", "sandbox", "info", "web").stderr.decode()
    for detail in ("QUEUE_FULL", "RESOURCE_EXHAUSTED", "queue: create", "retry after: 2 s"):
        assert detail in text
    assert fake.address in text


def test_unavailable_is_retried_by_the_same_request_id(cli: Run, fake: FakePrism) -> None:
    fake.fail(
        "CreateSandbox",
        errors.OutcomeUnknownError("the leader changed", retry_after_s=0.01),
        errors.NoLeaderError("no leader", retry_after_s=0.01),
        status_pb2.Status(code=14, message="Socket closed"),
    )
    result = cli("sandbox", "create", "web")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"web\n", b"")
    assert len({one.request_id for one in fake.requests("CreateSandbox")}) == 1
    assert len(fake.requests("CreateSandbox")) == 4


def test_retries_end_with_the_timeout(cli: Run, fake: FakePrism) -> None:
    fake.fail("GetSandbox", *[errors.NoLeaderError("no leader", retry_after_s=0.3)] * 50)
    line = line_of(cli("--timeout", "4", "sandbox", "info", "web"))
    assert line.startswith("no leader")
    assert 2 <= len(fake.requests("GetSandbox")) <= 15


def test_a_retry_that_cannot_help_is_not_made(inline: Run, fake: FakePrism) -> None:
    fake.fail("GetSandbox", *[errors.SandboxGoneError("gone")] * 2)
    assert line_of(inline("sandbox", "info", "web")) == "gone"
    assert len(fake.requests("GetSandbox")) == 1


def test_a_deadline_says_how_to_give_it_longer(inline: Run, fake: FakePrism) -> None:
    fake.fail("GetSandbox", errors.DeadlineError("too late"))
    assert "--timeout" in line_of(inline("sandbox", "info", "web"))


def test_no_server_is_one_line_that_names_api(bare: Run) -> None:
    line = line_of(bare("--api", "127.0.0.1:1", "--timeout", "200ms", "sandbox", "ls"))
    assert "127.0.0.1:1" in line
    assert "--api HOST:PORT" in line
    assert "PRISM_API" in line


@pytest.mark.parametrize(
    "args",
    [
        ["sandbox", "exec", "web", "--", "true"],
        ["sandbox", "run", "--", "true"],
        ["sandbox", "logs", "web"],
        ["sandbox", "rm", "a", "b"],
        ["sandbox", "ls", "--watch"],
        ["node", "top"],
        ["peer", "ls"],
        ["info"],
    ],
)
def test_no_server_is_one_line_everywhere(bare: Run, args: list[str]) -> None:
    assert "no answer from" in line_of(bare("--api", "127.0.0.1:1", "--timeout", "200ms", *args))


def test_the_next_address_is_tried(bare: Run, fake: FakePrism) -> None:
    fake.put("web", pb.SANDBOX_STATE_READY)
    result = bare("--api", f"127.0.0.1:1,{fake.address}", "sandbox", "ls", "-o", "name")
    assert (result.returncode, result.stdout) == (0, b"web\n")


def test_the_address_comes_from_flag_then_environment_then_file(
    bare: Run, fake: FakePrism, environment: dict[str, str]
) -> None:
    fake.put("web", pb.SANDBOX_STATE_READY)
    file = Path(environment["XDG_CONFIG_HOME"]) / "prism" / "context.toml"
    file.parent.mkdir(parents=True)
    listing = ["--timeout", "5s", "sandbox", "ls", "-o", "name"]
    file.write_text(f'api = ["{fake.address}"]\n')
    assert bare(*listing).stdout == b"web\n"
    assert "as PRISM_API says" in line_of(bare(*listing, env={"PRISM_API": "127.0.0.1:1"}))
    given = bare(*listing, "--api", fake.address, env={"PRISM_API": "127.0.0.1:1"})
    assert given.stdout == b"web\n"
    file.write_text("api = 5")
    assert str(file) in line_of(bare(*listing))
    file.write_text("api = ")
    assert "not valid TOML" in line_of(bare(*listing))


@pytest.mark.parametrize("api", ["nonsense:port", "", ",", "a:1:2", "host:99999"])
def test_a_bad_address_is_named(bare: Run, api: str) -> None:
    assert line_of(bare("--api", api, "sandbox", "ls")).startswith("--api: ")


@pytest.mark.parametrize(
    ("args", "flag"),
    [
        (["--cpu", "lots"], "--cpu"),
        (["--cpu", "0"], "--cpu"),
        (["--cpu", "NaN"], "--cpu"),
        (["--cpu", "0.0005"], "--cpu"),
        (["--memory", "256Mx"], "--memory"),
        (["--memory", "-1"], "--memory"),
        (["--memory", "9999999999Ti"], "--memory"),
        (["--disk", ""], "--disk"),
        (["--ttl", "soon"], "--ttl"),
        (["--ttl", "0"], "--ttl"),
        (["--idle-timeout", "1m1h"], "--idle-timeout"),
        (["--processes", "0"], "--processes"),
        (["--output-rate", "fast"], "--output-rate"),
        (["--priority", "5000"], "--priority"),
        (["--env", "NOVALUE"], "--env"),
        (["--env", "A=1", "--env", "A=2"], "--env"),
        (["--label", "=x"], "--label"),
        (["--on-node-loss", "panic"], "--on-node-loss"),
        (["--timeout", "0"], "--timeout"),
        (["-o", "xml"], "--output"),
        (["one", "--name", "two"], "--name"),
        (["--no-such"], "--no-such"),
    ],
)
def test_nonsense_is_a_usage_error_that_names_the_flag(
    inline: Run, fake: FakePrism, args: list[str], flag: str
) -> None:
    result = inline("sandbox", "create", *args)
    assert result.returncode == 2
    assert flag in result.stderr.decode().splitlines()[-1]
    assert not fake.calls


@pytest.mark.parametrize(
    "args",
    [["nosuch"], ["sandbox", "nosuch"], ["sandbox", "ls", "--state", "odd"], ["sandbox", "rm"]],
)
def test_unknown_words_are_usage_errors(inline: Run, args: list[str]) -> None:
    assert inline(*args).returncode == 2


def test_bytes_that_are_no_text_are_refused(environment: dict[str, str], fake: FakePrism) -> None:
    import sys

    fake.put("web", pb.SANDBOX_STATE_READY)
    result = subprocess.run(
        [sys.executable, "-m", "prism_cli", "sandbox", "exec", "web", "--", b"\xff\xfe"],
        env=environment | {"PRISM_API": fake.address},
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (result.returncode, b"not UTF-8" in result.stderr) == (2, True)
    assert b"Traceback" not in result.stderr


def test_ctrl_c_is_quiet(spawn: Spawn, fake: FakePrism) -> None:
    import signal

    fake.states_after_create = []
    process = spawn("sandbox", "create")
    fake.wait_for_call("WatchSandboxes")
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=20)
    assert (process.returncode, text) == (130, b"")


def test_a_reader_that_leaves_is_no_failure_to_talk_about(spawn: Spawn, fake: FakePrism) -> None:
    fake.put("web", pb.SANDBOX_STATE_READY)
    process = spawn("sandbox", "ls", "--watch", "-o", "name")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"web\n"
    process.stdout.close()
    fake.put("web", pb.SANDBOX_STATE_STOPPED)
    fake.put("web", pb.SANDBOX_STATE_READY)
    assert process.wait(20) == 141
    assert process.stderr.read() == b""


def test_bad_requests_without_a_description_still_name_the_flag(
    inline: Run, fake: FakePrism
) -> None:
    status = status_pb2.Status(code=3, message="refused")
    violation = error_details_pb2.BadRequest.FieldViolation(field="spec.ttl")
    status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    fake.fail("CreateSandbox", status)
    assert line_of(inline("sandbox", "create")) == "--ttl: refused"


def test_a_port_of_another_protocol_is_said(bare: Run) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Quiet(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        result = bare("--api", f"127.0.0.1:{server.server_port}", "--timeout", "5", "info")
        server.shutdown()
        thread.join()
    assert "is not a Prism API" in line_of(result)
