"""The table of docs/scaling.md."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.table import BEGIN, END, replaced, table
from prism_cli.bench.figures import Bar, Outcome, Round
from prism_cli.bench.report import write_json
from tests.integration import harness

MACHINE = {"processor": "p, 2 cores", "fsync p50": "0.20 ms", "load average": "1.00"}
BARS = (Bar("ready_per_s", "at least", 1800), Bar("lost", "at most", 0))


def rendered(*rounds: dict[str, float]) -> str:
    return table(MACHINE, [Outcome("w", "a load", BARS, [Round(dict(one)) for one in rounds])])


def test_a_line_has_medians_ranges_units_and_whether_a_bar_is_held() -> None:
    text = rendered(
        {"ready_per_s": 1500, "p99_ms": 7, "lost": 0, "sandboxes": 10},
        {"ready_per_s": 1700, "p99_ms": 7, "lost": 0, "sandboxes": 10},
    )
    assert (
        "| a load | ready 1,600/s [1,500–1,700]; p99 7 ms | ready ≥ 1,800/s: **missed** |" in text
    )
    assert "20 acknowledged sandboxes" in text
    assert "none was lost" in text
    assert "**missed**" not in rendered({"ready_per_s": 1800})


def test_one_lost_sandbox_is_named_in_its_line_and_at_the_end() -> None:
    text = rendered({"ready_per_s": 2000, "lost": 0}, {"ready_per_s": 2000, "lost": 1})
    assert "lost ≤ 0: **missed**" in text
    assert "Broken promises: lost 1" in text


def test_what_was_skipped_or_broke_off_says_why() -> None:
    outcomes = [
        Outcome("a", "first", skipped="no etcd"),
        Outcome("b", "second", error="UNAVAILABLE: no leader", rounds=[Round({"p50_ms": 1})]),
    ]
    text = table(MACHINE, outcomes)
    assert "| first | skipped: no etcd | |" in text
    assert "| second | broke off: UNAVAILABLE: no leader | |" in text
    assert "| second | p50 1 ms |  |" in text


@pytest.mark.parametrize("page", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_page_without_one_pair_of_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="needs one"):
        replaced(page, "text")


def test_only_what_is_between_the_markers_is_replaced(tmp_path: Path) -> None:
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    write_json(results, MACHINE, [Outcome("w", "a load", (), [Round({"p50_ms": 2})])])
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    done = subprocess.run(
        [sys.executable, "bench/table.py", str(results), f"--write={page}"],
        env=harness.environment(), cwd=harness.ROOT, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "| a load | p50 2 ms |  |" in text
    assert "old" not in text


def test_docs_have_the_markers() -> None:
    page = (harness.ROOT / "docs" / "scaling.md").read_text()
    assert "| a |" in replaced(page, "| a |")
