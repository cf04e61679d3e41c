"""What liars can do, counted on toy models (the full study: python -m fedhlm_lab.studies.liars)."""

from dataclasses import dataclass

import pytest

from fedhlm.config import load
from fedhlm_lab.studies.liars import HONEST, LiarsSetting, Life, study

BUDGET = 0.05


@dataclass
class Mean:
    truth: float
    messages: float


def mean(lives: list[Life], *, here: bool) -> Mean:
    group = [life for life in lives if life.here is here]
    return Mean(*(sum(getattr(life, name) for life in group) / len(group) for name in ("truth", "messages")))


@pytest.mark.parametrize("lie", ["bin-0", "seen", "bin-63", "harmless", "harmful", "drift"])
def test_one_of_two_and_two_of_five_change_nothing_for_the_honest(lie: str) -> None:
    config = load(preset="budget", environ={}, flags={"generation.budget": str(BUDGET)}).config
    for members, liars in ((2, 1), (5, 2)):
        calm, misled = (
            study(config, LiarsSetting(members, f, name, 0.0, 40, 24), seeds=[1])
            for f, name in ((0, HONEST), (liars, lie))
        )
        for here in (True, False):
            assert mean(misled, here=here).truth <= BUDGET
            assert mean(misled, here=here).messages <= 1.1 * mean(calm, here=here).messages
