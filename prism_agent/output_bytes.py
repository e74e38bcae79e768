"""Output as the bytes of an `ExecResponse`: built as a message, each piece is copied twice more."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Final

from prism_agent.supervisor.protocol import Output

#: Tags of the proto's fields: `ExecResponse.output`, and sequence, stream and data of `ExecOutput`.
_OUTPUT: Final = b"\x12"
_SEQUENCE: Final = b"\x08"
_STREAM: Final = b"\x10"
_DATA: Final = b"\x1a"


def encode_outputs(outputs: Iterable[Output], after_sequence: int) -> Iterator[bytes]:
    """Yield responses with what lies after a sequence number.

    Neighbours of one stream share one: a response costs as much as what is in it.
    """
    for stream, group in groupby(outputs, key=lambda output: output.stream):
        parts = list(group)
        sequence = parts[-1].sequence
        data: list[bytes | memoryview] = [part.data for part in parts]
        missing = sequence - after_sequence
        if missing < sum(map(len, data)):
            data = [b"".join(data)[-missing:]]
        if missing > 0:
            yield encode_output(sequence, stream, data)


def encode_output(sequence: int, stream: int, data: Sequence[bytes | memoryview]) -> bytes:
    """Return one `ExecResponse` with these bytes of output."""
    fields = (
        (_SEQUENCE + _varint(sequence) if sequence else b"")
        + (_STREAM + _varint(stream) if stream else b"")
        + (_DATA + _varint(sum(map(len, data))) if data else b"")
    )
    length = len(fields) + sum(map(len, data))
    return b"".join([_OUTPUT, _varint(length), fields, *data])


def _varint(number: int) -> bytes:
    """Encode a number that is 0 or more, seven bits a byte."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
