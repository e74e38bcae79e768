"""Output as bytes is what the message of the same contents would be."""

import pytest
from prism.sandbox.v1 import sandbox_pb2

from prism_agent.output_bytes import encode_output, encode_outputs
from prism_agent.supervisor.protocol import Output

OUT, ERR = sandbox_pb2.OUTPUT_STREAM_STDOUT, sandbox_pb2.OUTPUT_STREAM_STDERR


@pytest.mark.parametrize("size", [1, 100, 127, 128, 16_384, 300_000])
@pytest.mark.parametrize("sequence", [1, 127, 128, 2**40, 2**63 - 1])
def test_the_bytes_are_those_of_the_message(size: int, sequence: int) -> None:
    data = bytes(index % 251 for index in range(size))
    output = sandbox_pb2.ExecOutput(sequence=sequence, stream=ERR, data=data)
    message = sandbox_pb2.ExecResponse(output=output)
    assert encode_output(sequence, ERR, [data[:7], data[7:]]) == message.SerializeToString()


def told(outputs: list[Output], after: int) -> list[tuple[int, int, bytes]]:
    responses = map(sandbox_pb2.ExecResponse.FromString, encode_outputs(outputs, after))
    return [(each.output.sequence, each.output.stream, each.output.data) for each in responses]


def test_neighbours_of_one_stream_share_a_response_and_none_is_said_twice() -> None:
    outputs = [
        Output(OUT, 3, 1.0, memoryview(b"abc"), 30),
        Output(OUT, 5, 2.0, memoryview(b"de"), 60),
        Output(ERR, 6, 3.0, memoryview(b"!"), 90),
        Output(OUT, 8, 4.0, memoryview(b"fg"), 120),
    ]
    assert told(outputs, 0) == [(5, OUT, b"abcde"), (6, ERR, b"!"), (8, OUT, b"fg")]
    assert told(outputs, 2) == [(5, OUT, b"cde"), (6, ERR, b"!"), (8, OUT, b"fg")]
    assert told(outputs, 3) == [(5, OUT, b"de"), (6, ERR, b"!"), (8, OUT, b"fg")]
    assert told(outputs, 5) == [(6, ERR, b"!"), (8, OUT, b"fg")]
    assert told(outputs, 7) == [(8, OUT, b"g")]
    assert told(outputs, 8) == []
    assert told([], 0) == []
