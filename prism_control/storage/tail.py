"""The newest writes of the log, each durable with one flush of the disk (docs/adr/0029).

A file of fixed size, written once in full so that no later write allocates anything. A write is a
record: a header with a digest of all of it, and the payload, padded to whole blocks. No block
that holds a record gets other bytes before the records are elsewhere: then a new generation begins
at the front, and what an earlier one has left behind it counts for nothing. A generation is named
at random, so that nothing that a user sends, and that ends up in a payload, can pass for a record;
and who chooses a payload can choose parts whose loss leaves a CRC as it was, but no such digest.
"""

import errno
import hashlib
import os
import secrets
import struct
from pathlib import Path
from typing import Final

from prism_control.storage.directory import sync_directory
from prism_control.storage.errors import CorruptStoreError, DiskFullError

#: What disks write as a whole, or in parts that are never shared by two records.
_BLOCK_BYTES: Final = 4096
_SIZE_BYTES: Final = 256 * _BLOCK_BYTES
#: Larger writes gain little from one flush less, and would soon fill the file.
PAYLOAD_BYTES_MAX: Final = 128 * 1024
_GENERATION_BYTES: Final = 16
#: Generation, number in it, length of the payload.
_HEADER: Final = struct.Struct(f">{_GENERATION_BYTES}sQI")
_DIGEST_BYTES: Final = 16
_START: Final = _HEADER.size + _DIGEST_BYTES


def new_generation() -> bytes:
    """Return a name that no generation has had."""
    return secrets.token_bytes(_GENERATION_BYTES)


class Tail:
    """Records in a file, which `begin` or `reopen` opens."""

    def __init__(self, file: int, generation: bytes) -> None:
        self._file = file
        self._generation = generation
        self._number = 0
        self._offset = 0

    @classmethod
    def begin(cls, path: Path, generation: bytes) -> "Tail":
        """Return one without records, whatever the file holds. It is made if there is none.

        Raises:
            DiskFullError: There is no room for the file; nothing has happened.
            OSError: It cannot be made.
        """
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise_if_full(error)
            raise
        try:
            if os.fstat(file).st_size != _SIZE_BYTES:
                # It has its size only once it is whole.
                os.ftruncate(file, 0)
                _write(file, bytes(_SIZE_BYTES), 0)
            # Also one that is there: who made it may have been killed before this.
            os.fsync(file)
            sync_directory(path.parent)
        except OSError as error:
            os.close(file)
            path.unlink()
            raise_if_full(error)
            raise
        return cls(file, generation)

    @classmethod
    def reopen(cls, path: Path, generation: bytes) -> "tuple[Tail, list[bytes]]":
        """Return one that goes on after its records, and the payloads of those.

        A record that was not written to its end was never promised, and is left out.

        Raises:
            CorruptStoreError: The file is not whole, or records are missing; it says which.
            DiskFullError, OSError: It cannot be read, or not be made durable.
        """
        size = path.stat().st_size if path.exists() else 0
        if size != _SIZE_BYTES:
            raise CorruptStoreError(
                f"--data-dir: {path} was truncated: it has {size} bytes of {_SIZE_BYTES}"
            )
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            payloads = _records(os.pread(file, _SIZE_BYTES, 0), generation, path)
            tail = cls(file, generation)
            for payload in payloads[:-1]:
                tail._advance(payload)
            # Only the last may have been written and not flushed, or its flush have failed. It can
            # be read, and may yet be lost with the power, and nobody must hear of it before it is
            # durable. What a failed flush has given up is flushed only if it is written again.
            for payload in payloads[-1:]:
                tail.append(payload)
        except BaseException:
            os.close(file)
            raise
        return tail, payloads

    def has_room(self, payload: bytes) -> bool:
        """Whether a record fits."""
        end = self._offset + _blocks_bytes(payload)
        return len(payload) <= PAYLOAD_BYTES_MAX and end <= _SIZE_BYTES

    def append(self, payload: bytes) -> None:
        """Write a record, durably.

        Raises:
            DiskFullError: It is not there, and may be written again.
            OSError: It may be there or not.
        """
        header = _HEADER.pack(self._generation, self._number, len(payload))
        try:
            _write(self._file, header + _digest(header, payload) + payload, self._offset)
        except OSError as error:
            # Some filesystems need room for what is written in place.
            raise_if_full(error)
            raise
        # Whatever this one says, even ENOSPC: a second flush may lie.
        os.fdatasync(self._file)
        self._advance(payload)

    def restart(self, generation: bytes) -> None:
        """Begin at the front: all records are elsewhere, durably."""
        self._generation = generation
        self._number = self._offset = 0

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _advance(self, payload: bytes) -> None:
        self._number += 1
        self._offset += _blocks_bytes(payload)


def raise_if_full(error: OSError) -> None:
    """Raise DiskFullError in place of what says so."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DiskFullError from None


def _records(data: bytes, generation: bytes, path: Path) -> list[bytes]:
    """Return the payloads of a generation's records.

    Raises:
        CorruptStoreError: A record is not whole, and a later one follows: it had been promised.
    """
    payloads: list[bytes] = []
    offset = 0
    while (payload := _record_at(data, offset, generation, len(payloads))) is not None:
        payloads.append(payload)
        offset += _blocks_bytes(payload)
    for later in range(offset, len(data), _BLOCK_BYTES):
        found, number, _ = _HEADER.unpack_from(data, later)
        if found != generation or number <= len(payloads):
            continue
        if _record_at(data, later, generation, number) is not None:
            raise CorruptStoreError(
                f"--data-dir: {path}: record {len(payloads)} is corrupt, and record {number} "
                "follows it"
            )
    return payloads


def _record_at(data: bytes, offset: int, generation: bytes, number: int) -> bytes | None:
    """Return the payload of a record; None if it is not there, or not whole."""
    if offset + _START > len(data):
        return None
    header = data[offset : offset + _HEADER.size]
    found_generation, found_number, length = _HEADER.unpack(header)
    end = offset + _START + length
    if (found_generation, found_number) != (generation, number) or end > len(data):
        return None
    payload = data[offset + _START : end]
    digest = data[offset + _HEADER.size : offset + _START]
    return payload if digest == _digest(header, payload) else None


def _digest(header: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(header + payload, digest_size=_DIGEST_BYTES).digest()


def _blocks_bytes(payload: bytes) -> int:
    """Return what a record takes: whole blocks."""
    return -(-(_START + len(payload)) // _BLOCK_BYTES) * _BLOCK_BYTES


def _write(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
