"""The kernel's table of connections, in a network namespace of the test's own."""

import os
import shutil
import subprocess
import sys

import pytest

_PROGRAM = """
import socket, subprocess
from ipaddress import IPv4Address
from prism_agent.network.connections import forget
from prism_agent.network.tools import ip, nft
ip("link set lo up\\naddr add 198.18.0.9/32 dev lo\\naddr add 198.18.0.10/32 dev lo\\n")
nft("add table inet t\\nadd chain inet t o { type filter hook output priority 0; }\\n"
    "add rule inet t o ct state new accept\\n")
def begin(address, count):
    for port in range(20000, 20000 + count):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.bind((address, 0))
            one.sendto(b"x", ("127.0.0.1", port))
def count():
    with open("/proc/sys/net/netfilter/nf_conntrack_count") as file:
        return int(file.read())
forget(IPv4Address("198.18.0.9"))
begin("198.18.0.9", 900)
begin("198.18.0.10", 30)
before = count()
forget(IPv4Address("198.18.0.9"))
print(before, count())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.skipif(shutil.which("nft") is None, reason="nft is not installed")
def test_connections_of_one_address_are_forgotten_and_no_others() -> None:
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", _PROGRAM],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["930", "30"], done.stderr
