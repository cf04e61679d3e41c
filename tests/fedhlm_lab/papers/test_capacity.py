"""Agents per verifier: costs between measured calls, capacity on lines between fleets, and toy fleets end to end."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.decoding.decoder import Decoder
from fedhlm.errors import ConfigError, FedhlmError
from fedhlm_lab.papers import capacity
from fedhlm_lab.papers.capacity_figures import CapacityFindings, capacity_of, result_of
from fedhlm_lab.papers.experiment import CapacityExperiment, LabSample
from fedhlm_lab.papers.report import markdown
from fedhlm_lab.sim import toy, verifier_costs
from fedhlm_lab.sim.pace import CallTally, ModelPace
from fedhlm_lab.sim.verifier_costs import PairCosts, VerifierCall
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_zoo.shipped import model_folder
from tests.fedhlm_lab.papers import toys

GRID = [VerifierCall(b, w, c, 0.01 + 0.001 * b * w + 0.0001 * c) for b in (1, 4) for w in (1, 3) for c in (0, 100)]
COSTS = PairCosts("toy", GRID, ModelPace(0.001))


def test_a_call_between_measured_ones_costs_what_lies_between() -> None:
    pace = COSTS.pace()
    for call in GRID:
        assert pace.of_call(call.batch, call.width, call.context) == pytest.approx(call.seconds)
    assert pace.of_call(2, 2, 50) == pytest.approx(0.01 + 0.001 * 4 + 0.0001 * 50)
    assert pace.of_call(8, 3, 0) == pytest.approx(0.01 + 0.001 * 24)  # beyond the grid the last line goes on
    assert pace.of_call(1, 1, 0) == pytest.approx(0.011)


def test_a_cheaper_verifier_saves_on_what_goes_beyond_the_smallest_call() -> None:
    assert COSTS.pace(10.0).of_call(4, 3, 0) == pytest.approx(0.011 + 0.011 / 10.0)
    assert COSTS.pace(10.0).of_call(1, 1, 0) == pytest.approx(0.011)


@pytest.mark.parametrize(
    ("speeds", "target", "expected"),
    [
        ((9.0, 5.0, 1.0), 10.0, 0.0),
        ((9.0, 5.0, 3.0), 2.0, 16.0),
        ((9.0, 5.0, 1.0), 3.0, 8.0),
        ((9.0, 5.0, 1.0), 5.0, 4.0),
    ],
)
def test_capacity_lies_on_lines_between_fleets(speeds: tuple[float, ...], target: float, expected: float) -> None:
    assert capacity_of((1, 4, 16), speeds, target) == pytest.approx(expected)


def test_costs_are_measured_once_and_a_file_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("BATCHES", (1, 2)), ("WIDTHS", (1,)), ("CONTEXTS", (4,)), ("REPEATS", 1)):
        monkeypatch.setattr(verifier_costs, name, value)
    small, large = (Decoder.load(model_folder("", name)) for name in ("slm", "llm"))
    first = PairCosts.load_or_measure(tmp_path, "a pair", large, small)
    assert [call[:3] for call in first.calls] == [(1, 1, 4), (2, 1, 4)]
    assert all(call.seconds > 0.0 for call in first.calls)
    (file,) = tmp_path.iterdir()
    assert PairCosts.load_or_measure(tmp_path, "a pair", large, small) == first
    file.write_text("{}")
    with pytest.raises(FedhlmError, match="must be one of ours"):
        PairCosts.load_or_measure(tmp_path, "a pair", large, small)


def experiment(**changes: object) -> CapacityExperiment:
    """The shipped one, smaller."""
    small = {
        "agents": (1, 6),
        "verifiers": {"cpu": {"cheaper": 1.0, "batch_tokens": 32}},
        "targets": (2.0,),
        "mixed": (),
        **changes,
    }
    return CapacityExperiment.load("capacity", LabSample(quick=True, parameters=small))


def test_more_agents_are_slower_and_drafts_save_calls() -> None:
    rng, wanted = random.Random(1), experiment(presets=("exact", "llm-only"))
    prompts = [[rng.randrange(1, toy.VOCAB_SIZE) for _ in range(4)] for _ in range(wanted.prompts)]
    runs = capacity.run(wanted, toys.pair(), COSTS, "toy texts", prompts)
    assert len(runs.points) == 2 * 2 * wanted.seeds
    found = CapacityFindings(runs)
    for preset in wanted.presets:
        assert found.speed("cpu", preset, 6).mean < found.speed("cpu", preset, 1).mean
    calls = {p: sum(x.calls for x in runs.points if x.preset == p and x.agents == 1) for p in wanted.presets}
    assert calls["exact"] < calls["llm-only"]
    assert all(0.0 < point.busy_s <= point.wall_s for point in runs.points)
    text = markdown(result_of(runs))
    assert "## Capacity of the verifier cpu" in text
    assert "agents beside `llm-only`: `exact`" in text


def test_fleets_of_several_presets_begin_with_what_others_have_learnt_and_have_long_prompts_too() -> None:
    rng, two = random.Random(2), {"cpu": {"cheaper": 1.0, "batch_tokens": 32}}
    two["deadlines"] = two["cpu"] | {"text_tokens_s": 10.0}
    wanted = experiment(presets=("llm-only",), mixed=("exact", "budget"), long=30, agents=(2, 4), verifiers=two)
    prompts = [[rng.randrange(1, toy.VOCAB_SIZE) for _ in range(4)] for _ in range(wanted.prompts)]
    runs = capacity.run(wanted, toys.pair(), COSTS, "toy texts", prompts)
    assert {point.preset for point in runs.points} == {"llm-only", capacity.MIXED}
    assert all(len(point.speeds) == point.agents and min(point.waits) > 0.0 for point in runs.points)
    computed = {
        n: sum(p.positions for p in runs.points if p.preset == capacity.MIXED and p.agents == n) for n in (2, 4)
    }
    assert computed[4] > 2 * computed[2] + 2 * wanted.seeds * 20, "the fourth agent's prompts are long"
    text = markdown(result_of(runs))
    assert "The earliest deadline goes first, at 10 tokens a second." in text
    assert "agents with 2 tokens/s" in text


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), least=st.integers(1, 60))
def test_longer_prompts_begin_with_their_own_and_have_at_least_so_many_tokens(lengths: list[int], least: int) -> None:
    prompts = [[number] * length for number, length in enumerate(lengths)]
    for own, made in zip(prompts, capacity.longer(prompts, least), strict=True):
        assert made[: len(own)] == own
        assert len(made) == max(least, len(own))


def test_a_fleet_that_learns_leaves_files_of_edge_and_cloud() -> None:
    tally, wanted = CallTally(), experiment()
    prompts = [[5, 6, number] for number in range(1, 9)]
    fleet = capacity.CountedFleet(
        wanted, toys.pair().fleet(tally=tally), tally, wanted.verifiers["cpu"],
        capacity.Crowd(("budget",), 4), seed=1, prompts=prompts,
    )  # fmt: skip
    files = run_virtual(fleet.learn())
    assert set(files) == {"cloud", "edge-0"}
    assert all(data for part in files.values() for data in part.values())
    assert any(files.values())


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"presets must be one of .* \(got 'exakt'\)"):
        capacity.run(experiment(presets=("exakt",)), toys.pair(), COSTS, "", [])
