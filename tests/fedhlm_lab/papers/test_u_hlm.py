"""U-HLM's quantities: drafts and betas of the live couplings, the link model, the speed-ups, and the report."""

from pathlib import Path

import numpy as np
import pytest

from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.papers import u_hlm
from fedhlm_lab.papers.experiment import LabSample, UhlmExperiment
from fedhlm_lab.papers.findings import LabChart, LabResult
from fedhlm_lab.papers.report import markdown
from fedhlm_lab.papers.u_hlm import SpeedupPoint, observed, rate_of, sizes_of, snr_of, token_s
from fedhlm_lab.papers.u_hlm_figures import result_of
from fedhlm_lab.sim import toy
from tests.fedhlm_lab.papers import toys


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[u_hlm.UhlmRuns]:
    cache = tmp_path_factory.mktemp("laws")
    small = {
        "articles": 30,
        "questions": 40,
        "sample": 6,
        "taus": (0.0, 0.43, 1.0),
        "vocabularies": (64, 4096),
        "seeds": 2,
    }
    experiment = UhlmExperiment.load("u-hlm", LabSample(parameters=small))
    questions = toys.laws(cache)
    texts, source = toys.laws(cache, 30, 8), toys.source(questions)
    return [u_hlm.run(one, toys.pair(), source, texts, questions) for one in experiment.each_seed()]


@pytest.fixture
def runs(seeds: list[u_hlm.UhlmRuns]) -> u_hlm.UhlmRuns:
    return seeds[0]


def test_the_mean_of_beta_is_the_distance_of_both_laws(tmp_path: Path) -> None:
    laws = toys.laws(tmp_path, 200, 8)
    seen, _ = observed(laws, 1.0, 1)
    p, q = (np.exp(rows - rows.max(1, keepdims=True)) for rows in (laws.large.astype(float), laws.small.astype(float)))
    distance = 0.5 * np.abs(p / p.sum(1, keepdims=True) - q / q.sum(1, keepdims=True)).sum(1).mean()
    betas = [one.beta for one in seen["k-sample"]]
    assert np.mean(betas) == pytest.approx(distance, abs=4.0 * np.std(betas) / np.sqrt(len(betas)))


def test_drafts_and_doubts_are_those_of_an_agent_at_that_position(tmp_path: Path) -> None:
    laws = toys.laws(tmp_path, 5, 4)
    seen, _ = observed(laws, 1.0, 1)
    drafter = toy.ToyDrafter(agreement=toys.AGREEMENT)
    places = [(number, end) for number, p in enumerate(laws.prompts) for end in range(len(p.ids) - 3, len(p.ids) + 1)]
    for (number, end), one in zip(places, seen["k-sample"], strict=True):
        drawn = drafter.draft_now(
            laws.prompts[number].ids[:end], Sampling(1_000_003 + number, 1.0, 1.0, "full"), "k-sample"
        )
        assert one.doubt == drawn.uncertainty


def test_a_threshold_of_one_sends_nothing_and_costs_the_whole_distance(runs: u_hlm.UhlmRuns) -> None:
    assert (runs.rate(1.0), runs.error(-1.0)) == (0.0, 0.0)
    assert runs.error(1.0) == pytest.approx(np.mean([one.beta for one in runs.seen["k-sample"]]))
    assert runs.rate(0.0) >= runs.rate(0.43) >= runs.rate(1.0)
    fit = runs.fits["closed-form"]
    assert runs.error(fit.calibrated, "closed-form") <= runs.experiment.budget
    assert fit.a * fit.averse + fit.b == pytest.approx(0.0, abs=1e-9)
    assert fit.a * fit.prone + fit.b == pytest.approx(fit.delta)


def test_accuracy_is_the_llms_where_everything_is_sent(runs: u_hlm.UhlmRuns) -> None:
    assert runs.llm_right == pytest.approx(0.8)
    assert runs.accuracy[1.0][1] == 0.0
    assert runs.accuracy[0.0][0] == pytest.approx(runs.llm_right, abs=0.05)


def test_the_link_model_is_shannons() -> None:
    assert rate_of(0.0, 8.0e6) == pytest.approx(1.0e6)
    assert snr_of(rate_of(-11.2, 1e6), 1e6) == pytest.approx(-11.2)
    assert token_s(1000.0, 0.5, 2000.0, slm_s=0.02, llm_s=0.05) == pytest.approx(0.02 + 0.5 * 2.05)


def test_a_speedup_holds_at_the_rate_that_is_found_for_it_or_nowhere() -> None:
    thirty = SpeedupPoint(92_000.0, 86.25, 0.252, 0.02, 0.05)
    rate = thirty.rate_for(206.0)
    assert rate is not None
    assert thirty.at(rate) == pytest.approx(206.0)
    assert thirty.at(1e-9) == pytest.approx(thirty.most, rel=1e-3)
    squeezed = thirty._replace(sent_bytes=0.026 * 92_000.0)
    assert squeezed.most == pytest.approx(152.6, abs=0.05)
    assert squeezed.rate_for(206.0) is None


def test_sizes_are_those_of_the_live_encodings() -> None:
    sizes = sizes_of([4_096, 32_768], 1)
    assert sizes[4_096]["full"] == 2 * 4_096
    assert sizes[32_768]["gumbel"] == 2
    assert all(size["gumbel"] < size["lattice"] < size["published-cu"] < size["full"] for size in sizes.values())
    assert COUPLINGS["full"].law_size(b"", 4_096) == sizes[4_096]["full"]


def test_every_value_of_the_papers_has_ours_beside_it(seeds: list[u_hlm.UhlmRuns]) -> None:
    result: LabResult = result_of(seeds)
    assert len(result.compared) == 10
    assert all(row.published is not None for row in result.compared)
    slugs = [chart.slug for chart in result.charts] + [table.slug for table in result.tables]
    assert len(slugs) == len(set(slugs)) == 10  # each has a CSV file
    chart = result.charts[0]
    assert isinstance(chart, LabChart)
    line = chart.series[1]
    fits = [runs.fits["k-sample"] for runs in seeds]
    assert fits[0].a != fits[1].a
    for u, y in zip(line.x, line.y, strict=True):
        assert y == pytest.approx(np.mean([max(0.0, fit.a * float(u) + fit.b) for fit in fits]))
    assert (line.x[0], line.x[-1]) == (0.0, 1.0)
    assert max(line.band) > 0.0
    report = markdown(result)
    assert "152.6 times" in report
    assert "36 of 36 questions" in report
