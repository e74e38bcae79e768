import socket

import pytest

from prism_common.addresses import Address, check_port_free, parse_address, require_loopback
from prism_common.errors import InvalidArgumentError, StartupError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("localhost:1", "localhost", 1),
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("node-1.example.com:65535", "node-1.example.com", 65535),
        ("my_host:80", "my_host", 80),
        ("[::1]:4200", "::1", 4200),
        ("[::]", "::", 99),
        ("::1", "::1", 99),
        ("node1", "node1", 99),
        ("node1.:7", "node1.", 7),
    ],
)
def test_addresses_are_parsed(text: str, host: str, port: int) -> None:
    assert parse_address(text, "--raft", 99) == Address(host, port)


@pytest.mark.parametrize(
    "text",
    [
        "", ":1", "host:", "host:x", "host:-1", "host:65536", "host:1:2", "[::1", "[::1]x",
        "[host]:1", "ho st:1", "a..b:1", "host:١", "x" * 64 + ":1", "http://host:1", "host:1/path",
        "\0:1",
        "x" * 1_000_000,
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_by_its_field(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_address(text, "--raft")
    assert caught.value.field == "--raft"
    assert len(caught.value.message) < 300


def test_a_port_is_needed_where_there_is_no_default() -> None:
    for text in ("host", "::1", "[::1]"):
        with pytest.raises(InvalidArgumentError):
            parse_address(text, "--raft")


@pytest.mark.parametrize("text", ["localhost:1", "127.0.0.1:2", "[::1]:3", "a.b:4", "[fe80::1]:5"])
def test_an_address_prints_as_it_is_parsed(text: str) -> None:
    assert str(parse_address(text, "--raft")) == text


@pytest.mark.parametrize(
    ("host", "loopback", "wildcard"),
    [
        ("localhost", True, False), ("127.8.8.8", True, False), ("::1", True, False),
        ("0.0.0.0", False, True), ("::", False, True), ("10.0.0.1", False, False),
        ("localhost.evil.com", False, False),
    ],
)  # fmt: skip
def test_loopback_and_wildcard_are_known(host: str, loopback: bool, wildcard: bool) -> None:
    address = Address(host, 1)
    assert (address.is_loopback, address.is_wildcard) == (loopback, wildcard)


def test_a_port_in_use_is_refused_by_its_flag() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(StartupError, match=r"--api: cannot listen on 127.0.0.1:\d+"):
            check_port_free(address, "--api")
    check_port_free(address, "--api")


def test_a_host_that_does_not_resolve_is_refused_by_its_flag() -> None:
    with pytest.raises(StartupError, match="--api"):
        check_port_free(Address("no-such-host.invalid", 1), "--api")


def test_only_loopback_is_served_without_insecure() -> None:
    require_loopback(Address("127.0.0.1", 1), "--api", insecure=False)
    require_loopback(Address("0.0.0.0", 1), "--api", insecure=True)
    with pytest.raises(StartupError, match="--insecure"):
        require_loopback(Address("0.0.0.0", 1), "--api", insecure=False)
