"""Builds an agent from its settings, runs it, and ends it."""

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Literal

from prism.agent.v1 import agent_pb2, agent_pb2_grpc
from prism.node.v1 import node_pb2, node_pb2_grpc
from prometheus_client import CollectorRegistry

from prism_agent import cgroups, resources
from prism_agent.data_directory import DataDirectory
from prism_agent.health import Health
from prism_agent.journal import Journal
from prism_agent.metrics import AgentMetrics, UsageMetrics
from prism_agent.network.egress import Networks
from prism_agent.network.resolver import Resolvers
from prism_agent.reconcile import Reconciler
from prism_agent.reports import ReportQueue
from prism_agent.resources import CapacityFlags, Resources
from prism_agent.runtime import probe
from prism_agent.sandboxes import Sandboxes
from prism_agent.service import AgentService, NodeService
from prism_agent.session import NodeIdentity, Session
from prism_common.addresses import Address, require_loopback
from prism_common.calls import CallMetrics
from prism_common.metrics_server import MetricsServer
from prism_common.server import RpcServer

logger = logging.getLogger(__name__)

#: Calls under way at a shutdown have this time; their execs go on without them.
_DRAIN_S: Final = 1.0
#: With --on-exit=delete, what cannot be removed in this time is left to the next start.
_DELETE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What the flags say."""

    name: str
    data_dir: Path
    listen: Address
    metrics: Address
    advertise: str
    control: list[str]
    runtime: str
    labels: dict[str, str]
    insecure: bool
    starts_max: int
    on_exit: Literal["keep", "delete"]
    capacity: CapacityFlags = field(default_factory=CapacityFlags)
    #: Servers that sandboxes' names are asked of; empty: those of /etc/resolv.conf.
    dns_servers: list[tuple[str, int]] = field(default_factory=list)
    #: Prepared sandboxes to keep ready; 0: none.
    warm_pool: int = 0


class Agent:
    """One agent: built by `run`, ended by SIGTERM or `stop`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stop = asyncio.Event()
        self._failure = ""
        self.listening: Address | None = None
        #: Its own is removed at the end, also of one that could not start, if no sandbox is left.
        self._groups: cgroups.Cgroups | None = None
        self.session: Session | None = None

    def stop(self) -> None:
        """End; what happens to the sandboxes is `on_exit`'s to say."""
        self._stop.set()

    async def run(self) -> None:
        """Serve until asked to stop.

        Raises:
            StartupError: It cannot serve; one line says why.
        """
        settings = self._settings
        for address, flag in ((settings.listen, "--listen"), (settings.metrics, "--metrics")):
            require_loopback(address, flag, settings.insecure)
        if settings.insecure:
            logger.warning("--insecure: whoever reaches this port can run code in sandboxes")
        data = DataDirectory(settings.data_dir)
        try:
            await self._run(data)
        finally:
            data.close()

    async def _run(self, data: DataDirectory) -> None:
        settings = self._settings
        registry = CollectorRegistry()
        server = RpcServer(settings.listen, "--listen", CallMetrics(registry))
        # A port that is taken is said before anything else is done.
        self.listening = server.bind()
        try:
            pages = MetricsServer(settings.metrics, "--metrics", registry, self._ready)
            try:
                await self._build(data, registry, server, pages)
            finally:
                pages.stop()
                if self._groups is not None:
                    self._groups.close()
        finally:
            await server.stop(0)

    async def _build(
        self,
        data: DataDirectory,
        registry: CollectorRegistry,
        server: RpcServer,
        pages: MetricsServer,
    ) -> None:
        """Put the parts together, and serve."""
        settings = self._settings
        node_id = data.state.node_id
        groups, cgroup_problem = cgroups.find_on_this_machine(node_id)
        self._groups = groups
        journal = Journal(data.sandboxes)
        networks = Networks(node_id, journal, Resolvers(settings.dns_servers))
        warm = probe.make_warm(data, journal, groups)
        found = await probe.probe(settings.runtime, data, journal, groups, networks, warm)
        if settings.runtime != "fake":
            await networks.probe()
        metrics = AgentMetrics(registry)
        if groups is not None:
            UsageMetrics(registry, groups.total)
        reports = ReportQueue()
        fenced = data.state.lease_is_over(time.time())
        reconciler = Reconciler(settings.starts_max, data.state.term, fenced)
        sandboxes = Sandboxes(journal, found.working, found.known, reconciler, reports, metrics)
        offered = resources.capacity(settings.capacity, settings.data_dir)
        filling: Callable[[], Coroutine[None, None, None]] | None = None
        if settings.warm_pool:
            warm.reserve(settings.warm_pool, offered, found.working)
            slots = offered.slots
            filling = partial(
                warm.fill, settings.warm_pool, lambda: slots - len(sandboxes.live()), metrics
            )
        measured = Resources(
            node_id, settings.name, settings.data_dir, offered, found.statuses, sandboxes
        )
        if settings.control:
            self.session = Session(
                settings.control, data, sandboxes, reports, measured.load, metrics
            )
        limited_by = groups.description if groups else ""
        health = Health(
            node_id,
            settings.data_dir,
            found.statuses,
            (limited_by, cgroup_problem),
            journal,
            networks.status,
            self.session,
        )
        server.add(agent_pb2_grpc.add_AgentServiceServicer_to_server, AgentService(sandboxes))
        server.add(node_pb2_grpc.add_NodeServiceServicer_to_server, NodeService(measured, health))
        await sandboxes.adopt()
        identity = NodeIdentity(
            name=settings.name,
            address=settings.advertise or str(self.listening),
            capacity=offered,
            runtimes=found.statuses,
            labels=settings.labels,
            egress=networks.status,
        )
        await self._serve(server, pages, sandboxes, identity, networks, filling)
        for runtime in found.known.values():
            await runtime.close()
        journal.close()

    async def _serve(
        self,
        server: RpcServer,
        pages: MetricsServer,
        sandboxes: Sandboxes,
        identity: NodeIdentity,
        networks: Networks,
        filling: Callable[[], Coroutine[None, None, None]] | None,
    ) -> None:
        services = (
            agent_pb2.DESCRIPTOR.services_by_name["AgentService"].full_name,
            node_pb2.DESCRIPTOR.services_by_name["NodeService"].full_name,
        )
        await server.start(services)
        pages.start()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        settings = self._settings
        logger.info(
            "serving",
            extra={
                "node": settings.name,
                "listen": str(self.listening),
                "metrics": str(pages.address),
                "runtimes": ",".join(each.name for each in identity.runtimes if each.ready),
            },
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(networks.resolvers.run())
            group.create_task(sandboxes.run())
            await sandboxes.started.wait()
            await server.set_serving(True)
            held = [group.create_task(networks.watch())]
            if self.session is not None:
                held.append(group.create_task(self.session.run(identity)))
            if filling is not None:
                held.append(group.create_task(filling()))
            await self._stop.wait()
            logger.info("stopping", extra={"sandboxes": settings.on_exit})
            for task in held:
                task.cancel()
            await server.stop(_DRAIN_S)
            if settings.on_exit == "delete" and not await sandboxes.delete_all(_DELETE_S):
                logger.warning("some sandboxes could not be removed yet")
            sandboxes.close()
            networks.resolvers.stop()

    def _ready(self) -> tuple[bool, str]:
        if self._stop.is_set():
            return False, "stopping"
        if self.session is not None and not self.session.connected_to:
            return False, f"no control session: {self.session.last_error}"
        return True, "ok"
