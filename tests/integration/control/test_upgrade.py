"""A rolling upgrade from the last release, and one step back, under clients that never stop."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import grpc
import pytest
from prism.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from prism.sandbox.v1 import sandbox_pb2

from prism_control.raft.types import Entry, EntryKind
from prism_control.state import commands
from prism_control.storage.log import LogStore
from tests.integration.harness import ROOT, Cluster, ControlNode, cluster, reason_of, wait_for
from tests.integration.load import Load

#: The commit of the last release: its code is taken from the history of this repository.
LAST_RELEASE: Final = (Path(__file__).with_name("last_release.txt")).read_text().strip()
#: Only code since then counts these.
_ONLY_NEW: Final = "prism_raft_snapshot_transfers_total"
#: What the gRPC library itself prints, past logging, when a call begins while the server stops.
_GRPC_STOPS: Final = re.compile(
    r"Traceback \(most recent call last\):\n"
    r'  File ".*grpc/_cython/_cygrpc/aio/server\.pyx\.pxi", .*_schedule_rpc_coro\n'
    r"asyncio\.exceptions\.CancelledError\n"
)


@pytest.fixture(scope="module")
def last_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code of the last release."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed: the last release cannot be taken from the history")
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", LAST_RELEASE, "prism_common", "prism_control", "proto"],
        capture_output=True,
        check=False,
    )
    if archive.returncode != 0:
        said = archive.stderr.decode(errors="replace").strip()
        pytest.skip(f"the last release cannot be taken from the history (a shallow clone?): {said}")
    code = tmp_path_factory.mktemp("last-release")
    subprocess.run(["tar", "-x", "-C", str(code)], input=archive.stdout, check=True)
    # It runs with this environment's gRPC, and the stubs that it came with refuse an older one.
    proto = code / "proto"
    sources = [str(path) for path in sorted((proto / "prism").rglob("*.proto"))]
    stubs = ["-m", "grpc_tools.protoc", f"-I{proto}", f"--grpc_python_out={proto}", *sources]
    subprocess.run([sys.executable, *stubs], check=True)
    return code


def is_new(node: ControlNode) -> bool:
    """Whether a running node runs the code of this checkout."""
    return _ONLY_NEW in node.get("/metrics")[1]


def use_code(node: ControlNode, code: Path) -> None:
    """Let a stopped node run this code, with a log apart: only that of new code is judged."""
    node.code = code
    node.log_file = node.directory / ("log" if code == ROOT else "log-of-last-release")
    node.log_file.touch()


def change_code(node: ControlNode, code: Path) -> None:
    """Stop a node, and start it with other code on the same data."""
    assert node.stop() == 0, node.log[-2000:]
    use_code(node, code)
    node.start().wait_ready()
    assert is_new(node) == (code == ROOT)


def snapshots_installed(node: ControlNode) -> int:
    return node.log.count("installing snapshot")


def command_version(node: ControlNode) -> int:
    return node.cluster().command_version


def change_leader(made: Cluster, to: ControlNode) -> None:
    stub = cluster_pb2_grpc.ClusterServiceStub(made.leader().channel)
    stub.TransferLeadership(cluster_pb2.TransferLeadershipRequest(peer=to.name), timeout=10)
    wait_for(f"{to.name} leads", lambda: to.leads)


def ask_for_what_is_new(node: ControlNode) -> str:
    """Ask for new limits of a sandbox that there is not; return the reason of the refusal."""
    request = sandbox_pb2.UpdateSandboxRequest(
        sandbox="nowhere", limits=sandbox_pb2.Limits(cpu_millicores=100)
    )
    with pytest.raises(grpc.RpcError) as refused:
        node.sandboxes.UpdateSandbox(request, timeout=10)
    return reason_of(refused.value)[0]


def test_members_are_upgraded_one_by_one_while_clients_write(
    tmp_path: Path, last_release: Path
) -> None:
    with cluster(tmp_path, 3, "--snapshot-entries=100", start=False) as made:
        for node in made.nodes:
            use_code(node, last_release)
        made.start()
        assert not any(is_new(node) for node in made.nodes)
        with Load(made, clients=2, pause_s=0.005) as load:
            first, second = made.followers()
            leader = made.leader()
            change_code(first, ROOT)
            # The old leader would not see what is new in it, and say that it is done.
            assert ask_for_what_is_new(first) == "UPGRADE_NEEDED"
            # The other follower is so far behind that an old leader sends a new member a snapshot.
            behind = leader.metric("prism_raft_last_index")
            assert second.stop() == 0
            use_code(second, ROOT)
            wait_for(
                "the leader goes on",
                lambda: leader.metric("prism_raft_last_index") > behind + 300,
            )
            installed = snapshots_installed(second)
            second.start().wait_ready()
            wait_for("a snapshot arrives", lambda: snapshots_installed(second) > installed)

            # One goes back, and is sent a snapshot by a new leader; and is upgraded again.
            back = first
            assert back.stop() == 0
            use_code(back, last_release)
            change_leader(made, second)
            assert command_version(second) == commands.VERSION_UNTOLD
            assert ask_for_what_is_new(second) == "UPGRADE_NEEDED"
            behind = second.metric("prism_raft_last_index")
            wait_for(
                "the leader goes on",
                lambda: second.metric("prism_raft_last_index") > behind + 300,
            )
            installed = snapshots_installed(back)
            back.start().wait_ready()
            wait_for("a snapshot arrives", lambda: snapshots_installed(back) > installed)
            assert not is_new(back)
            change_code(back, ROOT)
            change_code(leader, ROOT)
            assert all(is_new(node) for node in made.nodes)
            wait_for(
                "commands of the new version may be proposed",
                lambda: all(command_version(node) == commands.VERSION for node in made.nodes),
            )
            assert ask_for_what_is_new(leader) == "NOT_FOUND"

            # And now none goes back any more: what it would meet, it may not know.
            assert back.stop() == 0
            use_code(back, last_release)
            logged = len(back.log)
            back.start()
            assert back.wait() == 1
            assert "upgrade it" in back.log[logged:]
            assert "Traceback" not in back.log[logged:]
            use_code(back, ROOT)
            back.start().wait_ready()
        for node in made.nodes:
            assert load.lost_and_duplicated(node) == (0, 0)
            assert "Traceback" not in _GRPC_STOPS.sub("", node.log)
        assert len(load.acknowledged) > 600


def test_data_of_the_last_release_is_read(tmp_path: Path, last_release: Path) -> None:
    node = ControlNode(tmp_path / "node", "n1", ["--bootstrap", "--snapshot-entries=20"])
    try:
        use_code(node, last_release)
        node.start().wait_ready()
        kept = {node.create(f"s{number}").id for number in range(50)}
        change_code(node, ROOT)
        assert {row.id for row in node.list_all()} == kept
        node.create("s50")
        node.kill()
        node.start().wait_ready()
        assert len(node.list_all()) == 51
    finally:
        node.close()


def test_a_member_of_the_last_release_may_not_join_what_it_cannot_apply(
    tmp_path: Path, last_release: Path
) -> None:
    node = ControlNode(tmp_path / "n1", "n1", ["--bootstrap"])
    late = ControlNode(tmp_path / "n2", "n2", [f"--join={node.raft}"])
    try:
        node.start().wait_ready()
        wait_for("the version in use", lambda: command_version(node) == commands.VERSION)
        use_code(late, last_release)
        late.start()
        wait_for("it is refused in words", lambda: "start it with a newer release" in late.log)
        assert [peer.name for peer in node.cluster().peers] == ["n1"]
        # The same machine, upgraded.
        assert late.stop() == 0
        use_code(late, ROOT)
        late.start().wait_ready()
        wait_for("it is a member", lambda: len(node.cluster().peers) == 2)
    finally:
        node.close()
        late.close()


def test_a_member_that_meets_an_unknown_version_stops_and_names_it(tmp_path: Path) -> None:
    node = ControlNode(tmp_path / "node", "n1", ["--bootstrap"])
    try:
        node.start().wait_ready()
        node.create("kept")
        assert node.stop() == 0
        # As if a newer leader had proposed it.
        store = LogStore(node.data / "log", lambda _: None)
        stored = store.load()
        newer = commands.encode(commands.Proposal(commands.VERSION + 1, 0, ()))
        last = stored.entries[-1]
        entry = Entry(last.index + 1, stored.hard_state.term, EntryKind.NORMAL, newer)
        store.persist(None, None, (entry,))
        store.close()
        logged = len(node.log)
        node.start()
        assert node.wait() == 1
        assert f"commands of version {commands.VERSION + 1}" in node.log[logged:]
        assert "upgrade it" in node.log[logged:]
        assert "Traceback" not in node.log[logged:]
    finally:
        node.close()
