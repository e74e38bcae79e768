"""`prismctl sandbox cp`: what arrives where, and what a hostile sandbox cannot reach."""

import json
import os
import signal
import stat
import threading
from pathlib import Path

import pytest
from google.rpc import status_pb2
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_cli.local_files import leads_out
from prism_cli.sandbox_cp import parse_place
from prism_common import errors
from tests.cli.conftest import Run, Spawn
from tests.cli.fake_prism import FakePrism

UNAVAILABLE = status_pb2.Status(code=14, message="Socket closed")
CUT = 3_000_000


@pytest.fixture
def here(tmp_path: Path) -> Path:
    made = tmp_path / "here"
    made.mkdir()
    return made


@pytest.fixture
def there(fake: FakePrism) -> Path:
    return fake.inside("/workspace")


def make_tree(root: Path) -> None:
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "one").write_bytes(b"one")
    (root / "a" / "b" / "run").write_bytes(b"#!/bin/sh\n")
    (root / "a" / "b" / "run").chmod(0o750)
    (root / "a" / "b").chmod(0o711)
    (root / "empty").write_bytes(b"")
    (root / "link").symlink_to("a/one")
    os.utime(root / "a" / "one", (1_500_000_000, 1_500_000_000))


def shape(root: Path) -> dict[str, tuple[object, ...]]:
    """What a copy keeps of a tree."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = ("directory", mode)
        else:
            found[name] = ("file", mode, path.read_bytes(), path.stat().st_mtime_ns)
    return found


# ── Where a copy goes ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "sandbox", "path"),
    [
        ("web:/tmp/x", "web", "/tmp/x"),
        ("web:out", "web", "/workspace/out"),
        ("web:", "web", "/workspace/"),
        ("./a:b", "", "./a:b"),
        ("/a:b", "", "/a:b"),
        ("dir/a:b", "", "dir/a:b"),
        ("-", "", "-"),
    ],
)
def test_places(text: str, sandbox: str, path: str) -> None:
    place = parse_place(text)
    assert (place.sandbox, place.path) == (sandbox, path)


def test_one_end_is_a_sandbox(inline: Run) -> None:
    for ends in (("a", "b"), ("a:x", "b:y"), ("", "a:x")):
        assert inline("sandbox", "cp", *ends).returncode == 2


def test_a_tree_comes_back_as_it_went(inline: Run, fake: FakePrism, here: Path) -> None:
    fake.put("web", pb.SANDBOX_STATE_READY)
    make_tree(here / "tree")
    result = inline("sandbox", "cp", str(here / "tree"), "web:", "-o", "json")
    assert (result.returncode, result.stderr) == (0, b"")
    assert json.loads(result.stdout) == {"files": 4, "bytes": 13, "failed": 0}
    assert shape(fake.inside("/workspace/tree")) == shape(here / "tree")
    assert inline("sandbox", "cp", "web:tree", str(here / "back")).returncode == 0
    assert shape(here / "back") == shape(here / "tree")


def test_a_directory_goes_into_one_that_exists_and_else_takes_the_name(
    inline: Run, there: Path, here: Path
) -> None:
    make_tree(here / "tree")
    for target in ("web:new", "web:", "web:new", "web:new/."):
        assert inline("sandbox", "cp", str(here / "tree"), target).returncode == 0
    assert sorted(one.name for one in there.iterdir()) == ["new", "tree"]
    assert sorted(one.name for one in (there / "new").iterdir()) == ["a", "empty", "link", "tree"]
    assert inline("sandbox", "cp", f"{here}/tree/.", "web:tree").returncode == 0
    assert not (there / "tree" / "tree").exists()
    for target in ("back", "back", "back/."):
        assert inline("sandbox", "cp", "web:tree", f"{here}/{target}").returncode == 0
    assert sorted(one.name for one in (here / "back").iterdir()) == ["a", "empty", "link", "tree"]
    assert inline("sandbox", "cp", "web:tree/.", str(here / "back")).returncode == 0
    assert sorted(one.name for one in (here / "back").iterdir()) == ["a", "empty", "link", "tree"]


def test_files_and_standard_streams(cli: Run, there: Path, here: Path) -> None:
    assert cli("sandbox", "cp", "-", "web:in", stdin=b"\x00\xff").returncode == 0
    assert (there / "in").read_bytes() == b"\x00\xff"
    assert cli("sandbox", "cp", "web:in", "-").stdout == b"\x00\xff"
    assert cli("sandbox", "cp", "web:in", f"{here}/").returncode == 0
    assert (here / "in").read_bytes() == b"\x00\xff"
    assert cli("sandbox", "cp", str(here / "in"), "web:other").returncode == 0
    assert (there / "other").read_bytes() == b"\x00\xff"


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("{here}/none", "web:", "{here}/none: No such file or directory"),
        ("{here}/fifo", "web:", "not a regular file; its contents can come by -"),
        ("{here}/file", "web:none/", "no such directory"),
        ("{here}/file", "web:none/x", "the directory that it would be in is missing"),
        ("{here}/dir", "web:file", "is a file, and SRC is a directory"),
        ("{here}/dir", "web:none/x", "the directory that it would be in is missing"),
        ("-", "web:dir", "is a directory; name the file to write"),
        ("web:none", "{here}", "web:/workspace/none: no such file"),
        ("web:dir", "-", "only a file is copied to -"),
        ("web:dir", "{here}/file", "is a file, and SRC is a directory"),
        ("web:file", "{here}/none/", "no such directory"),
        ("web:file", "{here}/none/x", "{here}/none: No such file or directory"),
        ("web:file", "{here}/fifo", "no regular file; to write into it, copy to -"),
        ("web:loop", "{here}", "too many links"),
        ("web:file/.", "{here}", "is a file, and not a directory"),
    ],
)
def test_what_cannot_be_is_said_and_leaves_nothing(
    inline: Run, there: Path, here: Path, source: str, target: str, words: str
) -> None:
    for root in (here, there):
        (root / "dir").mkdir()
        (root / "file").write_bytes(b"kept")
    os.mkfifo(here / "fifo")
    (there / "loop").symlink_to("loop")
    before = shape_names(here), shape_names(there)
    result = inline("sandbox", "cp", source.format(here=here), target.format(here=here))
    assert result.returncode == 1
    assert words.format(here=here) in result.stderr.decode()
    assert result.stderr.count(b"\n") == 1
    assert (shape_names(here), shape_names(there)) == before


def shape_names(root: Path) -> list[str]:
    return sorted(str(one) for one in root.rglob("*"))


def test_links_that_are_named_are_followed(inline: Run, there: Path, here: Path) -> None:
    make_tree(here / "tree")
    (here / "to-tree").symlink_to("tree")
    (there / "real").mkdir()
    (there / "to-real").symlink_to("/workspace/real")  # of the sandbox, and not of this machine
    assert inline("sandbox", "cp", str(here / "to-tree"), "web:to-real").returncode == 0
    assert (there / "real" / "to-tree" / "a" / "one").read_bytes() == b"one"
    (there / "x").symlink_to("real/to-tree/a/one")
    (here / "old").write_bytes(b"old")
    (here / "to-old").symlink_to("old")
    assert inline("sandbox", "cp", "web:x", str(here / "to-old")).returncode == 0
    assert (here / "to-old").is_symlink()
    assert (here / "old").read_bytes() == b"one"


# ── A hostile sandbox ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("directory", "target", "out"),
    [
        ((), "a", False),
        (("d",), "../a/b", False),
        (("d", "e"), "../..", False),
        ((), "..", True),
        (("d",), "../../a", True),
        ((), "/etc/passwd", True),
        # After a name, which may be a link itself, `..` may lead anywhere.
        (("d",), "a/..", True),
        (("d",), "x/../../..", True),
    ],
)
def test_links_that_may_lead_out(directory: tuple[str, ...], target: str, out: bool) -> None:
    assert leads_out(directory, target) is out


def file_named(name: str, kind: int = pb.FILE_TYPE_REGULAR, target: str = "") -> pb.FileInfo:
    path = f"/workspace/tree/{name}" if not name.startswith("/") else name
    return pb.FileInfo(path=path, type=kind, mode=0o4777, link_target=target)  # type: ignore[arg-type]


def test_names_of_a_hostile_sandbox_never_lead_out(
    inline: Run, fake: FakePrism, there: Path, here: Path
) -> None:
    (there / "tree").mkdir()
    (there / "tree" / "good").write_bytes(b"good")
    (there / "tree" / "good").chmod(0o4755)
    (there / "tree" / "late").write_bytes(b"late")
    link, directory = pb.FILE_TYPE_SYMLINK, pb.FILE_TYPE_DIRECTORY
    fake.hostile["/workspace/tree"] = [
        file_named(".."),
        file_named("."),
        file_named(""),
        file_named("x\0y"),
        file_named("bad\x1b[2Jname\ufffd"),
        file_named("..", directory),
        file_named("escape", link, "../../../etc"),
        file_named("absolute", link, str(here)),
        file_named("unclear", link, "a\0b"),
        # A link, and then a directory of the same name to write through it.
        file_named("inside", link, "good"),
        file_named("inside", directory),
        # A time that no file can have.
        file_named("late"),
    ]
    fake.hostile["/workspace/tree"][-1].modify_time.seconds = 2**62
    (here / "target").mkdir()
    result = inline("sandbox", "cp", "web:tree", str(here / "target" / "new"))
    assert result.returncode == 1
    assert b"\x1b" not in result.stderr
    assert "the node sent a name that no file can have" in result.stderr.decode()
    assert shape_names(here) == [
        str(here / name)
        for name in ("target", *(f"target/new{each}" for each in ("", "/good", "/inside", "/late")))
    ]
    assert stat.S_IMODE((here / "target/new/good").stat().st_mode) == 0o755  # no set-uid bit


def test_links_of_the_destination_are_not_written_through(
    inline: Run, there: Path, here: Path
) -> None:
    outside = here / "outside"
    outside.mkdir()
    (outside / "one").write_bytes(b"kept")
    make_tree(there / "tree")
    (here / "tree").mkdir()
    (here / "tree" / "a").symlink_to(outside)
    (here / "tree" / "empty").symlink_to(outside / "one")
    result = inline("sandbox", "cp", "web:tree", str(here))
    assert result.returncode == 1
    assert b"web:/workspace/tree/a: Not a directory" in result.stderr
    assert [one.name for one in outside.iterdir()] == ["one"]
    assert (outside / "one").read_bytes() == b"kept"
    assert not (here / "tree" / "empty").is_symlink()  # a link in a file's place is replaced


# ── Failures on the way ──────────────────────────────────────────────────────────────────────


def test_each_failure_is_said_and_the_rest_is_copied(
    inline: Run, fake: FakePrism, there: Path, here: Path
) -> None:
    make_tree(here / "tree")
    os.mkfifo(here / "tree" / "fifo")
    Path(os.fsdecode(bytes(here) + b"/tree/bad\xff")).write_bytes(b"x")
    (here / "tree" / "secret").write_bytes(b"x")
    (here / "tree" / "secret").chmod(0)
    (there / "tree" / "a" / "one").mkdir(parents=True)
    result = inline("sandbox", "cp", str(here / "tree"), "web:")
    assert result.returncode == 1
    said = result.stderr.decode().splitlines()
    assert len(said) == 3
    assert f"prismctl: {here}/tree/bad\\udcff: its name is not UTF-8, so it cannot be sent" in said
    assert stat.S_IMODE((there / "tree" / "secret").stat().st_mode) == 0o400
    assert any(line.startswith(f"prismctl: {here}/tree/fifo: not a regular") for line in said)
    assert any(line.startswith(f"prismctl: {here}/tree/a/one: ") for line in said)
    assert (there / "tree" / "a" / "b" / "run").exists()


def test_a_broken_file_is_begun_anew(inline: Run, fake: FakePrism, there: Path, here: Path) -> None:
    data = os.urandom(CUT + 500_000)
    (here / "big").write_bytes(data)
    fake.file_breaks.extend([(CUT, UNAVAILABLE), (0, UNAVAILABLE)])
    assert inline("sandbox", "cp", str(here / "big"), "web:").returncode == 0
    assert (there / "big").read_bytes() == data
    fake.file_breaks.append((CUT, UNAVAILABLE))
    assert inline("sandbox", "cp", "web:big", str(here / "back")).returncode == 0
    assert (here / "back").read_bytes() == data


def test_what_fails_leaves_what_was_there(
    inline: Run, fake: FakePrism, there: Path, here: Path
) -> None:
    for root in (here, there):
        (root / "big").write_bytes(bytes(CUT))
        (root / "old").write_bytes(b"old")
    full = errors.DiskFullError("no room is left in the sandbox")
    fake.file_breaks.append((CUT // 2, full))
    result = inline("sandbox", "cp", str(here / "big"), "web:old")
    assert (result.returncode, b"no room is left" in result.stderr) == (1, True)
    assert (there / "old").read_bytes() == b"old"
    fake.file_breaks.append((CUT // 2, errors.NotServedError("reading")))
    assert inline("sandbox", "cp", "web:big", str(here / "old")).returncode == 1
    assert (here / "old").read_bytes() == b"old"
    assert sorted(one.name for one in here.iterdir()) == ["big", "old"]


def test_a_sandbox_that_ends_ends_the_copy(
    inline: Run, fake: FakePrism, there: Path, here: Path
) -> None:
    make_tree(there / "tree")
    gone = errors.SandboxGoneError("the sandbox ended")
    fake.fail("ReadFile", *[gone] * 10)
    result = inline("sandbox", "cp", "web:tree", str(here))
    assert (result.returncode, result.stderr) == (1, b"prismctl: the sandbox ended\n")


def test_a_signal_ends_a_copy_and_leaves_nothing(
    spawn: Spawn, fake: FakePrism, there: Path, here: Path
) -> None:
    (here / "big").write_bytes(bytes(CUT))
    fake.write_gate = threading.Event()
    process = spawn("sandbox", "cp", str(here / "big"), "web:big")
    fake.wait_for_call("WriteFile")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    fake.write_gate.set()
    with fake.changed:
        assert fake.changed.wait_for(lambda: fake.writes_cut, 20)
    assert not (there / "big").exists()
    assert process.stderr is not None
    assert process.stderr.read() == b""


def test_a_file_that_does_not_move_is_given_up(
    cli: Run, fake: FakePrism, there: Path, here: Path
) -> None:
    (here / "big").write_bytes(bytes(CUT))
    fake.write_gate = threading.Event()
    result = cli("sandbox", "cp", str(here / "big"), "web:big", "--timeout", "1s")
    assert result.returncode == 1
    assert b"nothing of it was moved for 1 s; wait longer with --timeout" in result.stderr
    fake.write_gate.set()
    with fake.changed:
        assert fake.changed.wait_for(lambda: fake.writes_cut, 20)
    assert not (there / "big").exists()
