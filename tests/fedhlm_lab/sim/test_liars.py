"""A liar in a simulated fleet: the honest keep to their budget, and a rule that is taken out lets them exceed it."""

from typing import Any

import numpy as np
import pytest

from edge_agent import policy
from fedhlm.learning.curve import Bins, Curve
from fedhlm.learning.thresholds import tau_of_budget
from fedhlm_lab.sim import faults, links
from fedhlm_lab.sim.faults import Event
from fedhlm_lab.sim.liars import LIES
from fedhlm_lab.sim.scenario import Scenario
from fedhlm_lab.sim.simulator import RunTotals, Violation, simulate

LAN = links.load("lan")


def fleet(lie: str | None, **options: Any) -> Scenario:
    number = 0 if lie is None else 1 + list(LIES).index(lie)
    schedule = (Event(0.0, "liar", "agent-0", 60.0, float(number)),) if number else ()
    settings: dict[str, Any] = {"agents": 4, "prompts": 30, "tokens": 24, "temperature": 0.0, "agreement": 0.85}
    return Scenario(
        seed=1, preset="budget", clusters=2, link=LAN, upstream=LAN, schedule=schedule, **(settings | options)
    )


@pytest.fixture(scope="module")
def honest() -> RunTotals:
    """The same fleet without a liar."""
    return simulate(fleet(None))


@pytest.mark.parametrize("lie", LIES)
def test_the_honest_keep_to_their_budget_and_still_skip(honest: RunTotals, lie: str) -> None:
    misled = simulate(fleet(lie))
    assert misled.faults["liar"] == 1
    assert misled.tokens["local"] > 0
    assert misled.tokens["cloud"] <= 1.1 * honest.tokens["cloud"]


def test_a_liar_may_crash_and_come_back_among_all_other_faults() -> None:
    for seed in range(3):
        simulate(fleet(None, prompts=3, temperature=0.8).with_faults("all") if seed else fleet("bin-0", prompts=2))


def test_shares_from_the_cluster_break_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule as it was: decisions and evidence of all members together."""
    boast = LIES["bin-0"](Curve.empty(), 1)

    def pooled(own: Curve, m: Bins, rho: float, delta: float) -> float:
        return tau_of_budget(own + boast, np.minimum(m, own.harm / np.maximum(own.weight, 1.0)), rho, delta)

    monkeypatch.setattr(policy, "tau_of_budget", pooled)
    with pytest.raises(Violation, match="wrong ones must be"):
        simulate(fleet("bin-0"))


def test_lies_are_drawn_for_agents_only() -> None:
    scenario = fleet(None)
    drawn = {
        (event.target, event.amount)
        for seed in range(40)
        for event in faults.schedule(faults.parse("liar"), scenario.targets(), seed=seed, calm_s=8.0)
    }
    assert {target for target, _ in drawn} == set(scenario.agent_names())
    assert {amount for _, amount in drawn} == {float(i) for i in range(1, len(LIES) + 1)}
