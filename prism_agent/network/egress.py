"""Networks of sandboxes that may reach something: namespace, device, rules and resolver of each."""

import asyncio
import contextlib
import logging
import os
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from prism.node.v1 import node_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent.journal import Journal
from prism_agent.network import connections, devices, policy, tools
from prism_agent.network.devices import Link
from prism_agent.network.namespace import apart, enter
from prism_agent.network.policy import Policy
from prism_agent.network.resolver import ADDRESS, Resolvers
from prism_agent.record import Record
from prism_agent.runtime.base import StartError
from prism_common.errors import InvalidArgumentError
from prism_common.names import generate_id

logger = logging.getLogger(__name__)

#: In a sandbox's directory: its network namespace.
_FILE: Final = "network"
#: Agents of one machine begin at different places; when two meet, the next address is tried.
_ATTEMPTS: Final = 16
#: Between two looks whether the rules are there; meanwhile those inside the namespaces hold.
_WATCH_S: Final = 5.0


def namespace_path(directory: Path) -> Path:
    """Return where the network namespace of a sandbox is bound to, if its record has a device."""
    return directory / _FILE


def namespace_arguments(record: Record, directory: Path) -> list[str]:
    """Return what a program is started by so that it is in its sandbox's network, if there is one.

    Args:
        record: The sandbox's.
        directory: The sandbox's.
    """
    return ["nsenter", f"--net={namespace_path(directory)}", "--"] if record.device else []


def resolver_configuration(record: Record) -> bytes:
    """Return the sandbox's /etc/resolv.conf."""
    return f"nameserver {ADDRESS}\n".encode() if record.device else b""


@dataclass(frozen=True, slots=True)
class _Open:
    """A network that there is."""

    address: IPv4Address
    policy: Policy


class Networks:
    """All networks of this agent's sandboxes.

    Invariant: a sandbox's device carries nothing that is not filtered: its rules are there before
    it is up, and go after it.

    Args:
        node_id: The node's.
        journal: Where records are kept.
        resolvers: Answer the sandboxes' questions for names; `run` them.
    """

    def __init__(self, node_id: str, journal: Journal, resolvers: Resolvers) -> None:
        self._node_id = node_id
        self._journal = journal
        self.resolvers = resolvers
        self._table = policy.table_of(node_id)
        #: Addresses that sandboxes of this agent have.
        self._taken = {record.address for record in journal.load()[0].values() if record.address}
        self._next = zlib.crc32(node_id.encode()) % devices.POOL.num_addresses
        #: Networks by the names of their devices.
        self._open: dict[str, _Open] = {}
        #: Held while rules are put back, so that none are of what was removed meanwhile.
        self._restoring = threading.Lock()
        self._opening = asyncio.Lock()
        self.status = node_pb2.EgressStatus(
            ready=False, message="it was not tried: its agent runs nothing"
        )

    # ── probe ──

    async def probe(self) -> node_pb2.EgressStatus:
        """Make a network, and remove it; keep and return whether that works here."""
        problem = await asyncio.to_thread(_problem)
        if not problem:
            try:
                await self._try_one()
            except (OSError, StartError) as error:
                problem = str(error.strerror if isinstance(error, OSError) else error)
        self.status = node_pb2.EgressStatus(ready=not problem, message=problem)
        return self.status

    async def _try_one(self) -> None:
        sandbox_id = generate_id("probe")
        link = self._link(sandbox_id)
        await asyncio.to_thread(tools.nft, policy.base_rules(self._table))
        address = ""
        try:
            address = str(await self._make(link, Policy()))
        finally:
            await asyncio.to_thread(self._remove, link, Policy(), address)
            self._taken.discard(address)
            with contextlib.suppress(OSError):
                link.path.parent.rmdir()

    # ── one network ──

    def _link(self, sandbox_id: str) -> Link:
        return Link(
            policy.device_of(self._node_id, sandbox_id),
            f"{self._node_id}/{sandbox_id}",
            namespace_path(self._journal.directory(sandbox_id)),
        )

    async def open(self, record: Record, network: sandbox_pb2.Network) -> None:
        """Make what a sandbox's spec asks for, before it is started; nothing: nothing.

        Raises:
            StartError: It cannot be made. What there is of it is removed by `close`.
        """
        try:
            wanted = policy.policy_of(network)
        except InvalidArgumentError as error:
            raise StartError(f"its network: {error}") from None
        await self.close(record)
        if wanted is None:
            return
        if not self.status.ready:
            raise StartError(f"this node cannot give it a network: {self.status.message}")
        link = self._link(record.sandbox_id)
        # What is made from here on can be found again by this record.
        record.device = link.device
        await asyncio.to_thread(self._journal.save, record)
        try:
            record.address = str(await self._make(link, wanted))
            await asyncio.to_thread(self._journal.save, record)
            if wanted.names:
                await self._answer(record, link, wanted)
        except OSError as error:
            raise StartError(f"its network cannot be made: {error.strerror}") from None

    async def _make(self, link: Link, wanted: Policy) -> IPv4Address:
        await apart(lambda: devices.make(link))
        for _ in range(_ATTEMPTS):
            address = self._take_address()
            try:
                await asyncio.to_thread(
                    tools.nft, policy.add_rules(self._table, link.device, address, wanted)
                )
                await asyncio.to_thread(devices.connect, link, address)
            except tools.ToolError as error:
                self._taken.discard(str(address))
                await asyncio.to_thread(
                    tools.nft, policy.remove_rules(self._table, link.device, wanted)
                )
                if "File exists" not in str(error):
                    raise
                continue
            rules = policy.inner_rules(wanted)
            await self._inside(link, partial(devices.connect_inside, address, rules))
            self._open[link.device] = _Open(address, wanted)
            return address
        raise tools.ToolError("no address was free: other agents of this machine have them")

    async def _inside(self, link: Link, work: Callable[[], None]) -> None:
        """Do blocking work in a sandbox's namespace."""
        descriptor = os.open(link.path, os.O_RDONLY | os.O_CLOEXEC)

        def enter_and_work() -> None:
            enter(descriptor)
            work()

        try:
            await apart(enter_and_work)
        finally:
            os.close(descriptor)

    def _take_address(self) -> IPv4Address:
        """Return an address that no sandbox of ours has."""
        for _ in range(devices.POOL.num_addresses):
            self._next = (self._next + 1) % devices.POOL.num_addresses
            address = devices.POOL[self._next]
            # Those look like a network's own, or a broadcast.
            if address.packed[3] in (0, 255) or str(address) in self._taken:
                continue
            self._taken.add(str(address))
            return address
        raise tools.ToolError("all addresses for sandboxes are taken")

    async def _answer(self, record: Record, link: Link, wanted: Policy) -> None:
        """Have a resolver answer in a sandbox's namespace."""

        async def open_addresses(
            groups: list[int], addresses: list[IPv4Address], time_s: int
        ) -> None:
            text = policy.open_rules(self._table, link.device, groups, addresses, time_s)
            # One at a time, as the kernel has it: all sandboxes' names take one thread at most.
            async with self._opening:
                await asyncio.to_thread(tools.nft, text)

        descriptor = os.open(link.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            await self.resolvers.begin(record.sandbox_id, descriptor, wanted, open_addresses)
        finally:
            os.close(descriptor)

    async def adopt(self, record: Record, network: sandbox_pb2.Network) -> None:
        """Go on answering a sandbox that runs: the rest of its network needs no process."""
        try:
            wanted = policy.policy_of(network)
            if record.device and record.address and wanted is not None:
                self._open[record.device] = _Open(IPv4Address(record.address), wanted)
            if record.device and wanted is not None and wanted.names:
                await self._answer(record, self._link(record.sandbox_id), wanted)
        except (OSError, InvalidArgumentError) as error:
            logger.warning(
                "no names for a sandbox",
                extra={"sandbox": record.sandbox_id, "error": str(error)},
            )

    async def close(self, record: Record) -> None:
        """Remove a sandbox's network, whose processes have ended; none is success.

        Raises:
            OSError: Something is left.
        """
        self.resolvers.end(record.sandbox_id)
        if not record.device:
            return
        try:
            spec = sandbox_pb2.SandboxSpec.FromString(record.spec)
            wanted = policy.policy_of(spec.network) or Policy()
        except InvalidArgumentError:
            wanted = Policy()
        link = self._link(record.sandbox_id)
        await asyncio.to_thread(self._remove, link, wanted, record.address)
        self._taken.discard(record.address)
        record.device = record.address = ""

    def _remove(self, link: Link, wanted: Policy, address: str) -> None:
        devices.remove(link)
        if address:
            # Before the address may be another's.
            connections.forget(IPv4Address(address))
        with self._restoring:
            self._open.pop(link.device, None)
            try:
                tools.nft(policy.remove_rules(self._table, link.device, wanted))
            except tools.ToolError:
                if tools.chains(self._table) is not None:
                    raise

    # ── all networks ──

    async def watch(self) -> None:
        """Put the rules back whenever somebody has removed them, as a reload of a firewall does."""
        while True:
            await asyncio.sleep(_WATCH_S)
            if self._open:
                try:
                    await asyncio.to_thread(self._restore)
                except OSError as error:
                    logger.error(
                        "cannot put the rules of networks back",
                        extra={"error": error.strerror or str(error)},
                    )

    def _restore(self) -> None:
        there = set(tools.chains(self._table) or ())
        lost = {name: each for name, each in list(self._open.items()) if name not in there}
        if not lost:
            return
        logger.error("the rules of networks were removed", extra={"networks": len(lost)})
        tools.nft(policy.base_rules(self._table))
        for name, each in lost.items():
            with self._restoring:
                if name in self._open:
                    tools.nft(policy.add_rules(self._table, name, each.address, each.policy))
        self.resolvers.forget()

    async def sweep(self, keep: set[str]) -> list[str]:
        """Remove what belongs to no sandbox in `keep`; return what was found, in words."""
        if os.geteuid() != 0 or tools.missing():
            return []
        return await asyncio.to_thread(self._sweep, keep)

    def _sweep(self, keep: set[str]) -> list[str]:
        found = []
        for name, sandbox_id in list(devices.owned(self._node_id)):
            if sandbox_id not in keep:
                found.append(f"network device {name} of {sandbox_id}")
                addresses = devices.addresses_of(name)
                devices.remove_device(name)
                for address in addresses:
                    connections.forget(address)
        kept = {policy.device_of(self._node_id, sandbox_id) for sandbox_id in keep}
        for name in policy.devices_in(tools.chains(self._table) or []):
            if name not in kept:
                found.append(f"network rules of {name}")
                tools.nft(policy.sweep_rules(self._table, name, tools.sets(self._table)))
        return found

    async def shut(self) -> None:
        """Remove the agent's table if no sandbox is held to it."""
        if os.geteuid() == 0 and not tools.missing():
            await asyncio.to_thread(self._shut)

    def _shut(self) -> None:
        names = tools.chains(self._table)
        if names is not None and not policy.devices_in(names):
            tools.nft(f"delete table inet {self._table}\n")


def _problem() -> str:
    """Return why there can be no network here; empty: nothing is known against it."""
    if os.geteuid() != 0:
        return "prism-agent must run as root"
    packages = tools.missing()
    if packages:
        return f"not installed (Debian: apt install {' '.join(packages)})"
    if not devices.forwards():
        return (
            "this machine passes no packets on (sysctl -w net.ipv4.ip_forward=1, and start the "
            "agent again)"
        )
    return ""
