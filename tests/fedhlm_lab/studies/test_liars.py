"""What liars can do, counted on toy models (the full study: fedhlm lab liars)."""

import json
from functools import cache
from pathlib import Path

import pytest
from msgspec.structs import replace

from fedhlm_fleet.cli import main
from fedhlm_lab.sim.liars import LIES
from fedhlm_lab.studies.liars import (
    CALIBRATED,
    HONEST,
    PAPER,
    SHOUTS,
    LiarsCell,
    LiarsPlan,
    LiarsSetting,
    Life,
    cell_of,
    lives_of,
    misses,
)

SMALL = LiarsPlan(members=(2,), texts=15, seed=1)


@cache
def lives(members: int, liars: int, lie: str, rule: str = CALIBRATED) -> list[Life]:
    return lives_of(LiarsSetting(rule, members, liars, lie, SMALL))[1]


def cells(members: int, liars: int, lie: str, rule: str = CALIBRATED) -> list[LiarsCell]:
    """What the honest had in the liars' own cluster, and in the other one."""
    told = []
    for here in (True, False):
        calm = cell_of(LiarsSetting(rule, members, 0, HONEST, SMALL), lives(members, 0, HONEST, rule), here)
        setting = LiarsSetting(rule, members, liars, lie, SMALL)
        told.append(cell_of(setting, lives(members, liars, lie, rule), here, calm))
    return told


@pytest.mark.parametrize("lie", LIES)
def test_one_liar_of_two_changes_nothing_for_the_honest(lie: str) -> None:
    for cell in cells(2, 1, lie):
        assert cell.error <= SMALL.budget
        assert cell.messages_ratio <= 1.1
        assert not misses(SMALL, cell)


def test_liars_below_half_change_nothing_for_the_honest() -> None:
    assert not any(misses(SMALL, cell) for cell in cells(5, 2, "harmless"))


def test_a_liar_under_the_published_rule_changes_nothing_for_the_honest() -> None:
    for cell in cells(2, 1, SHOUTS[0], PAPER):
        assert cell.error <= SMALL.budget
        assert cell.tau_moved <= 0.05
        assert not misses(SMALL, cell)


def test_what_the_published_rule_costs_without_liars_is_no_miss() -> None:
    cell = cells(2, 1, SHOUTS[0], PAPER)[0]
    worse = replace(cell, error=0.2, error_more=0.0)
    assert not misses(SMALL, worse)
    assert misses(SMALL, replace(worse, error_more=0.01))
    assert misses(SMALL, replace(worse, messages_ratio=1.2))
    assert misses(SMALL, replace(worse, rule=CALIBRATED))


def test_a_plan_has_one_liar_and_the_most_below_half() -> None:
    plan = LiarsPlan(members=(2, 5, 32), lies=("bin-0",))
    assert [(s.rule, s.members, s.liars) for s in plan.settings() if s.rule == CALIBRATED] == [
        (CALIBRATED, 2, 0),
        (CALIBRATED, 2, 1),
        (CALIBRATED, 5, 0),
        (CALIBRATED, 5, 1),
        (CALIBRATED, 5, 2),
        (CALIBRATED, 32, 0),
        (CALIBRATED, 32, 1),
    ]


def test_the_command_writes_every_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "liars.json"
    words = ["--members", "2", "--lies", "bin-0", "--texts", "3", "--tokens", "6", "--jobs", "1", "--json", str(out)]
    code = main(["lab", "liars", *words])
    told = json.loads(out.read_text("utf-8"))
    assert [(cell["rule"], cell["liars"], cell["lie"], cell["here"]) for cell in told["cells"]] == [
        (rule, liars, lie, here)
        for rule, lies in (("calibrated-fl", ["bin-0"]), ("paper-fl", ["harmful", "harmless"]))
        for liars, lie in ((0, HONEST), *((1, lie) for lie in lies))
        for here in (True, False)
    ]
    assert code == int(told["missed"] > 0)
    assert "| calibrated-fl | 1 of 2 | bin-0 |" in capsys.readouterr().out


def test_an_unknown_lie_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "liars", "--lies", "half-truth"]) == 2
    assert capsys.readouterr().err.startswith("fedhlm: --lies must be one of bin-0, ")
