"""The bytes of assignments parse as their protos."""

from hypothesis import given, settings
from hypothesis import strategies as st
from prism.agent.v1 import agent_pb2

from prism_control.assignment_bytes import batch_bytes
from prism_control.rows import duration, spec_proto, timestamp
from prism_control.scheduler.assignments import Assignment
from prism_control.state.model import DesiredState, Spec

numbers = st.one_of(st.integers(0, 2**63 - 1), st.sampled_from([0, 1, 127, 128]))
texts = st.sampled_from(["", "sb-1", "é", "名前", "y" * 127, "z" * 128, "0" * 9000])
specs = st.one_of(
    st.none(),
    st.builds(
        Spec, image=texts, cpu_millicores=numbers, memory_bytes=numbers, disk_bytes=numbers,
        processes_max=numbers, open_files_max=numbers,
        labels=st.sampled_from([(), (("a", ""),), (("a", "1"), ("é", "名" * 200))]),
    ),
)  # fmt: skip
assignments = st.builds(
    Assignment,
    sandbox_id=texts,
    generation=numbers,
    desired=st.sampled_from(DesiredState),
    spec=specs,
    expire_ms=st.one_of(st.just(0), st.integers(1, 253_402_300_799_999)),
    name=texts,
    grace_ms=st.integers(0, 10**9),
    start_count=numbers,
)


def proto_of(one: Assignment) -> agent_pb2.Assignment:
    return agent_pb2.Assignment(
        sandbox_id=one.sandbox_id,
        generation=one.generation,
        desired=agent_pb2.DesiredState.ValueType(one.desired),
        spec=None if one.spec is None else spec_proto(one.spec),
        expire_time=timestamp(one.expire_ms),
        name=one.name,
        grace_period=duration(one.grace_ms),
        start_count=one.start_count,
    )


@settings(deadline=None)
@given(numbers, st.lists(assignments, max_size=4), st.booleans())
def test_bytes_of_any_assignments_parse_as_their_protos(
    term: int, made: list[Assignment], complete: bool
) -> None:
    batch = agent_pb2.AssignmentBatch(
        term=term, assignments=[proto_of(one) for one in made], complete=complete
    )
    parsed = agent_pb2.SessionResponse.FromString(batch_bytes(term, made, complete=complete))
    assert parsed == agent_pb2.SessionResponse(assignments=batch)


def test_every_field_of_an_assignment_is_among_those_of_the_property() -> None:
    """Fails for a new field: `assignment_bytes.py` must know it, and `proto_of` above."""
    assert {field.name for field in agent_pb2.Assignment.DESCRIPTOR.fields} == {
        "sandbox_id", "generation", "desired", "spec", "expire_time", "name", "grace_period",
        "start_count",
    }  # fmt: skip
