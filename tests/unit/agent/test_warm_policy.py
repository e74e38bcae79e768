"""When prepared sandboxes are made, given away and removed."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prism.sandbox.v1 import sandbox_pb2

from prism_agent.runtime.warm_policy import LOOK_S, QUIET_S, View, decide, fits, wait_s

IDLE = View(size=3, ready=0, making=0, free_slots=10, starts=0, quiet_s=10.0)


def test_they_are_made_one_at_a_time_until_there_are_enough() -> None:
    assert decide(IDLE) == 1
    assert decide(replace(IDLE, making=1)) == 0
    assert decide(replace(IDLE, ready=2)) == 1
    assert decide(replace(IDLE, ready=3)) == 0


def test_starts_come_first() -> None:
    assert decide(replace(IDLE, starts=1)) == 0
    assert decide(replace(IDLE, quiet_s=QUIET_S / 2)) == 0


def test_only_free_slots_are_taken() -> None:
    assert decide(replace(IDLE, free_slots=2, ready=2)) == 0
    assert decide(replace(IDLE, free_slots=1, ready=3)) == -2
    assert decide(replace(IDLE, free_slots=0, ready=3)) == -3
    # Those that start may take some of them.
    assert decide(replace(IDLE, free_slots=0, ready=3, starts=5)) == 0
    assert decide(replace(IDLE, free_slots=-4, ready=1)) == -1


def test_the_next_look_is_when_something_may_be_done() -> None:
    assert wait_s(replace(IDLE, quiet_s=QUIET_S / 2)) == pytest.approx(QUIET_S / 2)
    # A node that is full must not be looked at without a pause.
    assert wait_s(replace(IDLE, free_slots=0)) == LOOK_S
    assert wait_s(replace(IDLE, free_slots=0, quiet_s=QUIET_S * 1.01)) == LOOK_S
    assert wait_s(replace(IDLE, starts=1, quiet_s=0.0)) == LOOK_S


@given(
    st.builds(
        View,
        size=st.integers(0, 8),
        ready=st.integers(0, 8),
        making=st.integers(0, 1),
        free_slots=st.integers(-4, 12),
        starts=st.integers(0, 2),
        quiet_s=st.floats(0, 1),
    )
)
def test_a_decision_never_goes_beyond_what_there_is_or_may_be(view: View) -> None:
    count = decide(view)
    assert -view.ready <= count <= 1
    wanted = max(0, min(view.size, view.free_slots))
    if count > 0:
        assert view.ready + count <= wanted
    if count < 0:
        assert view.ready + view.making + count >= wanted


@pytest.mark.parametrize(
    ("spec", "is_first", "has_network", "expected"),
    [
        (sandbox_pb2.SandboxSpec(), True, False, True),
        (sandbox_pb2.SandboxSpec(image="host", env={"A": "b"}), True, False, True),
        (sandbox_pb2.SandboxSpec(image="other"), True, False, False),
        (sandbox_pb2.SandboxSpec(), False, False, False),
        (sandbox_pb2.SandboxSpec(), True, True, False),
    ],
)
def test_what_fits(
    spec: sandbox_pb2.SandboxSpec, is_first: bool, has_network: bool, expected: bool
) -> None:
    assert fits(spec, is_first, has_network) is expected
