"""Batches, changes, pauses and drains, with agents that run nothing."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import duration_pb2, timestamp_pb2
from prism.node.v1 import node_pb2
from prism.sandbox.v1 import sandbox_pb2

from tests.integration.harness import (
    WAIT_S,
    Cluster,
    ControlNode,
    cluster,
    environment,
    reason_of,
    wait_for,
)

AGENT = "from prism_agent.main import main; main()"
READY = sandbox_pb2.WAIT_UNTIL_READY


def small(**changes: object) -> sandbox_pb2.SandboxSpec:
    limits = sandbox_pb2.Limits(cpu_millicores=1, memory_bytes=16 << 20, disk_bytes=1 << 20)
    return sandbox_pb2.SandboxSpec(limits=limits, **changes)  # type: ignore[arg-type]


def creates(names: list[str], **changes: object) -> sandbox_pb2.BatchCreateSandboxesRequest:
    return sandbox_pb2.BatchCreateSandboxesRequest(
        requests=[
            sandbox_pb2.CreateSandboxRequest(name=name, spec=small(**changes), wait_until=READY)
            for name in names
        ]
    )


def node_of(control: ControlNode, name: str) -> node_pb2.Node:
    return control.nodes.GetNode(node_pb2.GetNodeRequest(node=name), timeout=WAIT_S)


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three control nodes and two agents of the fake runtime."""
    directory = tmp_path_factory.mktemp("steered")
    agents: list[subprocess.Popen[bytes]] = []
    with cluster(directory, 3) as made:
        try:
            for name in ("fake1", "fake2"):
                agents.append(agent(directory, name, made))
            wait_for(
                "both agents",
                lambda: len(
                    made.nodes[0].nodes.ListNodes(node_pb2.ListNodesRequest(), timeout=5).nodes
                ) == 2,
            )  # fmt: skip
            yield made
        finally:
            for process in agents:
                process.terminate()  # killed, it would leave its cgroup for the next one
            for process in agents:
                process.wait(WAIT_S)


def agent(directory: Path, name: str, made: Cluster) -> subprocess.Popen[bytes]:
    with (directory / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [
                sys.executable, "-c", AGENT, f"--name={name}", f"--data-dir={directory / name}",
                "--listen=127.0.0.1:0", "--metrics=127.0.0.1:0", "--runtime=fake", "--slots=5000",
                "--cpu=64", "--memory=256Gi", "--disk=256Gi",
                "--control=" + ",".join(node.api for node in made.nodes),
            ],
            env=environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=directory,
        )  # fmt: skip


def test_a_batch_through_a_follower_has_a_result_for_each_item(steered: Cluster) -> None:
    follower = steered.followers()[0]
    names = [f"batch-{i}" for i in range(300)]
    request = creates([*names, "NOT A NAME", "batch-7"])
    answer = follower.sandboxes.BatchCreateSandboxes(request, timeout=WAIT_S)
    *made, malformed, taken = answer.results
    assert [one.code for one in made] == [0] * 300
    assert [one.sandbox.name for one in made] == names
    assert {one.sandbox.state for one in made} == {sandbox_pb2.SANDBOX_STATE_READY}
    assert (malformed.code, malformed.reason) == (3, "INVALID_ARGUMENT")
    assert (taken.code, taken.reason) == (6, "ALREADY_EXISTS")

    deletes = sandbox_pb2.BatchDeleteSandboxesRequest(
        requests=[
            sandbox_pb2.DeleteSandboxRequest(sandbox=name, force=True, wait=True)
            for name in [*names, "nobody"]
        ]
    )
    *gone, missing = follower.sandboxes.BatchDeleteSandboxes(deletes, timeout=WAIT_S).results
    assert {(one.code, one.sandbox.state) for one in gone} == {
        (0, sandbox_pb2.SANDBOX_STATE_DELETED)
    }
    assert (missing.code, missing.reason) == (5, "NOT_FOUND")


def test_a_batch_sent_again_makes_nothing_twice(steered: Cluster) -> None:
    request = creates(["", "", ""])
    for i, one in enumerate(request.requests):
        one.request_id = f"again-{i}"
    first, second = (
        node.sandboxes.BatchCreateSandboxes(request, timeout=WAIT_S) for node in steered.nodes[:2]
    )
    assert [r.sandbox.id for r in first.results] == [r.sandbox.id for r in second.results]


def test_a_batch_whose_items_cannot_be_ready_answers_within_its_deadline(steered: Cluster) -> None:
    request = creates(["", ""], node_selector={"no": "where"})
    answer = None
    for _ in range(5):
        # Past its deadline it raises, and says nothing of its items; a busy machine may do that.
        with contextlib.suppress(grpc.RpcError):
            answer = steered.followers()[0].sandboxes.BatchCreateSandboxes(request, timeout=2.0)
            break
    assert answer is not None
    assert [one.code for one in answer.results] == [4, 4]
    assert "PENDING" in answer.results[0].message


@pytest.mark.parametrize("count", [0, 1001])
def test_a_batch_of_no_items_or_too_many_is_refused(steered: Cluster, count: int) -> None:
    request = sandbox_pb2.BatchDeleteSandboxesRequest(
        requests=[sandbox_pb2.DeleteSandboxRequest(sandbox="x")] * count
    )
    with pytest.raises(grpc.RpcError) as caught:
        steered.nodes[0].sandboxes.BatchDeleteSandboxes(request, timeout=WAIT_S)
    assert reason_of(caught.value)[0] == "INVALID_ARGUMENT"


def test_labels_and_deadline_change_and_the_agent_keeps_the_deadline(steered: Cluster) -> None:
    stub = steered.followers()[0].sandboxes
    stub.BatchCreateSandboxes(creates(["changed"], labels={"a": "1"}), timeout=WAIT_S)
    end = timestamp_pb2.Timestamp()
    end.FromNanoseconds(time.time_ns() + 500_000_000)
    request = sandbox_pb2.UpdateSandboxRequest(
        sandbox="changed", labels={"a": "", "b": "2"}, expire_time=end
    )
    row = stub.UpdateSandbox(request, timeout=WAIT_S)
    assert dict(row.spec.labels) == {"b": "2"}

    def gone() -> bool:
        got = stub.GetSandbox(sandbox_pb2.GetSandboxRequest(sandbox=row.id), timeout=WAIT_S)
        return got.state == sandbox_pb2.SANDBOX_STATE_DELETED and got.reason == "TTL_EXPIRED"

    wait_for("it to expire", gone)


def test_limits_change_where_the_node_has_room_and_reach_its_agent(steered: Cluster) -> None:
    first, second = steered.followers()
    (made,) = first.sandboxes.BatchCreateSandboxes(creates(["limited"]), timeout=WAIT_S).results
    sandbox = made.sandbox

    def update(**limits: int) -> sandbox_pb2.Sandbox:
        request = sandbox_pb2.UpdateSandboxRequest(
            sandbox=sandbox.id, limits=sandbox_pb2.Limits(**limits), labels={"seen": "yes"}
        )
        return second.sandboxes.UpdateSandbox(request, timeout=WAIT_S)

    with pytest.raises(grpc.RpcError) as refused:
        update(memory_bytes=257 << 30)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason_of(refused.value)[0] == "NO_CAPACITY"
    with pytest.raises(grpc.RpcError) as refused:
        update(cpu_millicores=-1)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    before = node_of(first, sandbox.node_name).allocated
    updated = update(cpu_millicores=300, memory_bytes=32 << 20)
    assert dict(updated.spec.labels) == {"seen": "yes"}
    after = node_of(first, sandbox.node_name).allocated
    assert after.cpu_millicores - before.cpu_millicores == 299
    assert after.memory_bytes - before.memory_bytes == 16 << 20

    def measured() -> bool:
        request = sandbox_pb2.GetSandboxRequest(sandbox="limited", with_usage=True)
        usage = first.sandboxes.GetSandbox(request, timeout=WAIT_S).usage
        # The fake runtime has no cgroups: what it uses is not known, and what it may use is.
        assert not usage.HasField("memory_bytes")
        return usage.limits.memory_bytes == 32 << 20

    wait_for("the agent holds it to the new limits", measured)
    request = sandbox_pb2.MeasureSandboxesRequest(node=sandbox.node_name, sandbox_ids=[sandbox.id])
    (usage,) = second.sandboxes.MeasureSandboxes(request, timeout=WAIT_S).usages
    assert usage.limits.cpu_millicores == 300
    with pytest.raises(grpc.RpcError) as unknown:
        first.sandboxes.MeasureSandboxes(
            sandbox_pb2.MeasureSandboxesRequest(node="no-node"), timeout=WAIT_S
        )
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_sandbox_is_paused_and_resumed_by_its_agent(steered: Cluster) -> None:
    stub = steered.followers()[0].sandboxes
    stub.BatchCreateSandboxes(creates(["napper"]), timeout=WAIT_S)

    def is_in(state: sandbox_pb2.SandboxState.ValueType) -> bool:
        get = sandbox_pb2.GetSandboxRequest(sandbox="napper")
        return stub.GetSandbox(get, timeout=WAIT_S).state == state

    stub.PauseSandbox(sandbox_pb2.PauseSandboxRequest(sandbox="napper"), timeout=WAIT_S)
    wait_for("it to be PAUSED", lambda: is_in(sandbox_pb2.SANDBOX_STATE_PAUSED))
    stub.ResumeSandbox(sandbox_pb2.ResumeSandboxRequest(sandbox="napper"), timeout=WAIT_S)
    wait_for("it to be READY", lambda: is_in(sandbox_pb2.SANDBOX_STATE_READY))


def test_drain_empties_a_node(steered: Cluster) -> None:
    control = steered.followers()[0]
    moving = [f"moves-{i}" for i in range(10)]
    ending = [f"ends-{i}" for i in range(10)]
    for names, policy in (
        (moving, sandbox_pb2.ON_NODE_LOSS_RESCHEDULE),
        (ending, sandbox_pb2.ON_NODE_LOSS_LOST),
    ):
        control.sandboxes.BatchCreateSandboxes(creates(names, on_node_loss=policy), timeout=WAIT_S)
    watch = control.nodes.WatchNodes(node_pb2.WatchNodesRequest(), timeout=WAIT_S)
    assert {next(watch).node.name, next(watch).node.name} == {"fake1", "fake2"}
    node = control.nodes.DrainNode(
        node_pb2.DrainNodeRequest(node="fake1", deadline=duration_pb2.Duration(seconds=1)),
        timeout=WAIT_S,
    )
    assert node.cordoned
    seen = next(watch).node
    assert (seen.id, seen.drain_time) == (node.id, node.drain_time)
    watch.cancel()
    wait_for("the node to be empty", lambda: node_of(control, "fake1").sandboxes == 0)

    def moved() -> bool:
        rows = {row.name: row for row in control.list_all()}
        return all(
            rows[name].node_name == "fake2" and rows[name].state == sandbox_pb2.SANDBOX_STATE_READY
            for name in moving
        )

    wait_for("what may move to have moved", moved)
    node = control.nodes.UncordonNode(node_pb2.UncordonNodeRequest(node="fake1"), timeout=WAIT_S)
    assert not node.cordoned
    assert not node.HasField("drain_time")


def test_a_cordoned_node_takes_nothing_new(steered: Cluster) -> None:
    control = steered.followers()[0]
    control.nodes.CordonNode(node_pb2.CordonNodeRequest(node="fake2"), timeout=WAIT_S)
    try:
        answer = control.sandboxes.BatchCreateSandboxes(creates(["", "", ""]), timeout=WAIT_S)
        assert {one.sandbox.node_name for one in answer.results} == {"fake1"}
    finally:
        control.nodes.UncordonNode(node_pb2.UncordonNodeRequest(node="fake2"), timeout=WAIT_S)
    with pytest.raises(grpc.RpcError) as caught:
        control.nodes.CordonNode(node_pb2.CordonNodeRequest(node="nobody"), timeout=WAIT_S)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
