"""What a sandbox may reach: the words of it, and which addresses are special. Pure."""

import re
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError
from typing import Final

from prism_common.errors import InvalidArgumentError
from prism_common.names import shorten

RULES_MAX: Final = 32
NAMES_MAX: Final = 32
PORT_RANGES_MAX: Final = 16
PORT_MAX: Final = 65_535
_NAME_LENGTH_MAX: Final = 253

_LABEL: Final = re.compile(r"[a-z0-9_]([-a-z0-9_]{0,61}[a-z0-9_])?")

#: Nothing outside a sandbox has such an address.
UNREACHABLE: Final = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # "this network"
        "127.0.0.0/8",  # loopback
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
#: Open only to a rule that lies within one of them. Where one lies in another the smaller counts.
RESERVED: Final = (
    *UNREACHABLE,
    *(
        IPv4Network(text)
        for text in (
            "10.0.0.0/8",  # private (RFC 1918)
            "100.64.0.0/10",  # shared by carriers, and by overlay networks (RFC 6598)
            "100.100.100.200/32",  # metadata of a cloud
            "168.63.129.16/32",  # the same, in a public range
            "169.254.0.0/16",  # link-local
            "169.254.169.254/32",  # metadata of most clouds
            "169.254.170.2/32",  # credentials of containers in a cloud
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocol assignments
            "192.0.0.192/32",  # metadata of a cloud
            "192.0.2.0/24",  # documentation
            "192.88.99.0/24",  # relays to IPv6
            "192.168.0.0/16",  # private
            "198.18.0.0/15",  # benchmarks, and the addresses of our sandboxes
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
        )
    ),
)


def parse_cidr(text: str, field: str) -> IPv4Network:
    """Return the addresses that a rule names.

    Raises:
        InvalidArgumentError: It is not IPv4 in that form, or cannot be reached.
    """
    try:
        network = IPv4Network(text)
    except (AddressValueError, NetmaskValueError, ValueError):
        hint = "; IPv6 is not served" if ":" in text else ""
        raise InvalidArgumentError(
            f"{field}: {shorten(text)} is not a network such as 203.0.113.0/24 (no bit set beyond "
            f"its prefix) or an address{hint}",
            field=field,
        ) from None
    for unreachable in UNREACHABLE:
        if network.subnet_of(unreachable):
            raise InvalidArgumentError(
                f"{field}: {text} cannot be reached from a sandbox: it is loopback, multicast or "
                "reserved",
                field=field,
            )
    return network


def parse_name(text: str, field: str) -> str:
    """Return a name in small letters: example.org, *.example.org or *.

    Raises:
        InvalidArgumentError: It is none.
    """
    name = text.lower().removesuffix(".")
    if name == "*":
        return name
    labels = name.removeprefix("*.").split(".")
    if len(name) > _NAME_LENGTH_MAX or not all(map(_LABEL.fullmatch, labels)):
        raise InvalidArgumentError(
            f"{field}: {shorten(text)} is not a name such as example.org, *.example.org (all "
            "below it) or * (all)",
            field=field,
        )
    if labels[-1].isdigit():
        raise InvalidArgumentError(
            f"{field}: {shorten(text)} is an address and not a name; give it as a rule",
            field=field,
        )
    return name


def parse_ports(ranges: list[tuple[int, int]], field: str) -> tuple[tuple[int, int], ...]:
    """Return ranges (first, last) in order, none touching another; empty: all ports.

    Raises:
        InvalidArgumentError: One is not 1 to 65535, or ends before it begins.
    """
    if len(ranges) > PORT_RANGES_MAX:
        raise InvalidArgumentError(
            f"{field}: {len(ranges)} ranges; at most {PORT_RANGES_MAX}", field=field
        )
    merged: list[tuple[int, int]] = []
    for first, last in sorted((first, last or first) for first, last in ranges):
        if not 1 <= first <= last <= PORT_MAX:
            raise InvalidArgumentError(
                f"{field}: {first} to {last} are not ports; use 1 to {PORT_MAX}", field=field
            )
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return tuple(merged)


def opened_by(network: IPv4Network) -> list[IPv4Network]:
    """Return what a rule opens: its addresses without the special ranges that it does not name.

    A rule names a range if it lies within it. So 10.0.0.0/8 opens that range, 0.0.0.0/0 does not,
    and 169.254.169.254 is open to that one address alone.
    """
    parts = [network]
    for reserved in RESERVED:
        if reserved == network or not reserved.subnet_of(network):
            continue
        parts = [
            piece
            for part in parts
            for piece in (part.address_exclude(reserved) if reserved.subnet_of(part) else [part])
            if not piece.subnet_of(reserved)
        ]
    return sorted(parts)


def is_public(address: IPv4Address) -> bool:
    """Return whether an address is in no special range."""
    return not any(address in reserved for reserved in RESERVED)


def matches(pattern: str, name: str) -> bool:
    """Return whether a name, in small letters and without a dot at its end, is allowed by one."""
    if pattern == "*":
        return True
    if pattern.startswith("*."):
        return name.endswith(pattern[1:]) and len(name) > len(pattern) - 1
    return name == pattern
