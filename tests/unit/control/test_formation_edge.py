"""Members that form a cluster over real ports and real disks; `tests/sim` has every order."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc.aio
import msgspec
import pytest
from prism.raft.v1 import raft_pb2, raft_pb2_grpc

from prism_common.errors import StartupError
from prism_control.node import formation as edge
from prism_control.node.formation import FormationEdge
from prism_control.raft.types import Configuration, Member
from prism_control.storage.log import Identity, LogStore
from prism_control.transport import wire
from prism_control.transport.service import RaftServicer


class Node:
    """One member: its disk stays, its process comes and goes."""

    def __init__(self, number: int, path: Path, expected: int = 3) -> None:
        self.expected = expected
        self.store = LogStore(path / f"n{number}", lambda seconds: None)
        self.store.set_identity(Identity(number, f"n{number}"))
        self.member = Member(number, f"n{number}", "", f"127.0.0.1:{number}")
        self.server: grpc.aio.Server | None = None
        self.formation: FormationEdge | None = None
        self.join: list[str] = []

    async def listen(self) -> None:
        """Take the port; the same one after a restart."""
        self.server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        servicer = RaftServicer(
            lambda request: self.edge.discover(request), lambda request: self.edge.form(request)
        )
        raft_pb2_grpc.add_RaftServiceServicer_to_server(servicer, self.server)
        port = self.server.add_insecure_port(self.member.raft_address or "127.0.0.1:0")
        self.member = replace(self.member, raft_address=f"127.0.0.1:{port}")
        self.formation = FormationEdge(self.member, self.expected, self.join, self.store)
        await self.server.start()

    @property
    def edge(self) -> FormationEdge:
        assert self.formation is not None
        return self.formation

    async def crash(self) -> None:
        if self.server is not None:
            await self.server.stop(0)
            self.server = None

    def stored(self) -> tuple[str, object]:
        identity = self.store.identity
        assert identity is not None
        return identity.cluster_id, self.store.load().entries


@pytest.fixture
async def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Node]]:
    monkeypatch.setattr(edge, "_ASK_INTERVAL_S", 0.01)
    made = [Node(number, tmp_path) for number in (1, 2, 3)]
    for node in made:
        await node.listen()
    for node in made:
        node.join += [other.member.raft_address for other in made]
    yield made
    for node in made:
        await node.crash()
        node.store.close()


def _assert_one_cluster(nodes: list[Node]) -> None:
    first = nodes[0].stored()
    assert first[0]
    for node in nodes:
        assert node.stored() == first
        assert node.store.formation is None


async def test_all_write_the_same_first_entry(nodes: list[Node]) -> None:
    async with asyncio.timeout(10):
        await asyncio.gather(*(node.edge.run(strict=True) for node in nodes))
    _assert_one_cluster(nodes)


@pytest.mark.parametrize("seed", range(6))
async def test_members_that_crash_while_it_forms_still_form_one(
    nodes: list[Node], seed: int
) -> None:
    chosen = random.Random(seed)

    async def live(node: Node) -> None:
        for _ in range(chosen.randint(0, 3)):
            try:
                async with asyncio.timeout(chosen.uniform(0, 0.04)):
                    await node.edge.run(strict=False)
                    return
            except TimeoutError:
                await node.crash()
                await node.listen()
        await node.edge.run(strict=False)

    async with asyncio.timeout(20):
        await asyncio.gather(*(live(node) for node in nodes))
    _assert_one_cluster(nodes)


async def test_a_promise_is_kept_over_a_restart(nodes: list[Node]) -> None:
    first, second, third = (node.member for node in nodes)
    wanted = Configuration(voters=(1, 2, 3), members=(first, second, third))
    asked = raft_pb2.FormRequest(
        cluster_id="cl-1", configuration=wire.encode_configuration(wanted), proposer=1
    )
    assert nodes[1].edge.form(asked).accepted
    await nodes[1].crash()
    await nodes[1].listen()
    answer = nodes[1].edge.discover(raft_pb2.DiscoverRequest())
    assert (answer.accepted_cluster_id, answer.cluster_id) == ("cl-1", "")
    # The same proposer may think again: it has not started. Nobody else knows that.
    asked.cluster_id = "cl-2"
    assert nodes[1].edge.form(asked).accepted
    zero = replace(first, id=0)
    other = Configuration(voters=(0, 2, 3), members=(zero, second, third))
    asked = raft_pb2.FormRequest(
        cluster_id="cl-3", configuration=wire.encode_configuration(other), proposer=0
    )
    refused = nodes[1].edge.form(asked)
    assert not refused.accepted
    assert "n1" in refused.reason


async def test_an_interrupted_proposal_goes_on_under_the_same_id(nodes: list[Node]) -> None:
    await nodes[2].crash()
    members = tuple(node.member for node in nodes)
    wanted = Configuration(voters=(1, 2, 3), members=members)
    nodes[0].edge._accept("cl-old", wanted)
    await nodes[2].listen()
    async with asyncio.timeout(10):
        await asyncio.gather(*(node.edge.run(strict=False) for node in nodes))
    _assert_one_cluster(nodes)
    assert nodes[0].stored()[0] == "cl-old"


async def test_one_that_starts_late_starts_with_what_it_had_accepted(nodes: list[Node]) -> None:
    """The others may have taken in a fourth member by then, but not in their first entry."""
    members = tuple(node.member for node in nodes)
    wanted = Configuration(voters=(1, 2, 3), members=members)
    for node in nodes:
        node.edge._accept("cl-1", wanted)
    for node in nodes[:2]:
        node.edge._start("cl-1", wanted)
        fourth = Member(4, "n4", "127.0.0.1:1", "")
        grown = Configuration(voters=(1, 2, 3, 4), members=(*members, fourth))
        node.edge.started("cl-1", lambda grown=grown: grown)  # type: ignore[misc]
    async with asyncio.timeout(10):
        await nodes[2].edge.run(strict=False)
    _assert_one_cluster(nodes)


async def test_a_member_of_a_cluster_accepts_nothing(nodes: list[Node]) -> None:
    async with asyncio.timeout(10):
        await asyncio.gather(*(node.edge.run(strict=False) for node in nodes))
    members = tuple(node.member for node in nodes)
    asked = raft_pb2.FormRequest(
        cluster_id="cl-9",
        configuration=wire.encode_configuration(Configuration((1, 2, 3), members=members)),
        proposer=1,
    )
    answer = nodes[1].edge.form(asked)
    assert not answer.accepted
    assert "already" in answer.reason


async def test_strict_join_gives_up_in_words(
    nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "_STRICT_TIMEOUT_S", 0.1)
    await nodes[1].crash()
    await nodes[2].crash()
    with pytest.raises(StartupError, match="--strict-join: no cluster yet: 1 of 3"):
        await nodes[0].edge.run(strict=True)


async def test_different_expectations_are_named(nodes: list[Node]) -> None:
    nodes[1].edge._expected = 5
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await nodes[0].edge.run(strict=False)
    assert "n2 do not have --bootstrap-expect=3" in nodes[0].edge.waiting_for


def test_a_configuration_survives_the_disk() -> None:
    wanted = Configuration((1, 2), (3,), (4,), (Member(2**63 + 1, "n", "a:1", "b:2"),))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(wanted), type=Configuration) == wanted
