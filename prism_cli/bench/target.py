"""The cluster under load: who leads it, and calls that keep count of what was acknowledged."""

import asyncio
import itertools
import secrets
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from typing import Final, Self, TypeVar

import grpc
import grpc.aio
from prism.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from prism.node.v1 import node_pb2, node_pb2_grpc
from prism.sandbox.v1 import sandbox_pb2 as pb
from prism.sandbox.v1 import sandbox_pb2_grpc

from prism_cli.errors import CliError, UnreachableError
from prism_common.channels import open_channel
from prism_common.status import from_rpc_error

Item = TypeVar("Item")

LABEL: Final = "prism-bench"
BATCH_ITEMS: Final = 1000
BATCH_CALLS: Final = 10
_PAGE_SIZE: Final = 1000
_FIND_TIMEOUT_S: Final = 3.0
_LOOK_PAUSE_S: Final = 0.1
#: What a full queue refuses is removed in the end by asking again so often.
_REMOVE_ATTEMPTS: Final = 20


class Target:
    """Connections to a cluster's leader and to one follower, and this run's sandboxes.

    Args:
        addresses: API addresses to find the leader by.
        timeout_s: Bound of each call.
        real: Whether control-plane load may start real sandboxes.
        changes_leader: Whether another member leads before what was acknowledged is compared.
    """

    def __init__(
        self, addresses: Sequence[str], timeout_s: float, real: bool, changes_leader: bool = False
    ) -> None:
        self._addresses = addresses
        self.timeout_s = timeout_s
        self.real = real
        self.changes_leader = changes_leader
        self.run_id = f"bench-{secrets.token_hex(4)}"
        self.leader_address = self.follower_address = ""
        #: Ready runtimes of the nodes, with how many nodes have each.
        self.runtimes: Counter[str] = Counter()
        #: When each READY node was heard last, by the leader's clock.
        self._heard: dict[str, int] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self.find()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def channel(self, address: str) -> grpc.aio.Channel:
        """Return the one channel to an address."""
        if address not in self._channels:
            self._channels[address] = await self._stack.enter_async_context(open_channel(address))
        return self._channels[address]

    async def _stub(self, address: str) -> "sandbox_pb2_grpc.SandboxServiceAsyncStub":
        return sandbox_pb2_grpc.SandboxServiceStub(await self.channel(address))

    async def find(self) -> None:
        """Learn the leader, a follower and the nodes' runtimes from the first that answers.

        Raises:
            UnreachableError: No address answers, or no leader is known.
        """
        for address in (self.leader_address, *self._addresses):
            if address and await self._ask(address):
                break
        else:
            raise UnreachableError(
                f"no answer from a cluster with a leader at {', '.join(self._addresses)}; start "
                "one, or name it with --api HOST:PORT"
            )
        self.leader = await self._stub(self.leader_address)
        self.follower = await self._stub(self.follower_address) if self.follower_address else None

    async def _ask(self, address: str) -> bool:
        """Ask one member; False: it does not answer, or knows no leader."""
        channel = await self.channel(address)
        stub = cluster_pb2_grpc.ClusterServiceStub(channel)
        try:
            cluster = await stub.GetCluster(
                cluster_pb2.GetClusterRequest(), timeout=_FIND_TIMEOUT_S
            )
            peers = await stub.ListPeers(cluster_pb2.ListPeersRequest(), timeout=_FIND_TIMEOUT_S)
            if not cluster.leader_api_address:
                return False
            await self._find_runtimes(await self.channel(cluster.leader_api_address))
        except grpc.aio.AioRpcError:
            return False
        self.leader_address = cluster.leader_api_address
        self.follower_address = next(
            (
                peer.api_address
                for peer in peers.peers
                if peer.role == cluster_pb2.PEER_ROLE_FOLLOWER
                and peer.api_address
                and peer.reachable
            ),
            "",
        )
        return True

    async def change_leader(self) -> None:
        """Have another member lead, and wait until it hears the nodes; alone, it goes on leading.

        Raises:
            CliError: The new leader does not hear from all nodes that were READY.
        """
        if not self.follower_address:
            return
        nodes = len(self._heard)
        await self.depose()
        await self._await(self._try_find, "no leader is found")
        before = dict(self._heard)

        async def heard() -> bool:
            await self._find_runtimes(await self.channel(self.leader_address))
            news = sum(at != before.get(node) for node, at in self._heard.items())
            return news >= nodes

        await self._await(heard, f"the new leader does not hear from {nodes} nodes")

    async def depose(self) -> None:
        """End the leader's term: leadership is handed to the member that is most up to date."""
        stub = cluster_pb2_grpc.ClusterServiceStub(await self.channel(self.leader_address))
        await stub.TransferLeadership(
            cluster_pb2.TransferLeadershipRequest(), timeout=self.timeout_s
        )

    def leader_memory_bytes(self) -> int | None:
        """Return the resident memory of the leader's process; None: it is not ours to look at."""
        return None

    def left_on_nodes(self) -> int:
        """Return how much of removed sandboxes is still on the nodes; 0 where nobody can look."""
        return 0

    async def _try_find(self) -> bool:
        try:
            await self.find()
        except UnreachableError:
            return False
        return True

    async def _await(self, look: Callable[[], Awaitable[bool]], failure: str) -> None:
        ends = time.monotonic() + self.timeout_s
        while True:
            try:
                if await look():
                    return
            except grpc.aio.AioRpcError:
                await self._try_find()
            if time.monotonic() > ends:
                raise CliError(f"{failure} within {self.timeout_s:g} s")
            await asyncio.sleep(_LOOK_PAUSE_S)

    async def _find_runtimes(self, channel: grpc.aio.Channel) -> None:
        stub = node_pb2_grpc.NodeServiceStub(channel)
        request = node_pb2.ListNodesRequest(page_size=_PAGE_SIZE)
        self.runtimes.clear()
        self._heard.clear()
        while True:
            page = await stub.ListNodes(request, timeout=_FIND_TIMEOUT_S)
            for node in page.nodes:
                if node.state == node_pb2.NODE_STATE_READY:
                    self.runtimes.update(each.name for each in node.runtimes if each.ready)
                    self._heard[node.id] = node.last_seen_time.ToMilliseconds()
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    # ── requests ──

    def request(
        self, runtime: str, *, ready: bool, limits: pb.Limits | None = None
    ) -> pb.CreateSandboxRequest:
        """Return a create of this run; limits None: small ones, so that thousands fit."""
        return create_request(self.run_id, runtime, ready=ready, limits=limits)

    async def list_run(self) -> list[str]:
        """Return the ids of this run's sandboxes, by linearizable reads."""
        found: list[str] = []
        request = pb.ListSandboxesRequest(page_size=_PAGE_SIZE, label_selector={LABEL: self.run_id})
        call = self.leader.ListSandboxes(request, timeout=self.timeout_s)
        while True:
            page = await call
            if page.next_page_token:
                # Asked for before this page is read.
                request.page_token = page.next_page_token
                call = self.leader.ListSandboxes(request, timeout=self.timeout_s)
                await asyncio.sleep(0)
            found += [sandbox.id for sandbox in page.sandboxes]
            if not page.next_page_token:
                return found

    async def remove_run(self) -> None:
        """Remove every sandbox of this run, also those whose create was never answered.

        Raises:
            CliError: Some could not be removed.
        """
        reason = ""
        for _ in range(_REMOVE_ATTEMPTS):
            try:
                left = await self.list_run()
                if not left:
                    return
                refused = await self.delete(left)
                reason = ", ".join(refused)
            except grpc.aio.AioRpcError as error:
                # Between two leaders: the next attempt finds the new one.
                reason = from_rpc_error(error).code
                await asyncio.sleep(0.5)
                await self._try_find()
                continue
            if refused:
                await asyncio.sleep(0.5)
        raise CliError(
            f"sandboxes of this run are left ({reason or 'they do not end'}); remove them: "
            f"prismctl sandbox rm --selector {LABEL}={self.run_id}"
        )

    async def delete(self, ids: Sequence[str]) -> Counter[str]:
        """Delete in batches and wait until nothing is left; return refusals by reason."""
        refused: Counter[str] = Counter()

        async def one(part: Sequence[str]) -> None:
            requests = [
                pb.DeleteSandboxRequest(sandbox=each, force=True, wait=True) for each in part
            ]
            answer = await self.leader.BatchDeleteSandboxes(
                pb.BatchDeleteSandboxesRequest(requests=requests), timeout=self.timeout_s
            )
            refused.update(result.reason for result in answer.results if result.code)

        parts = [ids[begin : begin + BATCH_ITEMS] for begin in range(0, len(ids), BATCH_ITEMS)]
        await each_of(parts, BATCH_CALLS, one)
        return refused


def create_request(
    run_id: str, runtime: str, *, ready: bool, limits: pb.Limits | None = None
) -> pb.CreateSandboxRequest:
    """Return a create of a run; limits None: small ones, so that thousands fit."""
    if limits is None:
        limits = pb.Limits(cpu_millicores=10, memory_bytes=16 << 20, disk_bytes=1 << 20)
    return pb.CreateSandboxRequest(
        request_id=str(uuid.uuid4()),
        wait_until=pb.WAIT_UNTIL_READY if ready else pb.WAIT_UNTIL_COMMITTED,
        spec=pb.SandboxSpec(labels={LABEL: run_id}, runtime=runtime, limits=limits),
    )


class Tally:
    """What a load was told.

    Args:
        started: When it begins, by time.perf_counter; None: now.
    """

    def __init__(self, started: float | None = None) -> None:
        self.started = time.perf_counter() if started is None else started
        self._cpu = time.process_time()
        #: Share of a core of the busiest other process that took part.
        self.others_cpu = 0.0
        #: Acknowledged sandboxes, without their specs' weight.
        self.ids: list[str] = []
        self.create_times_s: list[float] = []
        self.refused: Counter[str] = Counter()
        self.timeline: list[tuple[float, float]] = []

    def acknowledge(self, sandbox: pb.Sandbox, since: float) -> None:
        """Count a success that was due at `since`."""
        now = time.perf_counter()
        self.ids.append(sandbox.id)
        self.create_times_s.append(sandbox.create_time.ToNanoseconds() / 1e9)
        self.timeline.append((now - self.started, now - since))

    @property
    def latencies_s(self) -> list[float]:
        """Latency of each success."""
        return [latency for _, latency in self.timeline]

    @property
    def took_s(self) -> float:
        """From the beginning to the last success."""
        return max((at for at, _ in self.timeline), default=0.0)

    def client_cpu(self) -> float:
        """Return the share of a core that this process took since the beginning, or another."""
        took_s = time.perf_counter() - self.started
        ours = (time.process_time() - self._cpu) / took_s if took_s else 0.0
        return max(ours, self.others_cpu)


async def each_of(
    items: Iterable[Item], in_flight: int, work: Callable[[Item], Awaitable[None]]
) -> None:
    """Work on all items with a bounded number in flight."""
    rest = iter(items)

    async def worker() -> None:
        for item in rest:
            await work(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(worker())


async def create(
    stub: "sandbox_pb2_grpc.SandboxServiceAsyncStub", timeout_s: float, tally: Tally,
    request: pb.CreateSandboxRequest, since: float | None = None,
) -> None:  # fmt: skip
    """Create one sandbox, timed from when it was due; a refusal is counted, and not tried again."""
    due = time.perf_counter() if since is None else since
    try:
        tally.acknowledge(await stub.CreateSandbox(request, timeout=timeout_s), due)
    except grpc.aio.AioRpcError as error:
        tally.refused[from_rpc_error(error).code] += 1


async def create_batch(
    target: Target, tally: Tally, requests: Sequence[pb.CreateSandboxRequest]
) -> None:
    """Create many by one call; each item has its own result."""
    due = time.perf_counter()
    try:
        answer = await target.leader.BatchCreateSandboxes(
            pb.BatchCreateSandboxesRequest(requests=requests), timeout=target.timeout_s
        )
    except grpc.aio.AioRpcError as error:
        tally.refused[from_rpc_error(error).code] += len(requests)
        return
    for result in answer.results:
        if result.code:
            tally.refused[result.reason] += 1
        else:
            tally.acknowledge(result.sandbox, due)


async def lost_and_duplicated(target: Target, tally: Tally) -> tuple[int, int]:
    """Compare what was acknowledged with what the cluster lists, where asked under a new leader."""
    if target.changes_leader:
        await target.change_leader()
    listed = Counter(await target.list_run())
    told = set(tally.ids)
    twice = sum(count > 1 for count in listed.values())
    return len(told - set(listed)), len(tally.ids) - len(told) + twice


def commit_figures(create_times_s: Sequence[float]) -> dict[str, float]:
    """Return commits a second by the leader's own clock; nothing where all came in one moment."""
    took_s = max(create_times_s, default=0.0) - min(create_times_s, default=0.0)
    return {"commits_per_s": len(create_times_s) / took_s} if took_s else {}


def chunks(items: Iterable[Item], size: int) -> list[list[Item]]:
    """Return lists of `size`, the last maybe shorter."""
    rest, found = iter(items), []
    while part := list(itertools.islice(rest, size)):
        found.append(part)
    return found
