"""Snapshots: the rows as a stream of bytes, written from a view that no longer changes.

Format: frames of (kind: 1 byte, length of the body: 4 bytes big-endian, body). The first is the
header; then rows, each frame a msgpack array of one kind; the last is END, so that a stream that
was cut is noticed. Unknown kinds and versions are refused. Chunks are cut at frames when written,
and read however the transport has cut them.

PENDING sandboxes of one shape share one explanation; it is written once for all of them.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import force_setattr, replace

from prism_common.errors import PrismError
from prism_control.state.commands import VERSION, VERSION_UNTOLD
from prism_control.state.model import NodeRow, PlacementRefusal, SandboxRow, Spec
from prism_control.state.results import Created, RequestRow

#: Highest version of the format that this member reads. It writes version 1, with a few fields
#: more that older members pass over, until the command version is raised: what they do not know may
#: then be in the rows, and they must not take the state for theirs.
FORMAT: Final = 2
#: Bytes after which a frame ends; with one row more it stays below a message's bound.
_FRAME_BYTES: Final = 256 * 1024
#: Ids in one frame of explanations.
_IDS_MAX: Final = 4096
#: No frame of ours is longer; a longer one is damage, and must not be waited for.
_BODY_BYTES_MAX: Final = 64 * 1024 * 1024
_PREFIX: Final = struct.Struct(">BI")
_ARRAY32: Final = struct.Struct(">BI")


class SnapshotError(PrismError):
    """The bytes are no snapshot of a version that this member reads."""

    reason = "SNAPSHOT"


class SnapshotView(Struct, frozen=True):
    """All rows as of one applied index. Nothing in it changes: another thread may encode it."""

    index: int
    revision: int
    now_ms: int
    sandboxes: Sequence[SandboxRow]
    nodes: Sequence[NodeRow]
    requests: Sequence[RequestRow]
    command_version: int = VERSION_UNTOLD


class Header(Struct, frozen=True, array_like=True):
    """What stands at the beginning; the counts are checked at the end."""

    version: int
    index: int
    revision: int
    now_ms: int
    sandboxes: int
    nodes: int
    requests: int
    command_version: int = VERSION_UNTOLD


class _Kind(enum.IntEnum):
    HEADER = 1
    SANDBOXES = 2
    EXPLANATION = 3
    NODES = 4
    REQUESTS = 5
    END = 6


class _Explained(Struct, frozen=True, array_like=True):
    refusals: tuple[PlacementRefusal, ...]
    sandbox_ids: list[str]


_encoder: Final = msgspec.msgpack.Encoder()
_headers: Final = msgspec.msgpack.Decoder(Header)
_sandboxes: Final = msgspec.msgpack.Decoder(list[SandboxRow])
_nodes: Final = msgspec.msgpack.Decoder(list[NodeRow])
_requests: Final = msgspec.msgpack.Decoder(list[RequestRow])
_explained: Final = msgspec.msgpack.Decoder(_Explained)


def encode_snapshot(view: SnapshotView) -> Iterator[bytes]:
    """Yield a view as chunks of about 256 KiB. Works a chunk at a time: holds no second copy."""
    yield _frame(
        _Kind.HEADER,
        _encoder.encode(
            Header(
                FORMAT if view.command_version > VERSION_UNTOLD else 1,
                view.index,
                view.revision,
                view.now_ms,
                len(view.sandboxes),
                len(view.nodes),
                len(view.requests),
                view.command_version,
            )
        ),
    )
    groups: dict[tuple[PlacementRefusal, ...], list[str]] = {}
    yield from _frames(_Kind.SANDBOXES, _set_explanations_aside(view.sandboxes, groups))
    for refusals, ids in groups.items():
        for begin in range(0, len(ids), _IDS_MAX):
            body = _encoder.encode(_Explained(refusals, ids[begin : begin + _IDS_MAX]))
            yield _frame(_Kind.EXPLANATION, body)
    yield from _frames(_Kind.NODES, view.nodes)
    yield from _frames(_Kind.REQUESTS, view.requests)
    yield _frame(_Kind.END, b"")


def decode_snapshot(chunks: Iterable[bytes]) -> SnapshotView:
    """Read what `encode_snapshot` wrote, cut anywhere.

    Raises:
        SnapshotError: The stream is cut, damaged, or of a newer format.
    """
    frames = _read_frames(chunks)
    try:
        return _assemble(frames)
    except msgspec.DecodeError as error:
        raise SnapshotError(f"a row of the snapshot cannot be read: {error}") from error


def _assemble(frames: Iterator[tuple[int, bytes]]) -> SnapshotView:
    kind, body = next(frames, (0, b""))
    if kind != _Kind.HEADER:
        raise SnapshotError("the snapshot does not begin with its header")
    header = _headers.decode(body)
    if header.version > FORMAT:
        raise SnapshotError(
            f"the snapshot is of format {header.version}; this member reads up to {FORMAT}: "
            "upgrade it"
        )
    if header.command_version > VERSION:
        raise SnapshotError(
            f"the snapshot holds what commands of version {header.command_version} wrote; this "
            f"member knows up to {VERSION}: upgrade it"
        )
    sandboxes: list[SandboxRow] = []
    nodes: list[NodeRow] = []
    requests: list[RequestRow] = []
    by_id: dict[str, SandboxRow] = {}
    for kind, body in frames:
        if kind == _Kind.SANDBOXES:
            sandboxes += _sandboxes.decode(body)
        elif kind == _Kind.EXPLANATION:
            by_id = by_id or {row.id: row for row in sandboxes}
            _give_back(_explained.decode(body), by_id)
        elif kind == _Kind.NODES:
            nodes += _nodes.decode(body)
        elif kind == _Kind.REQUESTS:
            requests += _requests.decode(body)
        elif kind == _Kind.END:
            break
        else:
            raise SnapshotError(f"the snapshot has a frame of unknown kind {kind}")
    else:
        raise SnapshotError("the snapshot is cut: its end is missing")
    counts = (len(sandboxes), len(nodes), len(requests))
    if counts != (header.sandboxes, header.nodes, header.requests):
        raise SnapshotError("the snapshot has not the rows that its header promises")
    _share(sandboxes, requests)
    return SnapshotView(
        header.index,
        header.revision,
        header.now_ms,
        sandboxes,
        nodes,
        requests,
        header.command_version,
    )


def _set_explanations_aside(
    rows: Iterable[SandboxRow], groups: dict[tuple[PlacementRefusal, ...], list[str]]
) -> Iterator[SandboxRow]:
    for row in rows:
        if row.placement:
            groups.setdefault(row.placement, []).append(row.id)
            yield replace(row, placement=())
        else:
            yield row


def _give_back(explained: _Explained, by_id: dict[str, SandboxRow]) -> None:
    for key in explained.sandbox_ids:
        row = by_id.get(key)
        if row is None:
            raise SnapshotError(f"the snapshot explains {key!r}, which it does not hold")
        force_setattr(row, "placement", explained.refusals)  # nobody else has seen the row yet


def _share(sandboxes: list[SandboxRow], requests: list[RequestRow]) -> None:
    """Let equal specs be one, and answers share the strings of the rows that they are about."""
    specs: dict[Spec, Spec] = {}
    by_id: dict[str, SandboxRow] = {}
    for row in sandboxes:
        force_setattr(row, "spec", specs.setdefault(row.spec, row.spec))
        by_id[row.id] = row
    for request in requests:
        answer = request.answer
        if isinstance(answer, Created):
            force_setattr(answer, "spec", specs.setdefault(answer.spec, answer.spec))
            known = by_id.get(answer.sandbox_id)
            if known is not None:
                force_setattr(answer, "sandbox_id", known.id)
                force_setattr(answer, "name", known.name)


def _frames(kind: _Kind, rows: Iterable[Struct]) -> Iterator[bytes]:
    """Yield rows as frames that end once they have `_FRAME_BYTES`."""
    parts: list[bytes] = []
    size = 0
    for row in rows:
        part = _encoder.encode(row)
        parts.append(part)
        size += len(part)
        if size >= _FRAME_BYTES:
            yield _frame(kind, _ARRAY32.pack(0xDD, len(parts)) + b"".join(parts))
            parts, size = [], 0
    if parts:
        yield _frame(kind, _ARRAY32.pack(0xDD, len(parts)) + b"".join(parts))


def _frame(kind: _Kind, body: bytes) -> bytes:
    return _PREFIX.pack(kind, len(body)) + body


def _read_frames(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield (kind, body) of each whole frame; what is left at the end is dropped."""
    buffer = bytearray()
    for chunk in chunks:
        buffer += chunk
        begin = 0
        while len(buffer) - begin >= _PREFIX.size:
            kind, length = _PREFIX.unpack_from(buffer, begin)
            if length > _BODY_BYTES_MAX:
                raise SnapshotError(f"the snapshot has a frame of {length} bytes: it is damaged")
            end = begin + _PREFIX.size + length
            if len(buffer) < end:
                break
            yield kind, bytes(buffer[begin + _PREFIX.size : end])
            begin = end
        del buffer[:begin]
