"""One control node: builds its parts, starts them in order, and drains them."""

import asyncio
import logging
import random
import secrets
import signal
import time
from typing import Final

from prism.agent.v1 import agent_pb2, agent_pb2_grpc
from prism.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from prism.node.v1 import node_pb2, node_pb2_grpc
from prism.raft.v1 import raft_pb2, raft_pb2_grpc
from prism.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc

from prism_common.addresses import Address
from prism_common.channels import ChannelPool
from prism_common.errors import PrismError, StartupError
from prism_common.metrics_server import MetricsServer
from prism_common.names import generate_name
from prism_common.server import RpcServer
from prism_common.signal import Signal
from prism_control.api.cluster import ClusterServicer, ClusterView
from prism_control.api.context import ApiContext
from prism_control.api.forward import Forwarder
from prism_control.api.gateway import GatewayServicer
from prism_control.api.nodes import NodeServicer
from prism_control.api.sandboxes import SandboxServicer
from prism_control.batcher import Batcher
from prism_control.dispatch import Dispatcher
from prism_control.metrics import ControlMetrics, StatusCollector
from prism_control.node.driver import TICK_S, Driver
from prism_control.node.formation import FormationEdge, new_cluster_id
from prism_control.node.leader import Leadership
from prism_control.node.membership import Membership
from prism_control.node.replica import Replica
from prism_control.node.settings import NodeSettings
from prism_control.node.status import NodeStatus
from prism_control.node.upgrade import VersionGate
from prism_control.raft.config import CoreConfig
from prism_control.raft.configuration import bootstrap
from prism_control.raft.core import Core
from prism_control.raft.errors import CorruptEntryError, InvariantError
from prism_control.raft.types import Configuration, Member, SnapshotRequest
from prism_control.state import commands
from prism_control.storage.directory import DataDirectory
from prism_control.storage.errors import DiskFullError, StorageError
from prism_control.storage.log import Identity, LogStore
from prism_control.storage.snapshots import SnapshotStore, encode_records
from prism_control.transport.peers import RAFT_MESSAGE_BYTES_MAX, Transport
from prism_control.transport.service import RaftPort, RaftServicer
from prism_control.transport.snapshots import send_snapshot

logger = logging.getLogger(__name__)

#: An election timeout of at least 1 s: under big batches one loop was seen to lag a quarter of it.
_ELECTION_TICKS: Final = round(1.0 / TICK_S)
_HEARTBEAT_TICKS: Final = 2
#: The core asks again at once for a snapshot that did not arrive.
_SNAPSHOT_PAUSE_S: Final = 1.0
#: Calls under way at SIGTERM get this long.
_DRAIN_S: Final = 2.0
#: What stops a member: going on could break what it has promised.
_FATAL: Final = (StorageError, InvariantError, CorruptEntryError)


class ControlNode:
    """One `prismd` process.

    Args:
        settings: Its flags.
    """

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._metrics = ControlMetrics()
        self._replica = Replica()
        self._gate = VersionGate(lambda: self._replica.machine)
        self._agents = ChannelPool()
        self._peers = ChannelPool()
        #: Notified when who leads may have changed; lives longer than the driver.
        self.changed = Signal()
        self._driver: Driver | None = None
        self._status: NodeStatus | None = None
        self._leadership: Leadership | None = None
        self._membership: Membership | None = None
        self._formation: FormationEdge | None = None
        self._stopping = asyncio.Event()
        self._me = Member(0, "", "", "")

    # ── Who leads: what the forwarder asks ───────────────────────────────────────────────────

    @property
    def leads(self) -> bool:
        """Whether this member leads and may serve writes."""
        return self._driver is not None and self._driver.leads

    @property
    def leader_api_address(self) -> str:
        """host:port of another member that leads; empty: none is known."""
        leader = self._driver.leader if self._driver is not None else None
        return leader.api_address if leader is not None and leader.id != self._me.id else ""

    # ── Life ─────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; return the exit status.

        Raises:
            StartupError: It cannot start as told.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        directory = DataDirectory(self._settings.data_dir)
        try:
            store = LogStore(directory.path / "log", self._metrics.raft.fsync_seconds.observe)
            try:
                return await self._serve(directory, store)
            finally:
                store.close()
        except (StorageError, DiskFullError) as error:
            raise StartupError(f"--data-dir: {error}") from None
        finally:
            directory.close()

    async def _serve(self, directory: DataDirectory, store: LogStore) -> int:
        settings = self._settings
        batcher = Batcher(
            settings.batching, self._metrics.batcher, self._wake_driver, directory.has_room,
            self._gate.check,
        )  # fmt: skip
        snapshots = SnapshotStore(directory.path / "snapshots")
        dispatcher = Dispatcher(self._metrics.leader)
        api_server = RpcServer(settings.api, "--api", self._metrics.calls)
        raft_server = RpcServer(
            settings.raft, "--raft", self._metrics.calls, RAFT_MESSAGE_BYTES_MAX
        )
        metrics_server = MetricsServer(
            settings.metrics, "--metrics", self._metrics.registry, self._readiness
        )
        try:
            self._me = self._introduce(store, raft_server.bind(), api_server.bind())
            self._formation = FormationEdge(
                self._me, settings.bootstrap_expect, settings.join, store
            )
            raft_service = RaftServicer(self._formation.discover, self._formation.form)
            raft_server.add(raft_pb2_grpc.add_RaftServiceServicer_to_server, raft_service)
            await raft_server.start(_services(raft_pb2))
            await self._start_api(api_server, batcher, dispatcher)
            metrics_server.start()
            logger.info(
                "%s: Raft on %s, API on %s, metrics on %s",
                self._me.name, raft_server.address, api_server.address, metrics_server.address,
            )  # fmt: skip
            if not await self._until_stopping(self._form(store)):
                return 0
            return await self._lead_or_follow(
                directory, store, snapshots, batcher, dispatcher, raft_service, api_server
            )
        finally:
            batcher.close()
            dispatcher.close()
            await asyncio.gather(api_server.stop(_DRAIN_S), raft_server.stop(0))
            await self._agents.close()
            await self._peers.close()
            metrics_server.stop()

    async def _until_stopping(self, work: "asyncio._CoroutineLike[None]") -> bool:
        """Do `work`, or stop it at SIGTERM; return whether it was done."""
        try:
            async with asyncio.TaskGroup() as tasks:
                task = tasks.create_task(work)
                stop = tasks.create_task(self._stopping.wait())
                await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
                done = task.done()
                task.cancel()
                stop.cancel()
        except BaseExceptionGroup as group:
            raise _first(group) from None
        return done

    # ── Identity and formation ───────────────────────────────────────────────────────────────

    def _introduce(self, store: LogStore, raft: Address, api: Address) -> Member:
        """Return who this member is; at first start, make and write it."""
        settings = self._settings
        identity = store.identity
        if identity is None:
            name = settings.name or generate_name(random_bytes=0)
            identity = Identity(secrets.randbits(63) or 1, name)
            store.set_identity(identity)
        elif settings.name and settings.name != identity.name:
            raise StartupError(
                f"--name: --data-dir {settings.data_dir} belongs to {identity.name!r}; start it "
                "under that name, or give this node a directory of its own"
            )
        raft_host = settings.advertise or raft.host
        api_host = settings.advertise or api.host
        return Member(
            identity.member_id,
            identity.name,
            str(Address(raft_host, raft.port)),
            str(Address(api_host, api.port)),
        )

    async def _form(self, store: LogStore) -> None:
        """Return once this member belongs to a cluster."""
        settings, formation = self._settings, self._formation
        identity = store.identity
        if identity is not None and identity.cluster_id:
            if settings.join and formation is not None:
                await formation.check_cluster(identity.cluster_id)
            if settings.bootstrap or settings.join:
                logger.info("belongs to cluster %s; --bootstrap and --join are not needed any more",
                            identity.cluster_id)  # fmt: skip
            return
        if settings.bootstrap:
            cluster_id = new_cluster_id()
            hard_state, entry = bootstrap(Configuration(voters=(self._me.id,), members=(self._me,)))
            store.bootstrap(cluster_id, hard_state, entry)
            logger.info("cluster %s is formed by %s alone", cluster_id, self._me.name)
        elif settings.bootstrap_expect and formation is not None:
            await formation.run(settings.strict_join)
        elif settings.join and formation is not None:
            await formation.join(settings.strict_join)
        else:
            raise StartupError(
                f"--data-dir {settings.data_dir} is new: give --bootstrap to start a single node, "
                "or --bootstrap-expect=N --join=A,B,C to form a cluster"
            )

    # ── The member ───────────────────────────────────────────────────────────────────────────

    async def _lead_or_follow(
        self,
        directory: DataDirectory,
        store: LogStore,
        snapshots: SnapshotStore,
        batcher: Batcher,
        dispatcher: Dispatcher,
        raft_service: RaftServicer,
        api_server: RpcServer,
    ) -> int:
        identity = store.identity
        if identity is None:
            raise StorageError("the identity is gone")
        core = await self._restore(store, snapshots)
        tasks = asyncio.TaskGroup()
        work: set[asyncio.Task[None]] = set()

        def send(request: SnapshotRequest, address: str) -> None:
            task = tasks.create_task(
                self._send_snapshot(driver, snapshots, transport, request, address)
            )
            work.add(task)
            task.add_done_callback(work.discard)

        driver = self._driver = Driver(
            core, store, snapshots, self._replica, batcher, self._metrics.raft,
            self._settings.snapshots,
        )  # fmt: skip
        driver.changed = self.changed
        self._gate.attach(driver)
        transport = Transport(
            identity.cluster_id, self._me, driver.report_unreachable, driver.report_disconnected,
            send,
        )  # fmt: skip
        driver.on_configuration = transport.update
        self._membership = Membership(driver, self._peers, self._gate)
        self._status = NodeStatus(
            self._me, identity.cluster_id, driver, transport, self._replica, batcher,
            directory.has_room, self._gate,
        )  # fmt: skip
        self._leadership = Leadership(
            identity.cluster_id, self._me, driver, self._replica, batcher, dispatcher,
            self._metrics.leader, directory.has_room, self._gate,
        )  # fmt: skip
        self._open(identity.cluster_id, driver, transport, snapshots, raft_service)
        try:
            async with tasks:
                work |= {
                    tasks.create_task(driver.run(transport)),
                    tasks.create_task(transport.run(driver.configuration)),
                    tasks.create_task(self._leadership.run()),
                    tasks.create_task(self._report_serving(api_server)),
                }
                await self._stopping.wait()
                logger.info("stopping")
                batcher.close()
                dispatcher.close()
                await api_server.stop(_DRAIN_S)
                for task in work:
                    task.cancel()
        except BaseExceptionGroup as group:
            return _explain(group)
        return 0

    def _open(
        self,
        cluster_id: str,
        driver: Driver,
        transport: Transport,
        snapshots: SnapshotStore,
        raft_service: RaftServicer,
    ) -> None:
        """Let others see and reach this member: it belongs to a cluster now."""
        if self._formation is None or self._membership is None or self._status is None:
            raise RuntimeError("the member is not built yet")
        self.changed.notify()
        self._formation.started(cluster_id, lambda: driver.configuration)
        self._metrics.registry.register(StatusCollector(self._status.raft, self._status.state))
        raft_service.open(
            RaftPort(
                cluster_id=cluster_id,
                me=self._me.id,
                receive=driver.receive,
                meet=transport.meet,
                part=transport.part,
                join=self._membership.join,
                heard=transport.heard,
                snapshots=snapshots,
            )
        )
        self._warn_of_moved_addresses(driver.configuration)

    async def _restore(self, store: LogStore, snapshots: SnapshotStore) -> Core:
        """Return the core as the disk has it, with the state machine at the last snapshot."""
        started = time.perf_counter()
        stored = await asyncio.to_thread(store.load)
        if stored.snapshot.index:
            chunks = snapshots.read(stored.snapshot.index)
            become = await asyncio.to_thread(self._replica.restore, chunks)
            become()
        snapshots.prune(stored.snapshot.index, newer=True)
        core = Core(
            CoreConfig(
                self._me.id, _ELECTION_TICKS, _HEARTBEAT_TICKS, command_version=commands.VERSION
            ),
            random.Random(),  # noqa: S311 - election timeouts are no secret
            stored.hard_state,
            stored.snapshot,
            stored.entries,
        )
        logger.info(
            "restored term %d, %d entries after snapshot %d in %.2f s",
            stored.hard_state.term, core.log.last_index - stored.snapshot.index,
            stored.snapshot.index,
            time.perf_counter() - started,
        )  # fmt: skip
        return core

    def _warn_of_moved_addresses(self, configuration: Configuration) -> None:
        for member in configuration.members:
            if member.id == self._me.id and member != self._me:
                logger.warning(
                    "the cluster knows this member at %s and %s, but it is at %s and %s: others "
                    "will not find it; start it with the old addresses",
                    member.raft_address, member.api_address,
                    self._me.raft_address, self._me.api_address,
                )  # fmt: skip

    async def _send_snapshot(
        self,
        driver: Driver,
        snapshots: SnapshotStore,
        transport: Transport,
        request: SnapshotRequest,
        address: str,
    ) -> None:
        """Send the newest snapshot, and tell the core how that went, whatever happens."""
        ok = False
        try:
            meta = driver.core.snapshot
            ok = await send_snapshot(
                request.term,
                meta,
                snapshots.file(meta.index),
                transport.hello(request.receiver),
                address,
                self._metrics.snapshots,
            )
            if not ok:
                await asyncio.sleep(_SNAPSHOT_PAUSE_S)
        finally:
            driver.report_snapshot(request.receiver, ok)

    async def _report_serving(self, api_server: RpcServer) -> None:
        """Keep the health service true."""
        serving = False
        await api_server.set_serving(False)
        while True:
            ready = self._readiness()[0]
            if ready != serving:
                serving = ready
                await api_server.set_serving(serving)
            try:
                async with asyncio.timeout(1.0):
                    await self.changed.wait()
            except TimeoutError:
                continue

    # ── The API ──────────────────────────────────────────────────────────────────────────────

    async def _start_api(self, server: RpcServer, batcher: Batcher, dispatcher: Dispatcher) -> None:
        context = ApiContext(
            machine=lambda: self._replica.machine,
            changed=self._replica.changed,
            sandbox_changed=self._replica.sandbox_changed,
            submit=batcher.submit,
            submit_all=batcher.submit_all,
            read_barrier=self._read_barrier,
            forwarder=Forwarder(self, self._peers, lambda: self._replica.machine.command_version),
            agents=self._agents,
            last_seen_ms=self._last_seen_ms,
        )
        view = ClusterView(
            cluster=self._cluster,
            peers=self._peer_protos,
            members=lambda: self._membership,
            forwarder=context.forwarder,
            read_barrier=self._read_barrier,
            backup=lambda: encode_records(self._replica.snapshot()()),
        )
        server.add(sandbox_pb2_grpc.add_SandboxServiceServicer_to_server, SandboxServicer(context))
        server.add(node_pb2_grpc.add_NodeServiceServicer_to_server, NodeServicer(context))
        server.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, ClusterServicer(view))
        server.add(
            agent_pb2_grpc.add_AgentGatewayServicer_to_server, GatewayServicer(self, dispatcher)
        )
        await server.start(
            [
                *_services(sandbox_pb2),
                *_services(node_pb2),
                *_services(cluster_pb2),
                agent_pb2.DESCRIPTOR.services_by_name["AgentGateway"].full_name,
            ]
        )

    async def _read_barrier(self) -> None:
        while self._driver is None:
            await self.changed.wait()
        await self._driver.read_barrier()

    def _last_seen_ms(self, node_id: str) -> int:
        return self._leadership.last_seen_ms(node_id) if self._leadership is not None else 0

    def _wake_driver(self) -> None:
        if self._driver is not None:
            self._driver.wake()

    def _cluster(self) -> cluster_pb2.Cluster:
        if self._status is not None:
            return self._status.cluster()
        return cluster_pb2.Cluster(
            member_id=f"{self._me.id:016x}",
            member_name=self._me.name,
            warnings=[self._readiness()[1]],
        )

    def _peer_protos(self) -> list[cluster_pb2.Peer]:
        return self._status.peers() if self._status is not None else []

    def _readiness(self) -> tuple[bool, str]:
        if self._stopping.is_set():
            return False, "stopping"
        if self._status is not None:
            return self._status.readiness()
        waiting_for = self._formation.waiting_for if self._formation is not None else ""
        return False, f"no cluster yet: {waiting_for or 'starting'}"


def _services(module: object) -> list[str]:
    descriptor = module.DESCRIPTOR  # type: ignore[attr-defined]
    return [service.full_name for service in descriptor.services_by_name.values()]


def _explain(group: BaseExceptionGroup[BaseException]) -> int:
    """Say in one line what stopped the member; anything unexpected is raised."""
    known = group.subgroup((*_FATAL, PrismError))
    if known is None:
        raise group
    logger.critical("this member stops: %s", _first(known))
    return 1


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
