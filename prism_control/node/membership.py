"""Members that come, go and hand over: the edge of `raft.confchange` and `raft.transfer`."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import grpc.aio
from prism.raft.v1 import raft_pb2, raft_pb2_grpc

from prism_common.channels import ChannelPool
from prism_common.errors import (
    AlreadyExistsError,
    DeadlineError,
    InvalidArgumentError,
    NotFoundError,
    NotLeaderError,
    WrongStateError,
)
from prism_common.names import shorten
from prism_common.status import from_rpc_error
from prism_control.node.driver import Driver
from prism_control.node.upgrade import VersionGate
from prism_control.raft import errors as raft_errors
from prism_control.raft.confchange import ConfigurationChange
from prism_control.raft.configuration import VOTERS_MAX
from prism_control.raft.types import Member, MemberId
from prism_control.transport import wire

logger = logging.getLogger(__name__)

#: A change needs two commits, and a majority that is heard; after this it goes on by itself.
_CHANGE_TIMEOUT_S: Final = 10.0
_DISCOVER_TIMEOUT_S: Final = 2.0
_NOT_READY: Final = "NOT_READY"
T = TypeVar("T")


class Membership:
    """Changes who the members are, on the leader.

    Args:
        driver: Of this member.
        pool: Channels to other members.
        gate: Knows which versions of commands are in use.
    """

    def __init__(self, driver: Driver, pool: ChannelPool, gate: VersionGate) -> None:
        self._gate = gate
        self._driver = driver
        self._pool = pool

    async def join(self, member: Member, command_version: int) -> None:
        """Take in a member that asks to join. Asking again changes nothing.

        Args:
            member: Who asks.
            command_version: Highest version of commands that it can apply; 0: it does not tell.

        Raises:
            NotLeaderError: With the leader's Raft address in the metadata.
            AlreadyExistsError: Another member has its name or its address.
            WrongStateError: There are enough members, or its release is too old.
        """
        members = {known.id: known for known in self._driver.configuration.members}
        if members.get(member.id) == member:
            return
        for known in members.values():
            if known.id != member.id and known.name == member.name:
                raise AlreadyExistsError(
                    f"--name: {member.name!r} is a member already; if its disk was lost, remove it "
                    f"first: prismctl peer rm {member.name}"
                )
            if known.id != member.id and known.raft_address == member.raft_address:
                raise AlreadyExistsError(
                    f"{member.raft_address} is the address of member {known.name!r}; if its disk "
                    f"was lost, remove it first: prismctl peer rm {known.name}"
                )
        if len(members) >= VOTERS_MAX:
            raise WrongStateError(f"a cluster has at most {VOTERS_MAX} members; remove one first")
        moved = member.id in members
        change = ConfigurationChange(update=(member,)) if moved else ConfigurationChange((member,))
        with self._gate.admitting(member, command_version):
            await self._act(lambda: self._driver.change_members(change))
        logger.info("member %s at %s has joined", member.name, member.raft_address)

    async def add(self, raft_address: str) -> Member:
        """Take in the member that waits at an address; return it.

        Raises:
            WrongStateError: Nobody waits there; says what to do.
        """
        stub = raft_pb2_grpc.RaftServiceStub(self._pool.get(raft_address))
        try:
            answer = await stub.Discover(raft_pb2.DiscoverRequest(), timeout=_DISCOVER_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise WrongStateError(
                f"raft_address: nobody answers at {raft_address} ({from_rpc_error(error).message});"
                " start the new node first: prismd --join=… --name=…"
            ) from None
        member = wire.decode_member(answer.member)
        known = {m.id for m in self._driver.configuration.members}
        if answer.cluster_id and member.id not in known:
            raise WrongStateError(
                f"raft_address: {member.name} at {raft_address} belongs to cluster "
                f"{answer.cluster_id}; give it an empty --data-dir"
            )
        await self.join(member, answer.command_version)
        return member

    async def remove(self, reference: str) -> None:
        """Remove a member by id or name, also this one.

        Raises:
            NotFoundError: There is none.
            WrongStateError: It is the last voter, or the rest would be no majority.
        """
        member = self._find(reference)
        change = ConfigurationChange(remove=(member.id,))
        await self._act(lambda: self._driver.change_members(change))
        logger.info("member %s is removed", member.name)

    async def transfer(self, reference: str) -> MemberId:
        """Hand leadership to a voter by id or name, or to the most up to date; return its id.

        Raises:
            NotFoundError: There is none.
            WrongStateError: It cannot take over; this member goes on to lead.
        """
        to = self._find(reference).id if reference else self._most_up_to_date()
        if not await self._act(lambda: self._driver.transfer_leadership(to)):
            raise WrongStateError(
                f"member {to:016x} has not taken over; leadership is as before, or elected anew",
                reason="TRANSFER_FAILED",
                retry_after_s=1.0,
            )
        return to

    def _most_up_to_date(self) -> MemberId:
        core = self._driver.core
        voters = [m for m in core.configuration.voters if m != core.config.id]
        if core.replication is None or not voters:
            raise WrongStateError("peer: there is no other voter to hand over to")
        progress = core.replication.progress
        return max(voters, key=lambda member: (progress[member].match, member))

    def _find(self, reference: str) -> Member:
        for member in self._driver.configuration.members:
            if reference in (member.name, f"{member.id:016x}"):
                return member
        names = ", ".join(sorted(m.name for m in self._driver.configuration.members))
        raise NotFoundError(f"peer: no member {shorten(reference)}; there are: {names}")

    async def _act(self, act: Callable[[], Awaitable[T]]) -> T:
        """Do it, within a bound, and say in our own words why not."""
        try:
            async with asyncio.timeout(_CHANGE_TIMEOUT_S):
                return await act()
        except TimeoutError:
            raise DeadlineError(
                "it was begun and is not done yet; `prismctl peer ls` shows when it is"
            ) from None
        except raft_errors.NotLeaderError:
            leader = self._driver.leader
            raise NotLeaderError(
                "this member does not lead",
                retry_after_s=0.1,
                metadata={"leader": leader.raft_address} if leader else {},
            ) from None
        except raft_errors.InvalidRequestError as error:
            raise InvalidArgumentError(f"peer: {error}", field="peer") from None
        except raft_errors.NotReadyError as error:
            raise WrongStateError(
                f"not now: {error}", reason=_NOT_READY, retry_after_s=1.0
            ) from None
