"""A sandbox's network as its spec says it, and as rules of nftables. Pure: text in, text out.

Every agent has one table. A packet that comes from a sandbox's device goes through the chain of
that sandbox, whether it is for the host or for beyond; the chain ends in a refusal.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, collapse_addresses
from typing import Final, TypeAlias

from prism.sandbox.v1 import sandbox_pb2

from prism_common.egress import (
    RESERVED,
    is_public,
    matches,
    opened_by,
    parse_cidr,
    parse_name,
    parse_ports,
)
from prism_common.errors import InvalidArgumentError

Ports: TypeAlias = tuple[tuple[int, int], ...]

_DEVICE_PREFIX: Final = "pr"
_DEVICE: Final = re.compile(r"pr[0-9a-f]{12}")
#: Addresses that one sandbox's names may have open at once, for each group of names.
OPENED_MAX: Final = 1024
_REFUSE: Final = "reject with icmpx admin-prohibited"
#: Connections, and exchanges of datagrams, that one sandbox may have at once.
CONNECTIONS_MAX: Final = 2048
_PROTOCOLS: Final = {
    sandbox_pb2.TRANSPORT_PROTOCOL_UNSPECIFIED: "{ tcp, udp }",
    sandbox_pb2.TRANSPORT_PROTOCOL_TCP: "tcp",
    sandbox_pb2.TRANSPORT_PROTOCOL_UDP: "udp",
}


@dataclass(frozen=True, slots=True)
class Traffic:
    """What kind of packets something lets through."""

    protocol: str
    ports: Ports

    def match(self) -> str:
        """Return it as a condition."""
        if not self.ports:
            return f"meta l4proto {self.protocol}"
        ports = ", ".join(
            str(first) if first == last else f"{first}-{last}" for first, last in self.ports
        )
        return f"meta l4proto {self.protocol} th dport {{ {ports} }}"


@dataclass(frozen=True, slots=True)
class Rule:
    """Addresses, and what may be sent there."""

    network: IPv4Network
    traffic: Traffic


@dataclass(frozen=True, slots=True)
class Policy:
    """What one sandbox may reach."""

    rules: tuple[Rule, ...] = ()
    #: Names with the group that each is of; all of a group are open to the same traffic.
    names: tuple[tuple[str, int], ...] = ()
    groups: tuple[Traffic, ...] = ()

    def groups_of(self, name: str) -> list[int]:
        """Return the groups that a name, in small letters, is open to; empty: it is denied."""
        return sorted({group for pattern, group in self.names if matches(pattern, name)})

    def may_answer(self, address: IPv4Address) -> bool:
        """Return whether a name may turn out to be an address."""
        return is_public(address) or self.is_ruled(address)

    def is_ruled(self, address: IPv4Address) -> bool:
        """Return whether some rule opens an address, to whatever traffic."""
        return any(
            address in rule.network and any(address in part for part in opened_by(rule.network))
            for rule in self.rules
        )


def policy_of(network: sandbox_pb2.Network) -> Policy | None:
    """Return what a spec asks for; None: no network.

    Raises:
        InvalidArgumentError: The control plane let something through that we do not know.
    """
    if network.mode != sandbox_pb2.NETWORK_MODE_EGRESS:
        return None
    rules = tuple(
        Rule(parse_cidr(rule.cidr, "cidr"), _traffic_of(rule.protocol, rule.ports))
        for rule in network.rules
    )
    groups: dict[Traffic, int] = {}
    names = tuple(
        (
            parse_name(each.name, "name"),
            groups.setdefault(_traffic_of(each.protocol, each.ports), len(groups)),
        )
        for each in network.names
    )
    return Policy(rules, names, tuple(groups))


def _traffic_of(
    protocol: sandbox_pb2.TransportProtocol.ValueType, ports: Sequence[sandbox_pb2.PortRange]
) -> Traffic:
    if protocol not in _PROTOCOLS:
        raise InvalidArgumentError(f"protocol: {protocol} is not known here", field="protocol")
    return Traffic(
        _PROTOCOLS[protocol], parse_ports([(each.first, each.last) for each in ports], "ports")
    )


# ── Names of what is made ────────────────────────────────────────────────────────────────────


def table_of(node_id: str) -> str:
    """Return the name of an agent's table."""
    return f"prism_{_digest(node_id)}"


def device_of(node_id: str, sandbox_id: str) -> str:
    """Return the name of the device that a sandbox has on the host: at most 15 characters."""
    return f"{_DEVICE_PREFIX}{_digest(f'{node_id}/{sandbox_id}')}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ── Rules ────────────────────────────────────────────────────────────────────────────────────


def base_rules(table: str) -> str:
    """Return what an agent's table has for all sandboxes; sandboxes that are in it stay."""
    return f"""
add table inet {table}
add map inet {table} senders {{ type ifname : verdict; }}
add set inet {table} sandbox_devices {{ type ifname; }}
add chain inet {table} forward {{ type filter hook forward priority filter; policy accept; }}
add chain inet {table} input {{ type filter hook input priority filter; policy accept; }}
add chain inet {table} output {{ type filter hook output priority filter; policy accept; }}
add chain inet {table} postrouting {{ type nat hook postrouting priority srcnat; policy accept; }}
flush chain inet {table} forward
flush chain inet {table} input
flush chain inet {table} output
flush chain inet {table} postrouting
add rule inet {table} forward oifname @sandbox_devices ct state established,related accept
add rule inet {table} forward oifname @sandbox_devices {_REFUSE}
add rule inet {table} forward iifname vmap @senders
add rule inet {table} forward iifname @sandbox_devices drop
add rule inet {table} input iifname vmap @senders
add rule inet {table} input iifname @sandbox_devices drop
add rule inet {table} output oifname @sandbox_devices ct state established,related accept
add rule inet {table} output oifname @sandbox_devices {_REFUSE}
add rule inet {table} postrouting iifname @sandbox_devices masquerade
"""


def add_rules(table: str, device: str, address: IPv4Address, policy: Policy) -> str:
    """Return the transaction that holds a device to a policy; whatever it had is replaced."""
    lines = [remove_rules(table, device, policy)]
    lines += [
        f"add set inet {table} {set_of(device, group)} "
        f"{{ type ipv4_addr; flags timeout; size {OPENED_MAX}; }}"
        for group in range(len(policy.groups))
    ]
    lines.append(f"add chain inet {table} {device}")
    lines += [f"add rule inet {table} {device} {rule}" for rule in _chain(device, address, policy)]
    lines.append(f"add element inet {table} sandbox_devices {{ {device} }}")
    lines.append(f"add element inet {table} senders {{ {device} : goto {device} }}")
    return "\n".join(lines) + "\n"


def _chain(device: str, address: IPv4Address, policy: Policy) -> Iterator[str]:
    # The sandbox has one address, and IPv6 not at all.
    yield f"ip saddr != {address} drop"
    yield "meta nfproto != ipv4 drop"
    # Where they go on to is not where they seem to go.
    yield "ip option lsrr exists drop"
    yield "ip option ssrr exists drop"
    yield "ct state invalid drop"
    yield "ct state established,related accept"
    # The kernel's table of connections is one for the machine.
    yield f"ct count over {CONNECTIONS_MAX} {_REFUSE}"
    exact = [rule for rule in policy.rules if rule.network.prefixlen == 32]
    yield from (_accept(rule) for rule in exact)
    # The host itself, by whichever of its addresses.
    yield f"fib daddr type != unicast {_REFUSE}"
    yield from (_accept(rule) for rule in policy.rules if rule.network.prefixlen != 32)
    for group, traffic in enumerate(policy.groups):
        yield f"ip daddr @{set_of(device, group)} {traffic.match()} accept"
    yield _REFUSE


def _accept(rule: Rule) -> str:
    parts = ", ".join(str(part) for part in opened_by(rule.network))
    return f"ip daddr {{ {parts} }} {rule.traffic.match()} accept"


def inner_rules(policy: Policy) -> str:
    """Return what holds a sandbox to its policy inside its namespace, where nobody flushes it.

    The host's rules say more: which addresses are its own, and which ones names have opened. Should
    they be lost with all rules of the machine, special ranges are still closed by these.
    """
    chain = "inet prism output"
    lines = [
        "add table inet prism",
        f"add chain {chain} {{ type filter hook output priority filter; policy drop; }}",
        f"add rule {chain} oifname lo accept",
        f"add rule {chain} meta nfproto != ipv4 drop",
        *(f"add rule {chain} {_accept(rule)}" for rule in policy.rules),
    ]
    if policy.groups:
        special = ", ".join(str(each) for each in sorted(collapse_addresses(RESERVED)))
        lines.append(f"add rule {chain} ip daddr {{ {special} }} {_REFUSE}")
        lines += [f"add rule {chain} {traffic.match()} accept" for traffic in policy.groups]
    lines.append(f"add rule {chain} {_REFUSE}")
    if policy.names:
        lines += _resolver_rules()
    return "\n".join(lines) + "\n"


def _resolver_rules() -> Iterator[str]:
    """Yield what keeps floods from the agent: dropped here, they cost the sandbox and nobody else.

    Each limit is above what the resolver answers by itself.
    """
    chain = "inet prism input"
    yield f"add chain {chain} {{ type filter hook input priority filter; policy accept; }}"
    for what, rate in (("udp dport 53", 200), ("tcp dport 53 ct state new", 50)):
        yield f"add rule {chain} {what} limit rate over {rate}/second burst {2 * rate} packets drop"


def remove_rules(table: str, device: str, policy: Policy) -> str:
    """Return the transaction that removes all that `add_rules` makes, whether it is there or not.

    What is added first is only there to be removed: the kernel refuses to remove what is missing.
    """
    lines = [
        f"add chain inet {table} {device}",
        f"add element inet {table} senders {{ {device} : goto {device} }}",
        f"delete element inet {table} senders {{ {device} }}",
        f"add element inet {table} sandbox_devices {{ {device} }}",
        f"delete element inet {table} sandbox_devices {{ {device} }}",
    ]
    lines += [f"flush chain inet {table} {device}", f"delete chain inet {table} {device}"]
    for group in range(len(policy.groups)):
        name = set_of(device, group)
        lines += [
            f"add set inet {table} {name} {{ type ipv4_addr; flags timeout; size {OPENED_MAX}; }}",
            f"delete set inet {table} {name}",
        ]
    return "\n".join(lines) + "\n"


def devices_in(chains: Sequence[str]) -> list[str]:
    """Return the devices that have a chain of their own among the chains of a table."""
    return [name for name in chains if _DEVICE.fullmatch(name)]


def sweep_rules(table: str, device: str, sets: Sequence[str]) -> str:
    """Return the transaction that removes what a device has of which nothing else is known."""
    lines = [remove_rules(table, device, Policy())]
    lines += [f"delete set inet {table} {name}" for name in sets if name.startswith(f"{device}_")]
    return "\n".join(lines) + "\n"


def set_of(device: str, group: int) -> str:
    """Return the name of the set of addresses that a group of names has open."""
    return f"{device}_{group}"


def open_rules(
    table: str, device: str, groups: Sequence[int], addresses: Sequence[IPv4Address], time_s: int
) -> str:
    """Return the transaction that opens addresses for a time, anew where they are open."""
    lines = []
    plain = ", ".join(str(each) for each in addresses)
    timed = ", ".join(f"{each} timeout {time_s}s" for each in addresses)
    for group in groups:
        name = set_of(device, group)
        # A timeout is changed only by removing what has it.
        lines += [
            f"add element inet {table} {name} {{ {plain} }}",
            f"delete element inet {table} {name} {{ {plain} }}",
            f"add element inet {table} {name} {{ {timed} }}",
        ]
    return "\n".join(lines) + "\n"
