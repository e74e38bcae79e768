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
from prism_agent.sandboxes import Sandboxes
from prism_agent.tree import Draft, Tree, explained, parts_of
from prism_common import limits
from prism_common.errors import InvalidArgumentError, PrismError
from prism_common.streams import whole

_Context = grpc.aio.ServicerContext[Any, Any]
_MODE_DEFAULT: Final = 0o644
_MODE_MAX: Final = 0o777
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
        if first.mode > _MODE_MAX:
            raise InvalidArgumentError(f"mode: {first.mode:o}; at most 777 (octal)", field="mode")
        try:
            return await self._write_file(first, request_iterator, context)
        except PrismError:
            await _drain(request_iterator)
            raise

    async def _write_file(
        self,
        first: sandbox_pb2.WriteFileRequest,
        rest: AsyncIterator[sandbox_pb2.WriteFileRequest],
        context: _Context,
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
            return await call.run(_finish, draft, first.mode or _MODE_DEFAULT)

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
        async with self._sandboxes.open_files(request.sandbox) as call:
            return await call.run(Tree.make_directory, request.path, request.parents)

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


async def _drain(requests: AsyncIterator[sandbox_pb2.WriteFileRequest]) -> None:
    """Take what a client goes on to send for a while.

    gRPC may tell a client whose stream is cut off only that, and not why.
    """
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


def _finish(tree: Tree, draft: Draft, mode: int) -> sandbox_pb2.FileInfo:
    del tree
    return draft.finish(mode)
