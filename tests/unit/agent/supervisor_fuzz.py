"""Fuzzes the supervisor's protocol under the sanitisers.

More rounds than in the tests, by hand:

    python -m tests.unit.agent.supervisor_fuzz --seed=1 --rounds=50000
"""

import argparse
import contextlib
import fcntl
import os
import random
import socket
import struct
import tempfile
import time
from pathlib import Path

from prism_agent.supervisor import protocol
from prism_agent.supervisor.protocol import Event, Message, Request
from tests.unit.agent.supervised import RING_BYTES, Supervised, build_sanitised

_ANSWER_S = 20.0
_EDGES = (0, 1, -1, 2, 23, 24, 4096, 65_535, 65_536, 2**31 - 1, 2**32, 2**63 - 1, -(2**63))
_PROGRAMS = (
    ["true"],
    ["sh", "-c", "exit 3"],
    ["head", "-c", "300000", "/dev/zero"],
    ["sh", "-c", "echo out; echo err >&2; kill -9 $$"],
    ["sh", "-c", "(setsid sleep 0.05 &) ; exit 0"],
    ["sh", "-c", "for i in 1 2 3 4 5; do (true &) ; done"],
    ["cat"],
    ["sleep", "0.05"],
    ["prism-is-no-program"],
    ["/"],
    [""],
)
#: TERMINATE and a LEASE that is over end it: that is the last thing that is asked.
_KINDS = tuple(kind for kind in Request if kind not in (Request.TERMINATE, Request.LEASE))


class Fuzzer:
    """Says random things to a supervisor, and looks whether it is well.

    Args:
        supervised: What is spoken to; its own client is not used.
        seed: The same seed says the same.
    """

    def __init__(self, supervised: Supervised, seed: int) -> None:
        self._supervised = supervised
        self._rng = random.Random(seed)
        self._connection = self._connect()
        self._number = 0

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(_ANSWER_S)
        until_s = time.monotonic() + _ANSWER_S
        while True:
            try:
                connection.connect(str(self._supervised.socket_path))
            except BlockingIOError:
                # Its queue of connections is full for a moment.
                assert time.monotonic() < until_s, "it accepts no connection"
                time.sleep(0.001)
            else:
                return connection

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def _integer(self) -> int:
        if self._rng.random() < 0.6:
            return self._rng.choice(_EDGES)
        return self._rng.randrange(-(2**63), 2**63)

    def _exec_number(self) -> int:
        near = self._rng.random() < 0.9
        return self._rng.randint(0, self._number + 1) if near else self._rng.getrandbits(64)

    # ── files ──

    def _spec(self) -> int:
        content = bytearray(
            protocol.encode_spec("/", self._rng.choice(_PROGRAMS), {"PATH": "/usr/bin:/bin"})
        )
        fate = self._rng.randrange(8)
        if fate == 0:
            content[self._rng.randrange(16)] = self._rng.getrandbits(8)
        elif fate == 1:
            content = content[: self._rng.randrange(len(content))]
        elif fate == 2:
            struct.pack_into("=III", content, 4, *(abs(self._integer()) % 2**32 for _ in range(3)))
        elif fate == 3:
            for _ in range(4):
                content[self._rng.randrange(16, len(content))] = self._rng.getrandbits(8)
        descriptor = os.memfd_create("spec")
        os.write(descriptor, content)
        return descriptor

    def _ring(self) -> int:
        descriptor = os.memfd_create("ring", os.MFD_ALLOW_SEALING)
        size = self._rng.choice((0, 100, 4096 + 131_071, 4096 + 131_072, 2**31))
        size = size if self._rng.random() < 0.25 else 4096 + RING_BYTES
        os.ftruncate(descriptor, size)
        if self._rng.random() < 0.1:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        return descriptor

    def _other(self) -> int:
        kind = self._rng.randrange(4)
        if kind == 0:
            return os.open("/dev/null", os.O_RDWR)
        if kind == 1:
            return os.open("/", os.O_RDONLY | os.O_DIRECTORY)
        if kind == 2:
            read_end, write_end = os.pipe()
            os.close(write_end)
            return read_end
        return socket.socket(socket.AF_UNIX).detach()

    # ── requests ──

    def _exec(self) -> tuple[bytes, list[int]]:
        self._number += 1
        flags = self._rng.choice(
            (0, 1, 2, 3, protocol.exec_terminal(24, 80) | 1, 4, self._integer())
        )
        timeout_ns = self._rng.choice((0, 0, 10**7, 2**63 - 1, self._integer()))
        descriptors = [self._spec(), self._ring()]
        if flags & 1 and not flags & 4:
            descriptors += os.pipe()
        fate = self._rng.randrange(12)
        if fate == 0:
            os.close(descriptors.pop())
        elif fate == 1:
            descriptors += [self._other() for _ in range(self._rng.randrange(1, 5))]
        elif fate == 2:
            self._rng.shuffle(descriptors)
        elif fate == 3:
            place = self._rng.randrange(len(descriptors))
            os.close(descriptors[place])
            descriptors[place] = self._other()
        return Message(Request.EXEC, self._number, timeout_ns, flags).encode(), descriptors

    def _request(self) -> tuple[bytes, list[int]]:
        fate = self._rng.randrange(10)
        if fate < 3:
            return self._exec()
        packet = Message(
            self._rng.choice(_KINDS), self._exec_number(), self._integer(), self._integer()
        ).encode()
        descriptors: list[int] = []
        if fate == 3:
            packet = self._rng.randbytes(self._rng.randrange(1, 300))
        elif fate == 4:
            packet = packet[: self._rng.randrange(1, len(packet))]
        elif fate == 5:
            packet += self._rng.randbytes(self._rng.choice((1, 32, 60_000)))
        elif fate == 6:
            kind = self._rng.choice((0, 11, 255, 2**31, 2**32 - 1))
            packet = packet[:4] + struct.pack("=I", kind) + packet[8:]
        elif fate == 7:
            descriptors = [self._other() for _ in range(self._rng.randrange(1, 9))]
        return packet, descriptors

    def step(self) -> None:
        """Say one thing."""
        if self._rng.random() < 0.03:
            self._connection.close()
            self._connection = self._connect()
        packet, descriptors = self._request()
        try:
            socket.send_fds(self._connection, [packet], descriptors)
        except (BrokenPipeError, ConnectionResetError):
            # It hangs up on an agent that does not read.
            self._connection.close()
            self._connection = self._connect()
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        if self._rng.random() < 0.5:
            self._read_some()

    def _read_some(self) -> None:
        # With a timeout set, Python would wait whatever the flags say.
        self._connection.settimeout(0)
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while True:
                packet, descriptors, _, _ = socket.recv_fds(self._connection, 100, 4)
                for descriptor in descriptors:
                    os.close(descriptor)
                if not packet:
                    break
                protocol.decode_message(packet)
        self._connection.settimeout(_ANSWER_S)

    # ── is it well? ──

    def updates(self) -> dict[int, int]:
        """Ask for everything anew; return the word of each exec that it has."""
        self._connection.close()
        self._connection = self._connect()
        self._connection.send(Message(Request.HELLO).encode())
        found: dict[int, int] = {}
        count = -1
        while len(found) != count:
            message = protocol.decode_message(self._connection.recv(100))
            if message.kind == Event.HELLO:
                count = message.b
            elif message.kind == Event.UPDATE:
                found[message.exec_number] = message.b
        return found

    def clear(self) -> None:
        """Kill and forget all execs; return when it has none.

        Raises:
            AssertionError: It still had some after a while.
        """
        until_s = time.monotonic() + _ANSWER_S
        while found := self.updates():
            assert time.monotonic() < until_s, f"execs that do not end: {found}"
            for number in found:
                for kind, value in ((Request.SIGNAL, 9), (Request.FORGET, 0)):
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        self._connection.send(Message(kind, number, value).encode())
                self._read_some()


def descriptors_of(pid: int) -> int:
    """Return how many a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def zombies_of(pid: int) -> int:
    """Return how many children of a process nobody has reaped."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    count = 0
    for child in children:
        with contextlib.suppress(OSError):
            count += "State:\tZ" in Path(f"/proc/{child}/status").read_text()
    return count


def fuzz(supervised: Supervised, seed: int, rounds: int, duration_s: float) -> int:
    """Say `rounds` random things, or as many as fit into the time; return how many.

    Raises:
        AssertionError: It ended, hangs, or keeps what it should have let go.
    """
    fuzzer = Fuzzer(supervised, seed)
    try:
        fuzzer.clear()
        pid = supervised.pid()
        # Another user's descriptors are not shown.
        counted = os.geteuid() == 0
        before = descriptors_of(pid) if counted else 0
        until_s = time.monotonic() + duration_s
        done = 0
        while done < rounds and time.monotonic() < until_s:
            fuzzer.step()
            done += 1
            if done % 500 == 0:
                fuzzer.clear()
        fuzzer.clear()
        if counted:
            assert descriptors_of(pid) == before
        until_s = time.monotonic() + _ANSWER_S
        while zombies_of(pid):
            assert time.monotonic() < until_s, "zombies"
            fuzzer.updates()
        assert supervised.process.poll() is None
        return done
    finally:
        fuzzer.close()


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        program = build_sanitised(Path(directory))
        if program is None:
            raise SystemExit("the C compiler has no sanitisers (Debian: apt install gcc libasan8)")
        supervised = Supervised(Path(directory), program)
        try:
            done = fuzz(supervised, options.seed, options.rounds, 86_400)
        finally:
            said = supervised.end()
            print(said, end="")
    print(f"seed {options.seed}: {done} requests, and it is well")
    if said:
        raise SystemExit(1)


if __name__ == "__main__":
    _main()
