"""The error budget means what it says, counted on toy models (the full study: python -m fedhlm_lab.studies.coverage)."""

from fedhlm_lab.studies.coverage import study

RUNS = 12


def test_the_truth_stays_under_the_limit_and_the_budget() -> None:
    lives = study(runs=RUNS, generations=40, tokens=24, budget=0.05, audit=0.0105)
    assert all(life.truth <= life.limit for life in lives)
    assert all(life.truth <= 0.05 for life in lives)
    # Not by skipping nothing, and not by estimating anything: R-hat is the truth on the average.
    assert sum(life.skipped for life in lives) / RUNS > 0.03
    truth, estimate = (sum(getattr(life, name) for life in lives) / RUNS for name in ("truth", "estimate"))
    assert abs(truth - estimate) < 0.005
    assert all(life.different <= 24 * life.truth + 1e-9 for life in lives)
