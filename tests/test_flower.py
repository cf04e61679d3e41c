"""The published threshold federation beside Flower: equal thresholds from two programs that share no code."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.errors import FedhlmError
from fedhlm.settings import Learning
from fedhlm_lab.papers.device import LabOutcome
from fedhlm_lab.papers.rounds import ClientOutcome, RunRecord, verbatim_thresholds
from tests.fedhlm_lab.papers import toys

FOLDER = Path(__file__).parents[1] / "benchmarks" / "flower"
PYTHON = os.environ.get("FEDHLM_FLOWER", "")  # a Python that has flwr (benchmarks/flower/requirements.txt)


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"flower_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PUBLISHED, BESIDE = loaded("published"), loaded("beside")
UNIT = st.floats(0.0, 1.0)
PAIRS = st.lists(st.tuples(UNIT, UNIT), max_size=4)


@given(
    rounds=st.lists(st.lists(PAIRS, min_size=5, max_size=5), min_size=1, max_size=6),
    clusters=st.integers(1, 3),
    start=UNIT,
    rate=st.floats(0.0001, 1.0),
)
def test_the_peers_rule_is_the_products(
    rounds: list[list[list[tuple[float, float]]]], clusters: int, start: float, rate: float
) -> None:
    learning = Learning(learning_rate=rate)
    outcomes = [
        ClientOutcome(number, client, LabOutcome("cloud", 1, True, True, u, beta, False, False, 0.0))
        for number, clients in enumerate(rounds)
        for client, pairs in enumerate(clients)
        for u, beta in pairs
    ]
    if not outcomes:
        return
    last = max(outcome.round for outcome in outcomes)
    ours = verbatim_thresholds(RunRecord(outcomes, []), learning, start=start, clients=5, clusters=clusters)
    rule = PUBLISHED.Rule(learning.gamma, rate, learning.decay, learning.regularisation)
    theirs = PUBLISHED.trajectory(rule, rounds[: last + 1], clusters, start)
    assert ours == pytest.approx(theirs, abs=BESIDE.AGREE)


@pytest.fixture(scope="module")
def observations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small run of FedHLM's experiment on toy models."""
    laws = toys.laws(tmp_path_factory.mktemp("laws"))
    found: dict[str, Any] = json.loads(
        json.dumps(BESIDE.observations(toys.experiment(), toys.pair(), toys.source(laws), laws))
    )
    return found


def peer_of(known: dict[str, Any]) -> dict[str, Any]:
    """What the peer says, by its rule without Flower."""
    rule = PUBLISHED.Rule(**known["rule"])
    thresholds = PUBLISHED.trajectory(rule, known["rounds"], known["clusters"], known["start"])
    cost = {"messages": 8, "down_bytes": 100, "up_bytes": 100, "seconds": 0.5}
    return {"thresholds": thresholds, "costs": [cost] * len(thresholds)}


def test_both_agree_on_what_a_federation_saw(observations: dict[str, Any]) -> None:
    assert len(observations["rounds"]) == 4
    assert observations["ours"][-1] > observations["start"]
    result = BESIDE.report_of(observations, peer_of(observations))
    assert "differ by at most" in result.sentences[0]
    costs = {row[0]: row[1:] for row in result.tables[0].rows}
    messages, up, down, _ = costs["this federation"]
    # Four clients in two clusters: theirs and the clusters' own contributions go up, and both kinds of answers down.
    assert messages == 4 + 2 + 2 + 4
    assert min(up, down) > 100


def test_thresholds_that_differ_are_an_error(observations: dict[str, Any]) -> None:
    peer = peer_of(observations)
    peer["thresholds"][1] += 2e-9
    with pytest.raises(FedhlmError, match=r"thresholds must agree to 1e-09 \(got 2e-09\)"):
        BESIDE.report_of(observations, peer)


@pytest.mark.slow
def test_flower_agrees_as_well(observations: dict[str, Any], tmp_path: Path) -> None:
    if not PYTHON:
        pytest.skip("no Python with flwr is named (FEDHLM_FLOWER)")
    known, out = tmp_path / "observations.json", tmp_path / "peer.json"
    known.write_text(json.dumps(observations), "utf-8")
    command = [PYTHON, str(FOLDER / "peer.py"), str(known), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    peer = json.loads(out.read_text("utf-8"))
    assert peer["thresholds"] == pytest.approx(observations["ours"], abs=BESIDE.AGREE)
    assert all(cost["up_bytes"] > 0 for cost in peer["costs"])


def test_the_committed_result_is_of_these_programs() -> None:
    report = (FOLDER.parents[1] / "docs" / "results" / "flower" / "report.md").read_text("utf-8")
    assert "Flower's thresholds and ours differ by at most" in report


def test_a_file_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "beside.py"), "report", "a", "b"]
    environ = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environ, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
