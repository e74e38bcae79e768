"""`prismctl sandbox port`: local connections to ports of a sandbox."""

import contextlib
import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_common import errors
from tests.cli.conftest import Run, Spawn
from tests.cli.fake_prism import FakePrism, abort

CLOSED = 81


class PortPrism(FakePrism):
    """Port 81 is closed; any other answers what was sent once that is complete."""

    def ForwardPort(self, requests: Any, context: Any) -> Iterator[pb.ForwardPortResponse]:
        start = next(requests).start
        self.calls.append(("ForwardPort", start))
        if start.sandbox not in self.sandboxes and all(
            one.id != start.sandbox for one in self.sandboxes.values()
        ):
            abort(context, errors.NotFoundError("sandbox: there is none", field="sandbox"))
        if start.port == CLOSED:
            abort(context, errors.WrongStateError("nothing listens on port 81", reason="X"))
        response = pb.ForwardPortResponse()
        response.connected.SetInParent()
        yield response
        data = b""
        for request in requests:
            if request.HasField("eof"):
                break
            data += request.data
        yield pb.ForwardPortResponse(data=b"%d:" % start.port + data)
        response = pb.ForwardPortResponse()
        response.eof.SetInParent()
        yield response


@pytest.fixture
def fake() -> Iterator[PortPrism]:
    server = PortPrism()
    server.put("web", pb.SANDBOX_STATE_READY)
    yield server
    server.stop()


def _where(process: subprocess.Popen[bytes]) -> tuple[str, int]:
    assert process.stdout is not None
    host, _, port = process.stdout.readline().split()[0].decode().rpartition(":")
    return host, int(port)


def _ask(where: tuple[str, int], data: bytes) -> bytes:
    with socket.create_connection(where, timeout=20) as connection:
        connection.sendall(data)
        with contextlib.suppress(OSError):  # reset already, as reading then says
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_connections_are_carried_many_at_once_until_a_signal(spawn: Spawn) -> None:
    process = spawn("sandbox", "port", "web", "0:8000", "0:9000")
    first, second = _where(process), _where(process)
    assert first[0] == "127.0.0.1"
    large = bytes(range(256)) * 4096
    assert _ask(first, large) == b"8000:" + large
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: _ask(second, b"%d" % number), range(24)))
    assert answers == [b"9000:%d" % number for number in range(24)]
    with socket.create_connection(first, timeout=20) as held:
        held.sendall(b"x")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        with pytest.raises(ConnectionResetError):
            held.recv(1)
    assert process.stderr is not None
    assert process.stderr.read() == b""


def test_sigterm_ends_it_too(spawn: Spawn) -> None:
    process = spawn("sandbox", "port", "web", "0:8000", "-o", "name")
    _where(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143


def test_where_it_listens_is_said_for_people_and_for_programs(spawn: Spawn) -> None:
    process = spawn("sandbox", "port", "web", "0:8000")
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    assert line.startswith("127.0.0.1:")
    assert line.endswith(" -> web:8000\n")
    process = spawn("sandbox", "port", "web", "0:8000", "-o", "json")
    assert process.stdout is not None
    text = "".join(process.stdout.readline().decode() for _ in range(7))
    (found,) = json.loads(text)
    assert (found["sandbox"], found["port"]) == ("web", 8000)


def test_a_closed_port_is_said_and_the_others_go_on(spawn: Spawn) -> None:
    process = spawn("sandbox", "port", "web", f"0:{CLOSED}", "0:8000")
    closed, open_ = _where(process), _where(process)
    with pytest.raises(ConnectionResetError):
        _ask(closed, b"x")
    assert process.stderr is not None
    assert process.stderr.readline() == b"prismctl: web:81: nothing listens on port 81\n"
    assert _ask(open_, b"y") == b"8000:y"


def test_it_ends_when_the_sandbox_is_gone(spawn: Spawn, fake: PortPrism) -> None:
    process = spawn("sandbox", "port", "web", "0:8000")
    where = _where(process)
    fake.sandboxes.clear()
    with pytest.raises(ConnectionResetError):
        _ask(where, b"x")
    assert process.wait(20) == 1
    assert process.stderr is not None
    assert b"sandbox web is gone" in process.stderr.read()


def test_what_cannot_be_done_is_one_line(cli: Run, fake: PortPrism) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = cli("sandbox", "port", "web", f"{port}:80")
    assert result.returncode == 1
    assert b"in use; give another: prismctl sandbox port web 0:80" in result.stderr
    for wrong in ("0", "8000:", "65536", "8000:0", "x"):
        result = cli("sandbox", "port", "web", wrong)
        assert (result.returncode, b"[LOCAL:]REMOTE" in result.stderr) == (2, True), wrong
    fake.put("idle", pb.SANDBOX_STATE_STOPPED)
    result = cli("sandbox", "port", "idle", "8000")
    assert result.returncode == 1
    assert b"idle is STOPPED" in result.stderr
    result = cli("sandbox", "port", "web", "0:80", "--address", "192.0.2.1")
    assert result.returncode == 1
    assert b"192.0.2.1:0" in result.stderr
