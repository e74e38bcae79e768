"""Figures of a run: percentiles, summaries of rounds, and the bars they are held against."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

#: Above this share of a core the load measures itself.
CLIENT_CPU_MAX: Final = 0.9
#: Figures that are promises: one above 0 in one round fails the run, whatever its speed.
EXACT: Final = ("lost", "duplicated", "double_runs", "leftovers")


class SkippedError(Exception):
    """A workload cannot run here; the text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure should be on a machine with two cores."""

    figure: str
    kind: Literal["at least", "at most"]
    limit: float

    def holds(self, value: float) -> bool:
        """Whether a value meets it."""
        return value >= self.limit if self.kind == "at least" else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.kind == 'at least' else '≤'} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Summary:
    """One figure over all rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return shown(self.median)
        return f"{shown(self.median)} [{shown(self.low)}–{shown(self.high)}]"


@dataclass(slots=True)
class Round:
    """What one round of a workload gave."""

    #: Figures by name, the unit last in the name.
    figures: dict[str, float] = field(default_factory=dict)
    #: Failed calls by reason.
    refused: dict[str, int] = field(default_factory=dict)
    #: Each success: seconds since the round began, and its latency in seconds.
    timeline: list[tuple[float, float]] = field(default_factory=list)
    #: Share of a core that the load itself took.
    client_cpu: float = 0.0
    #: Of the machine when the round began; above the number of cores others took their share.
    load_average: float = 0.0


@dataclass(slots=True)
class Outcome:
    """One workload and its rounds so far, or why there are none."""

    name: str
    summary: str
    bars: Sequence[Bar] = ()
    rounds: list[Round] = field(default_factory=list)
    #: Why it cannot run here.
    skipped: str = ""
    #: What broke a round off: its figures are missing.
    error: str = ""

    @property
    def valid(self) -> bool:
        """Whether the load had processor time to spare in every round."""
        return all(one.client_cpu <= CLIENT_CPU_MAX for one in self.rounds)

    @property
    def failed(self) -> bool:
        """Whether a promise was broken or a round broke off: never a matter of speed."""
        broken = any(one.figures.get(name, 0) > 0 for one in self.rounds for name in EXACT)
        return broken or bool(self.error)


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """Return the nearest-rank percentile of sorted values: the least that covers the fraction.

    Raises:
        ValueError: There are no values, or the fraction is not above 0 and at most 1.
    """
    if not ordered or not 0 < fraction <= 1:
        raise ValueError(f"no percentile {fraction} of {len(ordered)} values")
    rank = -(-len(ordered) * round(fraction * 1_000_000) // 1_000_000)
    return ordered[rank - 1]


def latencies_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p99 and p99.9 in milliseconds; nothing where nothing succeeded."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    named = (("p50_ms", 0.5), ("p99_ms", 0.99), ("p999_ms", 0.999))
    return {name: percentile(ordered, fraction) * 1e3 for name, fraction in named}


def summarize(values: Sequence[float]) -> Summary:
    """Return the median and the range of at least one value."""
    return Summary(statistics.median(values), min(values), max(values))


def summaries(rounds: Sequence[Round]) -> dict[str, Summary]:
    """Return each figure's summary over the rounds that have it, in the order of appearance."""
    names = dict.fromkeys(name for one in rounds for name in one.figures)
    return {
        name: summarize([one.figures[name] for one in rounds if name in one.figures])
        for name in names
    }


def shown(value: float) -> str:
    """Return a number with about three digits."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
