"""The fake runtime, and the agent's session with the control plane."""

import grpc
import grpc.aio
import pytest
from prism.agent.v1 import agent_pb2
from prism.node.v1 import node_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent.journal_log import MARKER_BYTES, JournalLog
from prism_common.status import from_rpc_error
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess
from tests.integration.agent.test_life import until

READY = agent_pb2.OBSERVED_STATE_READY


async def test_fake_says_that_it_runs_nothing(fake_agent: AgentProcess, gateway: Gateway) -> None:
    await gateway.wait_registrations(1)
    runtime = gateway.registrations[0].runtimes[0]
    assert (runtime.name, runtime.ready) == ("fake", True)
    assert "runs nothing" in runtime.message
    gateway.assign("sb-1")
    await gateway.wait_for("sb-1", READY)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await fake_agent.run("sb-1", ["true"])
    assert failure.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert from_rpc_error(failure.value).code == "RUNTIME_FAKE"
    health = await fake_agent.node.GetHealth(node_pb2.GetHealthRequest())
    assert health.checks[0].status == node_pb2.HEALTH_STATUS_WARNING


async def test_a_runtime_that_is_not_here_is_never_replaced(
    fake_agent: AgentProcess, gateway: Gateway
) -> None:
    await gateway.wait_registrations(1)
    gateway.assign("sb-1", spec=sandbox_pb2.SandboxSpec(runtime="bubblewrap"))
    report = await gateway.wait_for("sb-1", agent_pb2.OBSERVED_STATE_FAILED)
    assert report.reason == "START_FAILED"


async def test_a_thousand_at_once(fake_agent: AgentProcess, gateway: Gateway) -> None:
    await gateway.wait_registrations(1)
    names = [f"sb-{i}" for i in range(1000)]
    for name in names:
        gateway.assign(name)
    await gateway.wait(
        lambda: sum(report.state == READY for report in gateway.reports.values()) == 1000
    )
    for name in names:
        gateway.want(name, agent_pb2.DESIRED_STATE_DELETED)
    deleted = agent_pb2.OBSERVED_STATE_DELETED
    await gateway.wait(
        lambda: sum(report.state == deleted for report in gateway.reports.values()) == 1000
    )


async def test_a_batch_of_an_older_term_is_refused(
    fake_agent: AgentProcess, gateway: Gateway
) -> None:
    gateway.term = 5
    await gateway.wait_registrations(1)
    gateway.assign("sb-1")
    await gateway.wait_for("sb-1", READY)
    stale = agent_pb2.Assignment(
        sandbox_id="sb-1", generation=9, desired=agent_pb2.DESIRED_STATE_DELETED
    )
    before = len(gateway.registrations)
    gateway.send(stale, term=0)
    await gateway.wait_registrations(before + 1)
    assert gateway.reports["sb-1"].state == READY


async def test_another_cluster_is_refused(fake_agent: AgentProcess, gateway: Gateway) -> None:
    await gateway.wait_registrations(1)
    gateway.assign("sb-1")
    await gateway.wait_for("sb-1", READY)
    await gateway.stop()
    port = int(gateway.address.rpartition(":")[2])
    other = Gateway()
    other.cluster_id = "other"
    await other.start(port)
    try:
        # It comes back again and again, and is never obeyed: an empty complete batch deletes all.
        await other.wait_registrations(2)
        assert all(each.sandboxes[0].state == READY for each in other.registrations)
    finally:
        await other.stop()


async def test_reports_are_sent_again_until_acknowledged(
    fake_agent: AgentProcess, gateway: Gateway
) -> None:
    await gateway.wait_registrations(1)
    gateway.acknowledges = False
    gateway.assign("sb-1")
    await gateway.wait_for("sb-1", READY)
    gateway.want("sb-1", agent_pb2.DESIRED_STATE_DELETED)
    await gateway.wait_for("sb-1", agent_pb2.OBSERVED_STATE_DELETED)
    await fake_agent.end()
    await fake_agent.start()
    await gateway.wait_registrations(2)
    again = gateway.registrations[1].sandboxes
    assert [(each.sandbox_id, each.state) for each in again] == [
        ("sb-1", agent_pb2.OBSERVED_STATE_DELETED)
    ]
    gateway.acknowledges = True
    await fake_agent.end()
    await fake_agent.start()
    # Once it is acknowledged it is forgotten.
    journal = fake_agent.data_dir / "journal"

    def is_forgotten() -> bool:
        log = JournalLog(bytes(MARKER_BYTES))
        log.replay(journal.read_bytes())
        return "sb-1" not in log

    await until(is_forgotten)
