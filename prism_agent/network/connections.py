"""Forgets what the kernel's table of connections says of a sandbox that is gone. Blocking.

An established connection stays in that table for days when nobody ends it: it takes room from the
whole machine, and it would let the sandbox that has the address next go on with it, whatever its
own rules say. By netlink (`linux/netfilter/nfnetlink_conntrack.h`), in this thread's namespace.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Final

_NETFILTER: Final = 12
_GET, _DELETE, _FOUND = 0x101, 0x102, 0x100
_ERROR, _DONE = 2, 3
_REQUEST, _ACKNOWLEDGE, _DUMP = 0x1, 0x4, 0x300
_TUPLE, _ZONE, _FILTER = 1, 18, 25
_TUPLE_ADDRESSES, _SOURCE, _FILTER_FLAGS, _FILTER_BY_SOURCE = 1, 1, 1, 1
_NESTED, _TYPE_MASK = 0x8000, 0x3FFF
_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
#: nfgenmsg: IPv4.
_FAMILY: Final = bytes([socket.AF_INET, 0, 0, 0])
_RECEIVE_BYTES: Final = 64 * 1024
_TIMEOUT_S: Final = 10


def forget(address: IPv4Address) -> None:
    """Remove all connections that an address has begun; its device must be gone.

    A look at a table of 262,144 places takes the kernel some 8 ms.

    Raises:
        OSError: Some are left, or the kernel does not tell.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER) as kernel:
        kernel.settimeout(_TIMEOUT_S)
        for known_as in list(_find(kernel, address)):
            kernel.send(_message(_DELETE, _REQUEST | _ACKNOWLEDGE, known_as))
            for kind, body in _messages(kernel.recv(_RECEIVE_BYTES)):
                # One that has ended by itself is as good.
                if kind == _ERROR and _number(body) not in (0, errno.ENOENT):
                    raise _refusal(body)


def _find(kernel: socket.socket, address: IPv4Address) -> Iterator[bytes]:
    """Yield the attributes by which the kernel knows each connection of an address."""
    source = _attribute(_SOURCE, address.packed)
    wanted = _attribute(_TUPLE | _NESTED, _attribute(_TUPLE_ADDRESSES | _NESTED, source))
    by_source = _attribute(_FILTER_FLAGS, struct.pack("=I", _FILTER_BY_SOURCE))
    by_source += _attribute(_FILTER_FLAGS + 1, struct.pack("=I", 0))
    wanted += _attribute(_FILTER | _NESTED, by_source)
    kernel.send(_message(_GET, _REQUEST | _DUMP, wanted))
    while True:
        for kind, body in _messages(kernel.recv(_RECEIVE_BYTES)):
            if kind == _DONE:
                return
            if kind == _ERROR:
                raise _refusal(body)
            if kind != _FOUND:
                continue
            parts = dict(_attributes(body[len(_FAMILY) :]))
            addresses = dict(_attributes(parts.get(_TUPLE, b""))).get(_TUPLE_ADDRESSES, b"")
            # A kernel before 5.8 knows no filter, and tells of all.
            if dict(_attributes(addresses)).get(_SOURCE) == address.packed:
                known_as = _attribute(_TUPLE | _NESTED, parts[_TUPLE])
                if _ZONE in parts:
                    known_as += _attribute(_ZONE, parts[_ZONE])
                yield known_as


def _number(body: bytes) -> int:
    return -int(struct.unpack_from("=i", body)[0])


def _refusal(body: bytes) -> OSError:
    number = _number(body)
    return OSError(number, f"the table of connections: {os.strerror(number)}")


def _message(kind: int, flags: int, attributes: bytes) -> bytes:
    body = _FAMILY + attributes
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0) + body


def _attribute(kind: int, content: bytes) -> bytes:
    padding = bytes(-len(content) % 4)
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(content), kind) + content + padding


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, _, _, _ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[max(_HEADER.size, length + 3 & ~3) :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind & _TYPE_MASK, data[_ATTRIBUTE.size : length]
        data = data[max(_ATTRIBUTE.size, length + 3 & ~3) :]
