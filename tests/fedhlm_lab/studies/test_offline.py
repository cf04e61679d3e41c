"""Offline runs: what a device does on recorded texts is counted right, and recordings are read back."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_agent.learner import Learner
from fedhlm.config import load
from fedhlm_lab.studies.offline import run, show
from fedhlm_lab.studies.recorded import RecordedText, load_or_record


def texts(count: int, length: int, seed: int = 0) -> list[RecordedText]:
    """Texts whose drafts are wrong with a probability of the doubt squared."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        doubts = rng.random(length) ** 2
        wrong = rng.random(length) < doubts**2
        found.append(
            RecordedText(
                prompt=3, target=[1] * length, drafts=[1 + int(w) for w in wrong], doubts=doubts.tolist(),
                right=(True, not wrong[0]) if length == 1 else None,
            )
        )  # fmt: skip
    return found


@pytest.mark.parametrize("length", [1, 12])
def test_a_fixed_threshold_keeps_exactly_the_tokens_below_it(length: int) -> None:
    config = load(
        preset="budget", environ={},
        flags={"generation.peers": "none", "generation.threshold": "fixed", "generation.tau": "0.3",
               "generation.pipeline.block": "1", "generation.pipeline.window": "1", "generation.pipeline.bonus": "false"},
    ).config  # fmt: skip
    given = texts(200, length)
    rows, certificate = run(
        given, config.generation, 0.0, learners=[Learner(config.federation, np.random.default_rng(0))]
    )
    doubts = np.concatenate([text.doubts for text in given])
    harms = np.concatenate([text.harms for text in given])
    assert sum(row.tokens for row in rows) == doubts.size == certificate.tokens
    assert sum(row.kept for row in rows) == (doubts <= 0.3).sum()
    assert sum(row.wrong for row in rows) == harms[doubts <= 0.3].sum()
    assert sum(row.blocks for row in rows) == (doubts > 0.3).sum()
    line = show(rows, given, certificate, 0.95)
    assert f"kept {(doubts <= 0.3).mean():.4f}" in line
    assert ("answers" in line) == (length == 1)


def test_a_fleet_learns_to_keep_and_stays_within_its_budget() -> None:
    config = load(preset="budget", environ={}, flags={"generation.peers": "none"}).config
    given = texts(400, 12)
    learners = [Learner(config.federation, np.random.default_rng(place)) for place in range(2)]
    rows, certificate = run(given, config.generation, 0.0, learners=learners)
    assert rows[0].kept == 0
    late = rows[200:]
    tokens = sum(row.tokens for row in late)
    assert sum(row.kept for row in late) > 0.2 * tokens
    assert sum(row.wrong for row in late) < config.generation.budget * tokens
    assert certificate.limit(0.95) > sum(row.wrong for row in rows) / sum(row.tokens for row in rows)
    assert all(learner.cluster for learner in learners)


def test_a_recording_is_read_back_without_the_models(tmp_path: Path) -> None:
    given = texts(5, 2)
    (tmp_path / "texts.json").write_bytes(msgspec.json.encode(given))

    class Task:
        prompt = (1, 2, 3)

    found = load_or_record(tmp_path / "texts.json", [Task()] * 5, None, None, "gumbel")  # type: ignore[list-item,arg-type]
    assert found == given
