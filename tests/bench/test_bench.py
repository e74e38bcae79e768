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
