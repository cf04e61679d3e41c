"""All presets on all links: figures of toy fleets, what they mean, and the pictures."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from msgspec.structs import replace

from cloud_verifier.engine import Engine, EngineInput, EngineOutput
from fedhlm.decoding.decoder import Decoder, DecoderInput, DecoderOutput
from fedhlm.errors import ConfigError
from fedhlm_lab.papers import pareto
from fedhlm_lab.papers.desk import LlmJudge, WrittenTexts
from fedhlm_lab.papers.experiment import LabSample, ParetoExperiment
from fedhlm_lab.papers.findings import LabPanels
from fedhlm_lab.papers.pair import folder_pair, paced
from fedhlm_lab.papers.pareto import PresetPoint
from fedhlm_lab.papers.pareto_figures import Findings, result_of
from fedhlm_lab.papers.quantities import AGREES, CALLS, SPEED
from fedhlm_lab.papers.report import markdown
from fedhlm_lab.papers.texts import TimedText
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.pace import KEPT, measured, remembered
from fedhlm_zoo.shipped import model_folder
from tests.fedhlm_lab.papers import toys

PRESETS = ("colocated", "exact", "llm-only", "slm-only", "u-hlm")


def experiment(**changes: object) -> ParetoExperiment:
    """The shipped one, smaller."""
    small = {"presets": PRESETS, "links": ("lan", "lte"), "seeds": 2, "texts": 2, "tokens": 12, "warm": 2, **changes}
    return ParetoExperiment.load("pareto", LabSample(parameters=small))


@pytest.fixture(scope="module")
def runs() -> pareto.ParetoRuns:
    wanted, rng = experiment(), random.Random(1)
    prompts = [[rng.randrange(1, toy.VOCAB_SIZE) for _ in range(4)] for _ in range(pareto.prompts_needed(wanted))]
    return pareto.run(wanted, toys.pair(), "toy texts", prompts)


def test_every_preset_has_a_point_on_every_link_with_every_seed(runs: pareto.ParetoRuns) -> None:
    assert len(runs.points) == len(PRESETS) * 2 * 2
    assert {(p.preset, p.link, p.seed) for p in runs.points} == {
        (preset, link, seed) for preset in PRESETS for link in ("lan", "lte") for seed in (1, 2)
    }
    assert {point.preset for point in runs.alone} == set(PRESETS)
    assert all(point.tokens == point.wanted for point in runs.alone)


def test_the_texts_of_exact_presets_are_the_llms_and_those_of_the_slm_are_not(runs: pareto.ParetoRuns) -> None:
    found = Findings(runs)
    for link in found.links:
        assert {"colocated", "exact", "llm-only"} <= set(found.exact(link))
        assert 0.5 < found.mean(AGREES, link, "slm-only").mean < 0.99
        assert found.mean(AGREES, link, "u-hlm").mean > found.mean(AGREES, link, "slm-only").mean


def test_drafts_at_the_cloud_save_calls_and_no_round_trip(runs: pareto.ParetoRuns) -> None:
    found = Findings(runs)
    for link in found.links:
        calls = {preset: found.mean(CALLS, link, preset).mean for preset in PRESETS}
        assert calls["slm-only"] == 0.0
        assert calls["colocated"] < 0.8 * calls["llm-only"]
        assert found.mean(SPEED, link, "colocated").mean > found.mean(SPEED, link, "llm-only").mean
    one = next(p.written for p in runs.points if p.preset == "colocated")
    assert one.sent == one.texts  # a text of 12 tokens is one chunk
    assert one.settled == {"cloud": one.tokens}
    slower = {link: found.mean(SPEED, link, "exact").mean for link in found.links}
    assert slower["lte"] < slower["lan"]


def test_a_token_counts_by_what_the_llm_would_emit_after_the_same_text() -> None:
    prompt, text = [5, 6], [7, 8, 9]
    expected = sum(int(np.argmax(toy.large_logits([*prompt, *text[:i]]))) == token for i, token in enumerate(text))
    judge = LlmJudge(toys.pair().large)
    for _ in range(2):
        assert judge.agreed(TimedText(prompt, text, [], 0.0, 1.0)) == expected
    own = [int(np.argmax(toy.large_logits(prompt)))]
    assert judge.agreed(TimedText(prompt, own, [], 0.0, 1.0)) == 1


def point(preset: str, agreed: int, seconds: float, sent: float) -> PresetPoint:
    return PresetPoint(preset, "lan", 1, WrittenTexts(1, 100, agreed, 0, {}, seconds, 0.1, sent, 1.0, 1.0, 1, 1))


def test_the_frontier_has_what_no_other_preset_beats_in_everything() -> None:
    points = [
        point("best", 100, 1.0, 10.0),
        point("as-good-and-slower", 100, 2.0, 10.0),
        point("cheap", 90, 4.0, 1.0),
        point("worse-than-cheap", 90, 5.0, 1.0),
    ]
    found = Findings(pareto.ParetoRuns(experiment(), "", [*points, *(p._replace(seed=2) for p in points)], [], {}))
    assert found.frontier("lan") == ["best", "cheap"]


def test_the_report_says_where_the_rival_wins_and_shows_every_link(runs: pareto.ParetoRuns) -> None:
    result = result_of(runs)
    text = markdown(result)
    assert "| `colocated` |" in text
    assert "## On lte" in text
    assert "Without a link the first token comes after" in text
    for chart in result.charts:
        assert isinstance(chart, LabPanels)
        assert all([series.name for series in panel.series] == list(PRESETS) for panel in chart.panels)
    assert [panel.slug for panel in result.charts[0].panels] == ["lan", "lte"]  # type: ignore[union-attr]


@pytest.mark.parametrize(("key", "value"), [("presets", "exakt"), ("links", "ltee")])
def test_an_unknown_name_is_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} must be one of .* \(got '{value}'\)"):
        pareto.run(experiment(**{key: (value,)}), toys.pair(), "", [])


async def test_a_remembered_engine_says_what_the_engine_says_and_asks_it_once() -> None:
    asked = 0

    async def forward(requests: Sequence[EngineInput]) -> list[EngineOutput]:
        nonlocal asked
        asked += len(requests)
        return toy.large_outputs(requests)

    engine = Engine(toy.ToyCache(), forward)
    known = remembered(engine)
    ids = [5, 6, 7, 8]
    (first,) = await known.forward([EngineInput(known.empty_cache, ids[:2], 0)])
    assert isinstance(first, EngineOutput)
    assert (len(first.logits), asked) == (0, 0)  # a context is read for nobody
    for _ in range(2):
        (second,) = await known.forward([EngineInput(first.cache.truncated(2), ids[2:], 2)])
        assert isinstance(second, EngineOutput)
        assert np.array_equal(second.logits, [toy.large_logits(ids[:3]), toy.large_logits(ids)])
        assert second.cache.ids == tuple(ids)
    assert asked == 1


async def test_a_remembered_text_goes_on_from_its_own_cache() -> None:
    """A long text is read once, not again for each token; one whose cache is gone is read anew, to the same logits."""
    read: list[int] = []

    async def forward(requests: Sequence[EngineInput]) -> list[EngineOutput]:
        read.extend(len(request.ids) for request in requests)
        return toy.large_outputs(requests)

    known = remembered(Engine(toy.ToyCache(), forward))
    texts = [[1 + number % 7, 2 + number % 5, 3 + number % 11] for number in range(KEPT + 2)]
    ends = []
    for ids in texts:
        (output,) = await known.forward([EngineInput(known.empty_cache, ids, 1)])
        assert isinstance(output, EngineOutput)
        ends.append(output.cache)
    for number, lengths in ((-1, [1]), (0, [4])):
        read.clear()
        (output,) = await known.forward([EngineInput(ends[number], [40], 1)])
        assert isinstance(output, EngineOutput)
        assert np.array_equal(output.logits[0], toy.large_logits([*texts[number], 40]))
        assert read == lengths


def test_times_are_measured_of_a_pair_of_ones_own() -> None:
    """The seconds in the file are those of the shipped models."""
    asked, folder = experiment(), str(model_folder("", "slm"))
    assert paced(asked, folder_pair()) == asked
    found = paced(asked, folder_pair(folder, folder))
    assert found.device_s != asked.device_s
    assert found.device_s == found.beside_s
    assert all(0.0 < sum(pace) < 0.5 for pace in (found.device_s, found.large_s))
    assert replace(found, device_s=asked.device_s, beside_s=asked.beside_s, large_s=asked.large_s) == asked


def test_a_pace_is_the_line_through_the_fastest_calls_of_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, now_s, calls = Decoder.load(model_folder("", "slm")), 0.0, 0
    forward = decoder.forward

    def slow(requests: Sequence[DecoderInput]) -> list[DecoderOutput]:
        nonlocal now_s, calls
        calls += 1
        now_s += 0.01 + 0.002 * len(requests[0].ids) + (0.5 if calls % 3 else 0.0)  # others use the machine as well
        return forward(requests)

    monkeypatch.setattr(decoder, "forward", slow)
    found = measured(decoder, repeats=6, clock_s=lambda: now_s)
    assert found.call_s == pytest.approx(0.01)
    assert found.token_s == pytest.approx(0.002)
    assert found.seconds(10) == pytest.approx(0.03)
