"""What one client, and all together, may have under way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_common.admission import Admission
from prism_common.errors import TooManyCallsError


def admission(**bounds: int) -> Admission:
    wide = {
        "calls_per_client_max": 100,
        "calls_max": 100,
        "bytes_per_client_max": 10**6,
        "bytes_max": 10**6,
    }
    return Admission(**(wide | bounds))


def test_one_client_at_its_bound_leaves_the_others_alone() -> None:
    edge = admission(calls_per_client_max=2)
    edge.enter("a", 1)
    edge.enter("a", 1)
    with pytest.raises(TooManyCallsError, match="2 calls of this connection") as caught:
        edge.enter("a", 1)
    assert caught.value.retry_after_s
    edge.enter("b", 1)
    edge.leave("a", 1)
    edge.enter("a", 1)
    assert edge.calls == 3


def test_all_clients_together_are_bounded() -> None:
    edge = admission(calls_max=2)
    edge.enter("a", 1)
    edge.enter("b", 1)
    with pytest.raises(TooManyCallsError, match="of all clients are under way"):
        edge.enter("c", 1)


def test_bytes_are_bounded_by_client_and_in_all() -> None:
    edge = admission(bytes_per_client_max=10, bytes_max=15)
    edge.enter("a", 8)
    with pytest.raises(TooManyCallsError, match="8 bytes of this connection"):
        edge.enter("a", 3)
    with pytest.raises(TooManyCallsError, match="8 bytes of all"):
        edge.enter("b", 8)
    edge.enter("b", 7)


def test_a_lone_call_is_never_too_large_here() -> None:
    """The server bounds each message; what passes that is served when nothing else waits."""
    edge = admission(bytes_per_client_max=10, bytes_max=10)
    edge.enter("a", 50)
    edge.leave("a", 50)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), max_size=60))
def test_what_is_admitted_stays_within_bounds_and_is_given_back(
    calls: list[tuple[str, int]],
) -> None:
    edge = admission(calls_per_client_max=4, calls_max=8, bytes_per_client_max=20, bytes_max=30)
    inside: list[tuple[str, int]] = []
    for number, (client, size) in enumerate(calls):
        try:
            edge.enter(client, size)
        except TooManyCallsError:
            if inside and number % 2:
                edge.leave(*inside.pop())
        else:
            inside.append((client, size))
        assert edge.calls == len(inside) <= 8
        assert all(sum(c == each for c, _ in inside) <= 4 for each in "abc")
        assert sum(size for _, size in inside) <= 30
    for call in inside:
        edge.leave(*call)
    assert edge.calls == 0
    assert not edge._clients
