"""How a load is shared between processes."""

from hypothesis import given
from hypothesis import strategies as st

from prism_cli.bench.load import Load


@given(count=st.integers(1, 500), in_flight=st.integers(1, 500), processes=st.integers(1, 16))
def test_every_create_belongs_to_one_process(count: int, in_flight: int, processes: int) -> None:
    load = Load("a:1", "run", "fake", True, 1.0, count, in_flight)
    shares = load.shared(processes)
    numbers = [number for share in shares for number in share.numbers]
    assert sorted(numbers) == list(range(count))
    assert all(share.numbers for share in shares)
    assert sum(share.in_flight for share in shares) >= in_flight
    assert sum(share.in_flight for share in shares) < in_flight + len(shares)
