"""Rounds of workloads that break off."""

from collections.abc import Sequence
from typing import cast

import grpc
import grpc.aio
import pytest

from prism_cli.bench.figures import Outcome, Round, SkippedError
from prism_cli.bench.runner import run_workloads
from prism_cli.bench.target import Target
from prism_cli.bench.workloads import Size, Workload
from prism_cli.errors import CliError


class FoundTarget:
    """A cluster that is always found."""

    async def find(self) -> None:
        """It is there."""


class Kept:
    """What was told after each round: workloads' rounds so far."""

    def __init__(self) -> None:
        self.counts: list[list[int]] = []

    def __call__(self, outcomes: Sequence[Outcome]) -> None:
        self.counts.append([len(outcome.rounds) for outcome in outcomes])


async def run(*workloads: Workload, rounds: int = 2) -> tuple[list[Outcome], Kept]:
    kept = Kept()
    target = cast("Target", FoundTarget())
    return await run_workloads(target, workloads, rounds, Size(), kept), kept


def workload(name: str, *results: Round | Exception) -> Workload:
    rest = list(results)

    async def work(target: Target, size: Size) -> Round:
        result = rest.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    return Workload(name, "", work)


def unavailable() -> grpc.aio.AioRpcError:
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing, "no leader")


async def test_each_round_goes_through_all_and_is_kept_at_once() -> None:
    _, kept = await run(workload("a", Round(), Round()), workload("b", Round(), Round()))
    assert kept.counts == [[1, 0], [1, 1], [2, 1], [2, 2]]


async def test_a_round_that_breaks_off_costs_no_other_round() -> None:
    group = ExceptionGroup("several", [ExceptionGroup("inner", [unavailable()])])
    outcomes, _ = await run(
        workload("a", Round({"x": 1}), CliError("it hangs")),
        workload("b", group, Round({"x": 2})),
        workload("c", TimeoutError(), Round()),
    )
    assert [len(outcome.rounds) for outcome in outcomes] == [1, 1, 1]
    assert "it hangs" in outcomes[0].error
    assert outcomes[1].error == "UNAVAILABLE: no leader"
    assert outcomes[2].error == "it took too long"
    assert all(outcome.failed for outcome in outcomes)


async def test_what_cannot_run_here_is_not_tried_again() -> None:
    outcomes, kept = await run(workload("a", SkippedError("no agents")))
    assert outcomes[0].skipped == "no agents"
    assert not outcomes[0].failed
    assert kept.counts == [[0]]


async def test_a_bug_is_not_taken_for_a_figure() -> None:
    with pytest.raises(ExceptionGroup, match="several"):
        await run(workload("a", ExceptionGroup("several", [ValueError("a bug")])))
