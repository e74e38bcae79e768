"""What `prismd` refuses before anything starts, and how it stops."""

import signal
import socket
from pathlib import Path

import grpc
import pytest
from prism.sandbox.v1 import sandbox_pb2

from tests.integration.harness import cluster, run_prismd, wait_for

ANY = ("--raft=127.0.0.1:0", "--api=127.0.0.1:0", "--metrics=127.0.0.1:0")


def _one_line(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


def test_nonsense_is_one_line_that_names_the_flag_and_starts_nothing(tmp_path: Path) -> None:
    """`tests/unit/control/test_flags.py` has every flag."""
    ended = run_prismd(f"--data-dir={tmp_path / 'd'}", *ANY, "--create-queue-size=0")
    assert ended.returncode == 2
    line = _one_line(ended.stderr)
    assert line == "prismd: --create-queue-size: 0 is not 1 to 1000000"
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--api=0.0.0.0:1", "--advertise=h"], ["--api", "--insecure"]),
        (["--log-file=/no/such/directory/log"], ["--log-file", "No such file"]),
        (["--data-dir=/dev/null/x", "--bootstrap"], ["--data-dir", "Not a directory"]),
    ],
)
def test_what_cannot_work_is_one_line_and_status_1(flags: list[str], words: list[str]) -> None:
    ended = run_prismd(*ANY, *flags)
    assert ended.returncode == 1, ended.stderr
    line = _one_line(ended.stderr)
    for word in words:
        assert word in line


def test_a_new_directory_without_a_way_to_a_cluster_is_refused(tmp_path: Path) -> None:
    ended = run_prismd(*ANY, f"--data-dir={tmp_path / 'd'}")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "--bootstrap-expect" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("flag", ["--raft", "--api", "--metrics"])
def test_a_port_in_use_is_one_line_that_names_the_flag(tmp_path: Path, flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run_prismd(
            "--bootstrap", f"--data-dir={tmp_path / 'd'}", *ANY, f"{flag}=127.0.0.1:{port}"
        )
    assert ended.returncode == 1
    line = _one_line(ended.stderr)
    assert flag in line
    assert "in use" in line


def test_a_second_process_on_a_data_directory_exits_1(tmp_path: Path) -> None:
    with cluster(tmp_path, 1) as one:
        (node,) = one.nodes
        ended = run_prismd("--bootstrap", *ANY, f"--data-dir={node.data}")
        assert ended.returncode == 1
        line = _one_line(ended.stderr)
        assert "--data-dir" in line
        assert "in use" in line
        node.create("still-serves")

        node.stop()
        ended = run_prismd(*ANY, f"--data-dir={node.data}", "--name=another")
        assert ended.returncode == 1
        assert "--name" in _one_line(ended.stderr)


def test_sigterm_exits_0_soon_though_streams_are_open(tmp_path: Path) -> None:
    with cluster(tmp_path, 1) as one:
        (node,) = one.nodes
        watch = node.sandboxes.WatchSandboxes(sandbox_pb2.WatchSandboxesRequest())
        next(watch)
        waiting = node.sandboxes.CreateSandbox.future(
            sandbox_pb2.CreateSandboxRequest(name="waits", wait_until=sandbox_pb2.WAIT_UNTIL_READY),
            timeout=60,
        )
        wait_for("it is committed", lambda: [s for s in node.list_all() if s.name == "waits"])
        node.signal(signal.SIGTERM)
        assert node.wait(30.0) == 0
        assert waiting.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        with pytest.raises(grpc.RpcError):
            list(watch)
        assert "Traceback" not in node.log
        assert "ERROR" not in node.log


def test_sigint_stops_like_sigterm(tmp_path: Path) -> None:
    with cluster(tmp_path, 1) as one:
        (node,) = one.nodes
        node.signal(signal.SIGINT)
        assert node.wait(30.0) == 0
        assert "Traceback" not in node.log


def test_port_0_asks_the_system(tmp_path: Path) -> None:
    with cluster(tmp_path, 1, start=False) as one:
        (node,) = one.nodes
        metrics = node.metrics
        node.raft = node.api = "127.0.0.1:0"
        node.start()
        assert node.metrics == metrics
        node.wait_ready()
        assert ":0," not in node.log
