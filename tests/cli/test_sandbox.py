"""create, ls, info, start, stop, rm, logs."""

import json
import re

import pytest
import yaml
from google.protobuf.timestamp_pb2 import Timestamp
from prism.sandbox.v1 import sandbox_pb2 as pb

from tests.cli.conftest import Run, Spawn
from tests.cli.fake_prism import FakePrism


def test_create_prints_the_name_once_it_is_ready(cli: Run, fake: FakePrism) -> None:
    fake.states_after_create = [
        pb.SANDBOX_STATE_SCHEDULED,
        pb.SANDBOX_STATE_STARTING,
        pb.SANDBOX_STATE_READY,
    ]
    result = cli("sandbox", "create")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"cosmic-dragon-3f2a\n", b"")


def test_create_sends_what_the_flags_say(inline: Run, fake: FakePrism) -> None:
    inline(
        "sandbox", "create", "web", "--cpu", "1.5", "--memory", "1Gi", "--disk", "2G",
        "--processes", "64", "--env", "A=b=c", "--env", "E=", "--label", "team=search",
        "--ttl", "1h30m", "--idle-timeout", "90s", "--runtime", "gvisor", "--image", "python",
        "--node-selector", "disk=ssd", "--on-node-loss", "reschedule", "--priority", "-5",
        "--request-id", "mine", "--output-rate", "10Mi",
    )  # fmt: skip
    (request,) = fake.requests("CreateSandbox")
    spec = request.spec
    assert (request.name, request.request_id) == ("web", "mine")
    assert spec.limits == pb.Limits(
        cpu_millicores=1500,
        memory_bytes=2**30,
        disk_bytes=2 * 10**9,
        processes_max=64,
        output_bytes_per_second=10 * 2**20,
    )
    assert dict(spec.env) == {"A": "b=c", "E": ""}
    assert (dict(spec.labels), dict(spec.node_selector)) == ({"team": "search"}, {"disk": "ssd"})
    assert (spec.ttl.seconds, spec.idle_timeout.seconds) == (5400, 90)
    assert (spec.runtime, spec.image, spec.priority) == ("gvisor", "python", -5)
    assert spec.on_node_loss == pb.ON_NODE_LOSS_RESCHEDULE


def test_create_json_is_the_sandbox(inline: Run) -> None:
    data = json.loads(inline("sandbox", "create", "--name", "web", "-o", "json").stdout)
    assert (data["name"], data["state"], data["node_name"]) == ("web", "READY", "agent-1")
    assert data["revision"] == 2  # a number, not text
    assert data["end_time"] is None


def test_create_without_wait_returns_at_once(cli: Run, fake: FakePrism) -> None:
    fake.states_after_create = []
    assert cli("sandbox", "create", "web", "--no-wait").stdout == b"web\n"
    assert not fake.requests("WatchSandboxes")


def test_create_that_stays_pending_says_why(cli: Run, fake: FakePrism) -> None:
    fake.states_after_create = []
    fake.placement = [
        pb.PlacementRefusal(node_name="agent-1", reason="needs 4096 MiB, 512 MiB free")
    ]
    result = cli("--timeout", "4", "sandbox", "create", "web", "--memory", "4Gi")
    assert result.returncode == 1
    line = result.stderr.decode()
    assert "sandbox web is still PENDING after 4 s" in line
    assert "agent-1: needs 4096 MiB, 512 MiB free" in line
    assert "prismctl sandbox info web" in line


def test_create_that_fails_says_why(cli: Run, fake: FakePrism) -> None:
    fake.states_after_create = [pb.SANDBOX_STATE_FAILED]
    result = cli("sandbox", "create", "web")
    assert (result.returncode, result.stdout) == (1, b"")
    assert b"sandbox web is FAILED" in result.stderr


def test_waiting_survives_a_broken_watch_and_a_compacted_revision(
    inline: Run, fake: FakePrism
) -> None:
    fake.states_after_create = [
        pb.SANDBOX_STATE_SCHEDULED,
        pb.SANDBOX_STATE_STARTING,
        pb.SANDBOX_STATE_READY,
    ]
    fake.watch_breaks.extend([1, 0])
    assert inline("sandbox", "create", "web").stdout == b"web\n"
    assert [one.revision for one in fake.requests("WatchSandboxes")] == [1, 2, 2]
    fake.compacted = 100
    assert inline("sandbox", "create", "two").stdout == b"two\n"
    assert fake.requests("GetSandbox")[-1].sandbox == "sb-two"


def test_ls_reads_all_pages(inline: Run, fake: FakePrism) -> None:
    for number in range(5):
        fake.put(f"s{number}", pb.SANDBOX_STATE_READY)
    assert inline("sandbox", "ls", "-o", "name").stdout == b"s0\ns1\ns2\ns3\ns4\n"
    assert len(fake.requests("ListSandboxes")) == 3


def test_ls_is_a_plain_table_for_a_pipe(inline: Run, fake: FakePrism) -> None:
    fake.put("web", pb.SANDBOX_STATE_READY, node_name="agent-1", runtime="fake")
    fake.put("db", pb.SANDBOX_STATE_FAILED, reason="OUT_OF_MEMORY")
    lines = inline("sandbox", "ls").stdout.decode().splitlines()
    assert lines[0].split() == ["NAME", "STATE", "NODE", "RUNTIME", "AGE", "REASON"]
    assert re.match(r"web   READY   agent-1  fake \(runs nothing\)  \d+d  -$", lines[1])
    assert re.match(r"db    FAILED  -        -                    \d+d  OUT_OF_MEMORY$", lines[2])
    assert "\x1b" not in "".join(lines)


def test_ls_filters_and_sorts(inline: Run, fake: FakePrism) -> None:
    for name, state in (("c", pb.SANDBOX_STATE_READY), ("a", pb.SANDBOX_STATE_LOST),
                        ("b", pb.SANDBOX_STATE_READY)):  # fmt: skip
        fake.put(name, state, node_name=f"agent-{name}")
    assert inline("sandbox", "ls", "-o", "name", "--sort", "name").stdout == b"a\nb\nc\n"
    assert inline("sandbox", "ls", "-o", "name", "--sort", "age").stdout == b"c\na\nb\n"
    assert inline("sandbox", "ls", "-o", "name", "--state", "ready").stdout == b"c\nb\n"
    inline("sandbox", "ls", "--label", "team=x", "--node", "agent-1")
    last = fake.requests("ListSandboxes")[-1]
    assert (dict(last.label_selector), last.node) == ({"team": "x"}, "agent-1")


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_empty_and_full_lists_parse(inline: Run, fake: FakePrism, form: str) -> None:
    assert yaml.safe_load(inline("-o", form, "sandbox", "ls").stdout) == []
    fake.put("web", pb.SANDBOX_STATE_READY)
    (data,) = yaml.safe_load(inline("-o", form, "sandbox", "ls").stdout)
    assert (data["name"], data["state"]) == ("web", "READY")


def test_watch_resumes_after_a_broken_stream(spawn: Spawn, fake: FakePrism) -> None:
    fake.put("web", pb.SANDBOX_STATE_PENDING)
    fake.watch_breaks.append(1)
    process = spawn("sandbox", "ls", "--watch", "-o", "json")
    assert process.stdout is not None

    def next_state() -> str:
        assert process.stdout is not None
        return str(json.loads(process.stdout.readline())["state"])

    assert next_state() == "PENDING"
    fake.put("web", pb.SANDBOX_STATE_STARTING)
    assert next_state() == "STARTING"
    fake.put("web", pb.SANDBOX_STATE_READY)
    assert next_state() == "READY"
    fake.put("web", pb.SANDBOX_STATE_DELETED)
    assert next_state() == "DELETED"
    assert [one.revision for one in fake.requests("WatchSandboxes")] == [1, 2]


def test_watch_lists_again_when_its_revision_is_compacted(spawn: Spawn, fake: FakePrism) -> None:
    fake.put("old", pb.SANDBOX_STATE_READY)
    fake.put("web", pb.SANDBOX_STATE_READY)
    fake.watch_breaks.append(0)
    process = spawn("sandbox", "ls", "--watch")
    assert process.stdout is not None
    lines = [process.stdout.readline().split()[:2] for _ in range(3)]
    assert lines == [[b"NAME", b"STATE"], [b"old", b"READY"], [b"web", b"READY"]]
    fake.wait_for_call("WatchSandboxes")
    with fake.changed:
        fake.compacted = 4
        fake.put("old", pb.SANDBOX_STATE_DELETED)
        fake.put("web", pb.SANDBOX_STATE_STOPPED)
    lines = [process.stdout.readline().split()[:2] for _ in range(2)]
    assert lines == [[b"web", b"STOPPED"], [b"old", b"DELETED"]]
    assert len(fake.requests("ListSandboxes")) == 2


def test_watch_keeps_to_its_filters(spawn: Spawn, fake: FakePrism) -> None:
    fake.put("a", pb.SANDBOX_STATE_READY)
    process = spawn("sandbox", "ls", "-w", "--state", "ready", "-o", "name")
    assert process.stdout is not None
    assert process.stdout.readline() == b"a\n"
    fake.wait_for_call("WatchSandboxes")
    fake.put("b", pb.SANDBOX_STATE_PENDING)
    fake.put("c", pb.SANDBOX_STATE_READY)
    assert process.stdout.readline() == b"c\n"
    fake.put("a", pb.SANDBOX_STATE_STOPPED)  # leaves the filter: said once
    assert process.stdout.readline() == b"a\n"


def test_info_says_for_each_node_why_not(inline: Run, fake: FakePrism) -> None:
    fake.put(
        "web",
        pb.SANDBOX_STATE_PENDING,
        spec=pb.SandboxSpec(env={"A": "x\x1b[31m"}, limits=pb.Limits(cpu_millicores=500)),
        placement=[
            pb.PlacementRefusal(node_name="agent-1", reason="512 MiB free"),
            pb.PlacementRefusal(node_name="agent-2", reason="is cordoned"),
        ],
    )
    text = inline("sandbox", "info", "web").stdout.decode()
    assert "State:" in text
    assert "PENDING: no node is chosen yet" in text
    assert "Waits for:   agent-1: 512 MiB free" in text
    assert "             agent-2: is cordoned" in text
    assert "cpu 500m" in text
    assert "\x1b" not in text


def test_info_of_a_lost_sandbox_says_when_it_was_seen(inline: Run, fake: FakePrism) -> None:
    seen = Timestamp(seconds=1_700_000_000)
    fake.put("web", pb.SANDBOX_STATE_LOST, reason="NODE_LOST", last_seen_time=seen)
    text = inline("sandbox", "info", "web").stdout.decode()
    assert re.search(r"LOST: NODE_LOST, last seen 2023-11-1\d \d\d:\d\d:\d\d \(\d+d ago\)", text)


def test_stop_and_start_wait(inline: Run, fake: FakePrism) -> None:
    fake.put("web", pb.SANDBOX_STATE_READY)
    stopped = inline("sandbox", "stop", "web", "--grace", "10s", "-o", "json")
    assert json.loads(stopped.stdout)["state"] == "STOPPED"
    assert fake.requests("StopSandbox")[0].grace_period.seconds == 10
    started = inline("sandbox", "start", "web", "-o", "json")
    assert json.loads(started.stdout)["state"] == "READY"


def test_pause_and_resume_wait(inline: Run, fake: FakePrism) -> None:
    fake.put("web", pb.SANDBOX_STATE_READY)
    paused = inline("sandbox", "pause", "web", "-o", "json")
    assert json.loads(paused.stdout)["state"] == "PAUSED"
    resumed = inline("sandbox", "resume", "web", "-o", "json")
    assert json.loads(resumed.stdout)["state"] == "READY"


def test_rm_reports_each_name(inline: Run, fake: FakePrism) -> None:
    fake.put("a", pb.SANDBOX_STATE_READY)
    fake.put("c", pb.SANDBOX_STATE_LOST)
    result = inline("sandbox", "rm", "-f", "a", "b", "c")
    assert (result.returncode, result.stdout) == (1, b"a\nc\n")
    assert result.stderr.startswith(b"prismctl: b: no sandbox is named 'b'")
    assert not fake.sandboxes
    assert all(one.force and one.wait for one in fake.requests("DeleteSandbox"))
    assert len({one.request_id for one in fake.requests("DeleteSandbox")}) == 3


def test_rm_without_wait_and_as_json(inline: Run, fake: FakePrism) -> None:
    fake.put("a", pb.SANDBOX_STATE_READY)
    result = inline("-o", "json", "sandbox", "rm", "--no-wait", "a")
    assert [one["name"] for one in json.loads(result.stdout)] == ["a"]
    assert not fake.requests("DeleteSandbox")[0].wait


def piece(
    seconds: int, data: bytes, stream: int = pb.OUTPUT_STREAM_STDOUT
) -> pb.StreamLogsResponse:
    return pb.StreamLogsResponse(
        exec_id="ex-1",
        time=Timestamp(seconds=seconds),
        stream=stream,  # type: ignore[arg-type]
        data=data,
    )


def test_logs_are_raw_and_go_to_their_own_stream(cli: Run, fake: FakePrism) -> None:
    fake.logs = [piece(1, b"a\xff\n"), piece(2, b"e\n", pb.OUTPUT_STREAM_STDERR)]
    result = cli("sandbox", "logs", "web")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"a\xff\n", b"e\n")
    assert not fake.requests("StreamLogs")[0].HasField("since")


def test_logs_go_on_after_a_broken_stream_without_repetition(cli: Run, fake: FakePrism) -> None:
    fake.logs = [piece(1, b"a"), piece(2, b"b"), piece(2, b"c"), piece(2, b"d"), piece(3, b"e")]
    fake.log_breaks.extend([3, 2])
    assert cli("sandbox", "logs", "-f", "web").stdout == b"abcde"
    assert len(fake.requests("StreamLogs")) == 3


def test_logs_since_a_moment(cli: Run, fake: FakePrism) -> None:
    cli("sandbox", "logs", "web", "--since", "2025-01-31T12:00:00Z")
    assert fake.requests("StreamLogs")[0].since.ToJsonString() == "2025-01-31T12:00:00Z"
    assert cli("sandbox", "logs", "web", "--since", "2025-99").returncode == 2
