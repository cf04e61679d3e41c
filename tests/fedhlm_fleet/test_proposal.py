"""The pipeline that is proposed for a pair follows from formulas: properties of the best shapes, and sums by hand."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.pipeline import PIPELINES
from fedhlm.config import load
from fedhlm_fleet.pair_files import PAIR_FILE
from fedhlm_fleet.pair_report import LINKS, LinkShapes, LinkSpeed, PairReport, reasons_of, shapes_of, toml_of
from fedhlm_fleet.proposal import (
    PairRates,
    PipelineChoice,
    best_ahead,
    best_block,
    best_drafts,
    best_tree,
    fastest,
    reaches,
)
from fedhlm_lab.sim import links
from fedhlm_lab.sim.pace import ModelPace
from fedhlm_zoo.evaluate import Agreement

SHARES = st.floats(0.0, 1.0, allow_subnormal=False)
SECONDS = st.floats(1e-4, 0.5)
RATES = st.builds(
    lambda first, rest, step_s, call_s, token_s: PairRates(
        (first, *((1.0 - first) * rest * 0.5**rank for rank in range(1, 8))), step_s, ModelPace(call_s, token_s)
    ),
    SHARES,
    SHARES,
    SECONDS,
    SECONDS,
    SECONDS,
)
TRIPS = st.lists(st.floats(0.0, 10.0), min_size=2, max_size=4)
GOOD = PairRates((0.7, 0.12, 0.05, 0.02), 0.003, ModelPace(0.010, 0.006))


@given(RATES, TRIPS)
def test_a_longer_round_trip_never_makes_a_block_or_a_tree_smaller(rates: PairRates, trips: list[float]) -> None:
    blocks = [best_block(rates, trip_s).settings["block"] for trip_s in sorted(trips)]
    nodes = [best_tree(rates, trip_s).settings["nodes"] for trip_s in sorted(trips)]
    assert blocks == sorted(blocks, key=int)
    assert nodes == sorted(nodes, key=int)


@given(RATES, TRIPS)
def test_a_longer_round_trip_is_never_faster(rates: PairRates, trips: list[float]) -> None:
    for best in (best_block, best_ahead, best_tree):
        speeds = [best(rates, trip_s).tokens_s for trip_s in sorted(trips)]
        assert all(later <= sooner * (1 + 1e-12) for sooner, later in itertools.pairwise(speeds))


@given(RATES, st.floats(0.0, 10.0), st.floats(0.0, 1.0))
def test_better_drafts_never_make_a_block_shorter(rates: PairRates, trip_s: float, share: float) -> None:
    worse = rates._replace(ranks=(rates.ranks[0] * share, *rates.ranks[1:]))
    assert int(best_block(worse, trip_s).settings["block"]) <= int(best_block(rates, trip_s).settings["block"])


def test_drafts_that_are_never_accepted_are_sent_one_by_one() -> None:
    never = PairRates((0.0,) * 8, 0.003, ModelPace(0.010, 0.006))
    assert next(choice.settings for choice in fastest(never, 0.0))["kind"] in PIPELINES
    assert best_block(never, 1.0).settings["block"] == 1
    assert best_drafts(never) == 0
    assert best_drafts(GOOD._replace(step_s=1e-4, large=ModelPace(0.05))) > 4
    assert best_drafts(GOOD._replace(step_s=1.0)) == 0


def test_drafts_that_are_always_accepted_fill_the_longest_block() -> None:
    always = PairRates((1.0,), 0.001, ModelPace(0.010, 0.0))
    assert best_block(always, 1.0).settings["block"] == 32
    ahead = best_ahead(always, 0.05)
    assert ahead.tokens_s == pytest.approx(1 / 0.001)  # nothing waits: as fast as drafting
    assert fastest(always, 0.05)[0] == ahead


def test_the_speeds_are_those_of_the_sums() -> None:
    choice = best_block(GOOD, 0.1)
    block = int(choice.settings["block"])
    tokens = (1 - 0.7 ** (block + 1)) / (1 - 0.7)
    assert choice.tokens_s == pytest.approx(tokens / (0.1 + block * 0.003 + 0.010 + 0.006 * (block + 1)))
    tree = best_tree(GOOD._replace(ranks=(0.7,)), 0.1)
    assert tree.tokens_s <= choice.tokens_s * (1 + 1e-9)  # a tree of one candidate is a block


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4))
def test_a_tree_has_the_likeliest_nodes(weights: list[float]) -> None:
    ranks = sorted((0.99 * weight / sum(weights) for weight in weights), reverse=True)
    found = reaches(ranks, 20)
    level, every = [1.0], list[float]()
    for _ in range(9 if len(ranks) == 1 else 4):
        level = [share * rank for share in level for rank in ranks]
        every += level
    expected = sorted(every, reverse=True)
    for reach, share in zip(found, expected, strict=False):
        if share <= max(level):  # deeper nodes than these may come first
            break
        assert reach.share == pytest.approx(share)
    assert [reach.share for reach in found] == sorted((reach.share for reach in found), reverse=True)
    chain = [reach for reach in found if reach.chain]
    assert [reach.share for reach in chain] == pytest.approx([ranks[0] ** (1 + at) for at in range(len(chain))])
    assert not any(reach.aside for reach in chain)


def report_of(shape: PipelineChoice | None) -> PairReport:
    settings = dict(shape.settings) if shape else {}
    return PairReport(
        slm="slm",
        llm="llm",
        projection="",
        agreement=Agreement(
            prompts=1, greedy=0.5, greedy_tokens=2, gumbel=0.7, gumbel_tokens=10, temperature=0.8, ranks=GOOD.ranks
        ),
        draft_step_s=0.003,
        step_s=0.016,
        block_s=0.058,
        speeds=(
            LinkSpeed(preset="exact", link="lte", tokens_s=9.0, agreed=1.0),
            LinkSpeed(preset="exact", link="lte", tokens_s=11.0, agreed=1.0, shape="some", settings=settings),
        ),
        shapes=tuple(
            LinkShapes(link=link, shapes=tuple(fastest(GOOD, links.load(link).round_trip_s))) for link in LINKS
        ),
        preset="exact",
        pipeline=settings,
    )


@pytest.mark.parametrize("best", [best_block, best_ahead, best_tree])
def test_the_configuration_has_the_pipeline_and_why(
    best: Callable[[PairRates, float], PipelineChoice], tmp_path: Path
) -> None:
    report = report_of(choice := best(GOOD, 0.1))
    (file := tmp_path / PAIR_FILE).write_text(toml_of(report))
    pipeline = load(file=file, environ={}).config.generation.pipeline
    assert {key: getattr(pipeline, key) for key in choice.settings} == choice.settings
    reasons = "\n".join(reasons_of(report))
    assert "accepts 70% of drafts" in reasons
    assert "exact, some: 11.0\n#   exact: 9.0" in reasons
    for of in report.shapes:
        assert f"{of.link}: {of.shapes[0].shape}" in reasons
        assert of.shapes[2].shape in shapes_of(report)


def test_without_a_pipeline_the_presets_own_counts(tmp_path: Path) -> None:
    (file := tmp_path / PAIR_FILE).write_text(toml_of(report_of(None)))
    assert (
        load(file=file, environ={}).config.generation.pipeline
        == load(preset="exact", environ={}).config.generation.pipeline
    )
