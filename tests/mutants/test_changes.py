"""The list of changes fits the tree: each rule stands where it says, and one change is noticed."""

from pathlib import Path

import pytest

from tests.mutants.change import Change
from tests.mutants.changes import CHANGES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.rule)
def test_the_rule_stands_once_where_it_says(change: Change) -> None:
    assert (ROOT / change.file).read_text("utf-8").count(change.before) == 1
    assert change.before != change.after
    assert all((ROOT / test).is_file() for test in change.tests)
