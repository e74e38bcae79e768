"""Sandboxes that may reach something: what they reach, what not, and what is left of it."""

import asyncio
import os
import signal
from pathlib import Path

from prism.agent.v1 import agent_pb2
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_agent.journal import Journal
from prism_agent.runtime import host
from tests.integration.agent import world as behind
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.ports import ECHO, PortCall, listen
from tests.integration.agent.process import AgentProcess
from tests.integration.agent.test_life import DELETED, READY, until
from tests.integration.agent.world import (
    HOST,
    METADATA,
    NAMED,
    OTHER,
    PRIVATE,
    PUBLIC,
    UDP,
    World,
    WorldAgent,
    egress,
    make,
    rule,
    run,
)

#: Says of each `address:port` or `name:port`, by TCP or UDP, who the other end sees, or why not.
PROBE = """
import socket, sys
for text in sys.argv[1:]:
    kind, host, port = text.split("/")
    try:
        if kind == "tcp":
            with socket.create_connection((host, int(port)), timeout=3) as one:
                print(text, one.recv(100).decode())
        else:
            one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            one.settimeout(3)
            one.connect((host, int(port)))
            one.send(b"x")
            print(text, one.recv(100).decode())
    except TimeoutError:
        print(text, "timeout")
    except socket.gaierror as error:
        print(text, "name")
    except OSError as error:
        print(text, "refused")
"""


#: The fixtures of this module.
world, agent = behind.world, behind.agent


async def probe(agent: AgentProcess, sandbox: str, *targets: str) -> dict[str, str]:
    result = await agent.run(sandbox, ["python3", "-c", PROBE, *targets])
    assert result.code == 0, result.stderr
    return dict(line.split() for line in result.stdout.decode().splitlines())


async def test_what_is_named_is_reached_and_nothing_else(
    gateway: Gateway, agent: WorldAgent, world: World
) -> None:
    await gateway.wait_registrations(1)
    told = gateway.registrations[0].egress
    assert (told.ready, told.message) == (True, "")
    sandbox = await make(
        gateway, "sb-1", egress(rule(NAMED, 80), rule("9.0.0.0/8", 80, protocol=UDP))
    )
    assert await probe(
        agent, sandbox, f"tcp/{NAMED}/80", f"tcp/{NAMED}/443", f"udp/{NAMED}/80",
        f"tcp/{PUBLIC}/80", f"udp/{PUBLIC}/80", f"tcp/{OTHER}/80", f"tcp/{PRIVATE}/80",
        f"tcp/{METADATA}/80", f"tcp/{HOST}/80", "tcp/good.example.org/80",
    ) == {
        f"tcp/{NAMED}/80": HOST,
        f"tcp/{NAMED}/443": "refused",
        f"udp/{NAMED}/80": "refused",
        f"tcp/{PUBLIC}/80": "refused",
        f"udp/{PUBLIC}/80": HOST,
        f"tcp/{OTHER}/80": "refused",
        f"tcp/{PRIVATE}/80": "refused",
        f"tcp/{METADATA}/80": "refused",
        f"tcp/{HOST}/80": "refused",
        "tcp/good.example.org/80": "name",
    }  # fmt: skip

    everything = await make(gateway, "sb-2", egress(pb.EgressRule(cidr="0.0.0.0/0")))
    found = await probe(
        agent, everything, f"tcp/{PUBLIC}/443", f"udp/{PUBLIC}/80", f"tcp/{PRIVATE}/80",
        f"tcp/{METADATA}/80", f"tcp/{HOST}/80", "tcp/192.0.2.2/80", f"tcp/{NAMED}/80",
    )  # fmt: skip
    reached = {target for target, how in found.items() if how == HOST}
    assert reached == {f"tcp/{PUBLIC}/443", f"udp/{PUBLIC}/80"}, found
    # Special addresses are reached where they are named.
    named = await make(
        gateway, "sb-3", egress(rule("10.0.0.0/8", 80), rule(METADATA, 80), rule(HOST, 80))
    )
    found = await probe(
        agent, named, f"tcp/{PRIVATE}/80", f"tcp/{METADATA}/80", f"tcp/{HOST}/80",
        f"tcp/{HOST}/443",
    )  # fmt: skip
    assert found.pop(f"tcp/{HOST}/443") == "refused"
    # The host sees the named's own address: nothing is masked on the way to it.
    assert found.pop(f"tcp/{HOST}/80").startswith("198.1")
    assert set(found.values()) == {HOST}


async def test_names_are_answered_and_opened_if_they_are_allowed(
    gateway: Gateway, agent: WorldAgent, world: World
) -> None:
    names = [
        pb.EgressName(name="good.example.org", ports=[pb.PortRange(first=443)]),
        *(pb.EgressName(name=f"{name}.example.org") for name in (
            "rebind", "metadata", "mixed", "host", "missing"
        )),
        pb.EgressName(name="db.internal"),
    ]  # fmt: skip
    sandbox = await make(gateway, "sb-1", egress(rule("10.9.0.0/16", 443), names=names))
    before = await probe(agent, sandbox, f"tcp/{PUBLIC}/443")
    assert before == {f"tcp/{PUBLIC}/443": "refused"}
    found = await probe(
        agent, sandbox, "tcp/good.example.org/443", "tcp/good.example.org/80",
        f"tcp/{PUBLIC}/443", "tcp/bad.example.org/443", "tcp/other.example.net/80",
        "tcp/metadata.example.org/80", "tcp/host.example.org/80", "tcp/missing.example.org/80",
        "tcp/db.internal/443", "tcp/db.internal/80",
    )  # fmt: skip
    assert found == {
        "tcp/good.example.org/443": HOST,
        "tcp/good.example.org/80": "refused",
        f"tcp/{PUBLIC}/443": HOST,
        "tcp/bad.example.org/443": "name",
        "tcp/other.example.net/80": "name",
        "tcp/metadata.example.org/80": "name",
        "tcp/host.example.org/80": "name",
        "tcp/missing.example.org/80": "name",
        # A rule opens its address, and names may lead there; the name opens nothing of its own.
        "tcp/db.internal/443": HOST,
        "tcp/db.internal/80": "refused",
    }
    # What is denied does not leave the node even as a question.
    assert "bad.example.org." not in world.questions()
    assert "other.example.net." not in world.questions()
    # Private addresses are taken out of answers.
    names = [pb.EgressName(name="*.example.org")]
    sandbox = await make(gateway, "sb-2", egress(names=names))
    program = (
        "import socket\n"
        "print(socket.gethostbyname_ex('mixed.example.org')[2])\n"
        "try:\n    socket.gethostbyname('rebind.example.org')\n"
        "except socket.gaierror:\n    print('refused')\n"
    )
    result = await agent.python(sandbox, program)
    assert result.stdout.decode().splitlines() == [str([PUBLIC]), "refused"], result.stderr
    found = await probe(agent, sandbox, "tcp/mixed.example.org/80", f"tcp/{PRIVATE}/80")
    assert found == {"tcp/mixed.example.org/80": HOST, f"tcp/{PRIVATE}/80": "refused"}


async def test_nothing_is_left_when_it_is_deleted_or_stopped(
    gateway: Gateway, agent: WorldAgent, world: World
) -> None:
    names = [pb.EgressName(name="good.example.org")]
    sandbox = await make(gateway, "sb-1", egress(rule(NAMED, 80), names=names))
    other = await make(gateway, "sb-2", egress(rule(NAMED, 80)))
    assert len(world.devices()) == 2
    await probe(agent, sandbox, "tcp/good.example.org/80")
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_STOPPED)
    await gateway.wait_for(sandbox, agent_pb2.OBSERVED_STATE_STOPPED)
    assert len(world.devices()) == 1
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_RUNNING, start_count=2)
    await gateway.wait_for(sandbox, READY)
    assert await probe(agent, sandbox, f"tcp/{NAMED}/80") == {f"tcp/{NAMED}/80": HOST}
    for each in (sandbox, other):
        gateway.want(each, agent_pb2.DESIRED_STATE_DELETED, grace_s=0)
        await gateway.wait_for(each, DELETED)
    assert world.devices() == []
    assert "goto" not in world.rules()
    assert "flags timeout" not in world.rules()
    assert [each for each in host.mounts_below(agent.data_dir) if each.name == "network"] == []
    assert await agent.end() == 0
    assert world.rules() == ""


async def test_a_restarted_agent_goes_on_and_sweeps_what_belongs_to_none(
    gateway: Gateway, agent: WorldAgent, world: World
) -> None:
    names = [pb.EgressName(name="good.example.org")]
    sandbox = await make(gateway, "sb-1", egress(rule(NAMED, 80), names=names))
    stray = await make(gateway, "sb-2", egress(rule(NAMED, 80), names=names))
    flood = agent.open(
        sandbox,
        ["python3", "-c", "import socket,time\n"
         f"while True:\n socket.create_connection(('{NAMED}', 80), timeout=5).recv(99)\n"
         " print('ok', flush=True); time.sleep(0.05)"],
        detach=False,
    )  # fmt: skip
    await flood.until(b"ok\n")
    await agent.kill()
    _forget(agent.data_dir, stray)
    del gateway.assignments[stray]
    await agent.start()
    await gateway.wait_registrations(2)
    await until(lambda: len(world.devices()) == 1)
    assert world.rules().count(": goto") == 1
    found = await probe(agent, sandbox, "tcp/good.example.org/80", f"tcp/{NAMED}/80")
    assert found == {"tcp/good.example.org/80": HOST, f"tcp/{NAMED}/80": HOST}
    again = agent.attach(sandbox, flood.so_far.exec_id, len(flood.so_far.stdout))
    await again.until(b"ok\nok\n")
    assert not again.so_far.stderr
    again.cancel()


def _forget(data_dir: Path, sandbox_id: str) -> None:
    """Lose what the journal knows of a sandbox, and kill its processes: as after a bad disk."""
    journal = Journal(data_dir / "sandboxes")
    records, _ = journal.load()
    pid = records[sandbox_id].pid
    journal._unwritten[sandbox_id] = None
    journal.flush()
    journal.close()
    os.kill(pid, signal.SIGKILL)


async def test_rules_that_somebody_removes_are_put_back_and_open_nothing_meanwhile(
    gateway: Gateway, agent: WorldAgent, world: World
) -> None:
    names = [pb.EgressName(name="good.example.org")]
    sandbox = await make(gateway, "sb-1", egress(rule(NAMED, 80), names=names))
    inside = ("nsenter", f"--net=/run/netns/{world.host}", "--")
    run(*inside, "nft", "flush", "ruleset")
    # The host routes whatever comes, and nothing of its own rules is there.
    found = await probe(
        agent, sandbox, f"tcp/{PRIVATE}/80", f"tcp/{METADATA}/80", f"tcp/{HOST}/80",
        f"tcp/{NAMED}/443",
    )  # fmt: skip
    assert set(found.values()) == {"refused"}, found
    await until(lambda: ": goto" in world.rules(), 20)
    # Looked up before or not: it is asked for and opened again.
    found = await probe(agent, sandbox, "tcp/good.example.org/80", f"tcp/{NAMED}/80")
    assert found == {"tcp/good.example.org/80": HOST, f"tcp/{NAMED}/80": HOST}


async def test_a_node_that_cannot_says_why_and_starts_none(
    needs_sandboxes: None, gateway: Gateway, world: World, tmp_path: Path
) -> None:
    run("ip", "netns", "exec", world.host, "sysctl", "-qw", "net.ipv4.ip_forward=0")
    control = await world.bridge(False, gateway.address)
    process = WorldAgent(world, tmp_path / "data", control, "--on-exit=delete")
    await process.start()
    try:
        await gateway.wait_registrations(1)
        told = gateway.registrations[0].egress
        assert not told.ready
        assert "net.ipv4.ip_forward=1" in told.message
        gateway.assign("sb-1", spec=egress(rule(NAMED)))
        report = await gateway.wait_for("sb-1", agent_pb2.OBSERVED_STATE_FAILED)
        assert "net.ipv4.ip_forward" in report.message
    finally:
        await process.end()
    assert world.devices() == []


async def test_a_burst_of_networks_has_an_address_each_and_they_are_apart(
    gateway: Gateway, agent: WorldAgent, world: World
) -> None:
    await gateway.wait_registrations(1)
    for number in range(12):
        gateway.assign(f"sb-{number}", spec=egress(rule(NAMED, 80)))
    for number in range(12):
        await gateway.wait_for(f"sb-{number}", READY)
    async with asyncio.TaskGroup() as group:
        found = [
            group.create_task(probe(agent, f"sb-{number}", f"tcp/{NAMED}/80"))
            for number in range(12)
        ]
    assert all(each.result() == {f"tcp/{NAMED}/80": HOST} for each in found)
    assert len(world.devices()) == 12
    # None of them reaches another, also if it says so.
    everything = egress(rule("198.18.0.0/15"), rule("0.0.0.0/0"))
    first = await make(gateway, "sb-first", everything)
    second = await make(gateway, "sb-second", everything)
    address = (await agent.run(second, ["hostname", "-I"])).stdout.decode().strip()
    assert address.startswith("198.1")
    server = await listen(agent, second, ECHO, 8000, "0.0.0.0")
    found = await probe(agent, first, f"tcp/{address}/8000")
    assert found[f"tcp/{address}/8000"] == "refused"
    # A port of it is published all the same.
    call = await PortCall(agent.stub, second, 8000).connect()
    await call.send_eof()
    assert await call.receive_all() == b"|0"
    server.cancel()
