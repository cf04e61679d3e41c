"""Whole fleets under faults: every committed text is the oracle's, and a failing seed says how to run it again."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from cloud_verifier.batching import Output
from cloud_verifier.sessions import Admission, Key, Sessions
from fedhlm.config import presets
from fedhlm.messages import Escalation
from lab import toy
from lab.simulator import Outcome, Scenario, Violation, main, simulate

SEEDS = 300
CHUNK = 20


def run(first: int, *, seeds: int = CHUNK, **options: Any) -> Counter[str]:
    total: Counter[str] = Counter()
    for seed in range(first, first + seeds):
        outcome = simulate(Scenario(seed=seed, **options))
        total.update(outcome.tokens)
        total.update({"rollbacks": outcome.rollbacks, "reprimes": outcome.reprimes, "faults": outcome.faults.total()})
    return total


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_exact_text_survives_every_fault_schedule(first: int) -> None:
    total = run(first, temperature=0.0 if first % 40 else 0.8)
    assert total["cloud"] == sum(total[s] for s in ("cloud", "local", "unverified", "peer", "neighbour"))
    assert total["rollbacks"] > CHUNK
    assert total["reprimes"] > CHUNK
    assert total["faults"] > CHUNK


@pytest.mark.parametrize("preset", sorted(presets()))
@pytest.mark.parametrize("deadline_s", [2.0, 600.0])
def test_every_preset_keeps_its_word_with_short_and_long_deadlines(preset: str, deadline_s: float) -> None:
    total = run(1_000, seeds=8, preset=preset, deadline_s=deadline_s)
    assert total["local" if preset == "slm-only" else "cloud"] > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_trees_survive_every_fault_schedule_too(temperature: float) -> None:
    settings = ("generation.pipeline.kind=tree", "generation.pipeline.nodes=12")
    total = run(2_000, temperature=temperature, settings=settings)
    assert total["cloud"] == sum(total[s] for s in ("cloud", "local", "unverified", "peer", "neighbour"))
    assert total["rollbacks"] > CHUNK


def test_one_seed_is_one_run() -> None:
    assert simulate(Scenario(seed=5)) == simulate(Scenario(seed=5))
    assert simulate(Scenario(seed=5)).texts != simulate(Scenario(seed=6)).texts


def test_calm_weather_needs_no_retry_and_leaves_nothing_unverified() -> None:
    outcome: Outcome = simulate(Scenario(seed=1, faults=False))
    assert set(outcome.tokens) == {"cloud"}


def test_a_wrong_cloud_is_caught_with_the_command_that_replays_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = toy.large_forward

    async def crooked(requests: Sequence[tuple[Any, list[int]]], *, step_s: float = 0.02) -> list[Output]:
        return [o._replace(logits=-o.logits) for o in await honest(requests, step_s=step_s)]

    monkeypatch.setattr(toy, "large_forward", crooked)
    assert main(["--seeds", "3", "--calm"]) == 1
    printed = capsys.readouterr().err
    assert "expected after" in printed
    assert "python -m lab.simulator --preset exact" in printed
    assert "--seeds 3" in printed


def test_a_cloud_that_answers_behind_a_rejection_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Sessions._admit

    def careless(self: Sessions, key: Key, escalation: Escalation) -> Admission:
        entry = self.entry(key)
        if entry is not None:
            entry.state.rejected_at = None
        return honest(self, key, escalation)

    monkeypatch.setattr(Sessions, "_admit", careless)
    with pytest.raises(Violation):
        run(0, seeds=SEEDS)
