"""The supervisor's messages and files, as `protocol.h` defines them. Pure."""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

MAGIC: Final = 0x314D5350
#: What is asked of supervisors. Those that an older agent has started are of an older version.
VERSION: Final = 6
VERSION_MIN: Final = 1
#: The first that has terminals.
VERSION_TERMINAL: Final = 2
#: The first that takes limits.
VERSION_LIMITS: Final = 4
#: The first that ends when nobody extends its lease.
VERSION_LEASE: Final = 5
#: The first that carries connections to ports, where no socket of the host reaches them.
VERSION_RELAY: Final = 6
LEASE_S_MAX: Final = 86_400.0
EXECS_MAX: Final = 640
SPEC_BYTES_MAX: Final = 512 * 1024
#: Of one frame of a connection that it carries.
RELAY_BYTES_MAX: Final = 64 * 1024
#: Read at a time: a program that writes byte by byte must not hold the loop up for long.
RECORDS_MAX: Final = 4096
RING_HEADER_BYTES: Final = 4096
RING_BYTES_MIN: Final = 128 * 1024

_MESSAGE: Final = struct.Struct("=IIQqq")
_SPEC: Final = struct.Struct("=IIII")
_RING: Final = struct.Struct("=QIIQQQQQQQiiiiiiQ")
_RECORD: Final = struct.Struct("=IIQQ")
MESSAGE_BYTES: Final = _MESSAGE.size
RECORD_BYTES: Final = _RECORD.size
HEADER_BYTES: Final = _RING.size


class Request(IntEnum):
    """From the agent."""

    HELLO = 1
    EXEC = 2
    SIGNAL = 3
    CLOSE_STDIN = 4
    STDIN = 5
    WINDOW = 6
    WAIT = 7
    FORGET = 8
    TERMINATE = 9
    RESIZE = 10
    LIMITS = 11
    LEASE = 12
    RELAY = 13


class Event(IntEnum):
    """From the supervisor."""

    HELLO = 1
    UPDATE = 2
    STDIN = 3
    ERROR = 4


class State(IntEnum):
    """Of an exec. EXITED: output written before the exit is still to be taken."""

    NEW = 0
    RUNNING = 1
    EXITED = 2
    DRAINED = 3


class Reason(IntEnum):
    """Why an exec ended, where the supervisor knows."""

    NONE = 0
    NOT_FOUND = 1
    NOT_EXECUTABLE = 2
    TIMEOUT = 3


EXEC_STDIN: Final = 1
EXEC_OVERWRITE: Final = 2
_EXEC_TERMINAL: Final = 4
#: Window of an exec that nobody reads: old output gives way to new.
OVERWRITE: Final = -1


def exec_terminal(rows: int, columns: int) -> int:
    """Return the flags of an exec with a terminal of this size."""
    return _EXEC_TERMINAL | rows << 16 | columns << 32


class ProtocolError(Exception):
    """The other end, or a file of it, is not what it should be."""


@dataclass(frozen=True, slots=True)
class Message:
    """One packet, either way."""

    kind: int
    exec_number: int = 0
    a: int = 0
    b: int = 0

    def encode(self) -> bytes:
        """Return the packet."""
        return _MESSAGE.pack(MAGIC, self.kind, self.exec_number, self.a, self.b)


def decode_message(packet: bytes) -> Message:
    """Read a packet.

    Raises:
        ProtocolError: It is not one.
    """
    if len(packet) != MESSAGE_BYTES:
        raise ProtocolError(f"a packet of {len(packet)} bytes")
    magic, kind, exec_number, a, b = _MESSAGE.unpack(packet)
    if magic != MAGIC:
        raise ProtocolError(f"a packet that begins with {magic:#x}")
    return Message(kind, exec_number, a, b)


def decode_state(number: int) -> State:
    """Read the state of an exec from the low byte of what an UPDATE says.

    Raises:
        ProtocolError: There is no such state.
    """
    try:
        return State(number & 0xFF)
    except ValueError as problem:
        raise ProtocolError(str(problem)) from None


def encode_spec(directory: str, argv: list[str], env: dict[str, str]) -> bytes:
    """Return the file that says what to run."""
    strings = [directory, *argv, *(f"{key}={value}" for key, value in env.items())]
    body = b"".join(text.encode("utf-8", "surrogateescape") + b"\0" for text in strings)
    return _SPEC.pack(MAGIC, len(argv), len(env), len(body)) + body


@dataclass(frozen=True, slots=True)
class RingHeader:
    """What the supervisor says of an exec in its ring file."""

    state: State
    capacity: int
    head: int
    tail: int
    sequence: int
    drained_head: int
    start_s: float
    exit_s: float
    exit_code: int
    signal: int
    reason: Reason
    error: int
    killed: bool


def decode_header(content: bytes) -> RingHeader | None:
    """Read a ring's header; None: it was being written, so read again.

    Raises:
        ProtocolError: It is not a header.
    """
    (begin, magic, state, capacity, head, tail, sequence, drained_head, start_ns, exit_ns,
     exit_code, signal, reason, error, killed, _, end) = _RING.unpack(content)  # fmt: skip
    if begin != end:
        return None
    if magic == 0:
        return RingHeader(State.NEW, 0, 0, 0, 0, 0, 0, 0, 0, 0, Reason.NONE, 0, False)
    try:
        return RingHeader(
            State(state), capacity, head, tail, sequence, drained_head, start_ns / 1e9,
            exit_ns / 1e9, exit_code, signal, Reason(reason), error, bool(killed),
        )  # fmt: skip
    except ValueError as problem:
        raise ProtocolError(str(problem)) from None


@dataclass(frozen=True, slots=True)
class Output:
    """A piece of output; `offset` is where the next one begins.

    `data` is a view of what was read, which is copied once less so: at 200 MB a second it counts.
    """

    stream: int
    sequence: int
    time_s: float
    data: memoryview
    offset: int


def decode_records(content: bytes, offset: int) -> list[Output]:
    """Read whole records at the beginning of `content`, which lies at logical `offset`.

    At most `RECORDS_MAX` of them: more are read with the next call, from the offset of the last.
    """
    outputs: list[Output] = []
    view = memoryview(content)
    at = 0
    while len(outputs) < RECORDS_MAX and at + RECORD_BYTES <= len(content):
        length, stream, sequence, time_ns = _RECORD.unpack_from(content, at)
        end = at + RECORD_BYTES + length
        if end > len(content):
            break
        data = view[at + RECORD_BYTES : end]
        outputs.append(Output(stream, sequence, time_ns / 1e9, data, offset + end))
        at = end
    return outputs
