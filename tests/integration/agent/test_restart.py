"""The agent dies and comes back; its sandboxes go on, with their execs and all their output."""

import asyncio
import contextlib
import os
import signal
import time

import grpc
import grpc.aio
import msgspec
import pytest
from prism.agent.v1 import agent_pb2
from prism.node.v1 import node_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent import cgroups, limits
from prism_agent.journal import Journal
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess
from tests.integration.agent.test_life import DELETED, FAILED, READY, traces, until, until_no_traces


async def kill_and_restart(agent: AgentProcess, gateway: Gateway) -> None:
    count = len(gateway.registrations)
    assert await agent.end(signal.SIGKILL) == -signal.SIGKILL
    await agent.start()
    await gateway.wait_registrations(count + 1)


async def test_running_exec_survives_kill_of_the_agent(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    script = "for i in $(seq 1 2000); do echo line $i; done; read x; echo $x; seq 1 50000; exit 9"
    call = agent.open(sandbox, ["sh", "-c", script], stdin=True, request_id="once")
    so_far = await call.until(b"line 2000\n")
    await kill_and_restart(agent, gateway)
    registered = {each.sandbox_id: each.state for each in gateway.registrations[-1].sandboxes}
    assert registered == {sandbox: READY}
    attached = agent.attach(sandbox, so_far.exec_id, after_sequence=so_far.sequences[-1])
    await attached.send_attach(stdin=b"hello\n")
    result = await attached.result()
    expected = b"hello\n" + b"".join(b"%d\n" % i for i in range(1, 50001))
    assert result.stdout == expected
    assert result.exit == sandbox_pb2.ExecExit(exit_code=9)
    whole = await agent.attach(sandbox, so_far.exec_id).result()
    assert whole.stdout == so_far.stdout + expected
    repeated = await agent.run(sandbox, ["sh", "-c", script], stdin=b"", request_id="once")
    assert repeated.exec_id == so_far.exec_id


async def test_what_has_run_does_not_run_again_though_its_output_was_given_up(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    command = ["sh", "-c", "echo x >> /workspace/runs"]
    assert (await agent.run(sandbox, command, request_id="once")).code == 0
    assert await agent.end(signal.SIGKILL) == -signal.SIGKILL
    (agent.data_dir / "sandboxes" / sandbox / "execs" / "1.ring").unlink()
    await agent.start()
    await gateway.wait_registrations(2)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await agent.run(sandbox, command, request_id="once")
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    assert (await agent.run(sandbox, ["cat", "/workspace/runs"])).stdout == b"x\n"


async def test_exec_that_ends_while_the_agent_is_away(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    call = agent.open(sandbox, ["sh", "-c", "echo up; read x < /workspace/go; echo $x; exit 3"])
    await agent.run(sandbox, ["mkfifo", "/workspace/go"])
    so_far = await call.until(b"")
    started = await agent.run(sandbox, ["sh", "-c", "sleep 0.3; echo late; exit 6"], detach=True)
    await agent.end(signal.SIGKILL)
    assert agent.supervised(sandbox)
    await until(lambda: "sleep" not in process_names(agent, sandbox))
    await agent.start()
    await gateway.wait_registrations(2)
    result = await agent.attach(sandbox, started.exec_id).result()
    assert (result.stdout, result.code) == (b"late\n", 6)
    del so_far


def process_names(agent: AgentProcess, sandbox_id: str) -> list[str]:
    groups, _ = cgroups.find_on_this_machine(agent.node_id)
    if groups is None:
        pytest.skip("no cgroups here")
    names = []
    for pid in groups.pids(sandbox_id):
        try:
            with open(f"/proc/{pid}/comm", encoding="utf-8") as file:
                names.append(file.read().strip())
        except OSError:
            continue
    return names


async def test_clean_shutdown_keeps_sandboxes(
    gateway: Gateway, agent: AgentProcess, sandbox: str
) -> None:
    await agent.end(signal.SIGKILL)
    keeper = AgentProcess(agent.data_dir, gateway.address)
    await keeper.start()
    await gateway.wait_registrations(2)
    assert await keeper.end(signal.SIGTERM) == 0
    assert agent.supervised(sandbox)
    await agent.start()
    await gateway.wait_registrations(3)
    assert (await agent.run(sandbox, ["echo", "on"])).stdout == b"on\n"


async def test_death_while_the_agent_is_away_is_reported(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    started = await agent.run(sandbox, ["sleep", "1000"], detach=True)
    await agent.end(signal.SIGKILL)
    for pid in agent.supervised(sandbox):
        with contextlib.suppress(ProcessLookupError):  # it died with the one before
            os.kill(pid, signal.SIGKILL)
    await agent.start()
    report = await gateway.wait_for(sandbox, FAILED)
    assert report.reason == "PROCESS_LOST"
    info = await agent.stub.GetExec(
        sandbox_pb2.GetExecRequest(sandbox=sandbox, exec_id=started.exec_id)
    )
    assert not info.running
    assert not info.HasField("exit")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await agent.attach(sandbox, started.exec_id).result()
    assert failure.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_expired_while_the_agent_is_away(agent: AgentProcess, gateway: Gateway) -> None:
    await gateway.wait_registrations(1)
    gateway.assign("sb-ttl", ttl_s=4.0)
    await gateway.wait_for("sb-ttl", READY)
    await agent.end(signal.SIGKILL)
    await asyncio.sleep(4.0)
    await agent.start()
    report = await gateway.wait_for("sb-ttl", DELETED)
    assert report.reason == "TTL_EXPIRED"
    await until_no_traces(agent, "sb-ttl")


async def test_leftovers_are_swept_at_the_start(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    await agent.end(signal.SIGKILL)
    (agent.data_dir / "journal").unlink()
    groups, _ = cgroups.find_on_this_machine(agent.node_id)
    if groups is not None:
        groups.create("sb-stray", cgroups.CgroupLimits(2**24, 8, 100))
    gateway.assignments.clear()
    await agent.start()
    await until_no_traces(agent, sandbox)
    await until_no_traces(agent, "sb-stray")
    assert "removed a leftover" in agent.log.read_text()


async def test_the_journal_of_the_version_before_is_taken_over(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    started = await agent.run(sandbox, ["sleep", "1000"], detach=True)
    await agent.end(signal.SIGKILL)
    sandboxes = agent.data_dir / "sandboxes"
    journal = Journal(sandboxes)
    for sandbox_id, record in journal.load()[0].items():
        (sandboxes / sandbox_id / "record").write_bytes(msgspec.json.encode(record))
    journal.close()
    (agent.data_dir / "journal").unlink()
    await agent.start()
    await gateway.wait_registrations(2)
    registered = {each.sandbox_id: each.state for each in gateway.registrations[-1].sandboxes}
    assert registered == {sandbox: READY}
    request = sandbox_pb2.GetExecRequest(sandbox=sandbox, exec_id=started.exec_id)
    assert (await agent.stub.GetExec(request)).running
    assert not (sandboxes / sandbox / "record").exists()


async def test_second_agent_on_the_directory_is_refused(
    agent: AgentProcess, gateway: Gateway
) -> None:
    second = AgentProcess(agent.data_dir, gateway.address)
    with pytest.raises(AssertionError, match="is in use by another prism-agent"):
        await second.start()
    assert await second.end() == 1


async def test_leader_is_followed(agent: AgentProcess, gateway: Gateway) -> None:
    await gateway.wait_registrations(1)
    other = Gateway()
    other.term = 2
    await other.start()
    gateway.leader = other.address
    await agent.end()
    await agent.start()
    await other.wait_registrations(1)
    other.assign("sb-2")
    await other.wait_for("sb-2", READY)
    # A leader of an older term is not obeyed again.
    await other.stop()
    gateway.leader = None
    before = len(gateway.registrations)
    await gateway.wait_registrations(before + 1)
    assert gateway.registrations[-1].term == 2
    assert (await agent.run("sb-2", ["echo", "on"])).stdout == b"on\n"
    gateway.term = 3
    await gateway.wait_for("sb-2", DELETED)


async def test_what_may_run_elsewhere_ends_without_its_agent(
    agent: AgentProcess, gateway: Gateway
) -> None:
    """Nobody starts the agent again: its lease is over all the same."""
    await gateway.wait_registrations(1)
    gateway.lease_s = 2.0
    await kill_and_restart(agent, gateway)
    moves = sandbox_pb2.SandboxSpec(on_node_loss=sandbox_pb2.ON_NODE_LOSS_RESCHEDULE)
    gateway.assign("sb-move", spec=moves)
    gateway.assign("sb-stay")
    for each in ("sb-move", "sb-stay"):
        await gateway.wait_for(each, READY)
        await agent.run(each, ["sleep", "1000"], detach=True)
    await asyncio.sleep(1.5 * gateway.lease_s)
    assert agent.supervised("sb-move")  # its lease was extended
    began_s = time.monotonic()
    await agent.end(signal.SIGKILL)
    await until(lambda: not agent.supervised("sb-move"))
    assert time.monotonic() - began_s < gateway.lease_s + limits.LEASE_GRACE_S + 8.0
    assert agent.supervised("sb-stay")
    await agent.start()
    await gateway.wait_registrations(3)
    registered = {each.sandbox_id: each.state for each in gateway.registrations[-1].sandboxes}
    assert registered == {"sb-move": FAILED, "sb-stay": READY}


def damage_last_record(agent: AgentProcess, sandbox_id: str) -> None:
    """Let the newest record of a sandbox rot on the disk."""
    path = agent.data_dir / "journal"
    data = bytearray(path.read_bytes())
    at = data.rindex(sandbox_id.encode())
    data[at - 4 : at] = bytes(each ^ 0xFF for each in data[at - 4 : at])
    path.write_bytes(data)


async def test_rot_in_the_journal_costs_what_cannot_be_known_and_says_so(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    for name in ("sb-rot", "sb-last"):
        gateway.assign(name)
        await gateway.wait_for(name, READY)
    # Of one, nothing is left but that it was being started.
    await agent.kill()
    damage_last_record(agent, "sb-rot")
    # As the leader does with what an agent has not got any more.
    gateway.assignments.pop("sb-rot")
    await kill_and_restart(agent, gateway)
    registered = {each.sandbox_id: each.state for each in gateway.registrations[-1].sandboxes}
    assert registered == {sandbox: READY, "sb-last": READY}
    left = traces(agent, "sb-rot")
    assert [each for each in left if "mount" not in each or "sb-rot" in each] == []
    assert "lost: its newest record was damaged" in agent.log.read_text()
    health = await agent.node.GetHealth(node_pb2.GetHealthRequest())
    (check,) = [each for each in health.checks if each.name == "journal"]
    assert check.status == node_pb2.HEALTH_STATUS_WARNING
    assert "1 records are lost" in check.message
    assert (await agent.run(sandbox, ["echo", "x"])).stdout == b"x\n"


async def test_what_runs_is_kept_though_its_newest_record_rotted(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    await agent.run(sandbox, ["touch", "here"])
    for desired, state in (
        (agent_pb2.DESIRED_STATE_PAUSED, agent_pb2.OBSERVED_STATE_PAUSED),
        (agent_pb2.DESIRED_STATE_RUNNING, READY),
    ):
        gateway.want(sandbox, desired)
        await gateway.wait_for(sandbox, state)
    gateway.assign("sb-last")
    await gateway.wait_for("sb-last", READY)
    await agent.kill()
    damage_last_record(agent, sandbox)
    await kill_and_restart(agent, gateway)
    await gateway.wait_for(sandbox, READY)
    assert (await agent.run(sandbox, ["ls"])).stdout == b"here\n"
    assert "lost: its newest record" not in agent.log.read_text()
