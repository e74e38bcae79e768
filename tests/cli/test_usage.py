"""What sandboxes use, changes of what they may use, and logs with times."""

import json

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_cli import sandbox_top
from prism_cli.sandbox_logs import Stamper
from prism_common import errors
from tests.cli.conftest import Run, Spawn
from tests.cli.fake_prism import FakePrism
from tests.cli.test_sandbox import piece

MIB = 2**20


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake has clocks of its own: nobody need wait between two measurements."""
    monkeypatch.setattr(sandbox_top, "_FIRST_S", 0.0)


LIMITS = pb.Limits(
    cpu_millicores=500, memory_bytes=256 * MIB, disk_bytes=128 * MIB, processes_max=99
)


def usage(name: str, at_s: int, cpu_ms: int, **fields: int) -> pb.SandboxUsage:
    """A measurement at a time of the node's clock."""
    one = pb.SandboxUsage(sandbox_id=f"sb-{name}", limits=LIMITS, **fields)  # type: ignore[arg-type]
    one.measure_time.seconds = at_s
    one.cpu_time.FromMilliseconds(cpu_ms)
    return one


def measured(*usages: pb.SandboxUsage) -> dict[str, pb.SandboxUsage]:
    return {one.sandbox_id: one for one in usages}


def two_sandboxes(fake: FakePrism) -> None:
    for name, node in (("web", "nd-1"), ("api", "nd-2")):
        fake.put(name, pb.SANDBOX_STATE_READY, node_id=node, node_name=node, spec=pb.SandboxSpec(
            limits=LIMITS))  # fmt: skip
    fake.put("old", pb.SANDBOX_STATE_STOPPED, node_id="nd-1")
    fake.usages.extend(
        [
            measured(usage("web", 10, 1000), usage("api", 50, 0)),
            measured(
                usage("web", 14, 2000, memory_bytes=3 * MIB, processes=2, disk_bytes=MIB),
                usage("api", 52, 900, memory_bytes=64 * MIB, oom_kills=4, processes=0),
            ),
        ]
    )


def test_top_shows_what_is_used_of_what_may_be(inline: Run, fake: FakePrism) -> None:
    two_sandboxes(fake)
    result = inline("sandbox", "top")
    assert [line.split() for line in result.stdout.decode().splitlines()] == [
        ["NAME", "STATE", "NODE", "CPU", "MEMORY", "DISK", "PROCESSES", "OOM", "KILLS", "ERROR"],
        ["api", "READY", "nd-2", "450m/500m", "64Mi/256Mi", "-", "0/99", "4", "-"],
        ["web", "READY", "nd-1", "250m/500m", "3Mi/256Mi", "1Mi/128Mi", "2/99", "-", "-"],
    ]
    assert {one.node for one in fake.requests("MeasureSandboxes")} == {"nd-1", "nd-2"}


def test_top_of_one_as_data_has_null_for_what_is_not_known(inline: Run, fake: FakePrism) -> None:
    two_sandboxes(fake)
    (one,) = json.loads(inline("sandbox", "top", "web", "-o", "json", "--sort", "name").stdout)
    assert (one["cpu_millicores"], one["usage"]["disk_bytes"]) == (250, MIB)
    assert one["usage"]["oom_kills"] is None
    assert one["error"] is None


def test_top_says_which_names_have_no_processes(inline: Run, fake: FakePrism) -> None:
    two_sandboxes(fake)
    result = inline("sandbox", "top", "web", "old", "none")
    assert result.returncode == 1
    assert result.stdout.split()[10:11] == [b"web"]
    assert b"no sandbox of this name is READY or PAUSED: none, old" in result.stderr


def test_top_says_which_node_does_not_answer(inline: Run, fake: FakePrism) -> None:
    two_sandboxes(fake)
    lost = errors.NodeUnreachableError("node nd-1 does not answer")
    fake.fail("MeasureSandboxes", *[lost] * 4)
    assert inline("sandbox", "top").stdout.count(b"node nd-1 does not answer") == 2


def test_top_watches(spawn: Spawn, fake: FakePrism) -> None:
    two_sandboxes(fake)
    process = spawn("sandbox", "top", "-w", "--every", "10ms", "-o", "name", "--sort", "memory")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(4)] == [b"api\n", b"web\n"] * 2


def test_info_says_what_is_used(inline: Run, fake: FakePrism) -> None:
    fake.put("web", pb.SANDBOX_STATE_READY, usage=usage("web", 1, 1500, memory_bytes=MIB,
             processes=3, oom_kills=2))  # fmt: skip
    text = inline("sandbox", "info", "web").stdout.decode()
    assert "1.5s of CPU so far, memory 1Mi/256Mi, processes 3/99, 2 killed as memory" in text
    assert fake.requests("GetSandbox")[0].with_usage


def test_update_sends_what_is_to_change_and_nothing_else(inline: Run, fake: FakePrism) -> None:
    fake.put("web", pb.SANDBOX_STATE_READY)
    flags = ("--cpu", "2", "--memory", "1Gi", "--disk", "64Mi", "--processes", "7")
    result = inline("sandbox", "update", "web", *flags, "--label", "a=b", "-l", "c=")
    assert (result.returncode, result.stdout) == (0, b"web\n")
    request = fake.requests("UpdateSandbox")[0]
    assert request.limits == pb.Limits(
        cpu_millicores=2000, memory_bytes=2**30, disk_bytes=2**26, processes_max=7
    )
    assert dict(request.labels) == {"a": "b", "c": ""}
    assert not request.HasField("expire_time")
    assert request.request_id
    before = Timestamp()
    before.GetCurrentTime()
    assert inline("sandbox", "update", "web", "--ttl", "1h").returncode == 0
    request = fake.requests("UpdateSandbox")[1]
    assert 3590 < request.expire_time.seconds - before.seconds < 3700
    assert not request.limits.ByteSize()


def test_update_of_several_says_which_failed(inline: Run, fake: FakePrism) -> None:
    fake.put("a", pb.SANDBOX_STATE_READY)
    fake.put("c", pb.SANDBOX_STATE_READY)
    room = errors.NoCapacityError("node 'n' has no room for 9 MiB more of memory: 1 MiB is free")
    fake.fail("UpdateSandbox", room)
    result = inline("sandbox", "update", "a", "b", "c", "--memory", "1Gi")
    assert (result.returncode, result.stdout) == (1, b"c\n")
    assert result.stderr.decode().splitlines() == [
        "prismctl: a: node 'n' has no room for 9 MiB more of memory: 1 MiB is free",
        "prismctl: b: no sandbox is named 'b'; what there is: prismctl sandbox ls",
    ]


def test_update_refuses_to_change_nothing_and_names_flags(inline: Run, fake: FakePrism) -> None:
    fake.put("web", pb.SANDBOX_STATE_READY)
    result = inline("sandbox", "update", "web")
    assert result.returncode == 2
    assert b"nothing to change" in result.stderr
    field = "limits.memory_bytes"
    fake.fail(
        "UpdateSandbox", errors.InvalidArgumentError(f"{field}: 1 is not 2 to 3", field=field)
    )
    result = inline("sandbox", "update", "web", "--memory", "1")
    assert (result.returncode, result.stderr) == (1, b"prismctl: --memory: 1 is not 2 to 3\n")


def test_logs_with_times(cli: Run, fake: FakePrism) -> None:
    fake.logs = [piece(1, b"a\nb"), piece(2, b"c\n"), piece(3, b"e\n", pb.OUTPUT_STREAM_STDERR)]
    result = cli("sandbox", "logs", "--timestamps", "web")
    assert result.stdout.splitlines() == [
        b"1970-01-01T00:00:01.000000Z a",
        b"1970-01-01T00:00:01.000000Z bc",
    ]
    assert result.stderr == b"1970-01-01T00:00:03.000000Z e\n"


def test_a_line_with_its_time_is_of_one_command() -> None:
    stamper = Stamper()
    other = piece(2, b"x\n\xff")
    other.exec_id = "ex-2"
    written = b"".join(
        stamper.stamp(one) for one in (piece(1, b"a"), piece(1, b""), other, piece(3, b"b\n"))
    )
    assert [line.partition(b" ")[2] for line in written.split(b"\n")] == [
        b"a", b"x", b"\xff", b"b", b"",
    ]  # fmt: skip
