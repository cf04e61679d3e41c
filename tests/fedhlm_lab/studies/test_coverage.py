"""The certificate means what it says, counted on toy models (the full study: fedhlm lab coverage)."""

import json
from pathlib import Path

import pytest

from fedhlm_fleet.cli import main
from fedhlm_lab.studies.coverage import CoveragePlan, study

LIVES = 16


def test_the_truth_stays_under_the_limit_and_the_limit_goes_under_the_budget() -> None:
    found = study(CoveragePlan(), lives=LIVES)
    assert found.share_ever_above == 0.0
    assert found.share_below_budget >= 0.9
    assert found.audits_per_text <= 0.044
    assert found.lost_audits == 0
    # Not by skipping nothing, and not by estimating anything: R-hat is the truth on the average.
    assert found.skipped > 0.03
    assert found.mean_estimate == pytest.approx(found.mean_truth, abs=0.005)
    assert found.fleet_ratio is not None
    assert found.fleet_ratio <= 1.3
    assert found.different <= 24 * found.mean_truth + 1e-9


def test_the_command_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    assert (
        main(["lab", "coverage", "--lives", "2", "--texts", "3", "--seed", "7", "--jobs", "1", "--json", str(file)])
        == 0
    )
    found = json.loads(file.read_text("utf-8"))
    assert {"share_below_budget", "share_ever_above", "audits_per_text", "mean_limit", "mean_truth"} <= found.keys()
    assert (found["lives"], found["texts"]) == (2, 3)
    assert f"{found['mean_limit']:.4f}" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_said_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "coverage", "--json", "/nowhere/found.json"]) == 2
    assert "--json" in capsys.readouterr().err
