"""The simulator finds known bugs; a simulator that finds nothing proves nothing."""

from __future__ import annotations

import pytest

from tests.sim.mutant import Mutant
from tests.sim.mutants import ALL

#: The others take longer; `make mutants` tries them all.
_QUICK = [mutant for mutant in ALL if mutant.is_quick]


@pytest.mark.parametrize("mutant", _QUICK, ids=[mutant.title for mutant in _QUICK])
def test_a_known_bug_is_found(mutant: Mutant) -> None:
    assert mutant.seeds_needed(), f"{mutant.title}: not found within {mutant.seeds_max} seeds"


def test_at_least_25_bugs_are_known() -> None:
    assert len(ALL) >= 25
    assert len({mutant.title for mutant in ALL}) == len(ALL)
