"""What a sandbox may reach, in the words of the flags: `--allow 203.0.113.0/24:443`."""

import re
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import typer
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_common import egress
from prism_common.errors import InvalidArgumentError
from prism_common.names import shorten

Result = TypeVar("Result")

_ALLOW: Final = re.compile(
    r"(?P<target>[^:/]+(?:/\d+)?)(?::(?P<ports>[\d,-]+))?(?:/(?P<protocol>tcp|udp))?", re.ASCII
)
_PROTOCOLS: Final = {
    None: pb.TRANSPORT_PROTOCOL_UNSPECIFIED,
    "tcp": pb.TRANSPORT_PROTOCOL_TCP,
    "udp": pb.TRANSPORT_PROTOCOL_UDP,
}
_WORDS: Final = {
    pb.TRANSPORT_PROTOCOL_TCP: "/tcp",
    pb.TRANSPORT_PROTOCOL_UDP: "/udp",
}


def make_network(
    mode: str, allow: Sequence[str] | None, allow_dns: Sequence[str] | None
) -> pb.Network | None:
    """Return the network that the flags ask for; None: the default, which is none.

    Args:
        mode: "none", "egress", or empty: egress if something is allowed.
        allow: Each ADDRESS[/BITS][:PORTS][/tcp|/udp].
        allow_dns: Each NAME[:PORTS][/tcp|/udp].

    Raises:
        BadParameter: A flag is not of its form; it is named.
    """
    if mode == "none" and (allow or allow_dns):
        flag = "--allow" if allow else "--allow-dns"
        raise typer.BadParameter("needs --network egress", param_hint=f"'{flag}'")
    if mode == "none" or not (mode or allow or allow_dns):
        return None
    return pb.Network(
        mode=pb.NETWORK_MODE_EGRESS,
        rules=[_rule(text) for text in allow or ()],
        names=[_name(text) for text in allow_dns or ()],
    )


def _rule(text: str) -> pb.EgressRule:
    target, ports, protocol = _parts(text, "--allow", "203.0.113.0/24:443 or 10.1.2.3:53/udp")
    cidr = _checked("--allow", lambda: str(egress.parse_cidr(target, "--allow")))
    return pb.EgressRule(cidr=cidr, ports=ports, protocol=protocol)


def _name(text: str) -> pb.EgressName:
    target, ports, protocol = _parts(text, "--allow-dns", "example.org, *.example.org:443")
    name = _checked("--allow-dns", lambda: egress.parse_name(target, "--allow-dns"))
    return pb.EgressName(name=name, ports=ports, protocol=protocol)


def _parts(
    text: str, flag: str, example: str
) -> "tuple[str, list[pb.PortRange], pb.TransportProtocol.ValueType]":
    match = _ALLOW.fullmatch(text)
    if match is None:
        raise typer.BadParameter(
            f"{shorten(text)} is not of the form {example}", param_hint=f"'{flag}'"
        )
    ranges = []
    for part in (match["ports"] or "").split(",") if match["ports"] else ():
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise typer.BadParameter(
                f"{shorten(part)} is no port; write 443 or 8000-8100", param_hint=f"'{flag}'"
            )
        ranges.append((int(first), int(last or first)))
    pairs = _checked(flag, lambda: egress.parse_ports(ranges, flag))
    ports = [pb.PortRange(first=first, last=last) for first, last in pairs]
    return match["target"], ports, _PROTOCOLS[match["protocol"]]


def _checked(flag: str, parse: Callable[[], Result]) -> Result:
    """Return what `parse` does; what it refuses becomes a wrong use of the flag."""
    try:
        return parse()
    except InvalidArgumentError as error:
        text = error.message.removeprefix(f"{flag}: ")
        raise typer.BadParameter(text, param_hint=f"'{flag}'") from None


def in_words(network: pb.Network) -> list[str]:
    """Return a line for each thing that a sandbox may reach, as the flags write it."""
    lines = [
        f"{rule.cidr}{_ports(rule.ports)}{_WORDS.get(rule.protocol, '')}" for rule in network.rules
    ]
    lines += [
        f"{each.name}{_ports(each.ports)}{_WORDS.get(each.protocol, '')}" for each in network.names
    ]
    return lines or ["nothing"]


def _ports(ports: Sequence[pb.PortRange]) -> str:
    texts = [
        str(each.first) if each.last in (0, each.first) else f"{each.first}-{each.last}"
        for each in ports
    ]
    return f":{','.join(texts)}" if texts else ""
