"""Shrinking finds what matters and nothing else; what it finds is kept in a trace and fails again from there."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fedhlm.errors import TraceError
from fedhlm_lab.sim import links
from fedhlm_lab.sim.invariants import Violation
from fedhlm_lab.sim.recording import SOURCE, save, scenario_of
from fedhlm_lab.sim.scenario import Scenario
from fedhlm_lab.sim.shrink import attempt, shrink
from fedhlm_lab.sim.sweep import SweepPlan
from fedhlm_traces.file import Header, Writer, read

START = Scenario(seed=3, link=links.load("lte"), upstream=links.load("lan")).with_faults("all")


@given(
    guilty=st.sets(st.integers(0, len(START.schedule) - 1), max_size=4),
    agents=st.integers(1, 4),
    tokens=st.integers(1, 16),
)
@settings(max_examples=40, deadline=None)
def test_what_is_left_is_what_it_takes(guilty: set[int], agents: int, tokens: int) -> None:
    """On a made-up fault that needs certain events, so many agents and tokens: no event can be spared in the end."""
    needed = {START.schedule[i].at_s for i in guilty}

    def fails(scenario: Scenario) -> Violation | None:
        enough = scenario.agents >= agents and scenario.tokens >= tokens
        return Violation("ends", "", 0.0) if enough and needed <= {e.at_s for e in scenario.schedule} else None

    # Events at places that are gone with their agents would go too; here every event may stay.
    small = shrink(START, Violation("ends", "", 0.0), runs_max=5_000, run=fails)
    assert fails(small.scenario)
    assert {e.at_s for e in small.scenario.schedule} == needed
    assert small.scenario.tokens == tokens
    assert small.runs < 1_500
    for i in range(len(small.scenario.schedule)):
        kept = (*small.scenario.schedule[:i], *small.scenario.schedule[i + 1 :])
        assert fails(replace(small.scenario, schedule=kept)) is None


def test_another_failure_is_not_taken_for_this_one() -> None:
    def fails(scenario: Scenario) -> Violation | None:
        return Violation("ends" if len(scenario.schedule) > 5 else "source", "", 0.0)

    small = shrink(START, Violation("ends", "", 0.0), run=fails)
    assert small.violation.name == "ends"
    assert len(small.scenario.schedule) == 6


def test_shrinking_ends_after_so_many_runs() -> None:
    assert shrink(START, Violation("ends", "", 0.0), runs_max=7, run=lambda _s: Violation("ends", "", 0.0)).runs == 7


def test_a_real_failure_shrinks_is_saved_and_fails_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.generation.digest_of", lambda _ids: None)
    plan = SweepPlan(
        presets=("exact",),
        links=("lte",),
        agents=3,
        tokens=10,
        faults="drop=0.3,reorder",
        settings=("generation.pipeline.block=1",),
    )
    scenario, violation = next((s, v) for s in map(plan.scenario, range(60)) if (v := attempt(s)) is not None)
    small = shrink(scenario, violation, runs_max=60)
    assert small.violation.name == "source"
    assert len(small.scenario.schedule) < len(scenario.schedule)
    path = tmp_path / "seed.trace"
    failed = save(path, small.scenario)
    assert str(failed) == str(small.violation)
    assert scenario_of(path) == small.scenario
    assert str(attempt(scenario_of(path))) == str(small.violation)
    trace = read(path)
    assert trace.header.source == SOURCE
    assert trace.header.facts["violation"]["name"] == "source"
    records = list(trace)
    assert [r.at_s for r in records] == sorted(r.at_s for r in records)
    assert {r.direction for r in records} >= {"up", "down"}
    assert any(r.topic.startswith("fedhlm/1/cloud/verify/") for r in records)


def test_a_recording_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.trace"
    with Writer(path, Header(created_ms=0, source="mqtt://home")):
        pass
    with pytest.raises(TraceError, match="holds no scenario"):
        scenario_of(path)
    wrong = tmp_path / "wrong.trace"
    with Writer(wrong, Header(created_ms=0, source=SOURCE, facts={"scenario": {"seed": "three"}})):
        pass
    with pytest.raises(TraceError, match="its scenario cannot be used here"):
        scenario_of(wrong)
