"""Flags: what is nonsense is refused in one line that names the flag and the range."""

import json
import socket
from pathlib import Path

import pytest

from prism_agent.main import command, parse_cpu, parse_labels, parse_size
from prism_common import settings
from prism_common.errors import InvalidArgumentError


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["--listen=nowhere:x"], "--listen"),
        (["--control=a:b:c"], "--control"),
        (["--slots=0"], "--slots"),
        (["--max-starts=100000"], "--max-starts"),
        (["--warm-pool=-1"], "--warm-pool"),
        (["--warm-pool=1025"], "--warm-pool"),
        (["--memory=lots"], "--memory"),
        (["--memory=1"], "--memory"),
        (["--cpu=0"], "--cpu"),
        (["--disk=-1"], "--disk"),
        (["--name=Not A Name"], "--name"),
        (["--label=novalue"], "--label"),
        (["--runtime=docker"], "--runtime"),
        (["--dns-servers=dns.example"], "--dns-servers"),
        (["--nonsense"], "--nonsense"),
        (["--listen=0.0.0.0:7117", "--insecure", "--control=a:1"], "--advertise"),
    ],
)
def test_nonsense_is_one_line_and_status_2(
    argv: list[str], flag: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert settings.run(command, [*argv, f"--data-dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert flag in error
    assert error.count("\n") == 1


def test_address_that_others_reach_needs_insecure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["--listen=0.0.0.0:0", f"--data-dir={tmp_path}", "--runtime=fake"]
    assert settings.run(command, argv) == 1
    assert "--insecure" in capsys.readouterr().err


def test_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        listen = f"--listen=127.0.0.1:{taken.getsockname()[1]}"
        argv = [listen, f"--data-dir={tmp_path}", "--runtime=fake", "--metrics=127.0.0.1:0"]
        assert settings.run(command, [*argv, "--log-level=error"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("prism-agent: --listen: cannot listen on")
    assert error.count("\n") == 1


def test_sizes_and_cpu() -> None:
    assert parse_size("512Mi", "--memory", 1) == 512 << 20
    assert parse_size("2G", "--memory", 1) == 2_000_000_000
    assert parse_cpu("500m", "--cpu") == 500
    assert parse_cpu("2.5", "--cpu") == 2500
    assert parse_labels(("a=b,c=d", "e="), "--label") == {"a": "b", "c": "d", "e": ""}
    with pytest.raises(InvalidArgumentError):
        parse_cpu("257", "--cpu")


def test_purge_of_nothing_is_success(tmp_path: Path) -> None:
    assert settings.run(command, ["--purge", f"--data-dir={tmp_path / 'none'}"]) == 0


def test_probe_prints_a_line_of_json_for_each_runtime(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = settings.run(command, ["--probe", "--runtime=fake"])
    line = json.loads(capsys.readouterr().out)
    assert (line["name"], line["ready"], status) == ("fake", True, 0)
