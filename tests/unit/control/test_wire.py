"""Every message crosses the wire as it is."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prism.raft.v1 import raft_pb2

from prism_control.raft import types
from prism_control.raft.errors import CorruptEntryError
from prism_control.raft.types import Configuration, Entry, EntryKind, Member, SnapshotMeta
from prism_control.transport import wire

U64 = st.integers(0, 2**64 - 1)
IDS = st.integers(1, 2**64 - 1)
ENTRIES = st.builds(Entry, U64, U64, st.sampled_from(EntryKind), st.binary(max_size=60))
MEMBERS = st.builds(Member, IDS, st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
ID_LISTS = st.lists(IDS, max_size=4).map(tuple)
CONFIGURATIONS = st.builds(
    Configuration, ID_LISTS, ID_LISTS, ID_LISTS, st.lists(MEMBERS, max_size=4).map(tuple)
)
HEAD = (IDS, IDS, U64)
MESSAGES = st.one_of(
    st.builds(types.VoteRequest, *HEAD, st.booleans(), U64, U64, st.booleans()),
    st.builds(types.VoteReply, *HEAD, st.booleans(), st.booleans()),
    st.builds(types.AppendRequest, *HEAD, U64, U64, st.lists(ENTRIES, max_size=4).map(tuple), U64),
    st.builds(types.AppendReply, *HEAD, st.booleans(), U64, U64, U64),
    st.builds(types.Heartbeat, *HEAD, U64, U64),
    st.builds(types.HeartbeatReply, *HEAD, U64, st.integers(0, 2**32 - 1)),
    st.builds(types.ReadIndexRequest, *HEAD, U64),
    st.builds(types.ReadIndexReply, *HEAD, U64, U64),
    st.builds(types.TimeoutNow, *HEAD),
)


@given(MESSAGES)
def test_every_message_crosses_as_it_is(message: types.Message) -> None:
    proto = raft_pb2.RaftMessage.FromString(wire.encode_message(message).SerializeToString())
    assert wire.decode_message(proto, message.sender, message.receiver) == message


def test_no_kind_of_message_is_forgotten() -> None:
    """All but a SnapshotRequest, which travels on a call of its own."""
    covered = {
        types.VoteRequest, types.VoteReply, types.AppendRequest, types.AppendReply,
        types.Heartbeat, types.HeartbeatReply, types.ReadIndexRequest, types.ReadIndexReply,
        types.TimeoutNow,
    }  # fmt: skip
    assert set(get_args(types.Message)) - covered == {types.SnapshotRequest}
    with pytest.raises(TypeError):
        wire.encode_message(types.SnapshotRequest(1, 2, 3, SnapshotMeta()))


@given(CONFIGURATIONS, U64, U64)
def test_a_snapshots_meta_crosses_as_it_is(
    configuration: Configuration, index: int, term: int
) -> None:
    meta = SnapshotMeta(index, term, configuration)
    proto = raft_pb2.SnapshotMeta.FromString(wire.encode_snapshot_meta(meta).SerializeToString())
    assert wire.decode_snapshot_meta(proto) == meta


@given(ENTRIES, st.integers(0))
def test_a_flipped_bit_on_the_wire_is_not_let_in(entry: Entry, position: int) -> None:
    proto = wire.encode_message(types.AppendRequest(1, 2, 3, 0, 0, (entry,), 0))
    damaged = bytearray(proto.append_request.entries[0])
    bit = position % (len(damaged) * 8)
    damaged[bit // 8] ^= 1 << bit % 8
    proto.append_request.entries[0] = bytes(damaged)
    with pytest.raises(CorruptEntryError):
        wire.decode_message(proto, 1, 2)


def test_a_message_of_a_newer_version_is_passed_over() -> None:
    assert wire.decode_message(raft_pb2.RaftMessage(term=3), 1, 2) is None
