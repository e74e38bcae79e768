"""Which addresses and names a rule opens."""

from ipaddress import IPv4Address, IPv4Network
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def _opens(rule: str, address: str) -> bool:
    return any(IPv4Address(address) in part for part in opened_by(IPv4Network(rule)))


@pytest.mark.parametrize(
    ("rule", "address", "opens"),
    [
        ("0.0.0.0/0", "1.1.1.1", True),
        ("0.0.0.0/0", "10.0.0.1", False),
        ("0.0.0.0/0", "192.168.1.1", False),
        ("0.0.0.0/0", "169.254.169.254", False),
        ("0.0.0.0/0", "168.63.129.16", False),
        ("0.0.0.0/0", "224.0.0.1", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.1.0.0/16", "10.1.2.3", True),
        ("10.1.0.0/16", "10.2.0.1", False),
        ("8.0.0.0/6", "10.1.2.3", False),
        ("8.0.0.0/6", "9.9.9.9", True),
        ("169.254.0.0/16", "169.254.1.1", True),
        ("169.254.0.0/16", "169.254.169.254", False),
        ("169.254.169.254/32", "169.254.169.254", True),
        ("100.64.0.0/10", "100.100.100.200", False),
    ],
)
def test_special_ranges_are_open_only_to_rules_within_them(
    rule: str, address: str, opens: bool
) -> None:
    assert _opens(rule, address) is opens


@given(st.integers(0, 2**32 - 1), st.integers(0, 32), st.integers(0, 2**32 - 1))
def test_what_a_rule_opens_is_what_the_words_say(base: int, length: int, number: int) -> None:
    network = IPv4Network((base, length), strict=False)
    address = IPv4Address(int(network.network_address) | (number & int(network.hostmask)))
    smallest = min(
        (each for each in RESERVED if address in each), key=lambda each: each.num_addresses,
        default=None,
    )  # fmt: skip
    named = smallest is None or network.subnet_of(smallest)
    assert any(address in part for part in opened_by(network)) is named
    assert is_public(address) is (smallest is None)


@given(st.integers(0, 2**32 - 1), st.integers(0, 32))
def test_parts_lie_within_the_rule_and_do_not_overlap(base: int, length: int) -> None:
    network = IPv4Network((base, length), strict=False)
    parts = opened_by(network)
    assert all(part.subnet_of(network) for part in parts)
    assert all(one.broadcast_address < two.network_address for one, two in pairwise(parts))


@pytest.mark.parametrize(
    "text", ["", "x", "10.0.0.1/8", "10.0.0.0/33", "::/0", "10.0.0.0/8 ", "127.0.0.1", "224.0.0.1"]
)
def test_what_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_cidr(text, "spec.network.rules[0].cidr")
    assert caught.value.field == "spec.network.rules[0].cidr"


@pytest.mark.parametrize("text", ["", ".", "a..b", "*.*.b", "a*.b", "-a", "a b", "1.2.3.4", "ü.de"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_name(text, "name")


@pytest.mark.parametrize(
    ("pattern", "name", "allowed"),
    [
        ("example.org", "example.org", True),
        ("example.org", "a.example.org", False),
        ("*.example.org", "a.b.example.org", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", "badexample.org", False),
        ("*", "anything", True),
    ],
)
def test_names_match_whole_labels(pattern: str, name: str, allowed: bool) -> None:
    assert parse_name(pattern.upper() + ".", "name") == pattern
    assert matches(pattern, name) is allowed


def test_ports_are_merged() -> None:
    assert parse_ports([(443, 0), (80, 0), (81, 90), (85, 95)], "ports") == ((80, 95), (443, 443))
    for wrong in ([(0, 0)], [(2, 1)], [(1, 65_536)], [(-1, 5)], [(9, 9)] * 17):
        with pytest.raises(InvalidArgumentError):
            parse_ports(wrong, "ports")
