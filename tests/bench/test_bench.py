"""`prismctl bench` on a real cluster with simulated agents. No figure is asserted, only what is."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.local import running
from tests.integration import harness


@pytest.fixture(scope="module")
def cluster() -> Iterator[harness.Cluster]:
    with running(agents=5, members=1) as (made, _):
        yield made


def bench(api: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prism_cli", "bench", f"--api={api}", *arguments],
        env=harness.environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_bench_measures_and_leaves_nothing(cluster: harness.Cluster, tmp_path: Path) -> None:
    node, file = cluster.leader(), tmp_path / "result.json"
    done = bench(
        node.api, "sequential", "burst-1k", "batch-10k", "exec-true", "--count=100",
        f"--json={file}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {each["name"]: each for each in json.loads(file.read_text())["workloads"]}
    for name in ("sequential", "burst-1k", "batch-10k"):
        (figures,) = (one["figures"] for one in found[name]["rounds"])
        assert figures["sandboxes"] == 100
        assert figures["lost"] == figures["duplicated"] == figures["failures"] == 0
    assert "no node has a runtime that runs code" in found["exec-true"]["skipped"]
    assert node.list_all() == []


def test_simulated_agents_say_that_they_run_nothing(cluster: harness.Cluster) -> None:
    from prism.node.v1 import node_pb2

    page = cluster.leader().nodes.ListNodes(node_pb2.ListNodesRequest(), timeout=harness.WAIT_S)
    assert len(page.nodes) == 5
    for node in page.nodes:
        assert [each.name for each in node.runtimes] == ["fake"]
        assert "runs nothing" in node.runtimes[0].message


def test_unknown_workload_is_named(cluster: harness.Cluster) -> None:
    done = bench(cluster.leader().api, "bursts")
    assert done.returncode == 2
    assert "'bursts' is none; see prismctl bench list" in done.stderr


def test_what_was_acknowledged_is_compared_under_another_leader(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    with running(agents=3, members=3) as (cluster, _):
        first = cluster.leader()
        done = bench(cluster.followers()[0].api, "burst-1k", "--count=50", f"--json={file}")
        assert done.returncode == 0, done.stderr
        (workload,) = json.loads(file.read_text())["workloads"]
        assert workload["rounds"][0]["figures"]["sandboxes"] == 50
        assert workload["rounds"][0]["figures"]["lost"] == 0
        assert cluster.leader() is not first
        kept = bench(cluster.leader().api, "sequential", "--count=5", "--keep-leader")
        second = cluster.leader()
        assert kept.returncode == 0, kept.stderr
        assert second is cluster.leader()


def test_a_json_file_that_cannot_be_written_is_said_before_the_load(
    cluster: harness.Cluster,
) -> None:
    done = bench(cluster.leader().api, "sequential", "--count=5", "--json=/nowhere/result.json")
    assert done.returncode == 1
    assert "--json: /nowhere/result.json: No such file or directory" in done.stderr
    assert "round 1" not in done.stderr


def test_several_processes_share_a_load_and_nothing_of_it_is_lost(
    cluster: harness.Cluster, tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    done = bench(
        cluster.leader().api, "burst-1k", "open-200", "--count=101", "--seconds=0.5",
        "--processes=3", f"--json={file}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    burst, steady = (
        one["rounds"][0]["figures"] for one in json.loads(file.read_text())["workloads"]
    )
    assert burst["sandboxes"] == 101
    assert steady["sandboxes"] == 100
    assert steady["offered_per_s"] == 200
    for figures in (burst, steady):
        assert figures["lost"] == figures["duplicated"] == figures["failures"] == 0
    assert cluster.leader().list_all() == []
