"""Reflection, health, metrics and watches on real ports."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prism.sandbox.v1 import sandbox_pb2
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.harness import Cluster, cluster, reason_of

API_SERVICES = {
    "prism.sandbox.v1.SandboxService",
    "prism.node.v1.NodeService",
    "prism.cluster.v1.ClusterService",
    "prism.agent.v1.AgentGateway",
}
EXPECTED_METRICS = (
    "prism_raft_term", "prism_raft_commit_seconds", "prism_batcher_batching", "prism_sandboxes",
    "prism_raft_leader_changes", "grpc_server_handled",
)  # fmt: skip
COMMON_SERVICES = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def _services(address: str) -> set[str]:
    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
        return {service.name for service in answer.list_services_response.service}


def test_both_ports_list_their_services(three: Cluster) -> None:
    node = three.nodes[0]
    assert _services(node.api) == API_SERVICES | COMMON_SERVICES
    assert _services(node.raft) == {"prism.raft.v1.RaftService"} | COMMON_SERVICES


def test_the_health_service_says_serving_for_the_port_and_each_service(three: Cluster) -> None:
    for node in three.nodes:
        stub: Any = health_pb2_grpc.HealthStub(node.channel)
        for name in ("", *API_SERVICES):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_metrics_parse_and_promtool_finds_nothing(three: Cluster) -> None:
    for node in three.nodes:
        status, text = node.get("/metrics")
        assert status == 200
        families = {family.name: family for family in text_string_to_metric_families(text)}
        for name in EXPECTED_METRICS:
            assert name in families, name
        assert not [name for name in families if name.endswith("_created")]
        promtool = shutil.which("promtool")
        if promtool is not None:
            checked = subprocess.run(
                [promtool, "check", "metrics"], input=text, text=True, capture_output=True,
                check=False,
            )  # fmt: skip
            assert checked.returncode == 0, checked.stdout + checked.stderr
            assert not checked.stdout + checked.stderr
    assert three.nodes[0].get("/healthz") == (200, "ok\n")
    assert three.nodes[0].get("/nothing")[0] == 404


def test_a_watch_goes_on_from_a_lists_revision(three: Cluster) -> None:
    for node in three.nodes:
        listed = node.sandboxes.ListSandboxes(sandbox_pb2.ListSandboxesRequest(), timeout=5)
        watch = node.sandboxes.WatchSandboxes(
            sandbox_pb2.WatchSandboxesRequest(revision=listed.revision), timeout=15
        )
        assert next(watch).revision == listed.revision
        name = f"watched-{node.name}"
        created = three.nodes[0].create(name)
        three.nodes[1].sandboxes.DeleteSandbox(
            sandbox_pb2.DeleteSandboxRequest(sandbox=name), timeout=5
        )
        states = []
        for change in watch:
            if change.sandbox.id == created.id:
                states.append(change.sandbox.state)
                assert change.revision == change.sandbox.revision > listed.revision
            if states[-1:] == [sandbox_pb2.SANDBOX_STATE_DELETED]:
                break
        watch.cancel()
        assert states[0] == sandbox_pb2.SANDBOX_STATE_PENDING


def test_a_watch_of_what_is_not_kept_is_told_to_list_again(tmp_path: Path) -> None:
    with cluster(tmp_path, 1, "--snapshot-entries=20", "--batching-enabled=false") as one:
        (node,) = one.nodes
        for number in range(40):
            node.create(f"s{number}")
        assert node.stop() == 0
        assert "snapshot" in node.log
        node.start().wait_ready()
        assert len(node.list_all()) == 40
        watch = node.sandboxes.WatchSandboxes(
            sandbox_pb2.WatchSandboxesRequest(revision=1), timeout=15
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(watch)
        assert caught.value.code() == grpc.StatusCode.OUT_OF_RANGE
        assert reason_of(caught.value)[0] == "COMPACTED"


def test_pages_of_large_sandboxes_fit_into_messages(tmp_path: Path) -> None:
    with cluster(tmp_path, 1) as one:
        (node,) = one.nodes
        env = {f"KEY{i}": "x" * 1000 for i in range(60)}
        for number in range(90):
            node.create(f"s{number}", env=env)
        assert [row.name for row in node.list_all()] == [f"s{i}" for i in range(90)]
        page = node.sandboxes.ListSandboxes(
            sandbox_pb2.ListSandboxesRequest(page_size=1000), timeout=5
        )
        assert 1 < len(page.sandboxes) < 90
