"""--network, --allow and --allow-dns, and the same words in files."""

from pathlib import Path

import pytest
from prism.node.v1 import node_pb2
from prism.sandbox.v1 import sandbox_pb2 as pb

from tests.cli.conftest import Run
from tests.cli.fake_prism import FakePrism

TCP, UDP = pb.TRANSPORT_PROTOCOL_TCP, pb.TRANSPORT_PROTOCOL_UDP
WANTED = pb.Network(
    mode=pb.NETWORK_MODE_EGRESS,
    rules=[
        pb.EgressRule(
            cidr="10.0.0.0/8",
            ports=[pb.PortRange(first=80, last=80), pb.PortRange(first=8000, last=8100)],
        ),
        pb.EgressRule(cidr="203.0.113.7/32", ports=[pb.PortRange(first=53, last=53)], protocol=UDP),
        pb.EgressRule(cidr="203.0.113.0/24", protocol=TCP),
    ],
    names=[
        pb.EgressName(name="*.example.org", ports=[pb.PortRange(first=443, last=443)]),
        pb.EgressName(name="example.net"),
    ],
)
ALLOW = ("10.0.0.0/8:80,8000-8100", "203.0.113.7:53/udp", "203.0.113.0/24/tcp")
NAMES = ("*.Example.org:443", "example.net")


def test_flags_become_rules(inline: Run, fake: FakePrism) -> None:
    flags = [part for text in ALLOW for part in ("--allow", text)]
    flags += [part for text in NAMES for part in ("--allow-dns", text)]
    assert inline("sandbox", "create", *flags).returncode == 0
    assert fake.requests("CreateSandbox")[0].spec.network == WANTED


def test_without_them_there_is_no_network_and_egress_alone_reaches_nothing(
    inline: Run, fake: FakePrism
) -> None:
    inline("sandbox", "create")
    inline("sandbox", "create", "--network", "none")
    inline("sandbox", "create", "--network", "egress")
    found = [request.spec for request in fake.requests("CreateSandbox")]
    assert [spec.HasField("network") for spec in found] == [False, False, True]
    assert found[2].network == pb.Network(mode=pb.NETWORK_MODE_EGRESS)


def test_a_file_has_the_same_words(inline: Run, fake: FakePrism, tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_text(
        "network: egress\nallow:\n"
        + "".join(f'- "{text}"\n' for text in ALLOW)
        + "allow_dns:\n"
        + "".join(f'- "{text}"\n' for text in NAMES)
    )
    assert inline("sandbox", "create", "-f", str(file)).returncode == 0
    created = fake.requests("BatchCreateSandboxes")[0].requests[0]
    assert created.spec.network == WANTED
    file.write_text("allow: 10.0.0.0/8\n")
    result = inline("sandbox", "create", "-f", str(file))
    assert (result.returncode, b"allow: is no list" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--allow", "10.0.0.1/8"], b"no bit set beyond"),
        (["--allow", "::/0"], b"is not of the form"),
        (["--allow", "127.0.0.1"], b"cannot be reached"),
        (["--allow", "1.1.1.1:0"], b"are not ports"),
        (["--allow", "1.1.1.1:9-8"], b"are not ports"),
        (["--allow", "1.1.1.1:1-2-3"], b"is no port"),
        (["--allow", "1.1.1.1/icmp"], b"is not of the form"),
        (["--allow-dns", "a..b"], b"is not a name"),
        (["--allow-dns", "1.2.3.4"], b"give it as a rule"),
        (["--network", "none", "--allow", "1.1.1.1"], b"needs --network egress"),
        (["--network", "all"], b"--network"),
    ],
)
def test_what_is_wrong_is_said_with_its_flag(
    inline: Run, fake: FakePrism, flags: list[str], words: bytes
) -> None:
    result = inline("sandbox", "create", *flags)
    text = b" ".join(result.stderr.replace(b"\xe2\x94\x82", b"").split())
    assert (result.returncode, words in text, flags[-2].encode() in text) == (2, True, True), text
    assert not fake.requests("CreateSandbox")


def test_info_shows_it_in_the_words_of_the_flags(inline: Run, fake: FakePrism) -> None:
    inline("sandbox", "create", "web", *[p for text in ALLOW for p in ("--allow", text)])
    shown = inline("sandbox", "info", "web").stdout.decode()
    assert "May reach:" in shown
    assert "10.0.0.0/8:80,8000-8100\n" in shown
    assert "203.0.113.7/32:53/udp\n" in shown
    node = node_pb2.Node(id="nd-1", name="n1", state=node_pb2.NODE_STATE_READY)
    node.egress.message = "prism-agent must run as root"
    fake.nodes.append(node)
    assert "none: prism-agent must run as root" in inline("node", "info", "n1").stdout.decode()
