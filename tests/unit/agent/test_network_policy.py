"""What a spec's network comes to: rules, names, and the text that nftables gets."""

import os
import shutil
import subprocess
from ipaddress import IPv4Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_agent.network import policy
from prism_agent.network.allowance import Allowance
from prism_agent.network.policy import Policy, policy_of

EGRESS = pb.NETWORK_MODE_EGRESS
HTTPS = [pb.PortRange(first=443)]


def _policy(*rules: pb.EgressRule, names: list[pb.EgressName] | None = None) -> Policy:
    found = policy_of(pb.Network(mode=EGRESS, rules=rules, names=names or []))
    assert found is not None
    return found


def test_no_network_unless_it_is_asked_for() -> None:
    assert policy_of(pb.Network()) is None
    assert policy_of(pb.Network(mode=pb.NETWORK_MODE_NONE)) is None
    assert _policy() == Policy()


def test_names_of_one_kind_of_traffic_share_a_set() -> None:
    found = _policy(
        names=[
            pb.EgressName(name="a.org", ports=HTTPS),
            pb.EgressName(name="*.b.org", ports=HTTPS),
            pb.EgressName(name="c.b.org"),
        ]
    )
    assert len(found.groups) == 2
    assert found.groups_of("a.org") == [0]
    assert found.groups_of("c.b.org") == [0, 1]
    assert found.groups_of("b.org") == []


def test_answers_may_be_public_or_what_a_rule_opens() -> None:
    found = _policy(pb.EgressRule(cidr="10.1.0.0/16"), pb.EgressRule(cidr="0.0.0.0/0"))
    for text, may in (
        ("9.9.9.9", True),
        ("10.1.2.3", True),
        ("10.2.0.1", False),
        ("169.254.169.254", False),
        ("127.0.0.1", False),
    ):
        assert found.may_answer(IPv4Address(text)) is may, text


def test_the_hosts_own_addresses_come_before_all_rules_but_exact_ones() -> None:
    found = _policy(pb.EgressRule(cidr="192.0.2.1"), pb.EgressRule(cidr="9.0.0.0/8"))
    lines = policy.add_rules("t", "prx", IPv4Address("198.18.0.1"), found).splitlines()
    order = [
        next(i for i, line in enumerate(lines) if words in line)
        for words in ("saddr != 198.18.0.1", "192.0.2.1", "fib daddr", "9.0.0.0/8")
    ]
    assert order == sorted(order)
    assert [line for line in lines if line.startswith("add rule")][-1].endswith("admin-prohibited")


def test_names_of_devices_fit_the_kernel_and_tell_sandboxes_and_nodes_apart() -> None:
    names = {
        policy.device_of(node, sandbox) for node in ("nd-1", "nd-2") for sandbox in ("sb-1", "sb-2")
    }
    assert len(names) == 4
    assert all(len(name) <= 15 for name in names)
    assert policy.devices_in([*names, "forward", "input", "pretty"]) == list(names)


def test_an_allowance_is_used_up_and_comes_back() -> None:
    allowance = Allowance(rate=1e9, most=3)
    assert all(allowance.take() for _ in range(20))
    allowance = Allowance(rate=1e-9, most=3)
    assert [allowance.take() for _ in range(5)] == [True, True, True, False, False]


_PORTS = st.lists(
    st.tuples(st.integers(1, 65_535), st.integers(0, 400)).map(
        lambda pair: pb.PortRange(first=pair[0], last=min(pair[0] + pair[1], 65_535))
    ),
    max_size=16,
)
_PROTOCOL = st.sampled_from([0, 1, 2])
_CIDR = st.tuples(st.integers(0x0100_0000, 0x7EFF_FFFF), st.integers(0, 32)).map(
    lambda pair: f"{IPv4Address(pair[0] >> (32 - pair[1]) << (32 - pair[1]))}/{pair[1]}"
)
_RULES = st.lists(
    st.builds(pb.EgressRule, cidr=_CIDR, ports=_PORTS, protocol=_PROTOCOL), max_size=32
)
_NAMES = st.lists(
    st.builds(pb.EgressName, name=st.just("a.org"), ports=_PORTS, protocol=_PROTOCOL), max_size=32
)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.skipif(shutil.which("nft") is None, reason="nft is not installed")
@settings(max_examples=15, deadline=None)
@given(_RULES, _NAMES)
def test_nftables_takes_every_policy(
    rules: list[pb.EgressRule], names: list[pb.EgressName]
) -> None:
    rules = [each for each in rules if not each.cidr.startswith("0.") or each.cidr == "0.0.0.0/0"]
    found = _policy(*rules, names=names)
    address = IPv4Address("198.18.0.1")
    text = "\n".join(
        (
            policy.base_rules("prism_test"),
            policy.add_rules("prism_test", "prtest", address, found),
            policy.inner_rules(found),
        )
    )
    # Checked by the kernel, in a namespace of its own, and not kept.
    done = subprocess.run(
        ["unshare", "--net", "nft", "--check", "-f", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
