"""Any node takes any write, through a change of leader, and says truly what became of it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio
import pytest
from prism.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc
from prometheus_client import CollectorRegistry

from prism_common import caller
from prism_common.addresses import Address
from prism_common.calls import CallMetrics
from prism_common.channels import ChannelPool
from prism_common.errors import (
    AlreadyExistsError,
    DeadlineError,
    DiskFullError,
    NoLeaderError,
    NotLeaderError,
    OutcomeUnknownError,
    PrismError,
    QueueFullError,
    UpgradeNeededError,
)
from prism_common.server import RpcServer
from prism_common.signal import Signal
from prism_control.api import forward
from prism_control.api.forward import FORWARDED, Forwarder
from prism_control.state.commands import VERSION

METHOD = "/prism.sandbox.v1.SandboxService/CreateSandbox"
Answer = Callable[[], Awaitable[sandbox_pb2.Sandbox]]


class View:
    """Who leads, as a test has it."""

    def __init__(self) -> None:
        self.leads = False
        self.leader_api_address = ""
        self.changed = Signal()

    def become(self, leads: bool = False, leader: str = "") -> None:
        self.leads, self.leader_api_address = leads, leader
        self.changed.notify()


class FakeContext:
    """As much of a call's context as the forwarder asks for."""

    def __init__(self, timeout_s: float | None = 5.0, forwarded: bool = False) -> None:
        self._timeout_s = timeout_s
        self._metadata = ((FORWARDED, "1"),) if forwarded else ()

    def time_remaining(self) -> float | None:
        return self._timeout_s

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata


class Leader(sandbox_pb2_grpc.SandboxServiceServicer):
    """Another node's API: answers in turn as it is told, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool, float | None]] = []
        #: Whose each call is.
        self.clients: list[str] = []
        self.answers: list[Answer] = []
        self.address = ""
        self.reached = asyncio.Event()

    async def CreateSandbox(
        self,
        request: sandbox_pb2.CreateSandboxRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> sandbox_pb2.Sandbox:
        marked = any(key == FORWARDED for key, _ in context.invocation_metadata() or ())
        self.asked.append((request.request_id, marked, context.time_remaining()))
        self.clients.append(caller.client.get())
        self.reached.set()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return await answer()


async def yes() -> sandbox_pb2.Sandbox:
    return sandbox_pb2.Sandbox(id="remote")


async def never() -> sandbox_pb2.Sandbox:
    await asyncio.Event().wait()
    raise AssertionError


def fails(error: Exception) -> Answer:
    async def answer() -> sandbox_pb2.Sandbox:
        raise error

    return answer


class Bench:
    def __init__(self) -> None:
        self.view = View()
        self.pool = ChannelPool()
        self.forwarder = Forwarder(self.view, self.pool, lambda: self.command_version)
        self.servers: list[RpcServer] = []
        self.here: list[Answer] = [self.local_yes]
        self.local_calls = 0
        self.command_version = VERSION
        self.needs = VERSION

    async def local_yes(self) -> sandbox_pb2.Sandbox:
        return sandbox_pb2.Sandbox(id="here")

    async def leader(self, *answers: Answer) -> Leader:
        servicer = Leader()  # type: ignore[abstract]  # only one method is called
        servicer.answers = list(answers) or [yes]
        metrics = CallMetrics(CollectorRegistry())
        server = RpcServer(Address("127.0.0.1", 0), "--api", metrics)
        server.add(sandbox_pb2_grpc.add_SandboxServiceServicer_to_server, servicer)
        servicer.address = str(server.bind())
        await server.start([])
        self.servers.append(server)
        return servicer

    async def call(self, timeout_s: float | None = 5.0, forwarded: bool = False) -> str:
        async def local(
            request: sandbox_pb2.CreateSandboxRequest, left_s: float
        ) -> sandbox_pb2.Sandbox:
            self.local_calls += 1
            return await (self.here.pop(0) if len(self.here) > 1 else self.here[0])()

        context: Any = FakeContext(timeout_s, forwarded)
        request = sandbox_pb2.CreateSandboxRequest(request_id="r1")
        answer = await self.forwarder.call(
            METHOD, request, sandbox_pb2.Sandbox, context, local, lambda: self.needs
        )
        return str(answer.id)

    def start(self, timeout_s: float | None = 5.0) -> asyncio.Task[str]:
        return asyncio.get_running_loop().create_task(self.call(timeout_s))


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(forward, "_LEADER_WAIT_S", 0.4)
    monkeypatch.setattr(forward, "_PAUSE_S", 0.01)
    monkeypatch.setattr(forward, "_MOVED_GRACE_S", 0.05)
    made = Bench()
    yield made
    await made.pool.close()
    for server in made.servers:
        await server.stop(0)


async def test_the_leader_serves_itself(bench: Bench) -> None:
    bench.view.become(leads=True)
    assert await bench.call() == "here"


async def test_others_forward_with_the_deadline_and_a_mark(bench: Bench) -> None:
    leader = await bench.leader()
    bench.view.become(leader=leader.address)
    assert await bench.call(timeout_s=3.0) == "remote"
    ((request_id, marked, left_s),) = leader.asked
    assert (request_id, marked) == ("r1", True)
    assert left_s is not None
    assert 2.0 < left_s <= 3.05  # deadlines travel rounded


async def test_the_leader_knows_whose_a_forwarded_call_is(
    bench: Bench,
) -> None:
    leader = await bench.leader()
    bench.view.become(leader=leader.address)
    token = caller.client.set("ipv4:10.0.0.1:5")
    try:
        assert await bench.call() == "remote"
    finally:
        caller.client.reset(token)
    assert leader.clients == ["ipv4:10.0.0.1:5"]


async def test_what_an_old_leader_would_not_know_is_not_forwarded(bench: Bench) -> None:
    leader = await bench.leader()
    bench.view.become(leader=leader.address)
    bench.command_version, bench.needs = 2, 3
    with pytest.raises(UpgradeNeededError, match=r"version 3.*uses version 2"):
        await bench.call()
    assert leader.asked == []
    bench.needs = 2
    assert await bench.call() == "remote"


async def test_a_call_without_a_deadline_gets_one(bench: Bench) -> None:
    leader = await bench.leader()
    bench.view.become(leader=leader.address)
    await bench.call(timeout_s=None)
    assert (leader.asked[0][2] or 0) > 50


async def test_what_the_leader_refuses_is_passed_on_as_it_came(bench: Bench) -> None:
    leader = await bench.leader(fails(AlreadyExistsError("taken", metadata={"a": "b"})))
    bench.view.become(leader=leader.address)
    with pytest.raises(PrismError) as caught:
        await bench.call()
    assert (caught.value.code, caught.value.metadata) == ("ALREADY_EXISTS", {"a": "b"})
    assert len(leader.asked) == 1


async def test_a_forwarded_call_is_never_forwarded_again(bench: Bench) -> None:
    leader = await bench.leader()
    bench.view.become(leader=leader.address)
    with pytest.raises(NotLeaderError) as caught:
        await bench.call(forwarded=True)
    assert caught.value.metadata == {"leader": leader.address}
    assert leader.asked == []
    bench.view.become(leads=True)
    assert await bench.call(forwarded=True) == "here"


async def test_not_leader_is_tried_again_until_there_is_one(bench: Bench) -> None:
    leader = await bench.leader(fails(NotLeaderError("no")), fails(NotLeaderError("no")), yes)
    bench.view.become(leader=leader.address)
    assert await bench.call() == "remote"
    assert [asked[0] for asked in leader.asked] == ["r1"] * 3


async def test_it_waits_for_an_election(bench: Bench) -> None:
    task = bench.start()
    await asyncio.sleep(0)
    bench.view.become(leads=True)
    assert await task == "here"


async def test_without_a_leader_it_says_so_in_bounded_time(bench: Bench) -> None:
    with pytest.raises(NoLeaderError) as caught:
        async with asyncio.timeout(2):
            await bench.call(timeout_s=60)
    assert caught.value.retry_after_s
    assert bench.local_calls == 0


async def test_at_the_calls_own_deadline_it_says_that(bench: Bench) -> None:
    with pytest.raises(DeadlineError):
        await bench.call(timeout_s=0.05)


async def test_a_lost_connection_is_resent_with_the_same_request_id(bench: Bench) -> None:
    first = await bench.leader(never)
    second = await bench.leader()
    bench.view.become(leader=first.address)
    task = bench.start()
    await first.reached.wait()
    await bench.servers[0].server.stop(0)
    bench.view.become(leader=second.address)
    assert await task == "remote"
    assert first.asked[0][0] == second.asked[0][0] == "r1"


async def test_a_connection_that_stays_lost_is_unknown_and_not_no_leader(bench: Bench) -> None:
    """The leader may have had it: nobody may say that nothing was done."""
    first = await bench.leader(never)
    bench.view.become(leader=first.address)
    task = bench.start()
    await first.reached.wait()
    await bench.servers[0].server.stop(0)
    bench.view.become()
    with pytest.raises(OutcomeUnknownError) as caught:
        await task
    assert caught.value.retry_after_s


@pytest.mark.parametrize("refusal", [QueueFullError("full"), DiskFullError("full")])
async def test_a_refusal_after_an_unknown_attempt_is_still_unknown(
    bench: Bench, refusal: PrismError
) -> None:
    leader = await bench.leader(fails(OutcomeUnknownError("lost", retry_after_s=1)), fails(refusal))
    bench.view.become(leader=leader.address)
    with pytest.raises(PrismError) as caught:
        await bench.call()
    assert caught.value.code == "OUTCOME_UNKNOWN"


async def test_a_full_queue_is_told_at_once(bench: Bench) -> None:
    leader = await bench.leader(fails(QueueFullError("full", retry_after_s=0.5)))
    bench.view.become(leader=leader.address)
    with pytest.raises(PrismError) as caught:
        await bench.call()
    assert (caught.value.code, caught.value.retry_after_s) == ("QUEUE_FULL", 0.5)
    assert len(leader.asked) == 1


async def test_losing_leadership_here_goes_on_at_the_new_leader(bench: Bench) -> None:
    leader = await bench.leader()

    async def lose() -> sandbox_pb2.Sandbox:
        bench.view.become(leader=leader.address)
        raise OutcomeUnknownError("leadership was lost")

    bench.here = [lose]
    bench.view.become(leads=True)
    assert await bench.call() == "remote"


async def test_a_leader_that_hangs_is_left_once_another_leads(bench: Bench) -> None:
    hung = await bench.leader(never)
    other = await bench.leader()
    bench.view.become(leader=hung.address)
    task = bench.start(timeout_s=30)
    await hung.reached.wait()
    bench.view.become(leader=other.address)
    async with asyncio.timeout(5):
        assert await task == "remote"
    assert other.asked[0][0] == "r1"


async def test_a_leader_that_lives_still_answers_after_another_was_elected(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does to a TransferLeadership: that must not be sent to the next one too."""
    monkeypatch.setattr(forward, "_MOVED_GRACE_S", 10.0)
    release = asyncio.Event()

    async def late() -> sandbox_pb2.Sandbox:
        await release.wait()
        return sandbox_pb2.Sandbox(id="from the old one")

    old, new = await bench.leader(late), await bench.leader()
    bench.view.become(leader=old.address)
    task = bench.start()
    await old.reached.wait()
    bench.view.become(leader=new.address)
    release.set()
    assert await task == "from the old one"
    assert new.asked == []


async def test_a_long_wait_survives_a_change_of_leader_at_its_end(bench: Bench) -> None:
    """Only time without a leader counts against the wait for one."""

    async def long() -> sandbox_pb2.Sandbox:
        await asyncio.sleep(0.5)
        raise OutcomeUnknownError("leadership was lost")

    bench.here = [long, bench.local_yes]
    bench.view.become(leads=True)
    assert await bench.call() == "here"
    assert bench.local_calls == 2


async def test_work_here_that_outlasts_the_deadline_is_unknown(bench: Bench) -> None:
    bench.here = [never]
    bench.view.become(leads=True)
    with pytest.raises(OutcomeUnknownError, match="deadline"):
        async with asyncio.timeout(5):
            await bench.call(timeout_s=0.1)


async def test_a_caller_that_goes_away_takes_its_forwarded_call_along(bench: Bench) -> None:
    left = asyncio.Event()

    async def watch() -> sandbox_pb2.Sandbox:
        try:
            return await never()
        finally:
            left.set()

    leader = await bench.leader(watch)
    bench.view.become(leader=leader.address)
    task = bench.start()
    await leader.reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(5):
        await left.wait()
