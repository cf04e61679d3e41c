"""The certificate means what it says, counted on toy models (the full study: fedhlm lab coverage)."""

import json
from pathlib import Path

import pytest

from fedhlm.errors import ConfigError
from fedhlm_fleet.cli import main
from fedhlm_lab.sim import toy
from fedhlm_lab.studies.coverage import CoveragePlan, SavedLives, live, study

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


SHORT = CoveragePlan(texts=3, tokens=8)


def test_a_life_is_the_same_whatever_laws_are_known_already() -> None:
    warm = [live(SHORT, seed) for seed in (1, 2, 1)]
    for cache in (toy.known_large, toy.known_small, toy.known_key):
        cache.cache_clear()
    assert warm[0] == warm[2] == live(SHORT, 1)
    assert warm[1].messages > 0


def test_a_study_goes_on_with_the_lives_that_are_missing(tmp_path: Path) -> None:
    saved, ran = SavedLives(tmp_path / "lives", SHORT), list[int]()
    whole = study(SHORT, lives=4, seed=5)
    study(SHORT, lives=2, seed=6, saved=saved)
    with (tmp_path / "lives").open("ab") as file:
        file.write(b'[{"texts":3')  # killed while it wrote
    assert study(SHORT, lives=4, seed=5, saved=saved, ended=lambda life: ran.append(life.seed)) == whole
    assert ran == [6, 7, 5, 8]
    (tmp_path / "lives").write_bytes((tmp_path / "lives").read_bytes().replace(b'"wrong":', b'"wrong":1', 1))
    assert study(SHORT, lives=4, seed=5, saved=saved) != whole  # saved lives are not run again


def test_saved_lives_of_other_texts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lives"
    study(SHORT, lives=1, saved=SavedLives(path, SHORT))
    longer = CoveragePlan(texts=4, tokens=8)
    with pytest.raises(ConfigError, match="--saved must be a file of lives with these texts and settings"):
        study(longer, lives=1, saved=SavedLives(path, longer))
    path.write_text("text\n", "utf-8")
    with pytest.raises(ConfigError, match="--saved must be a file of lives"):
        study(SHORT, lives=1, saved=SavedLives(path, SHORT))


def test_figures_do_not_depend_on_which_life_ends_first() -> None:
    assert study(SHORT, lives=9, jobs=2) == study(SHORT, lives=9)


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
