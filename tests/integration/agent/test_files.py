"""Files of a real sandbox, through the agent's own API."""

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import psutil
import pytest
from prism.agent.v1 import agent_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_common.status import failure_of, from_rpc_error
from tests.integration.agent.files import (
    describe,
    make_directory,
    move,
    names,
    read,
    remove,
    write,
)
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess
from tests.integration.agent.test_life import DELETED, until

NOT_FOUND = grpc.StatusCode.NOT_FOUND
WRONG = grpc.StatusCode.FAILED_PRECONDITION
INVALID = grpc.StatusCode.INVALID_ARGUMENT
EXISTS = grpc.StatusCode.ALREADY_EXISTS
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_what_is_written_is_read_inside_and_outside(
    agent: AgentProcess, sandbox: str
) -> None:
    data = os.urandom(3_000_000)
    info = await write(
        agent,
        sandbox,
        "/workspace/f",
        [data[i : i + 999_999] for i in range(0, len(data), 999_999)],
    )
    assert (info.path, info.size_bytes, info.mode) == ("/workspace/f", len(data), 0o644)
    assert info.type == sandbox_pb2.FILE_TYPE_REGULAR
    inside = await agent.run(sandbox, ["sha256sum", "/workspace/f"])
    assert inside.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()
    assert await read(agent, sandbox, "/workspace/f") == data
    owner = await agent.run(sandbox, ["stat", "-c", "%u:%g %a", "/workspace/f"])
    assert owner.stdout == b"1000:1000 644\n"


async def test_write_replaces_atomically_and_sets_the_mode(
    agent: AgentProcess, sandbox: str
) -> None:
    await write(agent, sandbox, "/workspace/f", b"old")
    call = agent.open(
        sandbox, ["sh", "-c", "exec 3</workspace/f; echo up; read x; cat <&3"], stdin=True
    )
    await call.until(b"up\n")
    await write(agent, sandbox, "/workspace/f", b"#!/bin/sh\necho new\n", mode=0o755)
    await call.send(stdin=b"go\n")
    assert (await call.result()).stdout == b"up\nold"
    assert (await agent.run(sandbox, ["/workspace/f"])).stdout == b"new\n"
    assert await names(agent, sandbox, "/workspace") == ["/workspace/f"]


async def test_write_replaces_a_link_and_not_its_target(agent: AgentProcess, sandbox: str) -> None:
    await agent.run(sandbox, ["sh", "-c", "echo kept > kept; ln -s kept link"])
    await write(agent, sandbox, "/workspace/link", b"new")
    assert await read(agent, sandbox, "/workspace/kept") == b"kept\n"
    assert (await describe(agent, sandbox, "/workspace/link")).size_bytes == 3


async def test_empty_file(agent: AgentProcess, sandbox: str) -> None:
    assert (await write(agent, sandbox, "/tmp/empty", [])).size_bytes == 0
    assert await read(agent, sandbox, "/tmp/empty") == b""


async def test_write_that_is_broken_off_changes_nothing(agent: AgentProcess, sandbox: str) -> None:
    await write(agent, sandbox, "/workspace/f", b"old")

    async def requests() -> AsyncIterator[sandbox_pb2.WriteFileRequest]:
        yield sandbox_pb2.WriteFileRequest(sandbox=sandbox, path="/workspace/f", data=b"new")
        await asyncio.Event().wait()

    for delay_s in (0, 0, 0.002, 0.005, 0.01, 0.05, 0.1):
        call = agent.stub.WriteFile(requests())
        await asyncio.sleep(delay_s)
        call.cancel()
        await asyncio.sleep(0.02)
        assert await read(agent, sandbox, "/workspace/f") == b"old"
    assert await names(agent, sandbox, "/workspace") == ["/workspace/f"]


async def test_listing_has_every_kind(agent: AgentProcess, sandbox: str) -> None:
    script = "mkdir d; echo 12345 > f; ln -s /nowhere l; mkfifo p; touch .hidden 'ü b'; chmod 600 f"
    await agent.run(sandbox, ["sh", "-c", script])
    request = sandbox_pb2.ListFilesRequest(sandbox=sandbox, path="/workspace/")
    listed = (await agent.stub.ListFiles(request)).files
    assert [(each.path.rpartition("/")[2], each.type) for each in listed] == [
        (".hidden", sandbox_pb2.FILE_TYPE_REGULAR),
        ("d", sandbox_pb2.FILE_TYPE_DIRECTORY),
        ("f", sandbox_pb2.FILE_TYPE_REGULAR),
        ("l", sandbox_pb2.FILE_TYPE_SYMLINK),
        ("p", sandbox_pb2.FILE_TYPE_OTHER),
        ("ü b", sandbox_pb2.FILE_TYPE_REGULAR),
    ]
    assert (listed[2].size_bytes, listed[2].mode) == (6, 0o600)
    assert (
        abs(
            listed[2].modify_time.seconds
            - (await describe(agent, sandbox, "/workspace/f")).modify_time.seconds
        )
        == 0
    )
    assert "/usr" in await names(agent, sandbox, "/")


async def test_directories_are_made_moved_and_removed(agent: AgentProcess, sandbox: str) -> None:
    made = await make_directory(agent, sandbox, "/workspace/a/b/c", parents=True)
    assert (made.path, made.mode) == ("/workspace/a/b/c", 0o755)
    await make_directory(agent, sandbox, "/workspace/a/b/c", parents=True)
    await write(agent, sandbox, "/workspace/a/b/c/f", b"x")
    await move(agent, sandbox, "/workspace/a/b", "/workspace/moved")
    assert await read(agent, sandbox, "/workspace/moved/c/f") == b"x"
    await agent.run(sandbox, ["sh", "-c", "ln -s /etc moved/etc; mkfifo moved/p"])
    await remove(agent, sandbox, "/workspace/moved", recursive=True)
    await remove(agent, sandbox, "/workspace/a")
    assert await names(agent, sandbox, "/workspace") == []


async def failure(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return caught.value.code(), from_rpc_error(caught.value).message


async def test_failures_name_the_path_and_why(agent: AgentProcess, sandbox: str) -> None:
    await agent.run(sandbox, ["sh", "-c", "mkdir d; touch d/f f; ln -s loop loop; mkfifo p"])
    there = "/workspace"
    cases = [
        (read(agent, sandbox, f"{there}/none"), NOT_FOUND, "none"),
        (read(agent, sandbox, f"{there}/d"), WRONG, "a directory"),
        (read(agent, sandbox, f"{there}/p"), WRONG, "regular"),
        (read(agent, sandbox, f"{there}/loop"), WRONG, "links"),
        (read(agent, sandbox, f"{there}/f/g"), WRONG, "not a directory"),
        (read(agent, sandbox, "relative"), INVALID, "absolute"),
        (read(agent, sandbox, "/" + "n" * 300), INVALID, "too long"),
        (read(agent, sandbox, "/n" * 2500), INVALID, "longer"),
        (write(agent, sandbox, "/usr/x", b""), WRONG, "read-only"),
        (write(agent, sandbox, f"{there}/d", b""), WRONG, "a directory"),
        (write(agent, sandbox, f"{there}/p", b""), WRONG, "regular"),
        (write(agent, sandbox, f"{there}/none/f", b""), NOT_FOUND, "none/f"),
        (write(agent, sandbox, "/", b""), INVALID, "no name"),
        (write(agent, sandbox, f"{there}/..", b""), INVALID, "no name"),
        (write(agent, sandbox, f"{there}/x", b"", mode=0o4755), INVALID, "mode"),
        (make_directory(agent, sandbox, f"{there}/d"), EXISTS, "exists"),
        (make_directory(agent, sandbox, f"{there}/x/y"), NOT_FOUND, "x/y"),
        (make_directory(agent, sandbox, f"{there}/f", parents=True), WRONG, "not a directory"),
        (move(agent, sandbox, f"{there}/none", f"{there}/x"), NOT_FOUND, "none"),
        (move(agent, sandbox, f"{there}/f", "/tmp/f"), WRONG, "file systems"),
        (remove(agent, sandbox, f"{there}/d"), WRONG, "not empty"),
        (remove(agent, sandbox, f"{there}/none"), NOT_FOUND, "none"),
        (remove(agent, sandbox, there, recursive=True), WRONG, "read-only"),
        (read(agent, "sb-none", "/etc/passwd"), NOT_FOUND, "sb-none"),
    ]
    for call, code, text in cases:
        found = await failure(call)
        assert found[0] is code, (text, found)
        assert text in found[1], found


async def test_full_disk_is_resource_exhausted_and_leaves_nothing(
    agent: AgentProcess, gateway: Gateway
) -> None:
    await gateway.wait_registrations(1)
    spec = sandbox_pb2.SandboxSpec(limits=sandbox_pb2.Limits(disk_bytes=8 << 20))
    gateway.assign("sb-small", spec=spec)
    await gateway.wait_for("sb-small", agent_pb2.OBSERVED_STATE_READY)
    call = write(agent, "sb-small", "/workspace/f", (bytes(1 << 20) for _ in range(20)))
    code, message = await failure(call)
    assert (code, "no room" in message) == (FULL, True), message
    assert await names(agent, "sb-small", "/workspace") == []
    await write(agent, "sb-small", "/workspace/f", (bytes(1 << 20) for _ in range(7)))


async def test_many_entries_are_refused_in_words(agent: AgentProcess, sandbox: str) -> None:
    await agent.python(sandbox, "for i in range(10001): open(f'/workspace/{i}', 'w').close()")
    code, message = await failure(names(agent, sandbox, "/workspace"))
    assert (code, "10000" in message) == (WRONG, True)


async def test_large_file_takes_constant_memory(agent: AgentProcess, gateway: Gateway) -> None:
    await gateway.wait_registrations(1)
    wanted = sandbox_pb2.Limits(memory_bytes=1 << 30, disk_bytes=512 << 20)
    gateway.assign("sb-big", spec=sandbox_pb2.SandboxSpec(limits=wanted))
    await gateway.wait_for("sb-big", agent_pb2.OBSERVED_STATE_READY)
    process = psutil.Process(agent.pid)
    before = process.memory_info().rss
    piece = os.urandom(1 << 20)
    await write(agent, "sb-big", "/workspace/f", (piece for _ in range(300)))
    request = sandbox_pb2.ReadFileRequest(sandbox="sb-big", path="/workspace/f")
    total = peak = 0
    async for response in agent.stub.ReadFile(request):
        total += len(response.data)
        peak = max(peak, process.memory_info().rss)
    assert total == 300 << 20
    assert peak - before < 64 << 20


async def test_calls_end_with_the_sandbox(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    await write(agent, sandbox, "/workspace/f", (bytes(1 << 20) for _ in range(30)))
    call = agent.stub.ReadFile(sandbox_pb2.ReadFileRequest(sandbox=sandbox, path="/workspace/f"))
    await call.read()
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_DELETED, grace_s=0.0)
    await gateway.wait_for(sandbox, DELETED)
    opened = []
    for entry in os.scandir(f"/proc/{agent.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            opened.append(os.readlink(entry.path))
    assert not [each for each in opened if each.endswith("/f") or "workspace" in each]

    async def read_on() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    assert (await failure(read_on()))[0] is grpc.StatusCode.UNAVAILABLE


async def test_calls_put_off_the_idle_timeout(agent: AgentProcess, gateway: Gateway) -> None:
    await gateway.wait_registrations(1)
    spec = sandbox_pb2.SandboxSpec()
    spec.idle_timeout.FromMilliseconds(2500)
    gateway.assign("sb-idle", spec=spec)
    await gateway.wait_for("sb-idle", agent_pb2.OBSERVED_STATE_READY)
    for _ in range(8):
        await asyncio.sleep(0.5)
        await describe(agent, "sb-idle", "/workspace")
    report = await gateway.wait_for("sb-idle", DELETED)
    assert report.reason == "IDLE_TIMEOUT"


async def test_calls_leave_no_threads_and_no_descriptors(agent: AgentProcess, sandbox: str) -> None:
    process = psutil.Process(agent.pid)
    await write(agent, sandbox, "/workspace/f", b"x")
    before = process.num_fds()
    for _ in range(100):
        await read(agent, sandbox, "/workspace/f")
        await failure(read(agent, sandbox, "/workspace/none"))
    await until(lambda: process.num_fds() <= before)
    assert process.uids().real == 0 or os.geteuid() != 0


async def test_too_many_calls_are_refused(agent: AgentProcess, sandbox: str) -> None:
    await write(agent, sandbox, "/workspace/f", (bytes(1 << 20) for _ in range(30)))
    request = sandbox_pb2.ReadFileRequest(sandbox=sandbox, path="/workspace/f")
    calls = [agent.stub.ReadFile(request) for _ in range(32)]
    for each in calls:
        await each.read()
    assert (await failure(describe(agent, sandbox, "/")))[0] is FULL
    for each in calls:
        while await each.read() is not grpc.aio.EOF:
            pass

    async def served() -> bool:
        try:
            await describe(agent, sandbox, "/")
        except grpc.aio.AioRpcError:
            return False
        return True

    async with asyncio.timeout(10):
        while not await served():
            pass


async def test_a_file_may_have_a_time_and_a_directory_a_mode(
    agent: AgentProcess, sandbox: str
) -> None:
    first = sandbox_pb2.WriteFileRequest(sandbox=sandbox, path="/workspace/f", data=b"x")
    first.modify_time.FromNanoseconds(1_500_000_000_123_456_789)

    async def requests() -> AsyncIterator[sandbox_pb2.WriteFileRequest]:
        yield first

    info = await agent.stub.WriteFile(requests())
    assert info.modify_time.ToNanoseconds() == 1_500_000_000_123_456_789
    request = sandbox_pb2.MakeDirectoryRequest(
        sandbox=sandbox, path="/workspace/a/b", parents=True, mode=0o770
    )
    assert (await agent.stub.MakeDirectory(request)).mode == 0o770
    assert (await describe(agent, sandbox, "/workspace/a")).mode == 0o755
    request.mode = 0o700  # of one that exists it stays as it is
    assert (await agent.stub.MakeDirectory(request)).mode == 0o770
    first.modify_time.seconds = 2**60
    code, message = await failure(agent.stub.WriteFile(requests()))
    assert (code, message) == (INVALID, "modify_time: not a time")


async def test_links_are_made_as_the_sandboxs_user_and_seen_but_not_followed(
    agent: AgentProcess, sandbox: str
) -> None:
    async def link(path: str, target: str) -> sandbox_pb2.FileInfo:
        request = sandbox_pb2.MakeLinkRequest(sandbox=sandbox, path=path, target=target)
        return await agent.stub.MakeLink(request)

    info = await link("/workspace/x", "/etc/shadow")
    assert (info.type, info.link_target) == (sandbox_pb2.FILE_TYPE_SYMLINK, "/etc/shadow")
    assert (await describe(agent, sandbox, "/workspace/x")).link_target == "/etc/shadow"
    await write(agent, sandbox, "/workspace/f", b"old")
    assert (await link("/workspace/f", "x/../y")).link_target == "x/../y"  # a file gives way
    request = sandbox_pb2.ListFilesRequest(sandbox=sandbox, path="/workspace")
    listed = (await agent.stub.ListFiles(request)).files
    assert {each.path: each.link_target for each in listed} == {
        "/workspace/f": "x/../y",
        "/workspace/x": "/etc/shadow",
    }
    owner = await agent.run(sandbox, ["stat", "-c", "%u", "/workspace/x"])
    assert owner.stdout == b"1000\n"
    assert (await failure(link("/workspace", "x")))[0] is WRONG
    assert (await failure(link("/etc/x", "x")))[0] is WRONG
    for target in ("", "a\0b", "a" * 4096):
        assert (await failure(link("/workspace/z", target)))[0] is INVALID
    assert await names(agent, sandbox, "/workspace") == ["/workspace/f", "/workspace/x"]


async def test_a_failure_is_told_while_the_file_is_still_sent(
    agent: AgentProcess, sandbox: str
) -> None:
    """What is between the client and the agent can stop, and say why, before the stream ends."""
    told = asyncio.Event()

    async def requests() -> AsyncIterator[sandbox_pb2.WriteFileRequest]:
        yield sandbox_pb2.WriteFileRequest(sandbox=sandbox, path="/none/f")
        await told.wait()

    call = agent.stub.WriteFile(requests())
    async with asyncio.timeout(10):
        found = failure_of(await call.initial_metadata())
    assert found is not None
    assert (found.code, found.message) == ("FILE_NOT_FOUND", "'/none/f': no such file")
    told.set()
    assert (await failure(call))[0] is NOT_FOUND
