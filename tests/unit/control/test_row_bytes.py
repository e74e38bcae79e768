"""The bytes of rows parse as their protos."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from prism.sandbox.v1 import sandbox_pb2

from prism_control.row_bytes import EventBytes, field_bytes, result_bytes, varint
from prism_control.rows import sandbox_proto
from prism_control.state.model import (
    DesiredState,
    Egress,
    EgressRow,
    PlacementRefusal,
    SandboxRow,
    SandboxState,
    Spec,
)

_INT64_MAX = 2**63 - 1
_ALL = 2**40

numbers = st.one_of(st.integers(0, _INT64_MAX), st.sampled_from([0, 1, 127, 128, 16383, 16384]))
#: Of 1970 to 9999: what a Timestamp holds.
times_ms = st.one_of(st.just(0), st.integers(1, 253_402_300_799_999))
#: Any: other characters than ASCII, and lengths of more than one byte.
texts = st.sampled_from(
    ["", "a", "b-7", "é", "\x80", "名前", "x" * 63, "y" * 127, "z" * 128, "0" * 9000]
)
labels = st.sampled_from([(), (("a", ""),), (("a", "1"), ("é", "名" * 200))])
specs = st.builds(
    Spec,
    image=texts,
    cpu_millicores=numbers,
    memory_bytes=numbers,
    disk_bytes=numbers,
    processes_max=numbers,
    open_files_max=numbers,
    env=labels,
    labels=labels,
    ttl_ms=st.integers(0, 10**12),
    runtime=texts,
    priority=st.integers(-1000, 1000),
    egress=st.one_of(
        st.none(), st.builds(Egress, rules=st.tuples(st.builds(EgressRow, target=texts)))
    ),
)
#: A node's id and name; a row has both or none.
nodes = st.sampled_from([("", ""), ("node-1", "one"), ("node-2", ""), ("n" * 200, "é")])


def row_with(
    node: tuple[str, str], times: tuple[int, ...], key: tuple[str, str], **fields: Any
) -> SandboxRow:
    """Return a row of parts that go together."""
    create_ms, expire_ms, schedule_ms, ready_ms, end_ms = times
    return SandboxRow(
        *key, desired=DesiredState.RUNNING, create_revision=1, create_ms=create_ms,
        expire_ms=expire_ms, schedule_ms=schedule_ms, ready_ms=ready_ms, end_ms=end_ms,
        node_id=node[0], node_name=node[1], **fields,
    )  # fmt: skip


plain_rows = st.builds(
    row_with,
    node=nodes,
    times=st.tuples(times_ms, times_ms, times_ms, times_ms, times_ms),
    key=st.tuples(st.sampled_from(["sb-1", "sb-" + "0" * 20]), st.sampled_from(["n", "n" * 63])),
    spec=specs,
    state=st.sampled_from(SandboxState),
    generation=numbers,
    revision=numbers,
    runtime=texts,
)
odd_rows = st.builds(
    row_with,
    node=nodes,
    times=st.tuples(times_ms, times_ms, times_ms, times_ms, times_ms),
    key=st.tuples(texts, texts),
    spec=specs,
    state=st.sampled_from(SandboxState),
    generation=numbers,
    revision=numbers,
    runtime=texts,
    reason=texts,
    message=texts,
    last_seen_ms=times_ms,
    placement=st.sampled_from([(), (PlacementRefusal("node-1", "one", "needs é"),)]),
)


def row_of(revision: int, label: str = "") -> SandboxRow:
    """Return a row that is READY."""
    spec = Spec("host", 500, 1 << 28, 1 << 28, 128, 1024, labels=(("a", label),))
    return SandboxRow(
        f"sb-{revision:020x}", f"cosmic-dragon-{revision}", spec, SandboxState.READY,
        DesiredState.RUNNING, 1, revision, revision, 1_790_000_000_123, node_id="node-1",
        node_name="one", runtime="fake", schedule_ms=1_790_000_000_200, ready_ms=1_790_000_000_300,
    )  # fmt: skip


@settings(deadline=None)
@given(st.lists(plain_rows | odd_rows, max_size=4))
def test_bytes_of_any_rows_parse_as_their_protos(made: list[SandboxRow]) -> None:
    encoded, count = field_bytes(made, _ALL)
    assert count == len(made)
    parsed = sandbox_pb2.ListSandboxesResponse.FromString(encoded)
    assert list(parsed.sandboxes) == [sandbox_proto(row) for row in made]


@settings(deadline=None)
@given(
    st.lists(
        plain_rows
        | odd_rows
        | st.builds(
            sandbox_pb2.ItemResult,
            code=numbers.map(lambda number: number & 0x7F),
            reason=texts,
            message=texts,
        ),
        max_size=4,
    )
)
def test_results_of_any_outcomes_parse_as_those_of_both_batches(made: list[Any]) -> None:
    wanted = [
        each if isinstance(each, sandbox_pb2.ItemResult)
        else sandbox_pb2.ItemResult(sandbox=sandbox_proto(each))
        for each in made
    ]  # fmt: skip
    encoded = result_bytes(
        each if isinstance(each, SandboxRow) else each.SerializeToString() for each in made
    )
    for answer in (
        sandbox_pb2.BatchCreateSandboxesResponse,
        sandbox_pb2.BatchDeleteSandboxesResponse,
    ):
        assert list(answer.FromString(encoded).results) == wanted


@given(numbers)
def test_varint_is_what_protobuf_writes(number: int) -> None:
    written = sandbox_pb2.Sandbox(revision=number).SerializeToString()
    assert number == 0 or varint(number).encode("latin-1") == written[1:]


def test_sandbox_is_field_1_of_both_answers() -> None:
    """What `field_bytes` relies on."""
    assert sandbox_pb2.ListSandboxesResponse.SANDBOXES_FIELD_NUMBER == 1
    assert sandbox_pb2.WatchSandboxesResponse.SANDBOX_FIELD_NUMBER == 1


def test_every_field_that_a_row_may_have_is_among_those_of_the_property() -> None:
    """Fails for a new field: `row_bytes.py` must know it, and the rows above have it."""
    told = {field.name for field in sandbox_pb2.Sandbox.DESCRIPTOR.fields} - {"usage"}
    assert told == {
        "id", "name", "spec", "state", "reason", "message", "node_id", "node_name", "runtime",
        "generation", "revision", "create_time", "schedule_time", "ready_time", "end_time",
        "expire_time", "last_seen_time", "placement",
    }  # fmt: skip


def test_page_ends_before_the_row_that_does_not_fit() -> None:
    made = [row_of(number, "x" * 5000) for number in range(1, 5)]
    whole, _ = field_bytes(made[:2], _ALL)
    encoded, count = field_bytes(made, len(whole))
    assert (encoded, count) == (whole, 2)
    assert field_bytes(made, len(whole) - 1)[1] == 1
    assert field_bytes(made, 1)[1] == 1, "one row is there in any case"
    assert field_bytes([], 1) == (b"", 0)


def test_event_tells_of_the_row_and_its_revision_and_is_encoded_once() -> None:
    events = EventBytes()
    row = row_of(7)
    event = events.of(row)
    parsed = sandbox_pb2.WatchSandboxesResponse.FromString(event)
    assert parsed == sandbox_pb2.WatchSandboxesResponse(sandbox=sandbox_proto(row), revision=7)
    assert events.of(row) is event


def test_events_that_are_kept_are_bounded() -> None:
    length = len(EventBytes().of(row_of(1)))
    events = EventBytes(bytes_max=3 * length)
    first = [events.of(row_of(number)) for number in range(1, 4)]
    assert all(events.of(row_of(number)) is first[number - 1] for number in range(1, 4))
    events.of(row_of(4))
    assert events.of(row_of(3)) is first[2], "the newest stay"
    again = events.of(row_of(1))
    assert again == first[0]
    assert again is not first[0], "the oldest goes"


def test_event_larger_than_all_that_is_kept_is_told_all_the_same() -> None:
    row = row_of(9, "x" * 500)
    parsed = sandbox_pb2.WatchSandboxesResponse.FromString(EventBytes(bytes_max=10).of(row))
    assert parsed.sandbox == sandbox_proto(row)
