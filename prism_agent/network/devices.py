"""A network namespace with one device that leads to the host: made, found, removed. Blocking."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Final

from prism_agent.network import tools
from prism_agent.network.namespace import enter_new
from prism_agent.runtime import host

#: For benchmarks of networks (RFC 2544), so no machine that one talks to has such an address.
POOL: Final = IPv4Network("198.18.0.0/15")
#: What the device of the host answers to inside; nothing has it as an address.
_GATEWAY: Final = "169.254.1.1"
#: Both ends are told the other's, so that nobody asks. Every pair is a network of its own.
_MAC_HOST, _MAC_INSIDE = "02:00:00:00:00:01", "02:00:00:00:00:02"
_ALIAS: Final = "prism "
_MS_BIND: Final = 4096

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Link:
    """What a sandbox's namespace is reached by."""

    #: Name of the device on the host.
    device: str
    #: Says whose it is: node id, slash, sandbox id.
    owner: str
    #: Where the namespace is bound to.
    path: Path


def make(link: Link) -> None:
    """Make a namespace with a pair of devices, and bind it to its path. Called in a thread `apart`.

    Until it is bound, a namespace ends with this thread, and the devices with it.

    Raises:
        OSError: It cannot be made; nothing is left.
    """
    link.path.parent.mkdir(mode=0o700, exist_ok=True)
    link.path.touch(mode=0o600)
    enter_new()
    for name in ("all", "default"):
        # Loopback keeps ::1; what comes later has no IPv6 at all.
        with contextlib.suppress(FileNotFoundError):
            Path(f"/proc/sys/net/ipv6/conf/{name}/accept_ra").write_text("0", encoding="ascii")
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1", encoding="ascii")
    tools.ip(
        "link set lo up\n"
        f"link add name eth0 address {_MAC_INSIDE} type veth "
        f"peer name {link.device} address {_MAC_HOST} netns {os.getpid()}\n"
    )
    source = f"/proc/self/task/{threading.get_native_id()}/ns/net"
    if _libc.mount(source.encode(), os.fsencode(link.path), None, _MS_BIND, None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"bind {link.path}: {os.strerror(number)}")


def connect(link: Link, address: IPv4Address) -> None:
    """Give the device of the host its side: a route to one address, and a word of whose it is.

    Until then it is found by the namespace's path, with which its other end goes.

    Raises:
        OSError: Another has that address.
    """
    tools.ip(
        f'link set dev {link.device} alias "{_ALIAS}{link.owner}"\n'
        f"link set dev {link.device} addrgenmode none\n"
        f"link set dev {link.device} up\n"
        f"route add {address}/32 dev {link.device}\n"
        f"neigh replace {address} lladdr {_MAC_INSIDE} dev {link.device} nud permanent\n"
    )


def connect_inside(address: IPv4Address, rules: str) -> None:
    """Give the sandbox's device its side, rules first. Called in a thread in its namespace."""
    tools.nft(rules)
    tools.ip(
        f"addr add {address}/32 dev eth0\n"
        "link set dev eth0 up\n"
        f"neigh replace {_GATEWAY} lladdr {_MAC_HOST} dev eth0 nud permanent\n"
        f"route add {_GATEWAY}/32 dev eth0 scope link\n"
        f"route add default via {_GATEWAY} dev eth0 src {address}\n"
    )


def remove(link: Link) -> None:
    """Remove the device with its other end, and the namespace's name; what is gone is success.

    Raises:
        OSError: Something is left.
    """
    if link.path.exists():
        host.unmount(link.path)
        link.path.unlink(missing_ok=True)
    remove_device(link.device)


def remove_device(name: str) -> None:
    """Remove a device of the host; one that is gone is success.

    Raises:
        OSError: It is left.
    """
    try:
        tools.ip(f"link delete dev {name}\n")
    except tools.ToolError:
        if _exists(name):
            raise


def addresses_of(name: str) -> list[IPv4Address]:
    """Return the addresses that lie behind a device of the host; none behind one that is gone."""
    try:
        routes = tools.routes(name)
    except tools.ToolError:
        if _exists(name):
            raise
        return []
    found = []
    for each in routes:
        with contextlib.suppress(ValueError):  # a network, that somebody else has put there
            found.append(IPv4Address(each["dst"]))
    return found


def owned(node_id: str) -> Iterator[tuple[str, str]]:
    """Yield the devices of an agent's sandboxes on the host, each with the sandbox's id."""
    prefix = f"{_ALIAS}{node_id}/"
    for each in tools.links():
        alias = str(each.get("ifalias", ""))
        if alias.startswith(prefix):
            yield str(each["ifname"]), alias.removeprefix(prefix)


def _exists(name: str) -> bool:
    return any(each["ifname"] == name for each in tools.links())


def forwards() -> bool:
    """Return whether the host passes packets on between its devices."""
    try:
        text = Path("/proc/sys/net/ipv4/ip_forward").read_text(encoding="ascii")
    except OSError:
        return False
    return text.strip() == "1"
