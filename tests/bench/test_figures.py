"""The arithmetic of the benchmark."""

import json
from pathlib import Path

import pytest

from prism_cli.bench.figures import Bar, Outcome, Round, latencies_ms, percentile, summaries
from prism_cli.bench.report import as_data, buckets, from_data, markdown, rows, write_json
from prism_cli.bench.target import commit_figures
from prism_cli.bench.workloads import CONTROL
from prism_cli.errors import CliError

BURST = next(each for each in CONTROL if each.name == "burst-1k")


def outcome(*rounds: Round) -> Outcome:
    return Outcome("w", "what it does", BURST.bars, list(rounds))


def test_percentile_is_the_least_value_that_covers_the_fraction() -> None:
    values = [float(value) for value in range(1, 101)]
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile(values, 0.999) == 100
    assert percentile([7.0], 0.01) == 7


@pytest.mark.parametrize(("values", "fraction"), [([], 0.5), ([1.0], 0.0), ([1.0], 1.1)])
def test_percentile_of_nothing_is_refused(values: list[float], fraction: float) -> None:
    with pytest.raises(ValueError, match="no percentile"):
        percentile(values, fraction)


def test_latencies_do_not_depend_on_order() -> None:
    assert latencies_ms([0.003, 0.001, 0.002])["p50_ms"] == pytest.approx(2)
    assert latencies_ms([]) == {}


def test_bars_hold_at_their_limit() -> None:
    assert Bar("x", "at least", 5).holds(5)
    assert not Bar("x", "at least", 5).holds(4.9)
    assert Bar("x", "at most", 5).holds(5)
    assert not Bar("x", "at most", 5).holds(5.1)


def test_summary_is_the_median_and_the_range() -> None:
    found = summaries([Round({"a": 1}), Round({"a": 9, "b": 4}), Round({"a": 2})])
    assert (found["a"].median, found["a"].low, found["a"].high) == (2, 1, 9)
    assert str(found["b"]) == "4"


def test_one_lost_sandbox_in_one_round_is_a_miss_and_a_failure() -> None:
    one = outcome(Round({"lost": 0}), Round({"lost": 1}), Round({"lost": 0}))
    assert [row[4] for row in rows([one]) if row[1] == "lost"] == ["miss"]
    assert one.failed
    assert not outcome(Round({"lost": 0})).failed


def test_a_busy_load_makes_the_run_invalid_rather_than_missed() -> None:
    one = outcome(Round({"ready_per_s": 10}, client_cpu=0.95))
    assert not one.valid
    assert [row[4] for row in rows([one]) if row[1] == "ready_per_s"] == ["invalid"]


def test_skipped_says_why() -> None:
    text = markdown({}, [Outcome("burst-1k", "", skipped="no agents")])
    assert "| burst-1k |  |  |  | skipped: no agents |" in text


def test_commits_in_one_moment_have_no_rate() -> None:
    assert commit_figures([1.0, 1.0]) == {}
    assert commit_figures([]) == {}
    assert commit_figures([1.0, 1.5, 3.0]) == {"commits_per_s": 1.5}


def test_buckets_count_each_success_once() -> None:
    timeline = [(0.1, 0.01), (0.2, 0.02), (6.0, 0.03)]
    points = buckets(timeline)
    assert sum(rate for _, rate, _ in points) * 0.1 == pytest.approx(3)
    assert points[-1][0] == pytest.approx(6.0)
    assert points[-1][2] == pytest.approx(30)
    assert buckets([]) == []


def test_what_broke_off_is_a_failure_and_keeps_its_earlier_rounds() -> None:
    one = outcome(Round({"ready_per_s": 10}))
    one.error = "UNAVAILABLE: no leader"
    text = markdown({}, [one])
    assert one.failed
    assert "failed: UNAVAILABLE: no leader" in text
    assert "| ready_per_s | 10 |" in text


def test_json_gives_the_same_table_back(tmp_path: Path) -> None:
    first = outcome(Round({"ready_per_s": 10, "lost": 0}, {"QUEUE_FULL": 3}, client_cpu=0.5))
    outcomes = [first, Outcome("other", "", skipped="no agents"), Outcome("broken", "", error="x")]
    file = tmp_path / "result.json"
    write_json(file, {"processor": "p"}, outcomes)
    machine, found = from_data(json.loads(file.read_text()))
    assert markdown(machine, found) == markdown({"processor": "p"}, outcomes)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("data", [{}, {"machine": {}}, {"machine": {}, "workloads": [{}]}])
def test_json_of_something_else_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not what a benchmark wrote"):
        from_data(data)


def test_json_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(CliError, match=r"--json: .*No such file"):
        write_json(tmp_path / "none" / "result.json", {}, [])


def test_every_exact_figure_fails_a_run() -> None:
    for name in ("lost", "duplicated", "double_runs", "leftovers"):
        assert outcome(Round({name: 1})).failed
        assert not outcome(Round({name: 0})).failed
    assert as_data({}, [])["workloads"] == []
