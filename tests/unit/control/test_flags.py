"""The flags of `prismd`: each refused in one line that names it, before anything starts."""

from pathlib import Path

import pytest

from prism_common import settings
from prism_common.addresses import Address
from prism_control import main
from prism_control.node.compaction import SnapshotPolicy
from prism_control.node.settings import NodeSettings, make_settings
from prism_control.request_queue import BatchingSettings


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--create-queue-size=0"], ["--create-queue-size", "1 to 1000000"]),
        (["--delete-queue-size=-1"], ["--delete-queue-size", "1 to 1000000"]),
        (["--batch-threshold=x"], ["--batch-threshold", "'x'"]),
        (["--batch-interval-ms=60001"], ["--batch-interval-ms", "0 to 60000"]),
        (["--bootstrap-expect=10"], ["--bootstrap-expect", "1 to 9"]),
        (["--bootstrap-expect=3", "--join=a:1"], ["--join", "all 3 members"]),
        (["--bootstrap", "--join=a:1"], ["--bootstrap", "--join"]),
        (["--bootstrap", "--bootstrap-expect=1"], ["--bootstrap", "--bootstrap-expect"]),
        (["--raft=nonsense:port"], ["--raft", "HOST:PORT"]),
        (["--api=127.0.0.1:65536"], ["--api", "0 to 65535"]),
        (["--metrics=[::1:9"], ["--metrics", "HOST:PORT"]),
        (["--join=a:b:c"], ["--join", "HOST:PORT"]),
        (["--name=Not_A_Name"], ["--name", "a-z"]),
        (["--advertise=0.0.0.0"], ["--advertise"]),
        (["--batching-enabled=perhaps"], ["--batching-enabled"]),
        (["--log-level=loud"], ["--log-level", "debug"]),
        (["--log-format=xml"], ["--log-format", "json"]),
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--config=/no/such/file"], ["--config", "No such file"]),
    ],
)
def test_nonsense_is_one_line_that_names_the_flag(
    tmp_path: Path, flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status = settings.run(main._command, [f"--data-dir={tmp_path / 'd'}", *flags])
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert line.startswith("prismd: ")
    for word in words:
        assert word in line
    assert not (tmp_path / "d").exists()


def _settings(**changes: object) -> NodeSettings:
    flags: dict[str, object] = {
        "name": "n1", "data_dir": "d", "raft": "127.0.0.1", "api": "[::1]:1", "metrics": "::1",
        "advertise": "", "bootstrap": False, "bootstrap_expect": None, "join": "",
        "strict_join": False, "insecure": False, "batching": BatchingSettings(),
        "snapshots": SnapshotPolicy(),
    }  # fmt: skip
    return make_settings(**(flags | changes))  # type: ignore[arg-type]


def test_ports_have_defaults() -> None:
    made = _settings()
    assert (made.raft, made.api) == (Address("127.0.0.1", 4200), Address("::1", 1))
    assert made.metrics == Address("::1", 9420)


def test_each_address_to_meet_counts_once() -> None:
    made = _settings(bootstrap_expect=3, join="a, b:4200,a:4200, ,c:1,")
    assert made.join == ("a:4200", "b:4200", "c:1")


def test_expecting_one_is_to_bootstrap() -> None:
    assert _settings(bootstrap_expect=1).bootstrap


def test_the_own_address_may_be_left_out() -> None:
    assert _settings(bootstrap_expect=3, join="a,b").bootstrap_expect == 3


def test_a_wildcard_needs_a_host_to_advertise() -> None:
    made = _settings(api="0.0.0.0:1", insecure=True, advertise="node1.example.com")
    assert made.advertise == "node1.example.com"
    assert _settings(api="[::]:1", insecure=True, advertise="[fe80::1]").advertise == "fe80::1"


@pytest.mark.parametrize("expect", [2, 4])
def test_an_even_size_is_warned_of(expect: int, caplog: pytest.LogCaptureFixture) -> None:
    join = ",".join(f"h{n}" for n in range(expect))
    main._warn(_settings(bootstrap_expect=expect, join=join), insecure=False)
    assert f"tolerate no more failures than {expect - 1}" in caplog.text


def test_being_reachable_by_others_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    main._warn(_settings(api="10.0.0.1:1", insecure=True), insecure=True)
    assert "without authentication" in caplog.text
    caplog.clear()
    main._warn(_settings(), insecure=True)
    assert caplog.text == ""
