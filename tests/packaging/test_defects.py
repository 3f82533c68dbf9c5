"""tests/defects.py fits the checkout: what scripts/mutants.py will plant and run is there."""

from pathlib import Path

import pytest
from defects import DEFECTS

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name)
def test_a_defect_can_be_planted(defect):
    assert (TESTS.parent / defect.file).read_text().count(defect.old) == 1 and defect.new != defect.old
    assert defect.tests and all((TESTS / file).is_file() for file in defect.tests)


def test_names_are_unique():
    assert len({d.name for d in DEFECTS}) == len(DEFECTS)
