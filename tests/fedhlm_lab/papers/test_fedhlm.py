"""FedHLM's experiment: requests dealt out, rounds by the live federation, figures, files."""

import csv
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fedhlm.config import load
from fedhlm.learning.thresholds import paper_gradient
from fedhlm_lab.papers import fedhlm
from fedhlm_lab.papers.experiment import FedhlmExperiment
from fedhlm_lab.papers.fedhlm_figures import paper_loss, result_of
from fedhlm_lab.papers.findings import LabChart, LabResult
from fedhlm_lab.papers.intervals import SeedMean
from fedhlm_lab.papers.report import write
from fedhlm_lab.papers.requests import asked, dealt
from fedhlm_lab.papers.rounds import run_rounds
from tests.fedhlm_lab.papers import toys


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> LabResult:
    known = toys.laws(tmp_path_factory.mktemp("laws"))
    experiment = msgspec.structs.replace(toys.experiment(), paper=FedhlmExperiment.load("fedhlm").paper)
    seeds = experiment.each_seed()
    assert [one.seed for one in seeds] == [1, 2]
    return result_of([fedhlm.run(one, toys.pair(), toys.source(known), known) for one in seeds])


def test_every_request_is_dealt_once_and_topics_are_skewed() -> None:
    topics = ["a", "b", "c", "d"] * 10
    requests = asked(400, 40, 3)
    assert len({r.seed for r in requests}) == 400
    for alpha in (10.0, 0.1):
        parts = dealt(requests, topics, clients=5, rounds=7, alpha=alpha, seed=1)
        assert (len(parts), {len(clients) for clients in parts}) == (7, {5})
        assert sorted(r for clients in parts for mine in clients for r in mine) == sorted(requests)
    assert dealt(requests, topics, clients=5, rounds=7, alpha=0.1, seed=1) == parts


def test_the_published_threshold_only_rises_and_reaches_every_client(tmp_path: Path) -> None:
    known = toys.laws(tmp_path)
    config = load(preset="fedhlm", environ={}, flags={"generation.learning.learning_rate": "0.01"}).config
    requests = asked(320, 40, 1)
    parts = dealt(requests, [a.topic for a in toys.source(known).articles], clients=4, rounds=4, alpha=10.0, seed=1)
    run = run_rounds(config, toys.texts(known), parts, clusters=2, models=toys.FINGERPRINTS)
    assert len(run.outcomes) == len(requests)
    trace = [0.3, *(tau for tau in run.thresholds if tau is not None)]
    assert len(trace) == 5
    assert all(b >= a for a, b in pairwise(trace))
    assert trace[-1] > 0.3
    for number in (1, 2, 3):
        (tau,) = {o.made.tau for o in run.outcomes if o.round == number}
        assert tau == pytest.approx(trace[number])


def test_centroid_peers_settle_tokens_only_where_others_published(tmp_path: Path) -> None:
    known = toys.laws(tmp_path)
    parts = [[[r] for r in asked(8, 1, 1)]]  # one article: all keys are equal, so the centroid is the key itself
    flags = {"generation.tau": "0"}
    config = load(preset="fedhlm", environ={}, flags=flags).config
    run = run_rounds(config, toys.texts(known), parts, clusters=2, models=toys.FINGERPRINTS)
    sources = [o.made.source for o in run.outcomes]
    assert sources[:2] == ["cloud", "cloud"]  # the first of each cluster
    assert set(sources[2:]) == {"peer"}
    assert fedhlm.hit_ratio([o.made for o in run.outcomes]) == 6 / 8


def test_the_loss_is_the_integral_of_the_gradient() -> None:
    pairs, step = np.array([[0.7, 0.2]]), 1e-6
    for tau in (0.1, 0.5, 0.9):
        high, low = (paper_loss(pairs[:, 0], tau + s, 0.2, gamma=10.0, lam=0.01)[0] for s in (step, -step))
        assert (high - low) / (2 * step) == pytest.approx(paper_gradient(pairs, tau, 10.0, 0.01), rel=1e-5)


def test_a_result_holds_every_figure_and_our_value_beside_each_of_the_papers(result: LabResult) -> None:
    assert {c.slug for c in result.charts} == {
        "fig-4a", "fig-4b", "fig-5", "fig-7-published", "fig-7-calibrated", "fig-8", "fig-9", "fig-10"
    }  # fmt: skip
    places = {row.paper.place for row in result.compared}
    assert places == {"Fig. 4", "Fig. 5", "Table III", "Fig. 7", "Table IV", "Table V", "Fig. 9", "Table VI", "Fig. 10"}
    known = {(row.paper.place, row.paper.name): row.published for row in result.compared}
    assert known["Fig. 10", "speculative decoding"] == pytest.approx(0.8)  # the toy LLM errs on every fifth article
    layers = [known["Table III", layer] for layer in ("local", "peers", "cloud")]
    assert sum(layer.mean for layer in layers if isinstance(layer, SeedMean)) == pytest.approx(1.0)
    simulator = next(table for table in result.tables if table.slug == "simulator")
    assert [row[1] for row in simulator.rows] == [row[2] for row in simulator.rows] == [12] * 6


def test_every_seed_deals_the_topics_out_anew_and_figures_have_their_bands(result: LabResult) -> None:
    charts = {chart.slug: chart for chart in result.charts if isinstance(chart, LabChart)}
    assert any(any(line.band) for line in charts["fig-10"].series)
    assert any(any(layer.band) for layer in charts["fig-7-published"].series)
    assert len(charts["fig-9"].series[0].x) > 4  # the four clients of each seed
    routing = next(table for table in result.tables if table.slug == "routing")
    assert any(isinstance(cell, SeedMean) for row in routing.rows for cell in row)


def test_files_of_a_result_are_whole_and_equal_the_second_time(result: LabResult, tmp_path: Path) -> None:
    files = {path.name: path for path in write(result, tmp_path / "one")}
    again = write(result, tmp_path / "two")
    assert [path.read_bytes() for path in files.values()] == [path.read_bytes() for path in again]
    assert files["fig-8.png"].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in files["fig-8.svg"].read_bytes()
    with files["baselines.csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert sum(float(rows[0][layer]) for layer in ("local", "peers", "cloud")) == pytest.approx(160)
    environment = msgspec.json.decode(files["environment.json"].read_bytes())
    assert set(environment) >= {"fedhlm", "python", "libraries", "requests", "seed"}
    report = files["report.md"].read_text()
    assert "![" in report
    assert "72 of 72 requests" in report
