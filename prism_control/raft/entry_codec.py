"""One encoding of an entry, for the disk and for the wire.

Layout, little-endian, 24 bytes of header and then the data::

    version u8 | kind u8 | reserved u16 | crc u32 | term u64 | index u64 | data

The CRC-32C covers everything but itself, and thereby the length. A flipped bit is thus found
wherever it happened, on the leader's disk, on the wire or on a follower's, and never applied.
"""

from __future__ import annotations

import struct
from typing import Final

import google_crc32c
import msgspec

from prism_control.raft.errors import CorruptEntryError
from prism_control.raft.types import Configuration, Entry, EntryKind

VERSION: Final = 1

_PREFIX: Final = struct.Struct("<BBH")
_CRC: Final = struct.Struct("<I")
_SUFFIX: Final = struct.Struct("<QQ")

HEADER_BYTES: Final = _PREFIX.size + _CRC.size + _SUFFIX.size
_SUFFIX_AT: Final = _PREFIX.size + _CRC.size

_configuration_decoder: Final = msgspec.msgpack.Decoder(Configuration)


def encode(entry: Entry) -> bytes:
    """Return the encoding of `entry`, made once and then kept in the entry."""
    if entry.encoded:
        return entry.encoded
    prefix = _PREFIX.pack(VERSION, entry.kind, 0)
    rest = _SUFFIX.pack(entry.term, entry.index) + entry.data
    encoded = prefix + _CRC.pack(google_crc32c.value(prefix + rest)) + rest
    # A memo of a pure function of the other fields; nobody can see the difference.
    object.__setattr__(entry, "encoded", encoded)
    return encoded


def decode(encoded: bytes) -> Entry:
    """Return the entry that `encode` has encoded.

    Raises:
        CorruptEntryError: The bytes are not those that were encoded, or come from a
            version which this one does not know.
    """
    if len(encoded) < HEADER_BYTES:
        raise CorruptEntryError(0, f"{len(encoded)} bytes are less than a header")
    version, kind, _ = _PREFIX.unpack_from(encoded)
    (crc,) = _CRC.unpack_from(encoded, _PREFIX.size)
    term, index = _SUFFIX.unpack_from(encoded, _SUFFIX_AT)
    if crc != google_crc32c.value(encoded[: _PREFIX.size] + encoded[_SUFFIX_AT:]):
        raise CorruptEntryError(index, "CRC-32C differs")
    if version != VERSION:
        raise CorruptEntryError(index, f"version {version} is unknown, only {VERSION} is known")
    try:
        known_kind = EntryKind(kind)
    except ValueError:
        raise CorruptEntryError(index, f"kind {kind} is unknown") from None
    return Entry(index, term, known_kind, encoded[HEADER_BYTES:], encoded)


def encode_configuration(configuration: Configuration) -> bytes:
    """Return the data of a CONFIGURATION entry."""
    return msgspec.msgpack.encode(configuration)


def decode_configuration(entry: Entry) -> Configuration:
    """Return the configuration in a CONFIGURATION entry.

    Raises:
        CorruptEntryError: The data is no configuration.
    """
    try:
        return _configuration_decoder.decode(entry.data)
    except msgspec.MsgspecError as error:
        raise CorruptEntryError(entry.index, f"no configuration: {error}") from error
