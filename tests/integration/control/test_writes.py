"""Writes and reads through any node, and through the death of a leader."""

import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prism.agent.v1 import agent_pb2, agent_pb2_grpc
from prism.sandbox.v1 import sandbox_pb2

from tests.integration.harness import STALE, Cluster, ControlNode, cluster, reason_of, wait_for


@pytest.fixture(scope="module")
def hurt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes; tests may stop some of them."""
    with cluster(tmp_path_factory.mktemp("hurt"), 3) as made:
        yield made


@pytest.fixture
def mended(hurt: Cluster) -> Cluster:
    """The same, all of them up."""
    for node in hurt.nodes:
        if node.process is None:
            node.start()
    return hurt.wait_ready()


def test_every_node_takes_writes_and_every_other_sees_them_at_once(three: Cluster) -> None:
    for writer in three.nodes:
        created = writer.create(f"from-{writer.name}")
        for reader in three.nodes:
            got = reader.sandboxes.GetSandbox(
                sandbox_pb2.GetSandboxRequest(sandbox=created.name), timeout=5
            )
            assert got.id == created.id


def test_a_request_id_means_the_same_on_every_node(three: Cluster) -> None:
    request_id = str(uuid.uuid4())
    answers = [node.create("once", request_id) for node in three.nodes]
    assert len({answer.id for answer in answers}) == 1
    with pytest.raises(grpc.RpcError) as caught:
        three.nodes[1].create("other-content", request_id)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(caught.value)[0] == "REQUEST_ID_REUSED"


def test_a_taken_name_is_refused_through_a_follower(three: Cluster) -> None:
    three.nodes[0].create("taken")
    for node in three.nodes:
        with pytest.raises(grpc.RpcError) as caught:
            node.create("taken")
        assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS
        assert reason_of(caught.value)[0] == "ALREADY_EXISTS"


def test_the_same_request_id_after_a_change_of_leader_gets_the_first_answer(
    mended: Cluster,
) -> None:
    request_id = str(uuid.uuid4())
    leader = mended.leader()
    first = leader.create("twice", request_id)
    leader.kill()
    again = mended.running[0].create("twice", request_id)
    assert again.id == first.id
    assert again.create_time == first.create_time


class _Writer(threading.Thread):
    """Creates one sandbox after another through one node, resending what is unknown."""

    def __init__(self, node: ControlNode) -> None:
        super().__init__()
        self.node = node
        self.acknowledged: dict[str, str] = {}
        self.gap_s = 0.0
        self.stop = threading.Event()
        self.failures: list[str] = []

    def run(self) -> None:
        last = time.monotonic()
        number = 0
        while not self.stop.is_set():
            number += 1
            name, request_id = f"{self.node.name}-{number}", str(uuid.uuid4())
            while not self.stop.is_set():
                try:
                    created = self.node.create(name, request_id)
                except grpc.RpcError as error:
                    if error.code() != grpc.StatusCode.UNAVAILABLE:
                        self.failures.append(f"{error.code()}: {error.details()}")
                        return
                    self.stop.wait(0.02)
                    continue
                self.acknowledged[name] = created.id
                self.gap_s = max(self.gap_s, time.monotonic() - last)
                last = time.monotonic()
                break


def test_kill_9_of_the_leader_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    with cluster(tmp_path, 3) as made:
        leader = made.leader()
        followers = made.followers()
        writers = [_Writer(node) for node in followers for _ in range(1)]
        for writer in writers:
            writer.start()
        try:
            _wait_for_writes(writers, 30)
            leader.kill()
            made.leader()
            _wait_for_writes(writers, 30)
            leader.start().wait_ready()
            _wait_for_writes(writers, 10)
        finally:
            for writer in writers:
                writer.stop.set()
            for writer in writers:
                writer.join()
        for writer in writers:
            assert not writer.failures
            assert writer.gap_s < 20.0
        _check_nothing_lost(made, writers)

        # And all at once, in the middle of nothing: everything is back.
        for node in made.nodes:
            node.kill()
        made.start()
        _check_nothing_lost(made, writers)


def _wait_for_writes(writers: list[_Writer], count: int) -> None:
    wanted = {writer: len(writer.acknowledged) + count for writer in writers}
    ends = time.monotonic() + 60
    while any(len(w.acknowledged) < n and not w.failures for w, n in wanted.items()):
        assert time.monotonic() < ends, [len(w.acknowledged) for w in writers]
        time.sleep(0.01)


def _check_nothing_lost(made: Cluster, writers: list[_Writer]) -> None:
    for node in made.nodes:
        rows = node.list_all()
        by_name = {row.name: row.id for row in rows}
        assert len(by_name) == len(rows)
        for writer in writers:
            for name, sandbox_id in writer.acknowledged.items():
                assert by_name[name] == sandbox_id
        # One more per writer at most: the one that was under way when it was told to stop.
        assert len(rows) <= sum(len(w.acknowledged) + 1 for w in writers)


def test_without_a_majority_writes_are_refused_in_words_and_stale_reads_go_on(
    tmp_path: Path,
) -> None:
    with cluster(tmp_path, 3) as made:
        made.leader().create("before")
        survivor = made.followers()[0]
        assert [row.name for row in survivor.list_all()] == ["before"]
        for node in made.nodes:
            if node is not survivor:
                node.kill()
        text = survivor.wait_readyz(
            503, r"2 of 3 voters unreachable since \d{4}-\d\d-\d\d .*, \d+ s "
        )
        assert "start them again" in text
        assert [row.name for row in survivor.list_all(STALE)] == ["before"]
        assert [w for w in survivor.cluster().warnings if "2 of 3 voters" in w]
        started = time.monotonic()
        read = survivor.sandboxes.GetSandbox.future(
            sandbox_pb2.GetSandboxRequest(sandbox="before"), timeout=30
        )
        with pytest.raises(grpc.RpcError) as caught:
            survivor.create("refused", timeout_s=30)
        for failed in (caught.value, read.exception()):
            assert isinstance(failed, grpc.RpcError)
            assert failed.code() == grpc.StatusCode.UNAVAILABLE
            reason, retry_after_s = reason_of(failed)
            assert reason == "NO_LEADER"
            assert retry_after_s
        assert time.monotonic() - started < 25

        for node in made.nodes:
            if node is not survivor:
                node.start()
        made.wait_ready()
        survivor.create("refused")


def test_a_leader_that_hangs_holds_up_nobody_for_long(mended: Cluster) -> None:
    """Its connections stand, but it answers nothing; those who wait for it are sent on."""
    leader = mended.leader()
    follower = mended.followers()[0]
    follower.create("before-it-hangs")
    leader.signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        created = follower.create("meanwhile", timeout_s=30)
        assert time.monotonic() - started < 20
    finally:
        leader.signal(signal.SIGCONT)
    wait_for("the old leader follows", lambda: not leader.leads)
    leader.wait_ready()
    assert [row.id for row in leader.list_all() if row.name == "meanwhile"] == [created.id]
    assert "Traceback" not in leader.log


def test_sessions_of_agents_end_with_a_leaders_office_and_go_on_at_the_next(
    mended: Cluster,
) -> None:
    leader = mended.leader()
    with pytest.raises(grpc.RpcError) as caught:
        list(_session(mended.followers()[0]))
    assert reason_of(caught.value)[0] == "NOT_LEADER"
    session = _session(leader)
    welcome = next(session).welcome
    leader.signal(signal.SIGTERM)
    with pytest.raises(grpc.RpcError) as caught:
        list(session)
    assert reason_of(caught.value)[0] in ("NOT_LEADER", "UNAVAILABLE", "STOPPING")
    assert leader.wait(30) == 0
    assert "Traceback" not in leader.log

    following = mended.leader()
    _again, term = wait_for("the next leader is in office", lambda: _opened(following))
    assert term > welcome.term
    # One that vanishes is no failure of the leader's.
    following._close_channel()
    wait_for("it is noticed", lambda: "has ended" in following.log)
    assert "Traceback" not in following.log


def _opened(node: ControlNode) -> tuple[Any, int] | None:
    """Open a session; return it and its leader's term, or None where nobody is in office yet."""
    session = _session(node)
    try:
        return session, next(session).welcome.term
    except grpc.RpcError:
        return None


def _session(node: ControlNode) -> Any:
    hold = threading.Event()

    def requests() -> Iterator[agent_pb2.SessionRequest]:
        yield agent_pb2.SessionRequest(
            register=agent_pb2.Register(
                node_id="node-1", name="worker", incarnation="i1", address="127.0.0.1:1"
            )
        )
        hold.wait(30)

    call = agent_pb2_grpc.AgentGatewayStub(node.channel).Session(requests())
    call.add_callback(hold.set)
    return call
