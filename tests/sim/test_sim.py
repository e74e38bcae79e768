"""A modest number of seeds, at each change; `python -m tests.sim.run` runs many."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest

from prism_control.raft.types import Configuration
from tests.sim.cluster import Cluster
from tests.sim.formation import Formation, Starter
from tests.sim.invariants import ViolationError
from tests.sim.options import Options
from tests.sim.plane.plane import Plane
from tests.sim.run import Result, main, replay_command, run_seed, shrink

_SEEDS = 300


@functools.cache
def _results(first: int) -> tuple[Result, ...]:
    return tuple(map(run_seed, range(first, first + 10)))


@pytest.mark.parametrize("first", range(0, _SEEDS, 10))
def test_no_seed_breaks_a_promise(first: int) -> None:
    failures = [
        f"{result.failure}\n  replay: {replay_command(result.seed)}"
        for result in _results(first)
        if result.failure
    ]
    assert failures == []


def test_the_seeds_exercise_what_they_are_for() -> None:
    results = [result for first in range(0, 60, 10) for result in _results(first)]
    assert sum(result.elections for result in results) > 100
    assert sum(result.acknowledged for result in results) > 3000
    assert sum(result.reads for result in results) > 500
    assert sum(result.crashes for result in results) > 100
    assert sum(result.changes for result in results) > 50
    assert sum(result.transfers for result in results) > 5
    assert sum(result.histories for result in results) > 20
    assert sum(result.plane_answers for result in results) > 500
    assert sum(result.plane_losses for result in results) > 0


def test_leaders_that_are_struck_at_once_break_no_promise() -> None:
    """Figure 8, again and again."""
    results = [
        run_seed(seed, Options.storm(3 + seed % 2 * 2, "short_reigns")) for seed in range(10)
    ]
    assert [result.failure for result in results if result.failure] == []
    assert sum(result.elections for result in results) > 50


def test_a_cluster_that_changes_all_the_time_breaks_no_promise() -> None:
    results = [
        run_seed(seed, Options.changes(1 + seed % 3, "crash", "partition", "wipe"))
        for seed in range(10)
    ]
    assert [result.failure for result in results if result.failure] == []
    assert sum(result.changes for result in results) > 50


def _form_clusters(seeds: int) -> None:
    for seed in range(seeds):
        Formation(seed).run()


def test_members_that_start_together_never_form_two_clusters() -> None:
    _form_clusters(1000)


def test_promises_that_are_not_kept_form_two_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Starter, "promised", Configuration())
    with pytest.raises(ViolationError, match="two clusters"):
        _form_clusters(1000)


def test_shrinking_finds_the_faults_that_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Cluster) -> None:
        self.faults.count = 8
        if not self.options.faults_left_out & {3, 6}:
            raise ValueError("as asked")

    monkeypatch.setattr(Cluster, "run", run)
    assert shrink(1) == [1, 2, 4, 5, 7, 8]


def test_the_whole_plane_does_the_same_for_the_same_seed() -> None:
    traces: list[list[str]] = []
    for _ in range(2):
        traces.append([])
        Plane(8, trace=traces[-1].append).run()
    assert len(traces[0]) > 100
    assert traces[0] == traces[1]


def _trace(seed: int) -> list[str]:
    lines: list[str] = []
    Cluster(seed, trace=lines.append).run()
    return lines


@pytest.mark.parametrize("seed", [3, 7, 11])
def test_the_same_seed_gives_the_same_trace(seed: int) -> None:
    first = _trace(seed)
    assert len(first) > 100
    assert _trace(seed) == first


def test_another_seed_gives_another_trace() -> None:
    assert _trace(3) != _trace(4)


def test_the_trace_does_not_depend_on_the_hash_seed() -> None:
    traces = [
        subprocess.run(
            [sys.executable, "-m", "tests.sim.run", "--seed", "8", "--trace"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            timeout=60,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert len(traces[0]) > 1000
    assert traces[0] == traces[1]


def test_a_failing_seed_prints_how_to_replay_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Cluster) -> None:
        raise ValueError("as asked")

    monkeypatch.setattr(Cluster, "run", fail)
    assert main(["--seeds", "1", "--first-seed", "9", "--processes", "1"]) == 1
    printed = capsys.readouterr().out
    assert "seed 9 FAILED: ValueError: as asked" in printed
    assert "replay: python -m tests.sim.run --seed 9 --trace" in printed
    assert main(["--seed", "9"]) == 1
    assert main(["--seed", "9", "--trace"]) == 1


def test_a_failing_seed_of_the_whole_plane_is_replayed_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Plane) -> None:
        raise ValueError("as asked")

    monkeypatch.setattr(Plane, "run", fail)
    assert main(["--plane", "--seeds", "1", "--first-seed", "13", "--processes", "1"]) == 1
    output = capsys.readouterr().out
    assert "seed 13 FAILED: plane: ValueError: as asked" in output
    assert replay_command(13, only_plane=True) in output
    assert main(["--plane", "--seed", "13", "--trace"]) == 1
