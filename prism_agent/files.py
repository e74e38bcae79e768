"""The file calls of the node's API: contents as streams, the rest one step each."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc.aio
from google.protobuf import empty_pb2
from prism.agent.v1 import agent_pb2_grpc
from prism.sandbox.v1 import sandbox_pb2

from prism_agent.file_call import FileCall
from prism_agent.file_errors import explained
from prism_agent.sandboxes import Sandboxes
from prism_agent.tree import Draft, Tree, parts_of
from prism_common import limits
from prism_common.errors import InvalidArgumentError, PrismError
from prism_common.status import failure_metadata
from prism_common.streams import whole

_Context = grpc.aio.ServicerContext[Any, Any]
_MODE_DEFAULT: Final = 0o644
_MODE_MAX: Final = 0o777
#: The years that a Timestamp may hold end with 9999; the kernel takes 64 bits of nanoseconds.
_SECONDS_MAX: Final = 2**63 // 10**9 - 1
#: Time in which a client whose write has failed may send the rest.
_DRAIN_S: Final = 3.0


class FileService(agent_pb2_grpc.AgentServiceServicer):
    """Files of the node's sandboxes, which are named by their ids here."""

    def __init__(self, sandboxes: Sandboxes) -> None:
        self._sandboxes = sandboxes

    async def ReadFile(
        self, request: sandbox_pb2.ReadFileRequest, context: _Context
    ) -> AsyncIterator[sandbox_pb2.ReadFileResponse]:
        """Stream a regular file, as long as it was when it was opened, as fast as the client."""
        parts_of(request.path, "path")
        async with self._sandboxes.open_files(request.sandbox) as call:
            descriptor, left = await call.run(Tree.open_read, request.path)
            while left > 0:
                size = min(left, limits.CHUNK_BYTES_MAX)
                data = await call.run(_read, descriptor, size, request.path)
                if not data:
                    return
                left -= len(data)
                yield sandbox_pb2.ReadFileResponse(data=data)

    async def WriteFile(
        self, request_iterator: AsyncIterator[sandbox_pb2.WriteFileRequest], context: _Context
    ) -> sandbox_pb2.FileInfo:
        """Take a file, and put it in its place when it is complete."""
        first = await anext(request_iterator, None)
        if first is None:
            raise InvalidArgumentError("path: the first message has sandbox and path", field="path")
        parts_of(first.path, "path")
        _check_mode(first.mode)
        modified_ns = _modified_ns(first)
        try:
            return await self._write_file(first, request_iterator, context, modified_ns)
        except PrismError as error:
            with contextlib.suppress(grpc.aio.BaseError, asyncio.InvalidStateError):
                await context.send_initial_metadata(failure_metadata(error))
            await _drain(request_iterator)
            raise

    async def _write_file(
        self,
        first: sandbox_pb2.WriteFileRequest,
        rest: AsyncIterator[sandbox_pb2.WriteFileRequest],
        context: _Context,
        modified_ns: int | None,
    ) -> sandbox_pb2.FileInfo:
        async with self._sandboxes.open_files(first.sandbox) as call:
            draft = await call.run(Tree.begin_write, first.path)
            await _write(call, draft, first)
            async for request in whole(rest, context):
                if request.sandbox or request.path or request.mode:
                    raise InvalidArgumentError(
                        "path: only the first message has sandbox, path and mode", field="path"
                    )
                await _write(call, draft, request)
            return await call.run(_finish, draft, first.mode or _MODE_DEFAULT, modified_ns)

    async def ListFiles(
        self, request: sandbox_pb2.ListFilesRequest, context: _Context
    ) -> sandbox_pb2.ListFilesResponse:
        """List a directory."""
        async with self._sandboxes.open_files(request.sandbox) as call:
            files = await call.run(Tree.list_directory, request.path)
        return sandbox_pb2.ListFilesResponse(files=files)

    async def StatFile(
        self, request: sandbox_pb2.StatFileRequest, context: _Context
    ) -> sandbox_pb2.FileInfo:
        """Describe a path."""
        async with self._sandboxes.open_files(request.sandbox) as call:
            return await call.run(Tree.describe, request.path)

    async def MakeDirectory(
        self, request: sandbox_pb2.MakeDirectoryRequest, context: _Context
    ) -> sandbox_pb2.FileInfo:
        """Make a directory."""
        _check_mode(request.mode)
        async with self._sandboxes.open_files(request.sandbox) as call:
            return await call.run(Tree.make_directory, request.path, request.parents, request.mode)

    async def MakeLink(
        self, request: sandbox_pb2.MakeLinkRequest, context: _Context
    ) -> sandbox_pb2.FileInfo:
        """Make a symbolic link."""
        size = len(request.target.encode())
        if "\0" in request.target or not 0 < size < limits.PATH_LENGTH_MAX:
            raise InvalidArgumentError(
                f"target: 1 to {limits.PATH_LENGTH_MAX - 1} bytes without NUL", field="target"
            )
        async with self._sandboxes.open_files(request.sandbox) as call:
            return await call.run(Tree.make_link, request.path, request.target)

    async def MoveFile(
        self, request: sandbox_pb2.MoveFileRequest, context: _Context
    ) -> sandbox_pb2.FileInfo:
        """Rename a path."""
        async with self._sandboxes.open_files(request.sandbox) as call:
            return await call.run(Tree.move, request.source_path, request.target_path)

    async def RemoveFile(
        self, request: sandbox_pb2.RemoveFileRequest, context: _Context
    ) -> empty_pb2.Empty:
        """Remove a path."""
        async with self._sandboxes.open_files(request.sandbox) as call:
            await call.run(Tree.remove, request.path, request.recursive)
        return empty_pb2.Empty()


def _check_mode(mode: int) -> None:
    if mode > _MODE_MAX:
        raise InvalidArgumentError(f"mode: {mode:o}; at most 777 (octal)", field="mode")


def _modified_ns(first: sandbox_pb2.WriteFileRequest) -> int | None:
    if not first.HasField("modify_time"):
        return None
    moment = first.modify_time
    if not (abs(moment.seconds) <= _SECONDS_MAX and 0 <= moment.nanos < 10**9):
        raise InvalidArgumentError("modify_time: not a time", field="modify_time")
    return moment.seconds * 10**9 + moment.nanos


async def _drain(requests: AsyncIterator[sandbox_pb2.WriteFileRequest]) -> None:
    """Take what a client goes on to send until it has heard why that is for nothing."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            async for _ in requests:
                pass


def _read(tree: Tree, descriptor: int, size: int, path: str) -> bytes:
    del tree
    with explained(path):
        return os.read(descriptor, size)


async def _write(call: FileCall, draft: Draft, request: sandbox_pb2.WriteFileRequest) -> None:
    if len(request.data) > limits.CHUNK_BYTES_MAX:
        raise InvalidArgumentError(
            f"data: {len(request.data)} bytes; at most {limits.CHUNK_BYTES_MAX} a message",
            field="data",
        )
    if request.data:
        await call.run(_append, draft, request.data)


def _append(tree: Tree, draft: Draft, data: bytes) -> None:
    del tree
    draft.write(data)


def _finish(tree: Tree, draft: Draft, mode: int, modified_ns: int | None) -> sandbox_pb2.FileInfo:
    del tree
    return draft.finish(mode, modified_ns)
