"""Answers to a sandbox's questions for names; what they lead to is open by then."""

import logging
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from ipaddress import AddressValueError, IPv4Address
from typing import Any, Final, TypeAlias

import dns.asyncresolver
import dns.exception
import dns.flags
import dns.message
import dns.nameserver
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.resolver
import dns.rrset

from prism_agent.network.allowance import Allowance
from prism_agent.network.policy import Policy
from prism_common.egress import is_public

logger = logging.getLogger(__name__)

#: A question has one name of at most 255 bytes, and options.
QUESTION_BYTES_MAX: Final = 512
_ONE_QUESTION: Final = b"\0\1"
#: Lookups under way for one sandbox; more are told to come again.
_LOOKUPS_MAX: Final = 16
_LOOKUP_TIMEOUT_S: Final = 5.0
#: Lookups a second of one sandbox, and how many it may save up: servers are asked for each, and
#: addresses are opened.
_LOOKUPS: Final = (10.0, 100.0)
#: Names whose answers are remembered for a sandbox; the oldest give way.
_REMEMBERED_MAX: Final = 512
#: Of one answer; what is beyond is neither told nor opened.
_ADDRESSES_MAX: Final = 16
#: An answer counts for so long, whatever its own time to live is.
_TTL_MIN_S, _TTL_MAX_S = 5, 300
#: An address stays open this much longer than it may be used: a program looks up, then connects.
_OPEN_LONGER_S: Final = 60
_PLAIN: Final = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")

#: Opens addresses to groups of a policy, for seconds.
Open: TypeAlias = Callable[[list[int], list[IPv4Address], int], Awaitable[None]]


def upstream(servers: list[tuple[str, int]]) -> dns.asyncresolver.Resolver:
    """Return what asks these servers, or those of /etc/resolv.conf.

    Raises:
        OSError: There are none.
    """
    try:
        resolver = dns.asyncresolver.Resolver(configure=not servers)
    except dns.resolver.NoResolverConfiguration:
        raise OSError(0, "/etc/resolv.conf names no DNS server; see --dns-servers") from None
    if servers:
        resolver.nameservers = [
            dns.nameserver.Do53Nameserver(address, port) for address, port in servers
        ]
    resolver.cache = None
    resolver.lifetime = _LOOKUP_TIMEOUT_S
    return resolver


class Answers:
    """The answers of one sandbox.

    Args:
        policy: Which names are allowed.
        opened: Opens what they lead to.
        servers: Asked for them.
    """

    def __init__(self, policy: Policy, opened: Open, servers: dns.asyncresolver.Resolver) -> None:
        self._policy = policy
        self._open = opened
        self._servers = servers
        self._lookups = 0
        self._new_names = Allowance(*_LOOKUPS)
        #: Addresses by name, and until when they count.
        self._remembered: OrderedDict[str, tuple[list[IPv4Address], float]] = OrderedDict()

    def forget(self) -> None:
        """Remember nothing."""
        self._remembered.clear()

    async def answer(self, data: bytes) -> bytes:
        """Return the answer to a question; empty: it deserves none."""
        if len(data) > QUESTION_BYTES_MAX or data[4:6] != _ONE_QUESTION:
            return b""
        try:
            # What else it holds is not read: a question full of records would take milliseconds.
            question = dns.message.from_wire(data, question_only=True)
            if question.flags & dns.flags.QR or question.opcode() != dns.opcode.QUERY:
                return b""
            response = dns.message.make_response(question, recursion_available=True)
            await self._fill(question.question[0], response)
            return bytes(response.to_wire())
        except (dns.exception.DNSException, ValueError):
            return b""
        except Exception:
            # Of a parser, by what a sandbox sent: never the end of the agent.
            logger.warning("a question for a name could not be read", exc_info=True)
            return b""

    async def _fill(self, asked: dns.rrset.RRset, response: dns.message.Message) -> None:
        name = asked.name.to_text(omit_final_dot=True).lower()
        # An escaped dot, or whatever else a label may hold, must not look like another name.
        groups = self._policy.groups_of(name) if _PLAIN.fullmatch(name) else []
        if not groups or asked.rdclass != dns.rdataclass.IN:
            response.set_rcode(dns.rcode.REFUSED)
            return
        if asked.rdtype != dns.rdatatype.A:
            # The name may exist, and has nothing else: no IPv6, no record that carries data out.
            return
        code, addresses, left_s = await self._look_up(name, groups)
        response.set_rcode(code)
        if addresses:
            response.answer.append(
                dns.rrset.from_text_list(
                    asked.name,
                    max(1, int(left_s)),
                    dns.rdataclass.IN,
                    dns.rdatatype.A,
                    [str(each) for each in addresses],
                )
            )

    async def _look_up(
        self, name: str, groups: list[int]
    ) -> tuple[dns.rcode.Rcode, list[IPv4Address], float]:
        """Return the addresses of a name, which are open by then, and how long they count."""
        known = self._remembered.get(name)
        now_s = time.monotonic()
        if known is not None and known[1] > now_s:
            return dns.rcode.NOERROR, known[0], known[1] - now_s
        if self._lookups >= _LOOKUPS_MAX or not self._new_names.take():
            return dns.rcode.SERVFAIL, [], 0
        self._lookups += 1
        try:
            return await self._ask(name, groups)
        except dns.resolver.NXDOMAIN:
            return dns.rcode.NXDOMAIN, [], 0
        except (dns.exception.DNSException, OSError) as error:
            logger.info("no answer for a name", extra={"error": str(error)[:200]})
            return dns.rcode.SERVFAIL, [], 0
        finally:
            self._lookups -= 1

    async def _ask(
        self, name: str, groups: list[int]
    ) -> tuple[dns.rcode.Rcode, list[IPv4Address], float]:
        answer = await self._servers.resolve(
            f"{name}.", "A", search=False, raise_on_no_answer=False
        )
        told = [] if answer.rrset is None else [_address_of(each) for each in answer.rrset]
        found = [each for each in told if each is not None]
        # A name of theirs that leads to an address of ours is not believed.
        addresses = [each for each in found if self._policy.may_answer(each)][:_ADDRESSES_MAX]
        if found and not addresses:
            return dns.rcode.REFUSED, [], 0
        if not addresses:
            return dns.rcode.NOERROR, [], 0
        ttl_s = min(max(answer.rrset.ttl if answer.rrset else 0, _TTL_MIN_S), _TTL_MAX_S)
        # The others are open to what their rules say, and to nothing more.
        public = [each for each in addresses if is_public(each)]
        if public:
            await self._open(groups, public, ttl_s + _OPEN_LONGER_S)
        self._remembered[name] = (addresses, time.monotonic() + ttl_s)
        self._remembered.move_to_end(name)
        while len(self._remembered) > _REMEMBERED_MAX:
            self._remembered.popitem(last=False)
        return dns.rcode.NOERROR, addresses, ttl_s


def _address_of(record: Any) -> IPv4Address | None:
    try:
        return IPv4Address(record.address)
    except (AttributeError, AddressValueError):
        return None
