"""File calls, shorter to write."""

from collections.abc import AsyncIterator, Iterable

from prism.sandbox.v1 import sandbox_pb2

from tests.integration.agent.process import AgentProcess


async def write(
    agent: AgentProcess, sandbox: str, path: str, pieces: bytes | Iterable[bytes], mode: int = 0
) -> sandbox_pb2.FileInfo:
    async def requests() -> AsyncIterator[sandbox_pb2.WriteFileRequest]:
        yield sandbox_pb2.WriteFileRequest(sandbox=sandbox, path=path, mode=mode)
        for piece in [pieces] if isinstance(pieces, bytes) else pieces:
            yield sandbox_pb2.WriteFileRequest(data=piece)

    return await agent.stub.WriteFile(requests())


async def read(agent: AgentProcess, sandbox: str, path: str) -> bytes:
    request = sandbox_pb2.ReadFileRequest(sandbox=sandbox, path=path)
    return b"".join([each.data async for each in agent.stub.ReadFile(request)])


async def names(agent: AgentProcess, sandbox: str, path: str) -> list[str]:
    request = sandbox_pb2.ListFilesRequest(sandbox=sandbox, path=path)
    return [each.path for each in (await agent.stub.ListFiles(request)).files]


async def describe(agent: AgentProcess, sandbox: str, path: str) -> sandbox_pb2.FileInfo:
    return await agent.stub.StatFile(sandbox_pb2.StatFileRequest(sandbox=sandbox, path=path))


async def make_directory(
    agent: AgentProcess, sandbox: str, path: str, parents: bool = False
) -> sandbox_pb2.FileInfo:
    request = sandbox_pb2.MakeDirectoryRequest(sandbox=sandbox, path=path, parents=parents)
    return await agent.stub.MakeDirectory(request)


async def move(agent: AgentProcess, sandbox: str, source: str, target: str) -> sandbox_pb2.FileInfo:
    request = sandbox_pb2.MoveFileRequest(sandbox=sandbox, source_path=source, target_path=target)
    return await agent.stub.MoveFile(request)


async def remove(agent: AgentProcess, sandbox: str, path: str, recursive: bool = False) -> None:
    request = sandbox_pb2.RemoveFileRequest(sandbox=sandbox, path=path, recursive=recursive)
    await agent.stub.RemoveFile(request)
