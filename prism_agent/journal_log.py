"""What the journal's file says: frames, one after the other; the last one of a sandbox counts.

Pure: bytes go in and come out; `journal.py` reads and writes the file.

A frame gives a sandbox's record or forgets it. It begins with a marker that is drawn for each file
and that no user ever sees, so where a part of the file is damaged, the next whole frame is found by
its marker, and nothing that a user has put into a record can pass for one. Frames are numbered: an
old block that a disk has brought back is not believed after newer ones. Each names the sandboxes of
the frames before it, so it is known of which ones something was lost, and how far the file had been
synced, so rot is told from what a crash of the machine has kept from the disk.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final, NamedTuple

#: Begins the file; the number is the format's version.
MAGIC: Final = b"PRISMJ2\n"
#: Of the version before, without markers: read up to the first frame that is not whole.
OLD_MAGIC: Final = b"PRISMJ1\n"
MARKER_BYTES: Final = 16
#: The file's marker and its checksum.
_BEGIN: Final = struct.Struct(f"<{len(MAGIC)}s{MARKER_BYTES}sI")
#: Marker, length of the payload, checksum of all that follows it and of the length.
_HEADER: Final = struct.Struct(f"<{MARKER_BYTES}sII")
_OLD_HEADER: Final = struct.Struct("<II")
#: Of a payload: its number, the number up to which all is synced, how many sandboxes it names.
_NUMBERS: Final = struct.Struct("<QQB")
#: What it is, and the length of the key that follows.
_PREFIX: Final = struct.Struct("<BB")
_PUT: Final = 1
_FORGET: Final = 2
#: Frames whose sandboxes the next one names, so that a damaged page of 4 KiB is covered.
NAMED_BEFORE: Final = 16
_NAME_BYTES: Final = 4
#: Of a frame, beside its key and its content.
FRAME_BYTES: Final = _HEADER.size + _NUMBERS.size + _PREFIX.size + NAMED_BEFORE * _NAME_BYTES
#: A longer one is not ours: a spec is bounded by the size of a request.
_PAYLOAD_BYTES_MAX: Final = 16 << 20
#: A file is rewritten when it is larger than this, and mostly of frames that count no more.
_REWRITE_BYTES_MIN: Final = 1 << 20
_REWRITE_FACTOR: Final = 4


class JournalFormatError(ValueError):
    """The file is not a journal of a version that this agent reads."""


class _Frame(NamedTuple):
    """One frame as it was read. `before`: what names the sandboxes of those before it."""

    begin: int
    end: int
    sequence: int
    synced: int
    before: bytes
    key: str
    content: bytes | None


@dataclass(slots=True)
class Damage:
    """What was found broken before the last whole frame.

    Attributes:
        regions: Damaged regions.
        size_bytes: Their length together.
        frames: How many frames were in them.
        doubtful: Sandboxes of which a newer word was in one, or may have been: what the journal
            holds of them was true once. Said anew after the damage: not among them.
    """

    regions: int = 0
    size_bytes: int = 0
    frames: int = 0
    doubtful: set[str] = field(default_factory=set)


def _read(data: bytes, offset: int, marker: bytes) -> _Frame | None:
    """Return the frame at an offset; None: there is none that is whole."""
    begin = offset + _HEADER.size
    if begin > len(data):
        return None
    found, length, checksum = _HEADER.unpack_from(data, offset)
    end: int = begin + length
    least = _NUMBERS.size + _PREFIX.size
    if found != marker or not least < length <= _PAYLOAD_BYTES_MAX or end > len(data):
        return None
    payload = data[begin:end]
    if zlib.crc32(payload, length) != checksum:
        return None
    sequence, synced, named = _NUMBERS.unpack_from(payload)
    at = _NUMBERS.size + named * _NAME_BYTES
    if at + _PREFIX.size > length:
        return None
    said = _said(payload, at)
    before = payload[_NUMBERS.size : at]
    return said and _Frame(offset, end, sequence, synced, before, *said)


def _said(payload: bytes, at: int) -> tuple[str, bytes | None] | None:
    """Return what a payload says from an offset on: a key, and its record; None: forget it."""
    kind, key_length = _PREFIX.unpack_from(payload, at)
    begin = at + _PREFIX.size
    name, content = payload[begin : begin + key_length], payload[begin + key_length :]
    if kind not in (_PUT, _FORGET) or len(name) != key_length or not name.isascii():
        return None
    return name.decode("ascii"), content if kind == _PUT else None


def _name(key: bytes) -> bytes:
    """Return what stands for a sandbox in the frames after its own."""
    return zlib.crc32(key).to_bytes(_NAME_BYTES, "little")


def _with_name(before: bytes, key: bytes) -> bytes:
    """Return what names the sandboxes of the last frames, after one more of them."""
    return before[-(NAMED_BEFORE - 1) * _NAME_BYTES :] + _name(key)


class JournalLog:
    """The latest record of each sandbox that was not forgotten.

    #: Invariant: `live_bytes` is the length of a file's frames for all records in `_live`.

    Args:
        marker: Random, of `MARKER_BYTES`; for a file that is begun.
    """

    def __init__(self, marker: bytes) -> None:
        if len(marker) != MARKER_BYTES:
            raise ValueError(f"a marker of {len(marker)} bytes; it has {MARKER_BYTES}")
        self._marker = marker
        self._live: dict[str, bytes] = {}
        self.live_bytes = 0
        #: Length of the file that holds all this, and what counts no more.
        self.file_bytes = 0
        #: Number of the last frame that was made; and of the last that survives the machine.
        self.sequence = 0
        self.synced = 0
        #: What names the sandboxes of the last frames, the oldest first.
        self._before = b""
        self.damage = Damage()
        self._rewrite_bytes_min = _REWRITE_BYTES_MIN

    def __contains__(self, key: str) -> bool:
        return key in self._live

    def records(self) -> Iterator[tuple[str, bytes]]:
        """Yield each sandbox with its record, in the order in which they were first named."""
        yield from self._live.items()

    # ── writing ──

    def begin(self) -> bytes:
        """Return what a file begins with."""
        checksum = zlib.crc32(self._marker)
        return _BEGIN.pack(MAGIC, self._marker, checksum)

    def frame(self, key: str, content: bytes | None) -> bytes:
        """Return a frame that gives a sandbox's record, or forgets it, for the end of the file.

        Each is made once; one that could not be written may be left out.

        Raises:
            ValueError: It is too long to be read again.
        """
        name = key.encode("ascii")
        payload = b"".join(
            (
                _NUMBERS.pack(self.sequence + 1, self.synced, len(self._before) // _NAME_BYTES),
                self._before,
                _PREFIX.pack(_FORGET if content is None else _PUT, len(name)),
                name,
                content or b"",
            )
        )
        length = len(payload)
        if length > _PAYLOAD_BYTES_MAX:
            raise ValueError(f"a record of {length} bytes; at most {_PAYLOAD_BYTES_MAX}")
        self.sequence += 1
        self._before = _with_name(self._before, name)
        # The length is part of the checksum: a run of zeros is no frame.
        return _HEADER.pack(self._marker, length, zlib.crc32(payload, length)) + payload

    def wrote(self, key: str, content: bytes | None, frame_bytes: int) -> None:
        """A frame of that length was appended to the file."""
        self.file_bytes += frame_bytes
        self._set(key, content)

    def _set(self, key: str, content: bytes | None) -> None:
        old = self._live.get(key)
        if old is not None:
            self.live_bytes -= len(old) + len(key) + FRAME_BYTES
        if content is not None:
            self._live[key] = content
            self.live_bytes += len(content) + len(key) + FRAME_BYTES
        elif old is not None:
            del self._live[key]

    # ── reading ──

    def replay(self, data: bytes) -> int:
        """Take over a file; return how much of it is to be kept. What follows must be cut off.

        What is damaged before its end is told by `damage`. A file of the version before, or a
        damaged one, is to be replaced by a new one.

        Raises:
            JournalFormatError: It is of another format, or its begin is damaged.
        """
        begin = data[: len(MAGIC)]
        if begin == OLD_MAGIC:
            return self._replay_old(data)
        if len(data) < _BEGIN.size and (MAGIC.startswith(begin) or OLD_MAGIC.startswith(begin)):
            return 0
        self._marker, is_whole = _marker_of(data)
        if not is_whole:
            self.damage.regions, self.damage.size_bytes = 1, _BEGIN.size
        frames = list(self._frames(data))
        # What any of the later frames knows to be synced had been promised to be there.
        synced = list(accumulate((frame.synced for frame in reversed(frames)), max))
        offset = _BEGIN.size
        for frame in frames:
            if frame.begin > offset:
                if synced[-1] <= self.sequence:
                    # A crash of the machine has kept later pages and not earlier ones.
                    break
                self._lose(frame.begin - offset, frame)
            synced.pop()
            self._take(frame)
            offset = frame.end
        self.file_bytes = offset
        return offset

    def _frames(self, data: bytes) -> Iterator[_Frame]:
        """Yield all frames that are whole and newer than those before them."""
        offset, sequence = _BEGIN.size, 0
        while offset >= 0:
            frame = _read(data, offset, self._marker)
            if frame is not None and frame.sequence > sequence:
                yield frame
                offset, sequence = frame.end, frame.sequence
            else:
                offset = data.find(self._marker, offset + 1)

    def _lose(self, size_bytes: int, after: _Frame) -> None:
        """Note what was between the last whole frame and the next."""
        lost = after.sequence - self.sequence - 1
        damage = self.damage
        damage.regions += 1
        damage.size_bytes += size_bytes
        damage.frames += lost
        named = len(after.before) // _NAME_BYTES
        if lost > named:
            # It is not known what they said, so any may have said something newer.
            damage.doubtful |= self._live.keys()
            return
        first = named - lost
        names = {
            after.before[at * _NAME_BYTES : (at + 1) * _NAME_BYTES] for at in range(first, named)
        }
        damage.doubtful |= {key for key in self._live if _name(key.encode("ascii")) in names}

    def _take(self, frame: _Frame) -> None:
        self.sequence, self.synced = frame.sequence, frame.synced
        self._before = _with_name(self._before, frame.key.encode("ascii"))
        self.damage.doubtful.discard(frame.key)
        self._set(frame.key, frame.content)

    def _replay_old(self, data: bytes) -> int:
        """Take over a file of the version before, up to the first frame that is not whole."""
        offset = len(OLD_MAGIC)
        while True:
            begin = offset + _OLD_HEADER.size
            if begin > len(data):
                return offset
            length, checksum = _OLD_HEADER.unpack_from(data, offset)
            payload = data[begin : begin + length]
            whole = _PREFIX.size < length <= _PAYLOAD_BYTES_MAX and len(payload) == length
            if not whole or zlib.crc32(payload, length) != checksum:
                return offset
            said = _said(payload, 0)
            if said is None:
                return offset
            self._set(*said)
            offset = begin + length

    # ── a new file ──

    @property
    def wants_rewrite(self) -> bool:
        """The file is large, and mostly of what counts no more."""
        return (
            self.file_bytes > self._rewrite_bytes_min
            and self.file_bytes > _REWRITE_FACTOR * self.live_bytes
        )

    @classmethod
    def of(cls, marker: bytes, records: Iterable[tuple[str, bytes]]) -> tuple["JournalLog", bytes]:
        """Return the log of a new file with these records, and what is in that file.

        It is to be synced before anything is added to it.
        """
        new = cls(marker)
        parts = [new.begin()]
        new.file_bytes = len(parts[0])
        for key, content in records:
            parts.append(new.frame(key, content))
            new.wrote(key, content, len(parts[-1]))
        new.synced = new.sequence
        return new, b"".join(parts)

    def postpone_rewrite(self) -> None:
        """It could not be replaced: not again before it is twice as long."""
        self._rewrite_bytes_min = 2 * self.file_bytes

    def check(self) -> None:
        """Raise if an invariant is broken. For tests: call it after each step."""
        if self.live_bytes != sum(
            len(content) + len(key) + FRAME_BYTES for key, content in self._live.items()
        ):
            raise AssertionError("live_bytes is not the length of the live frames")


def _marker_of(data: bytes) -> tuple[bytes, bool]:
    """Return a file's marker, by what it begins with or by its first frame; True: by the former.

    Nothing else is asked: elsewhere in the file a user's bytes could pass for one.

    Raises:
        JournalFormatError: It is of another format, or neither is whole.
    """
    if len(data) >= _BEGIN.size:
        magic, marker, checksum = _BEGIN.unpack_from(data)
        if magic == MAGIC and zlib.crc32(marker) == checksum:
            return marker, True
        first = data[_BEGIN.size : _BEGIN.size + MARKER_BYTES]
        if _read(data, _BEGIN.size, first) is not None:
            return first, False
    raise JournalFormatError("it is no journal of a version that is known here, or damaged")
