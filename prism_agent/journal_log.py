"""What the journal's file says: frames, one after the other; the last one of a sandbox counts.

Pure: bytes go in and come out; `journal.py` reads and writes the file.

A frame is its length, its checksum, and a payload that either gives a sandbox's record or forgets
it. Frames are believed from the start of the file up to the first that is not whole, and never
beyond it: users' bytes are inside of frames, and a search for the next whole one could be fooled
by a frame that a user made up.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import Final

#: Begins the file; the number is the format's version.
MAGIC: Final = b"PRISMJ1\n"
_HEADER: Final = struct.Struct("<II")
#: Of a payload: what it is, and the length of the key that follows.
_PREFIX: Final = struct.Struct("<BB")
_PUT: Final = 1
_FORGET: Final = 2
#: A longer one is not ours: a spec is bounded by the size of a request.
_PAYLOAD_BYTES_MAX: Final = 16 << 20
#: A file is rewritten when it is larger than this, and mostly of frames that count no more.
_REWRITE_BYTES_MIN: Final = 1 << 20
_REWRITE_FACTOR: Final = 4


class JournalFormatError(ValueError):
    """The file is not a journal of a version that this agent reads."""


def put_frame(key: str, content: bytes) -> bytes:
    """Return the frame that gives a sandbox's record."""
    return _frame(_PUT, key, content)


def forget_frame(key: str) -> bytes:
    """Return the frame that forgets a sandbox."""
    return _frame(_FORGET, key, b"")


def _frame(kind: int, key: str, content: bytes) -> bytes:
    name = key.encode("ascii")
    payload = b"".join((_PREFIX.pack(kind, len(name)), name, content))
    length = len(payload)
    if length > _PAYLOAD_BYTES_MAX:
        raise ValueError(f"a record of {length} bytes; at most {_PAYLOAD_BYTES_MAX}")
    # The length is part of the checksum: a run of zeros is no frame.
    return _HEADER.pack(length, zlib.crc32(payload, length)) + payload


class JournalLog:
    """The latest frame of each sandbox that was not forgotten.

    #: Invariant: `live_bytes` is the length of all frames in `_live`.
    """

    def __init__(self) -> None:
        self._live: dict[str, bytes] = {}
        self.live_bytes = 0
        #: Length of the file that holds all this, and what counts no more.
        self.file_bytes = 0
        self._rewrite_bytes_min = _REWRITE_BYTES_MIN

    def __contains__(self, key: str) -> bool:
        return key in self._live

    def records(self) -> Iterator[tuple[str, bytes]]:
        """Yield each sandbox with its record, in the order in which they were first named."""
        for key, frame in self._live.items():
            yield key, frame[_HEADER.size + _PREFIX.size + len(key) :]

    def replay(self, data: bytes) -> int:
        """Take over a file; return how much of it is whole. What follows must be cut off.

        Raises:
            JournalFormatError: It is of another format.
        """
        begin = data[: len(MAGIC)]
        if begin != MAGIC:
            if not MAGIC.startswith(begin):
                raise JournalFormatError("it is no journal of a version that is known here")
            return 0
        offset = len(MAGIC)
        while (end := self._replay_frame(data, offset)) > offset:
            offset = end
        self.file_bytes = offset
        return offset

    def _replay_frame(self, data: bytes, offset: int) -> int:
        """Take over the frame at an offset, and return its end; the offset: it is not whole."""
        begin = offset + _HEADER.size
        if begin > len(data):
            return offset
        length, checksum = _HEADER.unpack_from(data, offset)
        end: int = begin + length
        if not _PREFIX.size < length <= _PAYLOAD_BYTES_MAX or end > len(data):
            return offset
        payload = data[begin:end]
        if zlib.crc32(payload, length) != checksum:
            return offset
        kind, key_length = _PREFIX.unpack_from(payload)
        name = payload[_PREFIX.size : _PREFIX.size + key_length]
        if kind not in (_PUT, _FORGET) or len(name) != key_length or not name.isascii():
            return offset
        self._set(name.decode("ascii"), data[offset:end] if kind == _PUT else None)
        return end

    def _set(self, key: str, frame: bytes | None) -> None:
        old = self._live.get(key)
        if old is not None:
            self.live_bytes -= len(old)
        if frame is not None:
            self._live[key] = frame
            self.live_bytes += len(frame)
        elif old is not None:
            del self._live[key]

    def wrote(self, key: str, frame: bytes, forgets: bool) -> None:
        """A frame was appended to the file."""
        self.file_bytes += len(frame)
        self._set(key, None if forgets else frame)

    @property
    def wants_rewrite(self) -> bool:
        """The file is large, and mostly of what counts no more."""
        return (
            self.file_bytes > self._rewrite_bytes_min
            and self.file_bytes > _REWRITE_FACTOR * self.live_bytes
        )

    def whole(self) -> bytes:
        """Return a file that says the same, with nothing in it that counts no more."""
        return b"".join((MAGIC, *self._live.values()))

    def rewritten(self, file_bytes: int) -> None:
        """The file was replaced by one of this length."""
        self.file_bytes = file_bytes
        self._rewrite_bytes_min = _REWRITE_BYTES_MIN

    def postpone_rewrite(self) -> None:
        """It could not be replaced: not again before it is twice as long."""
        self._rewrite_bytes_min = 2 * self.file_bytes

    def check(self) -> None:
        """Raise if an invariant is broken. For tests: call it after each step."""
        if self.live_bytes != sum(len(frame) for frame in self._live.values()):
            raise AssertionError("live_bytes is not the length of the live frames")
