"""Reads an exec's ring file, which its supervisor writes."""

import os
from pathlib import Path

from prism_agent import limits
from prism_agent.supervisor import protocol
from prism_agent.supervisor.protocol import Output, ProtocolError, RingHeader

_ATTEMPTS = 1000
#: Of a ring; whoever has taken over a sandbox's own kernel may write anything to the file.
_CAPACITY_MAX = 1 << 32


class Ring:
    """One exec's output and exit status."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def create(cls, path: Path, capacity: int = limits.RING_BYTES) -> "Ring":
        """Make a new, empty, sparse ring."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, protocol.RING_HEADER_BYTES + capacity)
        except OSError:
            os.close(descriptor)
            raise
        return cls(descriptor)

    @classmethod
    def reuse(cls, old: Path, path: Path, capacity: int) -> "Ring":
        """Make a new, empty ring of one that nobody has open or will ask for again.

        To make and to remove a file for each exec costs some file systems a millisecond. It has its
        new name before it is emptied: its exec must not seem to have never run.

        Raises:
            OSError: There may be a ring by the new name, or not.
        """
        os.rename(old, path)
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, bytes(protocol.RING_HEADER_BYTES), 0)
            os.ftruncate(descriptor, protocol.RING_HEADER_BYTES + capacity)
        except OSError:
            os.close(descriptor)
            raise
        return cls(descriptor)

    @classmethod
    def open(cls, path: Path) -> "Ring":
        """Open a ring to read it."""
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def header(self) -> RingHeader:
        """Return how the exec is now.

        Raises:
            ProtocolError: The file is not a ring, or its header is for ever half written.
        """
        for _ in range(_ATTEMPTS):
            content = os.pread(self._descriptor, protocol.HEADER_BYTES, 0)
            if len(content) != protocol.HEADER_BYTES:
                raise ProtocolError("a ring file without a header")
            header = protocol.decode_header(content)
            if header is not None and header.capacity <= _CAPACITY_MAX:
                return header
        raise ProtocolError("a ring whose header was not finished")

    def read(self, offset: int) -> tuple[list[Output], int]:
        """Return whole records from `offset` or the oldest kept, and the offset after them.

        The supervisor moves the tail before it overwrites, so a tail that is behind `offset` after
        the read proves that what was read was whole.
        """
        header = self.header()
        offset = max(offset, header.tail)
        for _ in range(_ATTEMPTS):
            if offset >= header.head:
                return [], offset
            content = self._read_bytes(offset, min(header.head - offset, limits.READ_BYTES), header)
            tail = self.header().tail
            if tail > offset:
                offset = tail
                header = self.header()
                continue
            outputs = protocol.decode_records(content, offset)
            if not outputs:
                raise ProtocolError(f"no whole record at {offset}")
            return outputs, outputs[-1].offset
        raise ProtocolError("a ring that is overwritten faster than it can be read")

    def _read_bytes(self, offset: int, length: int, header: RingHeader) -> bytes:
        if header.capacity == 0:
            raise ProtocolError("a ring without room has output")
        place = offset % header.capacity
        first = min(length, header.capacity - place)
        content = os.pread(self._descriptor, first, protocol.RING_HEADER_BYTES + place)
        if first < length:
            content += os.pread(self._descriptor, length - first, protocol.RING_HEADER_BYTES)
        return content
