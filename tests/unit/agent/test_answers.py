"""Questions for names as hostile code may put them."""

import struct
from ipaddress import IPv4Address

import pytest

from prism_agent.network.answers import Answers, upstream
from prism_agent.network.policy import Policy

_QUESTION = b"\4good\7example\3org\0" + struct.pack(">2H", 1, 1)
_RECORD = b"\xc0\x0c" + struct.pack(">2HIH", 65_280, 1, 0, 0)
_REFUSED = 5


async def _open(groups: list[int], addresses: list[IPv4Address], time_s: int) -> None:
    raise AssertionError("nothing is allowed")


async def _answer(questions: int, records: int, rest: bytes) -> bytes:
    counts = struct.pack(">6H", 7, 0x100, questions, 0, 0, records)
    answers = Answers(Policy(), _open, upstream([("127.0.0.1", 53)]))
    return await answers.answer(counts + _QUESTION + rest)


@pytest.mark.parametrize("rest", [b"", _RECORD * 30, b"\xff" * 100])
async def test_what_follows_a_question_is_not_read(rest: bytes) -> None:
    answer = await _answer(1, 30 if rest else 0, rest)
    assert answer[3] & 15 == _REFUSED


@pytest.mark.parametrize(
    ("questions", "rest"), [(0, b""), (2, _QUESTION), (80, _QUESTION), (1, _RECORD * 60)]
)
async def test_many_questions_and_long_ones_get_no_answer(questions: int, rest: bytes) -> None:
    assert await _answer(questions, 60, rest) == b""
