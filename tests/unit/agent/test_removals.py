"""Files that nobody needs any more are removed, beside the loop, and only those."""

import asyncio
from pathlib import Path

from prism_agent.removals import Removals, remove_tree


def _files(directory: Path, count: int) -> list[Path]:
    directory.mkdir()
    paths = [directory / f"{number}.ring" for number in range(count)]
    for path in paths:
        path.touch()
    return paths


async def _until_gone(paths: list[Path]) -> None:
    for _ in range(20_000):
        if not any(path.exists() for path in paths):
            return
        await asyncio.sleep(0.001)
    raise AssertionError("they were not removed")


async def test_many_are_removed_by_a_thread_and_a_few_wait(tmp_path: Path) -> None:
    removals = Removals()
    paths = _files(tmp_path / "execs", 20)
    for path in paths[:19]:
        removals.add(path, 1)
    await _until_gone(paths[:16])
    assert all(path.exists() for path in paths[16:])
    # One that takes much does not wait for others.
    removals.add(paths[19], 1 << 30)
    await _until_gone(paths)


async def test_what_is_added_faster_than_it_is_removed_is_removed_at_once(tmp_path: Path) -> None:
    removals = Removals()
    paths = _files(tmp_path / "execs", 200)
    for path in paths:
        removals.add(path, 1)
        # No thread can tell of its end meanwhile, as nothing is awaited.
    assert sum(path.exists() for path in paths[16:]) < 64 + 16


async def test_a_new_directory_of_the_same_name_is_left_alone(tmp_path: Path) -> None:
    removals = Removals()
    old = tmp_path / "execs"
    for path in _files(old, 16):
        removals.add(path, 1)
    # Its thread may have begun or not.
    old.rename(tmp_path / "old")
    new = _files(old, 16)
    await _until_gone([tmp_path / "old" / path.name for path in new])
    assert all(path.exists() for path in new)


def test_a_tree_is_removed_though_something_of_it_goes_meanwhile(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    _files(tree, 2)
    remove_tree(tree)
    assert not tree.exists()
    remove_tree(tree)
