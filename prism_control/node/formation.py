"""The edge of forming a cluster: asks, persists and sends what `raft.formation` decides."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import grpc.aio
import msgspec
from prism.raft.v1 import raft_pb2, raft_pb2_grpc

from prism_common import channels
from prism_common.errors import AlreadyExistsError, StartupError
from prism_common.status import from_rpc_error
from prism_control.raft import formation
from prism_control.raft.configuration import bootstrap
from prism_control.raft.formation import PeerView
from prism_control.raft.types import Configuration, Member
from prism_control.state import commands
from prism_control.storage.log import Formation, LogStore
from prism_control.transport import wire

logger = logging.getLogger(__name__)

_ASK_INTERVAL_S: Final = 0.2
_ASK_TIMEOUT_S: Final = 1.0
#: The leader answers once the change is committed.
_JOIN_TIMEOUT_S: Final = 12.0
#: With --strict-join, no cluster after this time is a failure.
_STRICT_TIMEOUT_S: Final = 60.0


def new_cluster_id() -> str:
    """Return a random cluster id."""
    return f"cl-{secrets.token_hex(8)}"


class FormationEdge:
    """One member while it has no cluster, and what it says of itself afterwards.

    Args:
        me: This member.
        expected: --bootstrap-expect; 0 forms nothing.
        join: Raft addresses of the members to meet.
        store: Keeps promises.
    """

    def __init__(self, me: Member, expected: int, join: Sequence[str], store: LogStore) -> None:
        self._me = me
        self._expected = expected
        self._join = join
        self._store = store
        self._configuration: Callable[[], Configuration] = Configuration
        self._cluster_id = ""
        #: What is being waited for, for people.
        self.waiting_for = ""

    def started(self, cluster_id: str, configuration: Callable[[], Configuration]) -> None:
        """Say from now on that this member belongs to a cluster."""
        self._cluster_id = cluster_id
        self._configuration = configuration

    def discover(self, request: raft_pb2.DiscoverRequest) -> raft_pb2.DiscoverResponse:
        """Answer Discover."""
        accepted = self._store.formation
        return raft_pb2.DiscoverResponse(
            member=wire.encode_member(self._me),
            cluster_id=self._cluster_id,
            bootstrap_expect=self._expected,
            accepted_cluster_id=accepted.cluster_id if accepted else "",
            configuration=wire.encode_configuration(self._configuration()),
            command_version=commands.VERSION,
        )

    def form(self, request: raft_pb2.FormRequest) -> raft_pb2.FormResponse:
        """Answer Form: accept durably, or say why not."""
        identity = self._store.identity
        if identity is not None and identity.cluster_id:
            return raft_pb2.FormResponse(
                reason=f"it belongs to cluster {identity.cluster_id} already"
            )
        configuration = wire.decode_configuration(request.configuration)
        reason = formation.may_accept(
            self._me.id, self._expected, configuration, request.proposer, self._promised()
        )
        if not reason:
            self._accept(request.cluster_id, configuration)
        return raft_pb2.FormResponse(accepted=not reason, reason=reason)

    async def run(self, strict: bool) -> None:
        """Return once this member has started its first configuration.

        Raises:
            StartupError: With `strict`, when no cluster has formed in a minute.
        """
        pool = channels.ChannelPool()
        try:
            async with asyncio.timeout(_STRICT_TIMEOUT_S if strict else None):
                while not await self._turn(pool):  # noqa: ASYNC110 - others are asked again
                    await asyncio.sleep(_ASK_INTERVAL_S)
        except TimeoutError:
            raise StartupError(f"--strict-join: no cluster yet: {self.waiting_for}") from None
        finally:
            await pool.close()

    async def join(self, strict: bool) -> None:
        """Return once a running cluster has taken this member in, as a learner at first.

        Raises:
            StartupError: It was refused for good; or, with `strict`, not taken in in a minute.
        """
        pool = channels.ChannelPool()
        try:
            async with asyncio.timeout(_STRICT_TIMEOUT_S if strict else None):
                while not await self._ask_to_join(pool):  # noqa: ASYNC110 - others are asked again
                    await asyncio.sleep(_ASK_INTERVAL_S)
        except TimeoutError:
            raise StartupError(f"--strict-join: not joined yet: {self.waiting_for}") from None
        finally:
            await pool.close()

    async def _ask_to_join(self, pool: channels.ChannelPool) -> bool:
        request = raft_pb2.JoinRequest(
            member=wire.encode_member(self._me), command_version=commands.VERSION
        )
        addresses = list(self._join)
        for address in addresses:
            stub = raft_pb2_grpc.RaftServiceStub(pool.get(address))
            try:
                answer = await stub.Join(request, timeout=_JOIN_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                remote = from_rpc_error(error)
                if remote.code == AlreadyExistsError.reason:
                    raise StartupError(f"--join: {address}: {remote.message}") from None
                leader = remote.metadata.get("leader", "")
                if leader and leader not in addresses:
                    addresses.append(leader)
                self._wait(f"{address}: {remote.message}")
                continue
            self._store.join(answer.cluster_id)
            logger.info("joined cluster %s by %s", answer.cluster_id, address)
            return True
        return False

    async def check_cluster(self, cluster_id: str) -> None:
        """Refuse to start with the data directory of another cluster than the peers'.

        Peers that do not answer now are not waited for: the whole cluster may be starting.

        Raises:
            StartupError: A member that --join names belongs to another cluster.
        """
        pool = channels.ChannelPool()
        try:
            peers = await self._ask_all(pool)
        finally:
            await pool.close()
        for peer in peers:
            if peer.cluster_id not in ("", cluster_id) and peer.member.id != self._me.id:
                raise StartupError(
                    f"--data-dir: belongs to cluster {cluster_id}, but {peer.member.name} at "
                    f"{peer.member.raft_address}, which --join names, to {peer.cluster_id}: give "
                    "this node the directory that it had in that cluster"
                )

    async def _turn(self, pool: channels.ChannelPool) -> bool:
        peers = await self._ask_all(pool)
        decision = formation.decide(self._me, self._expected, peers, self._promised())
        match decision:
            case formation.Start():
                accepted = self._store.formation
                known = accepted is not None and accepted.cluster_id == decision.cluster_id
                # All write the same first entry; the others may have changed who they are since.
                first = self._promised() if known else decision.configuration
                self._start(decision.cluster_id, first)
                return True
            case formation.Propose():
                return await self._propose(pool, decision.configuration)
            case formation.Wait():
                self._wait(decision.reason)
        return False

    def _wait(self, reason: str) -> None:
        if reason != self.waiting_for:
            logger.info("no cluster yet: %s", reason)
        self.waiting_for = reason

    async def _ask_all(self, pool: channels.ChannelPool) -> Iterable[PeerView]:
        request = raft_pb2.DiscoverRequest(
            member=wire.encode_member(self._me), cluster_id=self._cluster_id
        )

        async def ask(address: str) -> PeerView | None:
            stub = raft_pb2_grpc.RaftServiceStub(pool.get(address))
            try:
                answer = await stub.Discover(request, timeout=_ASK_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                logger.debug("peer at %s does not answer: %s", address, error.details())
                return None
            return PeerView(
                wire.decode_member(answer.member),
                answer.cluster_id,
                answer.bootstrap_expect,
                wire.decode_configuration(answer.configuration),
            )

        answers = await asyncio.gather(*(ask(address) for address in self._join))
        return [answer for answer in answers if answer is not None]

    def _promised(self) -> Configuration:
        """Return what this member has promised to start with; without voters if nothing."""
        accepted = self._store.formation
        if accepted is None:
            return Configuration()
        return msgspec.msgpack.decode(accepted.configuration, type=Configuration)

    async def _propose(self, pool: channels.ChannelPool, configuration: Configuration) -> bool:
        accepted = self._store.formation
        encoded = msgspec.msgpack.encode(configuration)
        # A proposal that was interrupted goes on under the same cluster id.
        same = accepted is not None and accepted.configuration == encoded
        cluster_id = accepted.cluster_id if accepted and same else new_cluster_id()
        self._accept(cluster_id, configuration)
        request = raft_pb2.FormRequest(
            cluster_id=cluster_id,
            configuration=wire.encode_configuration(configuration),
            proposer=self._me.id,
        )
        for member in configuration.members:
            if member.id == self._me.id:
                continue
            stub = raft_pb2_grpc.RaftServiceStub(pool.get(member.raft_address))
            try:
                answer = await stub.Form(request, timeout=_ASK_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                self._wait(f"{member.name} does not answer: {error.details()}")
                return False
            if not answer.accepted:
                self._wait(f"{member.name} refuses: {answer.reason}")
                return False
        current = self._store.formation
        if current is None or current.cluster_id != cluster_id:
            return False  # this member was won over by another proposal meanwhile
        self._start(cluster_id, configuration)
        return True

    def _accept(self, cluster_id: str, configuration: Configuration) -> None:
        encoded = msgspec.msgpack.encode(configuration)
        wanted = Formation(cluster_id, encoded)
        if self._store.formation != wanted:
            self._store.set_formation(wanted)

    def _start(self, cluster_id: str, configuration: Configuration) -> None:
        hard_state, entry = bootstrap(configuration)
        self._store.bootstrap(cluster_id, hard_state, entry)
        self._cluster_id, self._configuration = cluster_id, lambda: configuration
        logger.info(
            "cluster %s is formed by %s",
            cluster_id,
            ", ".join(member.name for member in configuration.members),
        )
