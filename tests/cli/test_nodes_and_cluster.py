"""node, peer, info and doctor."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from prism.cluster.v1 import cluster_pb2
from prism.node.v1 import node_pb2

from prism_cli import doctor
from prism_common import errors
from tests.cli.conftest import Run
from tests.cli.fake_prism import FakePrism


@pytest.fixture(autouse=True)
def _machines(fake: FakePrism) -> None:
    amounts = node_pb2.ResourceAmounts
    for number in (1, 2):
        fake.nodes.append(
            node_pb2.Node(
                id=f"nd-{number}",
                name=f"agent-{number}",
                state=node_pb2.NODE_STATE_READY,
                address=f"127.0.0.1:711{number}",
                capacity=amounts(cpu_millicores=4000, memory_bytes=8 * 2**30, slots=100),
                allocated=amounts(cpu_millicores=1500, memory_bytes=2**30),
                runtimes=[
                    node_pb2.RuntimeStatus(name="fake", ready=True, message="for benchmarks only"),
                    node_pb2.RuntimeStatus(name="gvisor", message="runsc is not installed"),
                ],
                sandboxes=3,
                version="0.1.0",
            )
        )
    fake.cluster = cluster_pb2.Cluster(
        id="cl-1",
        member_name="node2",
        leader_id="a1",
        leader_api_address="127.0.0.1:8008",
        term=7,
        version="0.1.0",
        peers=[
            cluster_pb2.Peer(
                id="a1", name="node1", role=cluster_pb2.PEER_ROLE_LEADER, reachable=True
            ),
            cluster_pb2.Peer(id="b2", name="node2", role=cluster_pb2.PEER_ROLE_FOLLOWER),
        ],
        sandboxes={"READY": 3, "LOST": 1, "FAILED": 0},
        nodes={"READY": 2},
        warnings=["node2 is not reachable: start it again"],
    )


def test_node_ls_is_honest_about_the_fake_runtime(inline: Run) -> None:
    lines = inline("node", "ls").stdout.decode().splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("agent-1  READY  3          1.5/4  1Gi/8Gi")
    assert "fake (runs nothing)" in lines[1]
    assert inline("node", "ls", "-o", "name").stdout == b"agent-1\nagent-2\n"


def test_node_info_shows_runtimes_and_health(inline: Run) -> None:
    text = inline("node", "info", "agent-1").stdout.decode()
    assert "gvisor not ready: runsc is not installed" in text
    assert "WARNING disk: 91 % full: remove files" in text
    assert json.loads(inline("node", "info", "nd-1", "-o", "json").stdout)["state"] == "READY"


def test_node_info_works_where_the_agent_does_not_answer(inline: Run, fake: FakePrism) -> None:
    fake.fail("GetHealth", errors.WrongStateError("agent-1 does not answer"))
    result = inline("node", "info", "agent-1")
    assert result.returncode == 0
    assert b"not known: agent-1 does not answer" in result.stdout


def test_node_top_shows_a_node_that_does_not_answer(inline: Run, fake: FakePrism) -> None:
    fake.fail("GetResources", errors.NodeUnreachableError("no answer"))
    lines = inline("node", "top").stdout.decode().splitlines()
    assert sum("no answer" in line for line in lines) == 1
    assert sum("1/4 (25%)  2Gi/8Gi (25%)" in line for line in lines) == 1
    data = yaml.safe_load(inline("node", "top", "-o", "yaml").stdout)
    assert [one["score"] for one in data] == [71.5, 71.5]


def test_nodes_are_cordoned_drained_and_opened_again(inline: Run, fake: FakePrism) -> None:
    assert inline("node", "cordon", "agent-1").stdout == b"agent-1\n"
    assert inline("node", "drain", "agent-1", "--deadline", "10m").stdout == b"agent-1\n"
    assert fake.requests("DrainNode")[0].deadline.seconds == 600
    assert inline("node", "uncordon", "agent-1").stdout == b"agent-1\n"
    assert inline("node", "cordon", "nobody").returncode == 1


def test_peer_ls_and_info(inline: Run) -> None:
    lines = inline("peer", "ls").stdout.decode().splitlines()
    assert lines[1].split()[:3] == ["node1", "LEADER", "yes"]
    assert json.loads(inline("peer", "info", "b", "-o", "json").stdout)["name"] == "node2"
    assert b"Role:" in inline("peer", "info", "node1").stdout
    ambiguous = inline("peer", "info", "node")
    assert (ambiguous.returncode, b"node1, node2" in ambiguous.stderr) == (1, True)
    assert b"there are: node1, node2" in inline("peer", "info", "x").stderr


def test_info_says_what_is_wrong_first(inline: Run) -> None:
    lines = inline("info").stdout.decode().splitlines()
    assert lines[0] == "Warning:     node2 is not reachable: start it again"
    text = "\n".join(lines)
    assert "node1 (127.0.0.1:8008)" in text
    assert "2 voters, 1 reachable, 0 may fail" in text
    assert "1 LOST, 3 READY" in text
    assert json.loads(inline("info", "-o", "json").stdout)["sandboxes"]["READY"] == 3


def test_info_without_a_leader(inline: Run, fake: FakePrism) -> None:
    fake.cluster.leader_id = ""
    assert b"none known" in inline("info").stdout


def agent_program(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let doctor find this prism-agent, and not a real one."""
    program = directory / "prism-agent"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(directory / "prismctl")])
    assert doctor.find_agent() == str(program)


def checks_of(output: bytes) -> dict[str, tuple[str, str]]:
    return {one["name"]: (one["status"], one["message"]) for one in json.loads(output)}


def test_doctor_asks_the_agent_and_the_api(
    inline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent_program(
        tmp_path,
        """[ "$*" = --probe ] || exit 9
echo '{"name": "bubblewrap", "ready": true, "version": "0.8.0", "message": ""}'
echo noise
echo '{"name": "gvisor", "ready": false, "version": "", "message": "runsc is not installed"}'""",
        monkeypatch,
    )
    checks = checks_of(inline("doctor", "-o", "json").stdout)
    assert checks["runtime bubblewrap"] == ("OK", "ready: 0.8.0")
    assert checks["runtime gvisor"] == ("WARNING", "not ready: runsc is not installed")
    assert checks["api"][0] == "WARNING"
    assert "node2 is not reachable" in checks["api"][1]
    machine = {"bwrap", "user namespaces", "cgroups", "python3", "libseccomp", "cc", "port 8008"}
    assert machine <= {*checks}


def test_doctor_fails_where_no_runtime_works(
    inline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = '{"name": "bubblewrap", "ready": false, "message": "no"}'
    agent_program(tmp_path, f"echo '{line}'", monkeypatch)
    result = inline("doctor", "-o", "json")
    assert result.returncode == 1
    assert checks_of(result.stdout)["runtime bubblewrap"] == ("CRITICAL", "not ready: no")


def test_doctor_survives_an_agent_that_breaks(
    inline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent_program(tmp_path, "echo broken >&2; exit 3", monkeypatch)
    status, message = checks_of(inline("doctor", "-o", "json").stdout)["prism-agent"]
    assert status == "WARNING"
    assert message.endswith("broken")


def test_doctor_finds_an_api_that_was_asked_for_and_is_away(
    inline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent_program(tmp_path, "exit 0", monkeypatch)
    arguments = ("--api", "127.0.0.1:1", "--timeout", "200ms", "doctor", "-o", "json")
    result = inline(*arguments)
    assert result.returncode == 1
    assert checks_of(result.stdout)["api"][0] == "CRITICAL"
