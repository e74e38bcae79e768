"""The network of a request's spec: checked, and as it is stored."""

from collections.abc import Sequence
from typing import TypeAlias

from prism.sandbox.v1 import sandbox_pb2

from prism_common import egress
from prism_common.errors import InvalidArgumentError
from prism_control.state.model import Egress, EgressRow

_Ports: TypeAlias = Sequence[sandbox_pb2.PortRange]
_Protocol: TypeAlias = sandbox_pb2.TransportProtocol.ValueType


def egress_of(network: sandbox_pb2.Network, field: str) -> Egress | None:
    """Return what a sandbox may reach; None: it has no network.

    Raises:
        InvalidArgumentError: A field is out of its range; it names field and range.
    """
    if network.mode not in sandbox_pb2.NetworkMode.values():
        raise InvalidArgumentError(
            f"{field}.mode: {network.mode} is not NETWORK_MODE_NONE or NETWORK_MODE_EGRESS",
            field=f"{field}.mode",
        )
    if network.mode != sandbox_pb2.NETWORK_MODE_EGRESS:
        if network.rules or network.names:
            raise InvalidArgumentError(
                f"{field}.mode: rules and names need NETWORK_MODE_EGRESS", field=f"{field}.mode"
            )
        return None
    _check_count(len(network.rules), egress.RULES_MAX, f"{field}.rules")
    _check_count(len(network.names), egress.NAMES_MAX, f"{field}.names")
    return Egress(
        tuple(_rule(rule, f"{field}.rules[{i}]") for i, rule in enumerate(network.rules)),
        tuple(_name(name, f"{field}.names[{i}]") for i, name in enumerate(network.names)),
    )


def _check_count(count: int, most: int, field: str) -> None:
    if count > most:
        raise InvalidArgumentError(f"{field}: {count}; at most {most}", field=field)


def _rule(rule: sandbox_pb2.EgressRule, field: str) -> EgressRow:
    network = egress.parse_cidr(rule.cidr, f"{field}.cidr")
    return _row(str(network), rule.protocol, rule.ports, field)


def _name(name: sandbox_pb2.EgressName, field: str) -> EgressRow:
    return _row(egress.parse_name(name.name, f"{field}.name"), name.protocol, name.ports, field)


def _row(target: str, protocol: _Protocol, ports: _Ports, field: str) -> EgressRow:
    if protocol not in sandbox_pb2.TransportProtocol.values():
        raise InvalidArgumentError(
            f"{field}.protocol: {protocol} is none of TCP, UDP and unspecified (both)",
            field=f"{field}.protocol",
        )
    pairs = [(each.first, each.last) for each in ports]
    return EgressRow(target, protocol, egress.parse_ports(pairs, f"{field}.ports"))
