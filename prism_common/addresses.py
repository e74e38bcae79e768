"""host:port addresses: parsing, binding, and what others should dial."""

import ipaddress
import re
import socket
from dataclasses import dataclass

from prism_common.errors import InvalidArgumentError, StartupError
from prism_common.names import shorten

_LABEL = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*\.?")


@dataclass(frozen=True, slots=True)
class Address:
    """A host (name, IPv4 or IPv6 without brackets) and a port (0: the system chooses)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True for localhost, 127.0.0.0/8 and ::1."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_wildcard(self) -> bool:
        """True for 0.0.0.0 and ::, which bind all interfaces and cannot be dialled."""
        return self.host in ("0.0.0.0", "::")  # noqa: S104


def parse_address(text: str, field: str, default_port: int | None = None) -> Address:
    """Parse host:port, [v6]:port, or a bare host where there is a default port.

    Raises:
        InvalidArgumentError: It is none of these, or the port is not 0 to 65535.
    """
    host, port_text = text, ""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or ":" not in host or (rest and not rest.startswith(":")):
            raise _malformed(text, field)
        port_text = rest[1:]
    elif text.count(":") == 1:
        host, _, port_text = text.partition(":")
    elif ":" in text and default_port is None:
        raise _malformed(text, field)
    if not port_text and default_port is not None:
        port = default_port
    elif port_text.isascii() and port_text.isdigit() and int(port_text) <= 65535:
        port = int(port_text)
    else:
        raise _malformed(text, field)
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise _malformed(text, field) from None
    elif not _HOST_NAME.fullmatch(host):
        raise _malformed(text, field)
    return Address(host, port)


def _malformed(text: str, field: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{field}: {shorten(text)} is not HOST:PORT (IPv6 as [::1]:PORT, port 0 to 65535)",
        field=field,
    )


def check_port_free(address: Address, flag: str) -> None:
    """Raise StartupError, in one line that names the flag, if `address` cannot be bound.

    gRPC would bind with SO_REUSEPORT, or hide the reason; this asks the system plainly first.
    """
    try:
        infos = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise StartupError(f"{flag}: cannot resolve {address.host}: {error.strerror}") from None
    family, kind, protocol, _, sockaddr = infos[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(sockaddr)
            probe.listen(1)
        except OSError as error:
            raise StartupError(f"{flag}: cannot listen on {address}: {error.strerror}") from None


def require_loopback(address: Address, flag: str, insecure: bool) -> None:
    """Refuse an address that others can reach unless `--insecure` was given.

    This service runs other people's code, and has no authentication yet.
    """
    if not address.is_loopback and not insecure:
        raise StartupError(
            f"{flag}: {address} is reachable from other machines and there is no authentication "
            "yet; bind to 127.0.0.1, or give --insecure if the network is trusted"
        )
