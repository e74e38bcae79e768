"""Rows of the state to the bytes of their protos: for lists, watches and batches (ADR 24).

Messages of protobuf may be put together from pieces: one after the other they parse as one message
that has the fields of all. So what rows share is encoded by protobuf once and kept, and only what
each has for itself (id, name, revision) is encoded here, for each row.
"""

import functools
import sys
from collections.abc import Iterable
from typing import Final

from prism.sandbox.v1 import sandbox_pb2

from prism_common import limits
from prism_control.rows import sandbox_proto, spec_proto, timestamp
from prism_control.state.model import SandboxRow, SandboxState, Spec

#: Their environments, labels and rules have bounds: 100 KiB each at most.
_SPECS_MAX: Final = 256
#: Nodes, with a runtime, of all lists that are read at the same time.
_PLACES_MAX: Final = 2048
#: Rows that one entry of the log has changed share their times.
_TIMES_MAX: Final = 4096
#: Lengths of rows, and revisions without their low bits.
_NUMBERS_MAX: Final = 4096
#: Some thousand events: so far may watchers be apart before one is encoded twice.
_EVENT_BYTES_MAX: Final = 1 * limits.MIB
#: One character a byte: f-strings are put together in two thirds of the time that bytes take.
ENCODING: Final = "latin-1"
#: Of an id or a name that is encoded here: one byte says it.
LENGTH_MAX: Final = 0x7F

_ID: Final = chr(sandbox_pb2.Sandbox.ID_FIELD_NUMBER << 3 | 2)
_NAME: Final = chr(sandbox_pb2.Sandbox.NAME_FIELD_NUMBER << 3 | 2)
_REVISION: Final = chr(sandbox_pb2.Sandbox.REVISION_FIELD_NUMBER << 3)
#: Of `sandboxes` in a ListSandboxesResponse, of `sandbox` in a WatchSandboxesResponse, and of
#: `results` in what a batch is answered.
_FIELD: Final = chr(1 << 3 | 2)
_RESULT_SANDBOX: Final = chr(sandbox_pb2.ItemResult.SANDBOX_FIELD_NUMBER << 3 | 2)


@functools.lru_cache(maxsize=_NUMBERS_MAX)
def varint(number: int) -> str:
    """Return a number from 0 to 2⁶³ − 1 as protobuf writes it: seven bits a byte, lowest first."""
    if number < 0x80:
        return chr(number)
    return chr(number & 0x7F | 0x80) + varint(number >> 7)


def _encoded(proto: sandbox_pb2.Sandbox) -> str:
    return proto.SerializeToString().decode(ENCODING)


_STATES: Final = tuple(
    _encoded(sandbox_pb2.Sandbox(state=sandbox_pb2.SandboxState.ValueType(number)))
    for number in range(max(SandboxState) + 1)
)


@functools.lru_cache(maxsize=_SPECS_MAX)
def _spec(spec: Spec) -> str:
    return _encoded(sandbox_pb2.Sandbox(spec=spec_proto(spec)))


@functools.lru_cache(maxsize=_PLACES_MAX)
def _place(node_id: str, node_name: str, runtime: str, generation: int) -> str:
    return _encoded(
        sandbox_pb2.Sandbox(
            node_id=node_id, node_name=node_name, runtime=runtime, generation=generation
        )
    )


@functools.lru_cache(maxsize=_TIMES_MAX)
def _times(create_ms: int, schedule_ms: int, ready_ms: int, end_ms: int, expire_ms: int) -> str:
    return _encoded(
        sandbox_pb2.Sandbox(
            create_time=timestamp(create_ms),
            schedule_time=timestamp(schedule_ms),
            ready_time=timestamp(ready_ms),
            end_time=timestamp(end_ms),
            expire_time=timestamp(expire_ms),
        )
    )


def _texts(rows: Iterable[SandboxRow], bytes_max: int) -> list[str]:
    """Return rows as `sandbox_proto` makes them, each encoded; none after `bytes_max` bytes.

    One loop, for a list of all is a hundred thousand rows.
    """
    texts: list[str] = []
    size = 0
    spec: Spec | None = None
    spec_text = ""
    for row in rows:
        key, name, revision = row.id, row.name, row.revision
        both = key + name
        if (
            # What has failed or waits has words of its own; there are few of them.
            row.last_seen_ms or row.reason or row.message or row.placement
            # Not with ids and names as they are made and checked now.
            or len(both) > LENGTH_MAX or not both.isascii()
        ):  # fmt: skip
            text = _encoded(sandbox_proto(row))
        else:
            if row.spec is not spec:
                # Rows beside one another mostly share it.
                spec = row.spec
                spec_text = _spec(spec)
            # A revision below 128 takes a byte more than it needs, which is allowed.
            text = (
                f"{_ID}{chr(len(key))}{key}{_NAME}{chr(len(name))}{name}{spec_text}"
                f"{_REVISION}{chr(revision & 0x7F | 0x80)}{varint(revision >> 7)}"
                f"{_STATES[row.state]}"
                f"{_place(row.node_id, row.node_name, row.runtime, row.generation)}"
                f"{_times(row.create_ms, row.schedule_ms, row.ready_ms, row.end_ms, row.expire_ms)}"
            )
        texts.append(text)
        size += len(text)
        if size > bytes_max:
            break
    return texts


def field_bytes(rows: Iterable[SandboxRow], bytes_max: int) -> tuple[bytes, int]:
    """Return rows as `sandbox_proto` makes them, each encoded as field 1, and how many they are.

    That is what they are in a ListSandboxesResponse and in a WatchSandboxesResponse.

    Args:
        rows: What to encode, in this order.
        bytes_max: Rows past so many bytes are left out; the first is there in any case.
    """
    fields = [f"{_FIELD}{varint(len(text))}{text}" for text in _texts(rows, bytes_max)]
    size = sum(map(len, fields))
    while len(fields) > 1 and size > bytes_max:
        size -= len(fields.pop())
    return "".join(fields).encode(ENCODING), len(fields)


def result_bytes(outcomes: Iterable[SandboxRow | bytes]) -> bytes:
    """Return the outcomes of a batch's items as the batch's answer has them, encoded.

    Args:
        outcomes: Rows; and ItemResults of what was refused, encoded.
    """
    ordered = list(outcomes)
    rows = (each for each in ordered if not isinstance(each, bytes))
    sandboxes = iter(_texts(rows, sys.maxsize))
    fields: list[str] = []
    for outcome in ordered:
        if isinstance(outcome, bytes):
            result = outcome.decode(ENCODING)
        else:
            sandbox = next(sandboxes)
            result = f"{_RESULT_SANDBOX}{varint(len(sandbox))}{sandbox}"
        fields.append(f"{_FIELD}{varint(len(result))}{result}")
    return "".join(fields).encode(ENCODING)


class EventBytes:
    """WatchSandboxesResponses of the last changes: all watchers send the same bytes.

    A revision names one row for ever, on every member.

    Args:
        bytes_max: Of all that are kept.
    """

    def __init__(self, bytes_max: int = _EVENT_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        #: By revision, in the order in which they were encoded.
        self._kept: dict[int, bytes] = {}
        #: Sum of their lengths; at most `_bytes_max`.
        self._size = 0

    def of(self, row: SandboxRow) -> bytes:
        """Return the response that tells of a row."""
        event = self._kept.get(row.revision)
        if event is None:
            revision = sandbox_pb2.WatchSandboxesResponse(revision=row.revision)
            event = field_bytes((row,), self._bytes_max)[0] + revision.SerializeToString()
            self._kept[row.revision] = event
            self._size += len(event)
            while self._size > self._bytes_max:
                self._size -= len(self._kept.pop(next(iter(self._kept))))
        return event
