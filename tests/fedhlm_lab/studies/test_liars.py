"""What liars can do, counted on toy models (the full study: python -m fedhlm_lab.studies.liars)."""

from dataclasses import dataclass
from functools import cache

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


@cache
def lives(members: int, liars: int, lie: str) -> list[Life]:
    config = load(preset="budget", environ={}, flags={"generation.budget": str(BUDGET)}).config
    return study(config, LiarsSetting(members, liars, lie, 0.0, 30, 24), seeds=[1])


@pytest.mark.parametrize(
    ("lie", "members", "liars"),
    [
        *((lie, 2, 1) for lie in ("bin-0", "seen", "bin-63", "harmless", "harmful", "drift")),
        ("harmless", 5, 2),
    ],
)
def test_liars_below_half_change_nothing_for_the_honest(lie: str, members: int, liars: int) -> None:
    calm, misled = lives(members, 0, HONEST), lives(members, liars, lie)
    for here in (True, False):
        assert mean(misled, here=here).truth <= BUDGET
        assert mean(misled, here=here).messages <= 1.1 * mean(calm, here=here).messages
