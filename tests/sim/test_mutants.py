"""The simulator finds known bugs; a simulator that finds nothing proves nothing."""

from __future__ import annotations

import pytest

from tests.sim.mutants import MUTANTS, Mutant
from tests.sim.run import run_seed


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.title for mutant in MUTANTS])
def test_a_known_bug_is_found(mutant: Mutant) -> None:
    with mutant.active():
        found = any(run_seed(seed, mutant.options).failure for seed in range(mutant.seeds_max))
    assert found, f"{mutant.title}: not found within {mutant.seeds_max} seeds"
