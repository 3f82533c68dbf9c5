"""tests/mutants.py fits the checkout: what scripts/mutants.py will plant and run is there."""

from pathlib import Path

import pytest
from mutants import MUTANTS

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_defect_can_be_planted(mutant):
    assert (TESTS.parent / mutant.file).read_text().count(mutant.old) == 1 and mutant.new != mutant.old
    assert mutant.tests and all((TESTS / file).is_file() for file in mutant.tests)


def test_names_are_unique():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
