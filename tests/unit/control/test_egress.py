"""Networks of specs: what is taken, what is refused, where they are placed."""

import pytest
from prism.agent.v1 import agent_pb2
from prism.node.v1 import node_pb2
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_common.errors import InvalidArgumentError
from prism_control.api import validation
from prism_control.rows import node_labels, node_proto, spec_proto
from prism_control.scheduler.views import NodeView, shape_of
from prism_control.state.commands import CreateSandbox, propose
from prism_control.state.model import Amounts, NodeRow, NodeState, RuntimeRow

TCP = pb.TRANSPORT_PROTOCOL_TCP
FULL = pb.Network(
    mode=pb.NETWORK_MODE_EGRESS,
    rules=[
        pb.EgressRule(
            cidr="10.0.0.0/8", ports=[pb.PortRange(first=80, last=90)], protocol=TCP
        )
    ],
    names=[pb.EgressName(name="*.example.org", ports=[pb.PortRange(first=443, last=443)])],
)  # fmt: skip


def _node(egress: node_pb2.EgressStatus) -> NodeRow:
    return NodeRow(
        id="nd-1", name="n1", state=NodeState.READY, incarnation="i", address="127.0.0.1:7117",
        capacity=Amounts(8000, 2**34, 2**34, 100), runtimes=(RuntimeRow("bubblewrap", True),),
        labels=node_labels({"disk": "ssd"}, egress), version="1", lease_ms=1, heartbeat_ms=1,
        revision=1, create_ms=1, last_seen_ms=1,
    )  # fmt: skip


def test_what_is_stored_comes_back_as_it_was() -> None:
    spec = validation.spec_of(pb.SandboxSpec(network=FULL))
    assert spec_proto(spec).network == FULL
    assert not spec_proto(validation.spec_of(pb.SandboxSpec())).HasField("network")
    none = pb.SandboxSpec(network=pb.Network(mode=pb.NETWORK_MODE_NONE))
    assert validation.spec_of(none) == validation.spec_of(pb.SandboxSpec())


def test_one_word_for_one_thing() -> None:
    network = pb.Network(mode=pb.NETWORK_MODE_EGRESS)
    network.rules.add(cidr="10.1.2.3", ports=[pb.PortRange(first=9), pb.PortRange(first=8)])
    network.names.add(name="EXAMPLE.org.")
    stored = spec_proto(validation.spec_of(pb.SandboxSpec(network=network))).network
    assert stored.rules[0].cidr == "10.1.2.3/32"
    assert stored.rules[0].ports == [pb.PortRange(first=8, last=9)]
    assert stored.names[0].name == "example.org"


@pytest.mark.parametrize(
    ("network", "field"),
    [
        (pb.Network(mode=7), "spec.network.mode"),  # type: ignore[arg-type]
        (pb.Network(rules=[pb.EgressRule(cidr="1.1.1.1")]), "spec.network.mode"),
        (pb.Network(mode=pb.NETWORK_MODE_NONE, names=[pb.EgressName(name="a")]),
         "spec.network.mode"),
        (pb.Network(mode=2, rules=[pb.EgressRule(cidr="1.1.1.1")] * 33), "spec.network.rules"),
        (pb.Network(mode=2, names=[pb.EgressName(name="a")] * 33), "spec.network.names"),
        (pb.Network(mode=2, rules=[pb.EgressRule(cidr="fd00::/8")]),
         "spec.network.rules[0].cidr"),
        (pb.Network(mode=2, rules=[pb.EgressRule(cidr="1.1.1.1"), pb.EgressRule()]),
         "spec.network.rules[1].cidr"),
        (pb.Network(mode=2, rules=[pb.EgressRule(cidr="1.1.1.1", protocol=9)]),  # type: ignore[arg-type]
         "spec.network.rules[0].protocol"),
        (pb.Network(mode=2, rules=[pb.EgressRule(
            cidr="1.1.1.1", ports=[pb.PortRange(first=0, last=5)])]),
         "spec.network.rules[0].ports"),
        (pb.Network(mode=2, names=[pb.EgressName(name="a b")]), "spec.network.names[0].name"),
    ],
)  # fmt: skip
def test_errors_name_the_field(network: pb.Network, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        validation.spec_of(pb.SandboxSpec(network=network))
    assert caught.value.field == field


def test_it_is_placed_only_where_it_can_be_held_to_its_rules() -> None:
    plain = shape_of(validation.spec_of(pb.SandboxSpec()))
    wanted = shape_of(
        validation.spec_of(pb.SandboxSpec(network=FULL, node_selector={"disk": "ssd"}))
    )
    able = NodeView(_node(node_pb2.EgressStatus(ready=True)), Amounts(), "")
    assert able.suits(wanted)
    unable = NodeView(_node(node_pb2.EgressStatus(message="no nft")), Amounts(), "")
    assert unable.suits(plain)
    assert not unable.suits(wanted)
    assert unable.refusal(wanted) == "cannot give a network: no nft"
    # An agent of an earlier release says nothing of it.
    silent = NodeView(_node(agent_pb2.Register().egress), Amounts(), "")
    assert not silent.suits(wanted)


def test_nodes_show_it_apart_from_their_labels() -> None:
    proto = node_proto(_node(node_pb2.EgressStatus(message="no nft")), Amounts(), 0)
    assert dict(proto.labels) == {"disk": "ssd"}
    assert proto.egress == node_pb2.EgressStatus(ready=False, message="no nft")
    assert node_proto(_node(node_pb2.EgressStatus(ready=True)), Amounts(), 0).egress.ready


def test_members_that_do_not_know_of_it_do_not_get_it() -> None:
    def version(network: pb.Network) -> int:
        spec = validation.spec_of(pb.SandboxSpec(network=network))
        return propose(1, (CreateSandbox("r", b"", "sb-1", "web", spec),)).version

    assert version(pb.Network()) == 1
    assert version(FULL) == 4
