from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_control.raft import entry_codec
from prism_control.raft.errors import CorruptEntryError
from prism_control.raft.types import Configuration, Entry, EntryKind, Member

INDEXES = st.integers(min_value=0, max_value=2**64 - 1)


@given(INDEXES, INDEXES, st.sampled_from(EntryKind), st.binary(max_size=200))
def test_decoding_returns_what_was_encoded(
    index: int, term: int, kind: EntryKind, data: bytes
) -> None:
    entry = Entry(index, term, kind, data)
    decoded = entry_codec.decode(entry_codec.encode(entry))
    assert decoded == entry
    assert decoded.kind is kind


def test_an_entry_is_encoded_once_for_disk_and_wire() -> None:
    entry = Entry(7, 3, EntryKind.NORMAL, b"data")
    encoded = entry_codec.encode(entry)
    assert entry_codec.encode(entry) is encoded
    assert entry_codec.encode(entry_codec.decode(encoded)) is encoded
    assert len(encoded) == entry_codec.HEADER_BYTES + 4


@given(st.binary(max_size=40), st.data())
def test_any_flipped_bit_is_found(data: bytes, choice: st.DataObject) -> None:
    encoded = bytearray(entry_codec.encode(Entry(7, 3, EntryKind.NORMAL, data)))
    bit = choice.draw(st.integers(0, len(encoded) * 8 - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptEntryError):
        entry_codec.decode(bytes(encoded))


def test_corruption_names_the_index() -> None:
    encoded = entry_codec.encode(Entry(7, 3, EntryKind.NORMAL, b"data"))
    with pytest.raises(CorruptEntryError, match="entry 7 is corrupt: CRC-32C") as caught:
        entry_codec.decode(encoded[:-1] + b"?")
    assert caught.value.index == 7
    with pytest.raises(CorruptEntryError, match="entry 7"):
        entry_codec.decode(encoded[:-1])
    with pytest.raises(CorruptEntryError, match="less than a header"):
        entry_codec.decode(encoded[: entry_codec.HEADER_BYTES - 1])


def _with_prefix(version: int, kind: int) -> bytes:
    import google_crc32c

    body = entry_codec.encode(Entry(7, 3, EntryKind.NORMAL, b"data"))[8:]
    prefix = bytes((version, kind, 0, 0))
    crc: int = google_crc32c.value(prefix + body)
    return prefix + crc.to_bytes(4, "little") + body


def test_an_unknown_version_or_kind_is_refused_and_never_guessed() -> None:
    assert entry_codec.decode(_with_prefix(1, 0)).data == b"data"
    with pytest.raises(CorruptEntryError, match="version 2 is unknown"):
        entry_codec.decode(_with_prefix(2, 0))
    with pytest.raises(CorruptEntryError, match="kind 9 is unknown"):
        entry_codec.decode(_with_prefix(1, 9))


def test_a_configuration_survives_with_all_addresses() -> None:
    configuration = Configuration(
        voters=(1, 2**64 - 1),
        voters_outgoing=(1,),
        learners=(9,),
        members=(Member(1, "one", "10.0.0.1:7400", "10.0.0.1:7500"),),
    )
    data = entry_codec.encode_configuration(configuration)
    entry = Entry(4, 2, EntryKind.CONFIGURATION, data)
    assert entry_codec.decode_configuration(entry) == configuration


def test_data_that_is_no_configuration_is_corrupt() -> None:
    with pytest.raises(CorruptEntryError, match="entry 4 is corrupt: no configuration"):
        entry_codec.decode_configuration(Entry(4, 2, EntryKind.CONFIGURATION, b"\xc1"))
